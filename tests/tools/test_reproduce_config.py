"""Configs of tables: every one is valid, what is wrong is named, pages are what their cells say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import ROOT
from tools.reproduce import __main__ as reproduce
from tools.reproduce.config import ConfigError, load_config

CONFIGS = sorted((ROOT / "tools" / "reproduce").glob("*.yaml"))
RESULTS = ROOT / "docs" / "results"
PAGES = sorted(
    p for p in RESULTS.glob("*.jsonl") if p.stem.split("+")[0] in {c.stem for c in CONFIGS}
)
SMALL = """
title: small
source: nobody
dataset: mnist
train: 256
test: 100
normalise: half
model: {kind: mlp, depth: 3, width: 16, activation: relu, batch_norm: true}
init: he_uniform
epochs: 3
batch_size: 64
optimizer: {name: adam, lr: 1.0e-3, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.0}
schedule: {name: exponential, gamma: 0.95}
metric: last
alignment_batches: 1
differs: [it is small]
methods:
  bp: {method: bp, options: {calib_every: null}, published: [50.0, 0.1]}
  fdfa: {method: fdfa, options: {optimizer: adam, calib_every: null}, published: [50.0, 40.0]}
  dfa: {method: dfa, options: {calib_every: null}}
  drtp: {method: drtp, options: {calib_every: null}}
  pepita: {method: pepita, options: {calib_every: null}, published: [1.0, null]}
  grape+calibration: {method: grape, options: {calib_every: 1}, note: ours}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.rows and config.differs and config.name == path.stem
    if (
        "subset" in path.stem or "depth" in path.stem
    ):  # a subset's numbers cannot be judged by the full set's
        assert not any(r.published for r in config.rows.values())


def test_the_started_configs_keep_their_hashes() -> None:
    """Long runs were made under these: another hash would refuse to go on."""
    known = {
        "b6_mnist": "e9412d9b6a0d",
        "b6_fashion": "594fa23b01a9",
        "t1_mnist_mlp": "e67825af77a1",
        "t1_mnist_cnn": "62017e3fa9b5",
        "cifar10_subset_cnn": "ea85cd74eeca",
    }
    assert {p.stem: load_config(p).hash for p in CONFIGS if p.stem in known} == known


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 3", "epoch: 3", "unknown key 'epoch'. Did you mean 'epochs'?"),
        ("width: 16", "widht: 16", "unknown key 'widht'. Did you mean 'width'?"),
        ("method: fdfa", "method: fdaf", "Did you mean 'fdfa'?"),
        ("options: {optimizer: adam,", "options: {optimiser: adam,", "Did you mean 'optimizer'?"),
        ("metric: last", "metric: lats", "Did you mean 'last'?"),
        ("metric: last", "metric: last\nloss: bec", "Did you mean 'bce'?"),
        ("batch_size: 64\n", "", "'batch_size' is missing"),
        ("metric: last", "metric: last\nbp_epoch_every: 0", "bp_epoch_every=0 must be a positive"),
    ],
)
def test_unknown_keys_name_the_nearest(small: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    small.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(small)
    assert message in str(caught.value)


def test_a_base_is_inherited_and_set_changes_the_name(small: Path) -> None:
    child = small.with_name("child.yaml")
    child.write_text("base: small.yaml\nmodel: {width: 8}\nmethods: {bp: null, fdfa: {note: x}}\n")
    config = load_config(child)
    assert config.setting["model"]["width"] == 8 and config.setting["model"]["depth"] == 3
    assert "bp" not in config.rows and config.rows["fdfa"].options["calib_every"] is None
    other = load_config(child, ("model.width=16",))
    assert other.name == "child+model.width=16" and other.hash == load_config(small).hash


@pytest.mark.parametrize("cells", PAGES, ids=lambda p: p.stem)
def test_a_page_is_what_its_cells_say(cells: Path, tmp_path: Path) -> None:
    """Also that each cell was trained under the config as it is now."""
    name, *sets = cells.stem.split("+")
    shutil.copy(cells, tmp_path)
    where = ["--runs", str(tmp_path / "none"), "--results", str(tmp_path)]
    chosen = ["--set", *sets] if sets else []
    config = ROOT / "tools" / "reproduce" / f"{name}.yaml"
    assert reproduce.main([str(config), "--table", *where, *chosen]) == 0
    for suffix in (".md", ".jsonl"):
        found = tmp_path / (cells.stem + suffix)
        assert found.read_text() == cells.with_suffix(suffix).read_text()
