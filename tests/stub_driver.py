"""Run the GPU kernels through Triton's own compiler and launcher, on a stub of the CUDA driver that computes nothing.

Triton asks the driver once for the shared memory of a block and refuses kernels that need more. So run it in a separate
process for each device, as `python -m tests.stub_driver libcuda.so.1 ARCH BYTES CASE …`. Prints JSON by case: what forward and
backward launch, [name, grid, threads, shared memory] of a Triton kernel and [name] of one of torch; or the error as text.
"""

from __future__ import annotations

import ctypes
import json
import sys
from itertools import product
from unittest import mock

import torch

from benchmarks.kernels import BF16, CONVOLUTIONS, FP32, LOSSES, LossShape, Operations
from d2v_fast.ops import triton_loss
from tests.gate import NORMS

# Length and views for every norm; the recipes are in `benchmarks.kernels`. The number of layers takes no shared memory.
LENGTHS = {"text": (512, 0), "vision": (197, 0), "audio": (780, 0), "16 views": (196, 16), "8 views": (750, 8)}
WIDTHS = (312, 768, 1024, 1280)


def cases() -> dict[str, tuple]:
    """All cases by name: a shape and whether the loss computes statistics."""
    found: dict[str, tuple] = {}
    for (name, shape), stats in product(LOSSES.items(), (False, True)):
        found[f"{name}{', stats' * stats}"] = shape, stats
    for name, convolution in CONVOLUTIONS.items():
        found[name] = convolution, False
    for (name, (length, views)), norm, channels, dtype, stats in product(
        LENGTHS.items(), NORMS, WIDTHS, (FP32, BF16), (False, True)
    ):
        shape = LossShape(
            norm, channels=channels, length=length, k=8, views=views, dtype=dtype, dtype_z=dtype, padded=not stats
        )
        found[f"{name} {norm} {channels} {str(dtype).removeprefix('torch.')}{', stats' * stats}"] = shape, stats
    found["batch 4096 bfloat16"] = LossShape("batch", channels=4096, length=197, k=6), False
    return found


class Launches(Operations):
    """Collects the launches of Triton and of torch, in order."""

    def __init__(self):
        super().__init__(lambda operation, tensors: self.found.append([str(operation)]))
        self.found: list[list] = []

    def report_kernel(self, name, x, y, z, threads, shared):
        self.found.append([name.decode(), [x, y, z], threads, shared])

    def take(self) -> list[list]:
        found, self.found = self.found, []
        return found


def use_stub(library: str, arch: int, shared_memory: int, report) -> object:
    """Make Triton compile for sm_`arch` and launch on the stub; keep what is returned."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self):  # without torch.cuda
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device: divmod(arch, 10)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

    callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_uint] * 5)(report)
    stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # under its soname, before Triton looks for it
    stub.stub_setup(shared_memory, callback)
    driver.set_active(Driver())
    return callback


def launched(launches: Launches, shape, stats: bool) -> dict[str, list] | str:
    forward = shape.call(stats)
    try:
        with launches:
            backward = forward()
            first = launches.take()
            backward()
            return dict(forward=first, backward=launches.take())
    except Exception as error:
        launches.take()
        return f"{type(error).__name__}: {error}"


def main() -> None:
    library, arch, shared_memory, *names = sys.argv[1:]
    torch.set_num_threads(1)
    launches, known = Launches(), cases()
    kept = use_stub(library, int(arch), int(shared_memory), launches.report_kernel)
    with (
        mock.patch.object(triton_loss, "obstacle", lambda device: None),
        mock.patch.object(triton_loss, "_n_processors", lambda device: 132),
    ):
        found = {name: launched(launches, *known[name]) for name in names}
    del kept
    print(json.dumps(found))


if __name__ == "__main__":
    main()
