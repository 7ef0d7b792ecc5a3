"""Cost, dependency DAG, critical path and schedule of a step graph."""

from grapefx.analysis.cost import GraphCost, OpCost, graph_cost
from grapefx.analysis.dag import Dag, Loss, Path, Task, build_dag, longest_path
from grapefx.analysis.device import DeviceModel, bundled_devices, load_device
from grapefx.analysis.rules import Call, Price, register_cost
from grapefx.analysis.schedule import Schedule, list_schedule, upward_rank
from grapefx.analysis.sizes import Meta, size_symbols
from grapefx.analysis.theory import Calibration, amortised_calibration, arithmetic_ratio

__all__ = [
    "Calibration",
    "Call",
    "Dag",
    "DeviceModel",
    "GraphCost",
    "Loss",
    "Meta",
    "OpCost",
    "Path",
    "Price",
    "Schedule",
    "Task",
    "amortised_calibration",
    "arithmetic_ratio",
    "build_dag",
    "bundled_devices",
    "graph_cost",
    "list_schedule",
    "load_device",
    "longest_path",
    "register_cost",
    "size_symbols",
    "upward_rank",
]
