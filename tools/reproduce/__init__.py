"""The papers' tables, and our own, trained from configs: ``python -m tools.reproduce``."""
