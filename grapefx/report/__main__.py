"""Runs ``grapefx-inspect`` as ``python -m grapefx.report``."""

import sys

from grapefx.report.cli import main

sys.exit(main())
