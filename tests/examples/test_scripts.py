"""The example scripts run as they are and learn something."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch

import grapefx
from examples import train_classifier, train_lm

EXAMPLES = Path(train_classifier.__file__).parent


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' own call, but graphs are interpreted: what is tested is the script."""
    eager = functools.partial(grapefx.compile, backend="eager")
    monkeypatch.setattr(grapefx, "compile", eager)


def run(main: object, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    assert callable(main)
    monkeypatch.setattr(sys, "argv", ["script", *args])
    main()


def test_classifier_stays_short() -> None:
    assert len((EXAMPLES / "train_classifier.py").read_text().splitlines()) < 140


@pytest.mark.parametrize(
    ("model", "method", "calib"),
    [("mlp", "grape", "1"), ("cnn", "dfa", "never"), ("cnn", "fdfa", "1"), ("mlp", "bp", "1")],
)
def test_classifier_learns(
    model: str,
    method: str,
    calib: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--model", model, "--method", method, "--calib-every", calib, "--epochs", "1"]
    run(train_classifier.main, monkeypatch, *args, "--lr", "1e-3")
    out = capsys.readouterr().out
    found = re.search(r"accuracy ([\d.]+) %", out)
    assert found and float(found[1]) > 25  # chance is 10
    assert ("cos_jacobian" in out) == (method in {"grape", "fdfa"})


def test_lm_learns_and_samples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--steps", "60", "--epoch-steps", "30", "--dim", "32", "--depth", "2"]
    args += ["--context", "16", "--lr", "1e-2", "--sample", "50"]
    run(train_lm.main, monkeypatch, *args)
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"validation loss ([\d.]+)", out)]
    assert len(losses) == 2
    assert losses[-1] < 3.4  # a uniform guess among 65 characters costs 4.17 nats
    assert len(out.splitlines()[-1]) > 0 or len(out) > 100


def test_lm_is_causal() -> None:
    torch.manual_seed(0)
    model = train_lm.CharTransformer(vocab=11, context=8, dim=16, heads=4, depth=2).eval()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 11
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_lm_targets_are_one_character_later() -> None:
    text = torch.arange(100)
    x, y = train_lm.windows(text, torch.tensor([3, 50]), context=4)
    assert x.tolist() == [[3, 4, 5, 6], [50, 51, 52, 53]]
    assert torch.equal(y, x + 1)


def test_lm_sample_continues_the_prompt() -> None:
    torch.manual_seed(0)
    model = train_lm.CharTransformer(vocab=11, context=8, dim=16, heads=4, depth=1).eval()
    prompt = torch.tensor([1, 2, 3])
    written = train_lm.sample(model, prompt, length=20, temperature=1.0)
    assert written[:3].tolist() == [1, 2, 3] and len(written) == 23
