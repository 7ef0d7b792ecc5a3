"""Commands for developers of grapefx; each runs as ``python -m tools.NAME`` from the repository.

``tools/README.md`` lists them. Nothing here is part of the installed package.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
