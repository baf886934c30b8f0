"""A pytest plugin that replaces a GPU: benchmarks run without measuring anything, and report the memory that they would need.

    FAKE_GPU=fake_gpu.so python -m pytest -p tests.fake_device benchmarks/test_bench_step.py --device cuda --seconds 0

Tensors on "cuda" have shape and dtype but no data, except for those computed only from integers of the host: the baselines
read their values. Our variants must not read any, nor copy from the host. Graphs replay nothing, and code to be compiled runs
eagerly, which needs more memory. A case fails if it needs more than LIMIT.
"""

# ruff: noqa: E402
import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from benchmarks.gpu import load_fake_gpu

load_fake_gpu(os.environ["FAKE_GPU"])

import torch
import torch.nn.functional as F
import transformers.masking_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import measure
from d2v_fast import encoders
from d2v_fast.ops import attention as ops_attention
from d2v_fast.ops import triton_loss
from tests import waits

LIMIT = 70e9  # bytes, of a GPU with 80 GB
CONTEXT = 1e9  # bytes of a process besides its tensors: CUDA, cuBLAS, compiled kernels
MODE = FakeTensorMode(allow_non_fake_inputs=True)
aten = torch.ops.aten


class Device(TorchDispatchMode):
    """Runs operations on the GPU with fake tensors, and counts the bytes that are allocated.

    Attributes:
        live: Bytes of all tensors now.
        peak: Most bytes since `torch.cuda.reset_peak_memory_stats`.
        highest: Most bytes since it was set.
        pools: Bytes of the memory pools of captured graphs.
        strict: Whether reading a value and blocking copies from the host are errors.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.highest = self.pools = 0
        self.strict = False
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        from_host = not any(isinstance(x, FakeTensor) for x in tensors)
        if from_host and not to_gpu:
            return function(*args, **kwargs)
        if self.strict and (found := waits.why(function, args, kwargs)):
            raise AssertionError(found)
        values = None
        known = tensors and all(_value(x) is not None for x in tensors)
        if known and not (from_host and tensors[0].is_floating_point()):
            real = {name: x for name, x in kwargs.items() if name != "device"}
            values = function(*tree_map(_value, args), **tree_map(_value, real))
        if function is aten._local_scalar_dense.default and values is not None:
            return values
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (args[0], _without_masks(args[1]), *args[2:])
        if function is aten._to_copy.default and from_host:
            result = _on_gpu(tensors[0], kwargs.get("dtype"))
        elif function is aten.nonzero.default and values is not None:
            result = _on_gpu(values)
        else:
            with MODE:
                result = function(*args, **kwargs)
        self._count(result)
        results = tree_leaves(result)
        for x, value in zip(results, [None] * len(results) if values is None else tree_leaves(values), strict=True):
            if isinstance(x, FakeTensor):
                x.value = value
        return result

    def _count(self, result: Any) -> None:
        for x in tree_leaves(result):
            if not isinstance(x, FakeTensor) or x.device.type != "cuda":
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = size = -(-storage.nbytes() // 512) * 512  # as torch's allocator rounds
                self.live += size
                self.peak, self.highest = max(self.peak, self.live), max(self.highest, self.live)
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _on_gpu(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> FakeTensor:
    return FakeTensor(MODE, torch.empty_like(tensor, dtype=dtype, device="meta"), torch.device("cuda", 0))


def _value(x: Any) -> Any:
    """The values of a tensor if it has any; anything else is returned unchanged."""
    return getattr(x, "value", None) if isinstance(x, FakeTensor) else x


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with masks, whose values are known, as numbers."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if isinstance(index, FakeTensor) and index.dtype == torch.bool and _value(index) is not None:
            found += map(_on_gpu, _value(index).nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


DEVICE = Device()


class Here:
    """Stands in for `Worker`: the object lives in this process, and its bytes are counted separately."""

    running: ClassVar[list["Here"]] = []
    most: ClassVar[float] = 0.0  # bytes of all that ran at the same time, each at its own peak

    def __init__(self, make: Callable[..., Any], *args: Any):
        self.kept = self.peak = self.pools = self.steps = 0
        self.strict = False
        Here.running.append(self)
        self.served = self._counted(make, *args)
        self.strict = make.__name__ == "Ours"

    def __call__(self, method: str, *args: Any) -> Any:
        self.steps += method == "seconds"
        if method == "seconds" and self.steps > (4 if getattr(self.served, "graphs", None) else 2):
            return 1e-3  # the optimizer has its state and graphs are recorded: another step adds nothing
        return self._counted(getattr(self.served, method), *args)

    def _counted(self, call: Callable[..., Any], *args: Any) -> Any:
        before, pools = DEVICE.live, DEVICE.pools
        DEVICE.highest, DEVICE.strict = before, self.strict
        try:
            return call(*args)
        finally:
            DEVICE.strict = False
            self.peak = max(self.peak, self.kept + DEVICE.highest - before)
            self.kept += DEVICE.live - before
            self.pools += DEVICE.pools - pools
            Here.most = max(Here.most, sum(CONTEXT + each.peak + each.pools for each in Here.running))

    def close(self) -> None:
        Here.running.remove(self)
        self.served = None
        gc.collect()


def interleaved(variants: dict[str, Callable[[], object]], device: str, *_: Any, **__: Any) -> dict[str, float]:
    for name, call in variants.items():
        DEVICE.strict = name.startswith("fused")
        try:
            call()
        finally:
            DEVICE.strict = False
    return dict.fromkeys(variants, 1e-3)


def timed(call: Callable[[], object], device: str) -> float:
    call()
    return 1e-3


class Graph:
    def replay(self) -> None:
        pass


@contextlib.contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    before, highest, strict = DEVICE.live, DEVICE.highest, DEVICE.strict
    DEVICE.highest, DEVICE.strict = before, True
    try:
        yield
    finally:
        DEVICE.strict = strict
    DEVICE.pools += DEVICE.highest - before
    DEVICE.highest = max(highest, DEVICE.highest)


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu"):
        return super().__new__(cls)


_attend, _rates = F.scaled_dot_product_attention, measure.rates


def rates(device: str) -> dict[str, float]:
    with DEVICE:
        return _rates(device)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """The kernel that torch uses in fp32 or with a bias. Flash attention saves the same amount for the backward."""
    if not isinstance(query, FakeTensor):
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
    bias = attn_mask
    if bias is not None:
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    saved = torch.is_grad_enabled() and query.requires_grad
    operator = aten._scaled_dot_product_efficient_attention
    return operator(query, key, value, bias, saved, dropout_p, is_causal, scale=scale)[0]


def _deepcopy(self: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    """torch's version reads the address of the data."""
    copied = self.detach().clone()
    if isinstance(self, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, self.requires_grad)
    memo[id(self)] = copied
    return copied


