"""Old name of ``grapefx.report.inspect``."""

from grapefx.report.inspect import explain

__all__ = ["explain"]
