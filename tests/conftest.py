"""Which modules run behind ``make test-all`` only: they are long, the rest is `make test`."""

from __future__ import annotations

import pytest

# Every operator of torch's own database; random models; scripts that train;
# planted regressions.
LONG = ("test_rules_opinfo.py", "test_random_models.py", "test_scripts.py", "test_demo.py",
        "test_experiments.py", "test_reproduce.py", "test_perf_gate.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is long as slow."""
    for item in items:
        if item.path.name in LONG:
            item.add_marker(pytest.mark.slow)
