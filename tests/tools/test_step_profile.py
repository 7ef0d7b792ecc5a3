"""Where a step's time goes: the kinds, and a table."""

from __future__ import annotations

from unittest import mock

import pytest

from tools.bench import step_profile


def test_the_kinds() -> None:
    events = [
        ("aten::mm", 1000.0), ("aten::addmm", 500.0), ("aten::convolution_backward", 2000.0),
        ("aten::mkldnn_convolution", 1.0), ("StepBackward", 3000.0),
        ("## Call CompiledFxGraph f2 ##", 4000.0), ("aten::copy_", 7.0), ("detach", 3.0),
    ]  # fmt: skip
    found = step_profile.shares(events)
    assert found == pytest.approx(
        {"convolutions": 2.001, "products": 1.5, "generated": 7.0, "other": 0.01}
    )


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tiny", "--batch", "4", "--rounds", "1", "--variants", "compiled", "dfa"]
    whole = step_profile.measure
    kept = {}

    def measured(*arguments: object) -> object:
        kept.update(whole(*arguments))  # type: ignore[arg-type]
        return kept

    with mock.patch.object(step_profile, "measure", measured):
        assert step_profile.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["compiled", "dfa"]
    for (found,) in kept.values():
        assert found["products"] > 0 and found["generated"] > 0 and found["convolutions"] == 0


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_profile.main(["tiny", "--rounds", "0"])
    assert "1 or more" in capsys.readouterr().err
