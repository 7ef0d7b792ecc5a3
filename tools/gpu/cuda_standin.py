"""Inductor's code for a CUDA GPU, made and run on a machine without one.

``install`` makes Inductor believe in an H100. It then writes Triton kernels, which Triton's own
interpreter (``TRITON_INTERPRET=1``, before torch is imported) runs on the CPU; library calls run
there as well. What is tested: that our graphs can be lowered for CUDA, and that what comes out
computes the right values. What is not: streams and CUDA graphs at work, Triton's compiler, the GPU.

It replaces private functions of torch for good: use a process of its own.
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils._triton
from torch.fx.node import map_aggregate, map_arg

from grapefx.ir import StepGraph
from grapefx.torch_compat import FakeTensor, TorchDispatchMode, fake_mode_of, python_dispatcher

DEVICE = torch.device("cuda:0")


class Unfit(Exception):
    """This machine or this torch cannot do it; says why."""


class H100:
    """What Inductor asks of a device."""

    name = "NVIDIA H100"
    major, minor = 9, 0
    multi_processor_count = 132
    warp_size = 32
    max_threads_per_block = 1024
    max_threads_per_multi_processor = 2048
    regs_per_multiprocessor = 65536
    shared_memory_per_block = 48 << 10
    shared_memory_per_block_optin = 227 << 10
    shared_memory_per_multiprocessor = 228 << 10
    L2_cache_size = 50 << 20
    total_memory = 80 << 30
    clock_rate = 1_755_000


# What kernels call of CUDA's math library; the interpreter has only Triton's own operators.
MATH: dict[str, Callable[..., Any]] = {
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "pow": np.power,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "floor": np.floor,
    "isnan": np.isnan,
    "isinf": np.isinf,
}


def install() -> None:
    """Make Inductor compile for CUDA and run the result on the CPU, in this process, for good.

    Raises:
        Unfit: there is a GPU, no Triton, or no interpreter.
    """
    # a capture through Dynamo has asked already, and found no device
    for name in dir(torch.utils._triton):
        forget = getattr(getattr(torch.utils._triton, name), "cache_clear", None)
        if forget is not None:
            forget()
    if torch.cuda.is_available():
        raise Unfit("this machine has a GPU: make gpu-check says more")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise Unfit("TRITON_INTERPRET=1 must be set before torch is imported")
    if torch.version.cuda is None:
        raise Unfit("this torch was built without CUDA")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
    except ImportError as e:
        raise Unfit(f"no Triton: {e}") from None
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor
    from torch.utils import _triton

    np.seterr(all="ignore")  # lanes behind a mask divide by zero
    target = GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_name": lambda device=None: H100.name,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "_lazy_init": lambda: None,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    interface: Any = CudaInterface
    interface.get_device_properties = staticmethod(lambda device=None: H100)
    interface.Worker.get_device_properties = staticmethod(lambda device=None: H100)
    interface.get_compute_capability = staticmethod(lambda device=None: target.arch)
    interface.is_available = staticmethod(lambda: True)
    private: Any = torch._C
    private._cuda_getCurrentRawStream = lambda device: 0
    private._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype
    )
    triton.runtime.driver._active = types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0
    )
    replaced: Any = _triton
    replaced.triton_backend = lambda: make_backend(target)
    replaced = fake_tensor
    replaced.init_gpu_context = lambda device: None
    triton_helpers.set_driver_to_gpu = lambda: None
    library = {name: _elementwise(fn) for name, fn in MATH.items()}
    triton_helpers.libdevice = types.SimpleNamespace(**library)


def _elementwise(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` of NumPy arrays as a function of the interpreter's values."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*args: Any) -> Any:
        like = next(a for a in args if isinstance(a, tl.core.tensor))
        with np.errstate(all="ignore"):
            found = np.asarray(
                fn(*(a.handle.data if isinstance(a, tl.core.tensor) else a for a in args))
            )
        dtype = tl.int32 if found.dtype == bool else like.dtype.scalar
        data = found.astype(np.int32 if found.dtype == bool else like.handle.data.dtype)
        kind = tl.block_type(dtype, list(data.shape)) if like.type.is_block() else dtype
        return tl.core.tensor(TensorHandle(data, dtype), kind)

    return call


def on_cuda(step: StepGraph) -> StepGraph:
    """The same step graph, its values on a CUDA device.

    Autograd cannot trace there without a driver, so the graph of the CPU is run again on CUDA's
    fake tensors. ``Unfit`` names an operator of the CPU's own (its fused attention).
    """
    work = step.copy()
    mode: Any = nullcontext()

    def moved(arg: Any) -> Any:
        return DEVICE if isinstance(arg, torch.device) and arg.type == "cpu" else arg

    for node in work.gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, FakeTensor):
            mode = fake_mode_of(value)
            with mode:
                node.meta["val"] = torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device=DEVICE
                )
        elif node.op == "call_function":
            if "cpu" in str(node.target) or "mkldnn" in str(node.target):
                raise Unfit(f"{node.target} is an operator of the CPU")
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), moved)
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode, python_dispatcher():
                node.meta["val"] = node.target(*args, **kwargs)
        elif node.op == "get_attr":
            raise Unfit(f"{node.target}: a constant that lies on the CPU")
    return work


class OnCpu(TorchDispatchMode):
    """Inside, what would be made on the CUDA device is made on the CPU."""

    def __torch_dispatch__(
        self,
        func: Any,
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Without the device."""
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == DEVICE:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


LAUNCH = re.compile(r"^\s+(?:\w+ = )?(?:\w+\.run\(|extern_kernels\.\w+\(|torch\.ops\.)", re.M)


class Launches:
    """Counts, inside, what each graph that Inductor compiles starts on the device.

    A Triton kernel and a library call (a product, a convolution) count one each, as written in the
    code that Inductor generates.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __enter__(self) -> Launches:
        from torch._inductor import config
        from torch._inductor.graph import GraphLowering

        self._before = GraphLowering.save_output_code
        GraphLowering.save_output_code = staticmethod(self._count)
        self._caches = config.patch({"force_disable_caches": True})  # a cached graph is not written
        self._caches.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        from torch._inductor.graph import GraphLowering

        GraphLowering.save_output_code = self._before
        self._caches.__exit__(None, None, None)

    def _count(self, code: str) -> None:
        body = code[code.index("def call(") :]
        self.counts.append(len(LAUNCH.findall(body)))
