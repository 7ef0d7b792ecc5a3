"""Implements the command ``grapefx-inspect``: the report on a model, from the command line.

``python -m grapefx.report`` is the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grapefx.errors import GrapefxError, InputError, OptionError
from grapefx.methods import names
from grapefx.options import OPTIONS
from grapefx.report.inspect import METHODS, build_plans, report_plans, shown_dag
from grapefx.report.load import Loaded, ModelError, UsageError, load
from grapefx.report.render.dot import dot_source, drawn, write_graph
from grapefx.report.stages import stages_text
from grapefx.torch_compat import pytree

FORMATS = ("text", "json", "html", "dot", "svg", "png")
SUFFIXES = {".txt": "text", ".json": "json", ".html": "html", ".htm": "html"} | {
    f".{f}": f for f in ("dot", "svg", "png")
}
OK, MODEL_PROBLEM, USAGE = 0, 1, 2

EPILOG = """\
a model file:
  Importing a model file RUNS it (as `python FILE` would, but with __name__ other than
  '__main__'); where it needs numbers, it is run a second time with real weights. The model is
  the nn.Module instance at the top level of the file, or the one class or function that can be
  called without arguments; --model names it where there are several. The example input is
  `example_inputs` in the file (a tensor, a tuple of arguments, a dict of keyword arguments, or a
  function that returns one), else --input-shape.

examples:
  grapefx-inspect model.py
  grapefx-inspect model.py --model Net --input-shape 128x784
  grapefx-inspect torchvision:resnet50 --batch 64 --device-model h100 -o resnet50.html
  grapefx-inspect my.package.models:build --input-shape 8x256 --dtype int64 --granularity block
  grapefx-inspect model.py --method bp --method grape --tangent-fraction 0.125 --format json
  grapefx-inspect model.py --calib-every 1 --steps-per-epoch 390 --workers 1,2,inf
  grapefx-inspect model.py --method grape -o graph.svg
  grapefx-inspect model.py --stages 4 --microbatches 4 --batch 64

exit codes: 0 done, 1 the model is the problem, 2 the command line is
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else USAGE
    try:
        return _run(options)
    except ModelError as e:
        if e.report.strip():
            print(e.report.rstrip(), file=sys.stderr)
        return _fail(str(e), MODEL_PROBLEM)
    except (UsageError, OptionError) as e:
        return _fail(str(e), USAGE)
    except GrapefxError as e:
        return _fail(str(e), MODEL_PROBLEM)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"grapefx-inspect: {message}", file=sys.stderr)
    return code


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


# options of ``grapefx.compile`` that the report depends on, and how they are written
STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "granularity": {"choices": OPTIONS["granularity"].metadata["values"].words},
    "points": {"action": "append", "metavar": "GLOB"},
    "error_at": {"metavar": "GLOB"},
    "feedback": {"metavar": "KIND"},
    "tangent_fraction": {"type": float, "metavar": "F"},
    "align_every": {"type": _positive, "metavar": "K"},
    "calib_every": {
        "type": _positive,
        "metavar": "T",
        "default": None,
        "help": "one full backward step every T epochs (default: none is counted)",
    },
    "steps_per_epoch": {"type": _positive, "metavar": "N"},
}


def _add_step_options(s: Any) -> None:
    for name, more in STEP_OPTIONS.items():
        field = OPTIONS[name]
        meaning = field.metadata["meaning"].replace("``", "").replace("%", "%%")
        s.add_argument(
            "--" + name.replace("_", "-"), **{"default": field.default, "help": meaning, **more}
        )


def _add_machine_options(d: Any) -> None:
    d.add_argument(
        "--device-model",
        default="cpu-2core",
        metavar="NAME|FILE.yaml",
        help="cpu-2core (default), a100, h100, h200, or a YAML file",
    )
    d.add_argument(
        "--workers",
        type=_workers,
        default=(1, 2, 4, 8, None),
        metavar="1,2,4,8,inf",
        help="numbers of workers to schedule for",
    )
    d.add_argument(
        "--stages",
        type=_positive,
        metavar="P",
        help="instead of the report: the model in P stages on P devices, and what a step takes",
    )
    d.add_argument(
        "--microbatches", type=_positive, default=1, metavar="M", help="of a batch, with --stages"
    )