def _install() -> None:
    measure.Worker, measure.interleaved, measure.timed, measure.rates = Here, interleaved, timed, rates
    F.scaled_dot_product_attention = attention
    FakeTensor.__deepcopy__ = _deepcopy
    encoders.hub._check_states = lambda encoder: None  # reads values
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None  # torch 2.11 would allocate a tensor on the GPU
    # transformers treats fake tensors as tracing and would skip the checks that read values.
    transformers.masking_utils.is_tracing = lambda *args: False
    triton_loss.obstacle = lambda device: None
    ops_attention._agrees = lambda device: True
    torch.compile = lambda function=None, **_: function or (lambda function: function)
    torch.testing.assert_close = lambda *_, **__: None
    torch.Generator = Generator
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) then copies in a way that Device sees
    for name, stand_in in {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "none",
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, major=9, minor=0),
        "synchronize": lambda *_: None,
        "memory_allocated": lambda *_: DEVICE.live,
        "max_memory_allocated": lambda *_: DEVICE.peak,
        "reset_peak_memory_stats": lambda *_: setattr(DEVICE, "peak", DEVICE.live),
        "CUDAGraph": Graph,
        "current_stream": lambda *_: SimpleNamespace(device_index=0),
        "default_generators": (torch.default_generator,),
        "graph_pool_handle": lambda: (0, 1),
        "graph": capture,
    }.items():
        setattr(torch.cuda, name, stand_in)


_install()  # now: the modules of the benchmarks import these names


@pytest.fixture(autouse=True)
def fits(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the case on the fake device; fail if it needs more than LIMIT, and record what it needs."""
    gc.collect()
    Here.most, before, pools = 0.0, DEVICE.live, DEVICE.pools
    DEVICE.highest = before
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    with DEVICE:
        yield
    needed = Here.most or CONTEXT + DEVICE.highest - before + DEVICE.pools - pools
    if benchmark is not None:
        benchmark.extra_info["needed_bytes"] = needed
    assert needed <= LIMIT, f"{request.node.name}: needs {needed / 1e9:.0f} GB, expected at most {LIMIT / 1e9:.0f}"


@pytest.hookimpl(trylast=True, optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["dry_run"] = True
