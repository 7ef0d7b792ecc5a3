"""The scripts for several processes run under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):  # pragma: no cover
    pytest.skip("torch was built without gloo", allow_module_level=True)

pytestmark = pytest.mark.slow  # processes that import torch
ROOT = Path(__file__).parent.parent.parent


def torchrun(*command: str) -> str:
    """What a command prints in two processes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
           "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, *command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", ["train_stages.py", "train_ddp.py"])
def test_examples_train(script: str, tmp_path: Path) -> None:
    args = ["--epochs", "2", "--steps", "12", "--backend", "eager"]
    if script == "train_stages.py":
        args += ["--checkpoint", str(tmp_path / "saved")]
    out = torchrun(f"examples/{script}", *args)
    first, last = (float(x) for x in re.findall(r"loss of the last step ([\d.]+)", out))
    assert last < first
    if script == "train_stages.py":
        assert "rank 0: stage 0 of 2" in out and (tmp_path / "saved" / ".metadata").exists()


def test_the_benchmark_runs(tmp_path: Path) -> None:
    page = tmp_path / "stages.md"
    out = torchrun(
        "-m", "tools.bench_stages", "--models", "mlp16x1024", "--microbatches", "1",
        "--rounds", "3", "--backend", "eager", "--page", str(page),
    )  # fmt: skip
    assert "| grapefx dfa, M=1 |" in out and "| torch GPipe, M=1 |" in page.read_text()
