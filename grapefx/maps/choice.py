"""Which kind of feedback map each layer gets: as asked, or as the memory budget demands."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

from grapefx.errors import OptionError, nearest
from grapefx.maps.feedback_map import ErrorRows, FeedbackMap
from grapefx.methods.base import Method

KINDS = ("auto", "dense", "pooled", "low-rank", "sparse", "seeded")
DEFAULTS = {"pooled": 1, "low-rank": 64, "sparse": 8}
LEAST_RANK = 16

Maps = tuple[FeedbackMap, ...]
Rows = dict[str, ErrorRows]


def parse_kind(feedback: str) -> tuple[str, int]:
    """``"kind"`` or ``"kind:number"``; raises ``OptionError``."""
    kind, _, number = str(feedback).partition(":")
    if kind not in KINDS:
        raise OptionError(f"feedback={feedback!r}.{nearest(kind, KINDS)}")
    if not number:
        return kind, DEFAULTS.get(kind, 0)
    if kind not in DEFAULTS or not number.isdecimal() or int(number) < 1:
        raise OptionError(
            f"feedback={feedback!r}: a positive number goes with pooled (grid points a dim), "
            "low-rank (rank) or sparse (groups)"
        )
    return kind, int(number)


def choose_maps(
    maps: Maps, rows: Rows, *, feedback: str, budget: int, method: Method, seed: int, refits: bool
) -> tuple[Maps, Rows, tuple[str, ...]]:
    """The maps of ``plain_maps`` made smaller, their rows, and what the user should know.

    "auto" takes full maps while they fit into ``budget`` bytes. Over it, a fixed map is made from
    its seed; else planes are pooled, the largest first, and then the error's rank is reduced.
    """
    kind, number = parse_kind(feedback)
    if not method.feedback or kind == "dense":
        return maps, rows, ()
    exact = {"next_delta", "noise", "output"} & (method.reads | method.learns_from)
    exact |= {"tangent"} & method.reads
    if exact:
        if kind != "auto":
            raise OptionError(
                f"feedback={feedback!r}: method {method.name!r} reads {', '.join(sorted(exact))} "
                "in full\n  remedy: feedback='dense'"
            )
        return maps, rows, ()
    fixed = method.fixed and not refits
    if kind == "seeded" and not fixed:
        raise OptionError(
            f"feedback='seeded': method {method.name!r} learns its maps, or calibration refits "
            "them\n  remedy: a fixed method (dfa, drtp) with calib_every=None or "
            "calib_refit='weights'"
        )
    if kind == "seeded":
        return _seeded(maps, seed), rows, ()
    if kind == "pooled":
        return tuple(_to_grid(m, number) for m in maps), rows, ()
    if kind == "sparse":
        made = tuple(replace(m, groups=max(1, min(number, m.error_dim, m.value_dim))) for m in maps)
        return made, rows, ()
    if kind == "low-rank":
        made, rows = _low_rank(maps, rows, number, seed)
        return made, rows, ()
    return _auto(maps, rows, budget, fixed, seed)


def _auto(
    maps: Maps, rows: Rows, budget: int, fixed: bool, seed: int
) -> tuple[Maps, Rows, tuple[str, ...]]:
    need = _bytes(maps)
    if need <= budget:
        return maps, rows, ()
    said = f"full feedback maps would need {need / 2**20:,.0f} MiB of {budget / 2**20:,.0f}"
    if fixed:
        return _seeded(maps, seed), rows, (f"{said}: they are made from their seed in each step",)
    kept = list(maps)
    while _bytes(kept) > budget:
        order = sorted(range(len(kept)), key=lambda i: -kept[i].bytes)
        found = next(((i, s) for i in order if (s := _coarser(kept[i])) is not None), None)
        if found is None:
            break
        kept[found[0]] = found[1]
    pooled = sum(bool(m.pool) for m in kept)
    notes = [f"{said}: {pooled} of {len(kept)} maps are pooled over positions"] if pooled else []
    made = tuple(kept)
    if _bytes(made) > budget:
        full = max(m.error_dim for m in made)
        rank = 1 << max(0, full - 1).bit_length() - 1
        while rank >= LEAST_RANK:
            small, small_rows = _low_rank(made, rows, rank, seed)
            if _bytes(small) <= budget:
                notes.append(f"{said}: the error ({full}) is projected on {rank} random directions")
                return small, small_rows, tuple(notes)
            rank //= 2
    notes = [f"{n}; feedback_budget= raises the limit" for n in notes]
    return made, rows, tuple(notes)


def _bytes(maps: Maps | list[FeedbackMap]) -> int:
    return sum(m.bytes for m in maps)


def _seeded(maps: Maps, seed: int) -> Maps:
    return tuple(replace(m, seed=zlib.crc32(f"{seed}/{m.layer.name}".encode())) for m in maps)


def _low_rank(maps: Maps, rows: Rows, rank: int, seed: int) -> tuple[Maps, Rows]:
    new = {
        k: replace(r, rank=rank, seed=zlib.crc32(f"{seed}/rank".encode())) if rank < r.dim else r
        for k, r in rows.items()
    }
    made = tuple(
        replace(m, error_dim=rank, rank=rank, classes=None) if new[m.rows].rank else m for m in maps
    )
    return made, new


def _dims(m: FeedbackMap) -> list[int]:
    """The sample's dims that may be pooled: all but the channels."""
    channel = m.layer.channel
    shape = m.layer.sample_shape
    if m.rows != "dense" or channel is None or len(shape) < 2:
        return []
    return [d for d in range(len(shape)) if d != channel % len(shape)]


def _pooled(m: FeedbackMap, pool: list[int]) -> FeedbackMap:
    sizes = [s // b for s, b in zip(m.layer.sample_shape, pool, strict=True)]
    return replace(m, pool=tuple(pool), value_dim=math.prod(sizes))


def _to_grid(m: FeedbackMap, grid: int) -> FeedbackMap:
    """At most ``grid`` points in each dim that may be pooled."""
    pool = [1] * len(m.layer.sample_shape)
    for d in _dims(m):
        size = m.layer.sample_shape[d]
        points = next(g for g in range(min(grid, size), 0, -1) if size % g == 0)
        pool[d] = size // points
    return _pooled(m, pool) if max(pool, default=1) > 1 else m


def _coarser(m: FeedbackMap) -> FeedbackMap | None:
    """The next coarser grid; None at one point."""
    shape = m.layer.sample_shape
    points = [shape[d] // (m.pool[d] if m.pool else 1) for d in _dims(m)]
    return _to_grid(m, max(points) - 1) if points and max(points) > 1 else None
