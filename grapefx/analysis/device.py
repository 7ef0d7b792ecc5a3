"""Roofline device models: how long an op takes on one worker.

time = max(matmul FLOPs / matmul rate + vector FLOPs / vector rate, bytes / bandwidth) + overhead
(Williams, Waterman and Patterson, "Roofline", CACM 2009, with a launch overhead an op).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from grapefx.errors import OptionError, nearest

_RATES = ("matmul_flops", "vector_flops")


@dataclass(frozen=True)
class DeviceModel:
    """One worker: peak rates in FLOP/s by dtype name, bandwidth in bytes/s, overhead in seconds.

    ``worker`` says in words what one worker is; ``workers`` how many of them the machine has.
    A dtype without a rate uses float32's.
    """

    name: str
    matmul_flops: Mapping[str, float]
    vector_flops: Mapping[str, float]
    bandwidth: float
    launch_overhead: float
    description: str = ""
    worker: str = "one device"
    workers: int = 1
    source: str = ""
    _rates: dict[torch.dtype, tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def rates(self, dtype: torch.dtype) -> tuple[float, float]:
        """Matmul and vector FLOP/s for a dtype."""
        found = self._rates.get(dtype)
        if found is None:
            name = str(dtype).removeprefix("torch.")
            found = self._rates[dtype] = (
                self.matmul_flops.get(name, self.matmul_flops["float32"]),
                self.vector_flops.get(name, self.vector_flops["float32"]),
            )
        return found

    def seconds(
        self,
        matmul_flops: float,
        vector_flops: float,
        nbytes: float,
        dtype: torch.dtype,
        launches: int = 1,
    ) -> float:
        """Seconds that one op takes on one worker."""
        matmul, vector = self.rates(dtype)
        compute = matmul_flops / matmul + vector_flops / vector
        return max(compute, nbytes / self.bandwidth) + launches * self.launch_overhead


def bundled_devices() -> list[str]:
    """Names of the device models that come with the package."""
    folder = resources.files("grapefx.analysis") / "devices"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_device(name: str | Path) -> DeviceModel:
    """A bundled device model by name, or one from a YAML file.

    Raises:
        OptionError: no such name or file, a key that is missing or unknown, or a rate that is not
            a positive number.
    """
    text = str(name)
    if text in bundled_devices():
        file = resources.files("grapefx.analysis") / "devices" / f"{text}.yaml"
        return _parse(file.read_text(encoding="utf-8"), text)
    path = Path(text)
    if not path.is_file():
        kind = "device model file" if path.suffix in (".yaml", ".yml") else "device model"
        raise OptionError(
            f"no {kind} {text!r}.{nearest(text, bundled_devices())} "
            "Or give the path of a YAML file."
        )
    return _parse(path.read_text(encoding="utf-8"), text)


def _parse(text: str, where: str) -> DeviceModel:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise OptionError(f"{where} is not YAML: {e}") from None
    if not isinstance(data, dict):
        raise OptionError(f"{where}: a device model is a mapping of keys to values")
    known = {f.name for f in fields(DeviceModel) if f.init}
    for key in data:
        if key not in known:
            raise OptionError(f"{where}: unknown key {key!r}.{nearest(str(key), known)}")
    missing = {"name", *_RATES, "bandwidth", "launch_overhead"} - set(data)
    if missing:
        raise OptionError(f"{where}: missing {', '.join(sorted(missing))}")
    values: dict[str, Any] = dict(data)
    for key in _RATES:
        if not isinstance(data[key], dict) or "float32" not in data[key]:
            raise OptionError(f"{where}: {key} maps dtype names to FLOP/s and has float32")
        values[key] = {str(k): _number(where, f"{key}.{k}", v) for k, v in data[key].items()}
    values["bandwidth"] = _number(where, "bandwidth", data["bandwidth"])
    overhead = data["launch_overhead"]
    values["launch_overhead"] = _number(where, "launch_overhead", overhead, zero=True)
    workers = data.get("workers", 1)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise OptionError(f"{where}: workers is a whole number of at least 1, not {workers!r}")
    return DeviceModel(**values)


def _number(where: str, key: str, value: Any, *, zero: bool = False) -> float:
    try:
        # YAML 1.1 reads 1e12 as text
        out = float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{where}: {key} is a number, not {value!r}") from None
    if not 0 <= out < float("inf") or (out == 0 and not zero):
        raise OptionError(f"{where}: {key} is positive, not {value!r}")
    return out
