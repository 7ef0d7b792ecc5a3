"""The tool that switches passes off: every one of them is one that runs."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from grapefx.options import Options
from grapefx.torch_compat import inductor_counts
from tools.bench import models as bench_models
from tools.bench import what_pays


def test_what_is_switched_off_is_otherwise_run() -> None:
    """Each name is a pass that runs in a compiled step, and does not where it is left out."""
    for feature in what_pays.FEATURES.values():
        if not feature.off:
            continue
        for left_out in (False, True):
            with contextlib.ExitStack() as stack:
                stack.enter_context(inductor_counts())
                if left_out:
                    stack.enter_context(feature.without("grape"))
                step = bench_models.make("cnn", "grape", 4)
                step()
                net: Any = step.net
            ran = {run.name for runs in net._captures.lowered().values() for run in runs}
            ran |= {run.name for runs in net.plan.passes.values() for run in runs}
            assert (feature.off in ran) != left_out, feature.off


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
