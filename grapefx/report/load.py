"""Finds the model and the example input that a command line names: a file, a module, a zoo.

Everything is built on the meta device, which allocates nothing. A file or factory that cannot work
without numbers is run once more for real.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect as pyinspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grapefx.errors import GrapefxError, nearest

USUAL = ("model", "net", "make_model", "build_model", "get_model")
EXAMPLES = ("example_inputs", "example_input", "example_input_array")
# sample shapes for which a zoo's builders are made
ZOO_SHAPES = {"inception_v3": (3, 299, 299)}
ZOO_BATCH = 32


class ModelError(GrapefxError):
    """The model cannot be found or built. ``report`` is what to print before the message."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(message)
        self.report = report


class UsageError(GrapefxError):
    """The command line asks for something that cannot be."""


@dataclass(frozen=True)
class Loaded:
    """A model, its name, and the example that its author left (None: none)."""

    model: nn.Module
    name: str
    example: Any = None
    note: str = ""


def load(target: str, model: str | None = None, *, real: bool = False) -> Loaded:
    """The model that ``target`` names: ``file.py``, ``torchvision:NAME`` or ``module:factory``.

    ``model`` names the attribute of a file. With ``real`` nothing is tried on the meta device.

    Raises:
        UsageError: no such file, module or name.
        ModelError: the code raises, or holds no model, or several.
    """
    source, _, name = target.partition(":")
    if source == "torchvision" and name:
        return _twice(lambda: _torchvision(name), real)
    path = Path(source)
    if source.endswith(".py") or path.is_file():
        if not path.is_file():
            raise UsageError(f"no such file: {source}")
        return _twice(lambda: _file(path, model or name or None), real)
    if not name and not model:
        raise UsageError(
            f"{target!r} is neither a file nor 'module.path:factory' nor 'torchvision:NAME'"
        )
    return _twice(lambda: _module(source, model or name), real)


def _twice(build: Callable[[], Loaded], real: bool) -> Loaded:
    """Build without memory, and for real where that fails."""
    if not real:
        try:
            with torch.device("meta"):
                return build()
        except ModelError as e:
            if not e.report:  # nothing raised: it is the choice that fails
                raise
    found = build()
    if real:
        return found
    note = "the model could not be built without its weights, so they were allocated"
    return Loaded(found.model, found.name, found.example, note)


# where models are


def _torchvision(name: str) -> Loaded:
    try:
        from torchvision import models
    except ImportError:
        raise UsageError("torchvision is not installed: pip install torchvision") from None
    names = models.list_models()
    if name not in names:
        close = nearest(name, names).split(" Valid:")[0]
        raise UsageError(f"torchvision has no model {name!r}.{close}")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in pyinspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if "init_weights" in pyinspect.signature(builder).parameters:
        options["init_weights"] = False
    with _theirs(f"torchvision:{name}"):
        model = builder(**options)
    example = None
    if builder.__module__.startswith("torchvision.models.") and builder.__module__.count(".") == 2:
        example = torch.empty(ZOO_BATCH, *ZOO_SHAPES.get(name, (3, 224, 224)))
    return Loaded(model, name, example)


