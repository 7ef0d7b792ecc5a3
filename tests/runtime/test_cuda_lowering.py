"""Our graphs lowered for CUDA, on a machine without a GPU: ``tools.cuda_lowering``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = [
    ("cnn", "fdfa"), ("resnet", "grape"), ("layers", "dfa"), ("layers", "grape"),
    ("blocks", "grape"), ("mlp", "bp"),
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own; skips where it cannot work."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.cuda_lowering", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    reason = done.stderr.strip().splitlines()[-1:]
    if done.returncode == 2 and reason[0].startswith("cuda_lowering: "):  # argparse exits 2, too
        pytest.skip(reason[0])
    return done


@pytest.mark.parametrize(
    ("net", "method"),
    [("mlp", "grape"), *(pytest.param(*c, marks=pytest.mark.slow) for c in LONG)],
)
def test_what_inductor_makes_for_cuda_computes_the_same(net: str, method: str) -> None:
    """Every form, kernels run by Triton's interpreter, against uncompiled graphs."""
    done = run("--check", "--nets", net, "--methods", method)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, [r for r in rows if not r["ok"]] or done.stderr[-2000:]
    forms = {r["form"] for r in rows}
    assert forms == ({"off"} if method == "bp" else {"off", "graphs", "horizontal", "streams"})


@pytest.mark.slow
def test_layers_together_are_few_launches(tmp_path: Path) -> None:
    """The update of twice the depth: twice the launches one by one, nearly the same batched."""
    out = tmp_path / "launches.md"
    done = run("--depths", "2", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    grown = {
        (points, variant): float(last)
        for points, variant, *_, last in (
            [c.strip() for c in line.strip("|").split("|")]
            for line in out.read_text().splitlines()
            if line.startswith(("| micro", "| macro"))
        )
    }
    assert len(grown) == 10
    for (_, variant), growth in grown.items():
        assert growth < 1.2 if variant.endswith("horizontal") else growth > 1.6, (variant, growth)
