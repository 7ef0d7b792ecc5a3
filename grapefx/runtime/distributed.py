"""Data parallelism: what the ranks of a process group agree on when a step is committed.

Gradients are averaged by whoever averages them for a plain module (DistributedDataParallel). The
learning state is ours: every rank starts a step with the same maps, learns from its own part of the
batch, and the mean of what they learned is what all go on with. One all_reduce of one flat tensor
in a step that learns or measures (on a CPU one of two numbers before it), none in the others.

For a state that moves linearly with its estimate (fdfa: B + a (J^ - B)) the mean of the updates is
the update with the mean of J^. A cosine step (grape) takes each rank's direction at length 1 before
the mean, as it does not within a batch: where ranks disagree the step is shorter. Columns of the
mean are a little under norm 1 until the next step rescales them. Maps that a calibration fitted are
the mean of the ranks' fits, and go through the method's ``refit`` once more, for what it derives
from a fitted map; where calibrations remember (``calib_forget``), the ranks' normal equations are
averaged and solved, which is the fit of all samples. A step that is not finite on one rank is
skipped by all. Ranks may have batches of their own size, and other sample shapes where the maps are
the same (tokens share one); otherwise the step is refused on all ranks, before anything is
exchanged.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from grapefx.errors import InputError
from grapefx.methods import Method
from grapefx.passes.feedback.normal_equations import solve, without_memory


def rank() -> int:
    """This process's rank in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def parallel() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over the ranks, by one all_reduce."""
    if not tensors:
        return []
    flat = _summed(tensors) / dist.get_world_size()
    return _cut(flat, tensors)


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(flat)
    return flat


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([math.prod(t.shape) for t in like])
    return [p.view(t.shape).to(t.dtype, copy=True) for p, t in zip(parts, like, strict=True)]


def agree(
    learned: dict[str, Tensor],
    old: dict[str, Tensor],
    metrics: dict[str, Tensor],
    refitted: Method | None = None,
    ridge: float = 0.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The feedback states and metrics that all ranks go on with.

    ``old``: the states before the step, kept where the flag ``metrics["finite"]`` is false on any
    rank. ``refitted``: the method, if the states come from a refit with ``ridge``. Integer states
    (counters) are equal on all ranks already.
    """
    keys = [k for k, t in learned.items() if t.is_floating_point()]
    names = list(metrics)
    sent = [metrics[n].float() if n == "finite" else metrics[n] for n in names]
    sent += [learned[k] for k in keys]
    if not sent:
        return learned, metrics
    _same_everywhere([*names, *keys], sent)
    found = averaged(sent)
    seen = dict(zip(names, found, strict=False))
    new = {**learned, **dict(zip(keys, found[len(names) :], strict=True))}
    if refitted is not None:
        new = _derived(refitted, new, ridge)
    if "finite" in seen:
        # a mean of 1: true on all. Compared on the device: nobody waits for the flag here
        seen["finite"] = seen["finite"] == 1
        new = {k: torch.where(seen["finite"], t, old.get(k, t)) for k, t in new.items()}
    return new, seen


def _same_everywhere(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Refuse what the ranks cannot average: gloo would abort the process.

    Not on a GPU, where the answer would have to be waited for; TORCH_DISTRIBUTED_DEBUG=DETAIL
    checks there.
    """
    if tensors[0].device.type != "cpu":
        return
    text = repr([(n, tuple(t.shape)) for n, t in zip(names, tensors, strict=True)])
    mark = zlib.crc32(text.encode())
    found = torch.tensor([mark, -mark])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if int(found[0]) != -int(found[1]):
        shapes = {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True) if "/B" in n}
        raise InputError(
            "the ranks are in different steps and cannot average their feedback maps; rank "
            f"{rank()} learned {shapes}. All ranks must see sample shapes that share their maps "
            "(pad or crop batches to one size) and call set_epoch() and calibration() alike. "
            "Weights and maps are as before the step"
        )


def _derived(method: Method, states: dict[str, Tensor], ridge: float) -> dict[str, Tensor]:
    """Each layer's state for what the ranks fitted together.

    With normal equations in the states their mean is solved: the fit of all samples. Else the mean
    of the maps goes through the method's refit once more (a scale is that map's own, ...).
    """
    out = dict(states)
    layers = {key.rpartition("/")[0] for key in states}
    for layer in layers:
        own = {k.rpartition("/")[2]: t for k, t in states.items() if k.rpartition("/")[0] == layer}
        if "B" not in own:
            continue
        fitted = own["B"]
        if "gram" in own:
            parts = solve(own["gram"], own["cross"], ridge)
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            size = whole.abs().sum()
            fitted = torch.where(torch.isfinite(size) & (size > 0), whole, fitted).to(fitted.dtype)
        made = method.refit(without_memory(own), fitted)
        out.update({f"{layer}/{k}": t for k, t in made.items()})
    return out