def _module(name: str, factory: str) -> Loaded:
    sys.path.insert(0, "")
    try:
        with _theirs(name):
            module = importlib.import_module(name)
    except ModelError as e:
        missing = e.__cause__.name if isinstance(e.__cause__, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UsageError(f"no module named {missing!r}") from None
        raise
    finally:
        sys.path.remove("")
    return _chosen(module, factory, f"{name}:{factory}")


def _file(path: Path, name: str | None) -> Loaded:
    module = _imported(path)
    chosen = name or _only(module, path)
    return _chosen(module, chosen, path.stem if chosen in USUAL else f"{path.stem}: {chosen}")


def _imported(path: Path) -> types.ModuleType:
    """Run a file as a module of its own name, with its folder on the path, as a script has it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    folder, arguments = str(path.resolve().parent), sys.argv
    sys.path.insert(0, folder)
    sys.argv = [str(path)]
    shadowed = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickles look classes up by module
    try:
        with _theirs(str(path)):
            spec.loader.exec_module(module)
    finally:
        sys.argv = arguments
        sys.path.remove(folder)
        if shadowed is not None:
            sys.modules[path.stem] = shadowed
    return module


# what is a model


def _only(module: types.ModuleType, path: Path) -> str:
    """The name of the one model in a file."""
    instances = {n: v for n, v in _public(module) if isinstance(v, nn.Module)}
    distinct = {id(v): n for n, v in reversed(list(instances.items()))}
    names = [n for n in USUAL if n in instances]
    if len(distinct) == 1 or names:
        return names[0] if names else next(iter(distinct.values()))
    if distinct:
        raise ModelError(_several(path, sorted(distinct.values()), "models"))
    usual = [n for n in USUAL if _callable_alone(getattr(module, n, None))]
    if usual:
        return usual[0]
    classes = {n: v for n, v in _public(module) if _own_class(v, module)}
    alone = [n for n, v in classes.items() if _callable_alone(v)]
    if len(alone) == 1:
        return alone[0]
    if alone:
        raise ModelError(_several(path, alone, "model classes"))
    found = [f"{n}{pyinspect.signature(v)} (a class with arguments)" for n, v in classes.items()]
    found += [
        f"{n}{pyinspect.signature(v)} (a function: --model {n} calls it)"
        for n, v in _public(module)
        if isinstance(v, types.FunctionType) and v.__module__ == module.__name__
    ]
    listed = "".join(f"\n    {f}" for f in found) or " nothing that makes one"
    raise ModelError(
        f"no model in {path}: no nn.Module instance and no nn.Module class without arguments\n"
        f"  found:{listed}\n"
        "  remedy: add `model = MyModel(...)` to the file, or name what makes it with --model"
    )


def _several(path: Path, names: Sequence[str], what: str) -> str:
    return f"{path} has several {what}: {', '.join(names)}\n  remedy: --model {names[0]}"


def _public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    return ((n, v) for n, v in vars(module).items() if not n.startswith("_"))


def _own_class(value: Any, module: types.ModuleType) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
    )


def _callable_alone(value: Any) -> bool:
    """Whether a class or function can be called without arguments."""
    if not (isinstance(value, (type, types.FunctionType))):
        return False
    try:
        pyinspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True


def _chosen(module: types.ModuleType, name: str, shown: str) -> Loaded:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            names = [n for n, _ in _public(module)]
            raise UsageError(f"{module.__name__} has no {name!r}.{nearest(name, names)}")
        value = getattr(value, part)
    if not isinstance(value, nn.Module):
        if not callable(value):
            raise UsageError(f"{name!r} is a {type(value).__name__}, not a model or what makes one")
        with _theirs(f"{name}()"):
            value = value()
    if not isinstance(value, nn.Module):
        raise ModelError(f"{name}() returns a {type(value).__name__}, not an nn.Module")
    example = _example(module, value)
    return Loaded(value, shown, example)


def _example(module: types.ModuleType, model: nn.Module) -> Any:
    for holder in (module, model):
        for name in EXAMPLES:
            found = getattr(holder, name, None)
            if found is None:
                continue
            if callable(found) and not isinstance(found, torch.Tensor):
                with _theirs(f"{name}()"):
                    found = found()
            return found
    return None


# other people's code


@contextlib.contextmanager
def _theirs(what: str) -> Iterator[None]:
    """Run the user's code: what it raises is shown from its own first line on."""
    try:
        yield
    except GrapefxError:
        raise
    except KeyboardInterrupt:
        raise
    except SystemExit as e:
        raise ModelError(
            f"{what} exits on import (code {e.code})\n"
            "  remedy: put what only a script should do under `if __name__ == '__main__':`",
            " ",
        ) from e
    except BaseException as e:
        raise ModelError(f"{what} raised {type(e).__name__} (above)", _their_traceback(e)) from e


def _their_traceback(error: BaseException) -> str:
    """The traceback without our frames and the import machinery's above the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next(
        (
            i
            for i, f in enumerate(frames)
            if not f.filename.startswith("<frozen importlib") and f.filename != __file__
        ),
        None,
    )
    lines = []
    if first is not None:
        shown = frames[first:]
        # torch's own frames at the bottom are part of the user's error; ours at the top are not
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(shown)]
    return "".join([*lines, *traceback.format_exception_only(error)])
