"""The tool that switches passes off: every one of them is one that runs."""

from __future__ import annotations

import contextlib
import pkgutil
from typing import Any
from unittest import mock

import pytest

from grapefx.options import Options
from grapefx.torch_compat import inductor_counts
from tools.bench import models as bench_models
from tools.bench import what_pays


def test_what_is_switched_off_is_otherwise_called() -> None:
    names = {name for feature in what_pays.FEATURES.values() for name in feature.off}
    called = set()

    def noting(name: str) -> Any:
        real = pkgutil.resolve_name(name)

        def call(*args: Any) -> Any:
            called.add(name)
            return real(*args)

        return call

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(name, noting(name)))
        with inductor_counts():
            bench_models.make("cnn", "grape", 4)()
    assert called == names


def test_options_are_put_back() -> None:
    before = dict(bench_models.VARIANTS)
    for feature in what_pays.FEATURES.values():
        with feature.without("dfa"):
            assert bench_models.VARIANTS["dfa"][0].items() >= feature.options.items()
        assert set(feature.options) <= set(Options.__dataclass_fields__)
    assert before == bench_models.VARIANTS


def test_too_few_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        what_pays.main(["--rounds", "1"])
    assert "quartiles need 2" in capsys.readouterr().err
