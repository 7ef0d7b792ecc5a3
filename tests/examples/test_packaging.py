"""What a user installs: ``passes/`` arrives as ``grapefx.passes``, with real files in the wheel."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from grapefx import __main__ as facts

ROOT = Path(__file__).resolve().parents[2]


def test_passes_is_one_package_under_one_name() -> None:
    link = ROOT / "grapefx" / "passes"
    assert link.is_symlink() and link.readlink() == Path("../passes")
    assert Path(importlib.import_module("grapefx.passes").__file__ or "").parent == link


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it, as for a release."""
    pytest.importorskip("build", reason="needs build")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("grapefx", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_wheel_holds_every_file(built: Path) -> None:
    (wheel,) = built.glob("grapefx-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        f"{prefix}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, prefix in (("grapefx", "grapefx/"), ("passes", "grapefx/passes/"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules and modules <= packed
    templates = {
        f"grapefx/{path.relative_to(ROOT / 'grapefx').as_posix()}"
        for path in (ROOT / "grapefx" / "report" / "render" / "templates").iterdir()
    }
    assert templates and templates <= packed
    assert {"grapefx/py.typed", "grapefx/passes/__init__.py"} <= packed
    assert not [name for name in packed if name.startswith(("passes/", "tests/", "tools/"))]


def test_sdist_is_complete(built: Path) -> None:
    """The wheel above was built from it; beside that it holds what a packager needs."""
    (sdist,) = built.glob("grapefx-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "grapefx/passes/__init__.py"} <= names


def test_the_installed_wheel_runs(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees this one's dependencies but not this checkout."""
    (wheel,) = built.glob("grapefx-*.whl")
    env = tmp_path / "env"
    venv.create(env, with_pip=False, symlinks=True)
    site = next(env.glob("lib/python*/site-packages"))
    target = ["--target", str(site), "--no-deps", "--no-index", "-q"]
    subprocess.run([sys.executable, "-m", "pip", "install", *target, str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # no .pth files of it
    for script in (site / "bin").glob("*"):  # of --target: given to this environment's Python
        lines = script.read_text().splitlines()
        script.write_text("\n".join([f"#!{env}/bin/python", *lines[1:]]))

    def run(*command: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python = str(env / "bin" / "python")
    facts = run(python, "-m", "grapefx")
    assert str(site) in facts and "supported: >=2.11" in facts and torch.__version__ in facts
    assert "usage: grapefx-inspect" in run(str(site / "bin" / "grapefx-inspect"), "--help")
    model = tmp_path / "model.py"
    model.write_text(
        "import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), "
        "torch.nn.Linear(8, 2))\nexample_inputs = torch.zeros(3, 4)\n"
    )
    page = tmp_path / "report.html"
    run(str(site / "bin" / "grapefx-inspect"), str(model), "-o", str(page))
    assert "</html>" in page.read_text()


def test_facts_name_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        importlib.metadata.metadata("grapefx")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("grapefx runs from its source: the package is not installed")
    have = {"transformers": "5.0", "accelerate": None, "lightning": None, "torch": "2.9.1"}
    monkeypatch.setattr(facts, "_version", have.get)
    assert facts.main() == 0
    out = capsys.readouterr().out
    assert "accelerate is not installed: pip install 'grapefx[huggingface]'" in out
    assert "supported: >=2.11; this one is NOT" in out


def test_oldest_torch_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [d for d in project["dependencies"] if d.startswith("torch")]
    oldest = re.search(r'^OLDEST = "(.+)"$', (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert oldest and needed == f"torch>={oldest[1]}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["versions"]["strategy"]["matrix"]["session"] == ["oldest", "newest"]


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == version