def _add_report_options(o: Any) -> None:
    o.add_argument(
        "--format",
        choices=FORMATS,
        help="text by default, or what -o ends in; dot, svg and png draw the graph of the last "
        "method asked for",
    )
    o.add_argument("-o", "--output", metavar="FILE", help="write there instead of to stdout")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="grapefx-inspect",
        description="Shows what waits for what in a training step of a model, and what the "
        "critical path costs, for backpropagation and for methods without a backward chain. "
        "Nothing is trained and no weights are allocated.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "target",
        metavar="MODEL",
        help="FILE.py (importing it runs it), module.path:factory, or torchvision:NAME",
    )
    m = p.add_argument_group("the model")
    m.add_argument("--model", metavar="NAME", help="the instance, class or function in the file")
    m.add_argument(
        "--input-shape",
        action="append",
        metavar="NxCxHxW",
        help="an example input's shape, batch first; once for each input",
    )
    m.add_argument(
        "--dtype",
        action="append",
        metavar="DTYPE",
        help="its dtype (float32 by default; int64 for tokens); once, or once for each input",
    )
    m.add_argument("--batch", type=_positive, metavar="N", help="report for this batch size")
    m.add_argument(
        "--eval", action="store_true", help="trace in eval mode (frozen norms, no dropout)"
    )
    s = p.add_argument_group("the step")
    s.add_argument(
        "--method",
        action="append",
        choices=names(),
        help="repeatable (default: bp, dfa, grape; bp is always there to compare with)",
    )
    _add_step_options(s)
    _add_machine_options(p.add_argument_group("the machine"))
    _add_report_options(p.add_argument_group("the report"))
    return p


def _workers(text: str) -> tuple[int | None, ...]:
    return tuple(
        None if part.strip() in ("inf", "\u221e") else _positive(part) for part in text.split(",")
    )


def _run(options: argparse.Namespace) -> int:
    form = _format(options)
    target = _writable(options.output)
    shapes, dtypes = _shapes(options)
    # what the user's code and torch print must not get between the report's lines
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = _inspected(options, form, shapes, dtypes)
    return _write(result, form, target)


def _inspected(options: argparse.Namespace, form: str, shapes: Any, dtypes: Any) -> Any:
    loaded = load(options.target, options.model)
    try:
        return _result(loaded, options, form, shapes, dtypes)
    except GrapefxError as e:
        # an attribute that is neither parameter nor buffer stays where it was made
        if loaded.note or "meta" not in str(e):
            raise
    loaded = load(options.target, options.model, real=True)
    return _result(loaded, options, form, shapes, dtypes)


def _result(
    loaded: Loaded, options: argparse.Namespace, form: str, shapes: Any, dtypes: Any
) -> Any:
    model = loaded.model
    if not loaded.note:
        model = model.to("meta")
    model.train(not options.eval)
    example = _example(loaded, shapes, dtypes, options.batch)
    plans = build_plans(
        model,
        example,
        options.method or METHODS,
        granularity=options.granularity,
        points=options.points,
        error_at=options.error_at,
        feedback=options.feedback,
        tangent_fraction=options.tangent_fraction,
        align_every=options.align_every,
        calib_every=options.calib_every,
    )
    if options.stages:
        if form != "text":
            raise UsageError(f"--stages gives text, not {form}")
        return stages_text(
            plans,
            options.stages,
            options.microbatches,
            options.batch,
            options.device_model,
            loaded.name,
        )
    if form in ("dot", "svg", "png"):
        chosen = options.method[-1] if options.method else plans[-1].method.name
        plan = next(p for p in plans if p.method.name == chosen)
        kind, dag = shown_dag(plan, options.device_model, options.batch)
        return dot_source(dag, f"{loaded.name}: {chosen}, {kind} step")
    report = report_plans(
        plans,
        device=options.device_model,
        workers=options.workers,
        batch=options.batch,
        calib_every=options.calib_every,
        steps_per_epoch=options.steps_per_epoch,
        name=loaded.name,
    )
    return report.noting(loaded.note) if loaded.note else report


