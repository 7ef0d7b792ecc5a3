"""``python -m grapefx``: versions, devices, and what works here; for bug reports."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterator

import torch

import grapefx
from grapefx.methods import names

INTEGRATIONS = {
    "lightning": ("lightning",),
    "huggingface": ("transformers", "accelerate"),
    "accelerate": ("accelerate",),
}


def main() -> int:
    """Print the facts, a line each; always 0."""
    for label, fact in facts():
        print(f"{label:<13} {fact}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Pairs of a label and what is found."""
    yield "grapefx", f"{grapefx.__version__} ({grapefx.__path__[0]})"
    yield "torch", f"{torch.__version__} ({_supported('torch')})"
    yield "Python", f"{platform.python_version()} ({_supported('Python')})"
    yield "system", f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    yield "device", _device()
    yield "backends", f"eager; inductor ({_compiler()})"
    yield "methods", ", ".join(names())
    for name, packages in INTEGRATIONS.items():
        found = [(p, _version(p)) for p in packages]
        lacking = any(v is None for _, v in found)
        said = ", ".join(f"{p} {v or 'is not installed'}" for p, v in found)
        yield f"  {name}", said + (f": pip install 'grapefx[{name}]'" if lacking else "")


def _supported(package: str) -> str:
    """The versions that grapefx's own metadata asks for."""
    try:
        found = importlib.metadata.metadata("grapefx")
    except importlib.metadata.PackageNotFoundError:
        return "grapefx runs from its source and is not installed"
    if package == "Python":
        return f"supported: {found['Requires-Python']}"
    wanted = found.get_all("Requires-Dist") or ()
    needed = next(r for r in wanted if re.match(rf"{package}\b", r))
    least, have = (_numbers(text) for text in (needed, _version(package) or ""))
    range_ = needed.removeprefix(package).strip(" ()")
    return f"supported: {range_}" + ("; this one is NOT" if have < least else "")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    name = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{kind}{name}; cpu"


def _compiler() -> str:
    found = next((c for c in ("c++", "g++", "clang++", "cl") if shutil.which(c)), None)
    return f"C++ compiler: {found}" if found else "no C++ compiler found, which a CPU needs"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main())
