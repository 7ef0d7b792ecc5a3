"""A batch in microbatches: which dim of each argument is divided, and the parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grapefx.errors import InputError
from grapefx.ir import Slot
from grapefx.plan import Plan
from grapefx.runtime.program import Places
from grapefx.torch_compat import batch_symbol


def divided(plan: Plan, places: Places, given: list[Any], count: int) -> list[dict[Slot, Any]]:
    """The model's arguments for each of ``count`` microbatches, by slot.

    Raises:
        InputError: an argument holds the batch in no dim of its own.
    """
    dims = _batch_dims(plan) if count > 1 else {}
    inputs = {name: given[k] for (role, name), k in places.items() if role == "input"}

    def part(name: str, value: Any, i: int) -> Any:
        if name not in dims:
            return value
        size = value.shape[dims[name]] // count
        return value.narrow(dims[name], i * size, size).contiguous()

    return [{Slot("input", n): part(n, v, i) for n, v in inputs.items()} for i in range(count)]


def _batch_dims(plan: Plan) -> dict[str, int]:
    """For each of the model's inputs that holds the batch, the dim."""
    batch = plan.captured.batch
    found: dict[str, int] = {}
    for slot, node in zip(plan.captured.inputs, plan.captured.placeholders(), strict=True):
        if slot.role != "input" or batch is None:
            continue
        sizes = [batch_symbol(size) for size in node.meta["val"].shape]
        dims = [d for d, e in enumerate(sizes) if e is not None and batch in e.free_symbols]
        if len(dims) > 1 or any(sizes[d] != batch for d in dims):
            raise InputError(
                f"argument {slot.name} has the batch in dims {dims}, folded or twice, and cannot "
                "be divided into microbatches\n  remedy: microbatches=1, or give it another shape"
            )
        if dims:
            found[slot.name] = dims[0]
    return found


def rows_of(value: Any, i: int, size: int, count: int) -> Any:
    """A microbatch's part of a target."""
    if not isinstance(value, Tensor):
        return value
    if not value.ndim or value.shape[0] != size * count:
        raise InputError(
            f"a target of shape {tuple(value.shape)} does not have the batch ({size * count}) first"
        )
    return value[i * size : (i + 1) * size]
