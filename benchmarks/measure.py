"""Measure time, bandwidth and memory: interleaved variants, medians, cold caches."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d2v_fast.config import has_bf16


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; on a GPU, by CUDA events."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


SLOW = 0.2  # seconds; for longer calls the state of allocator and threads is negligible


def interleaved(
    variants: dict[str, Callable[[], object]], device: str, seconds: float = 3.0, calls: int = 3
) -> dict[str, float]:
    """Median seconds of each variant.

    The variants take turns, so that drift of the machine affects all of them. In its turn a variant runs `calls` times after
    one uncounted call, which absorbs the effect of the previous variant on the allocator and the threads. A slow variant runs
    only once per turn.
    """
    slow = set()
    for name, call in variants.items():
        call()
        if timed(call, device) > SLOW:
            slow.add(name)
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        for name, call in variants.items():
            if name not in slow:
                call()
            times[name] += [timed(call, device) for _ in range(1 if name in slow else calls)]
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


class Worker:
    """An object in a separate process, which isolates its settings of allocator and threads.

    Methods are called by name, `worker("method", *args)`; errors are raised in the caller.
    """

    def __init__(self, make: Callable[..., object], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, method: str, *args: Any) -> Any:
        self.connection.send((method, args))
        result = self.connection.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def _serve(connection: Any, make: Callable[..., object], args: tuple) -> None:
    try:
        served: Any = make(*args)
    except Exception as error:
        served = error
    try:
        while True:
            method, arguments = connection.recv()
            try:
                if isinstance(served, Exception):
                    raise served
                connection.send(getattr(served, method)(*arguments))
            except Exception as error:
                connection.send(error)
    except EOFError:
        pass


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, as the machine's upper limit."""
    size = 512 if dtype == torch.bfloat16 and not has_bf16(device) else 4096  # the large one could take minutes
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / interleaved({"matmul": lambda: a @ b}, device, seconds=1.0, calls=1)["matmul"]


def copy(device: str, size: int = 256 << 20) -> Callable[[], object]:
    """A call that copies `size` bytes, far more than the caches hold, and so moves 2 · size bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def rates(device: str) -> dict[str, float]:
    """Current rates of the machine: bytes/s of a long copy and FLOP/s of large products; also the load average before."""
    return {
        "load": os.getloadavg()[0],
        "copy": 2 * (256 << 20) / interleaved({"copy": copy(device)}, device, seconds=1.0)["copy"],
        "fp32": matmul_rate(device, torch.float32),
        "bf16": matmul_rate(device, torch.bfloat16),
    }


def peak_extra_bytes(call: Callable[[], object], device: str) -> int:
    """Peak memory that a call adds to what was allocated before, including what it returns."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # pages that the allocator holds would hide those of the call
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process: VmRSS, those resident now, or VmHWM, their peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")