# the example input


def _shapes(options: argparse.Namespace) -> tuple[list[tuple[int, ...]], list[torch.dtype]]:
    shapes = []
    for text in options.input_shape or ():
        try:
            shape = tuple(int(part) for part in text.replace(",", "x").split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise UsageError(f"--input-shape {text!r} is not of the form 1x3x224x224")
        shapes.append(shape)
    dtypes = []
    for text in options.dtype or ():
        dtype = getattr(torch, text.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"--dtype {text!r} is not a torch dtype (float32, int64, ...)")
        dtypes.append(dtype)
    if len(dtypes) > 1 and len(dtypes) != len(shapes):
        raise UsageError(f"{len(dtypes)} --dtype for {len(shapes)} --input-shape")
    return shapes, dtypes


def _example(loaded: Loaded, shapes: Any, dtypes: Any, batch: int | None) -> Any:
    device = torch.device("cpu" if loaded.note else "meta")
    if shapes:
        kinds = list(dtypes) or [torch.float32]
        kinds = kinds * len(shapes) if len(kinds) == 1 else kinds
        first = shapes[0][0]
        sized = [(batch or s[0], *s[1:]) if s[0] == first else s for s in shapes]
        return tuple(
            torch.zeros(s, dtype=k, device=device) for s, k in zip(sized, kinds, strict=True)
        )
    if loaded.example is None:
        raise ModelError(
            "no example input\n"
            "  remedy: --input-shape 32x3x224x224 (and --dtype int64 for tokens), or a line "
            "`example_inputs = torch.randn(...)` in the file"
        )
    return _moved(loaded.example, device, batch)


def _moved(example: Any, device: torch.device, batch: int | None) -> Any:
    """The example on the model's device, at the batch size asked for."""
    leaves = [t for t in pytree.tree_leaves(example) if isinstance(t, torch.Tensor) and t.ndim]
    if not leaves:
        raise InputError("the example input holds no tensor with a batch dim")
    first = leaves[0].shape[0]

    def move(t: torch.Tensor) -> torch.Tensor:
        t = t.detach()
        if batch and t.ndim and t.shape[0] == first:
            t = t.new_zeros((batch, *t.shape[1:]))
        return t.to(device)

    return pytree.tree_map_only(torch.Tensor, move, example)


# the result


def _format(options: argparse.Namespace) -> str:
    if options.format:
        form = str(options.format)
    elif options.output:
        form = SUFFIXES.get(Path(options.output).suffix.lower(), "text")
    else:
        form = "text"
    if form == "png" and not options.output:
        raise UsageError("--format png needs -o FILE")
    return form


def _writable(output: str | None) -> Path | None:
    """The output file, checked before the long part begins."""
    if not output:
        return None
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"cannot write {output}: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {output}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {output}: permission denied")
    return path


def _write(result: Any, form: str, path: Path | None) -> int:
    try:
        if form in ("dot", "svg", "png"):
            if path is None:
                print(drawn(result, form), end="")
            else:
                write_graph(result, path, form)
        else:
            made = result if isinstance(result, str) else getattr(result, form)
            text = made if isinstance(made, str) else made()
            if path is None:
                sys.stdout.write(text if text.endswith("\n") else text + "\n")
            else:
                path.write_text(text, encoding="utf-8")
    except BrokenPipeError:
        sys.stderr.close()
        return OK
    except OSError as e:
        raise UsageError(f"cannot write {path or 'stdout'}: {e.strerror or e}") from None
    if path is not None:
        print(f"grapefx-inspect: wrote {path}", file=sys.stderr)
    return OK


if __name__ == "__main__":
    sys.exit(main())
