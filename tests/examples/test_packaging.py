"""What a user installs: ``passes/`` arrives as ``grapefx.passes``, with real files in the wheel."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_passes_is_one_package_under_one_name() -> None:
    link = ROOT / "grapefx" / "passes"
    assert link.is_symlink() and link.readlink() == Path("../passes")
    assert Path(importlib.import_module("grapefx.passes").__file__ or "").parent == link


def test_wheel_holds_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("grapefx", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-q", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("grapefx-*.whl")
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


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == version
