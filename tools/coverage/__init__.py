"""Which published architectures work: ``python -m tools.coverage``."""
