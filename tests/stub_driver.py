"""The GPU kernels through Triton's own compiler and launcher, on a stub of the CUDA driver that computes nothing.

Triton asks the driver once for the shared memory of a block and refuses kernels that need more. So run it in a separate
process for each device, as `python -m tests.stub_driver libcuda.so.1 ARCH BYTES CASE …`. Prints JSON by case: what forward and
backward launch, [name, grid, threads, shared memory] of a Triton kernel and [name] of one of torch; or the error as text.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.kernels import BF16, CONVOLUTIONS, FP16, FP32, LOSSES, Call, ConvShape, LossShape, Operations
from d2v_fast.ops import triton_adam, triton_loss
from d2v_fast.ops.triton_adam import Slot
from tests.gate import NORMS

# Length and views for every norm; the recipes are in `benchmarks.kernels`. The number of layers takes no shared memory.
LENGTHS = {"text": (512, 0), "vision": (197, 0), "audio": (780, 0), "long audio": (1500, 0)}
LENGTHS |= {"16 views": (196, 16), "8 views": (750, 8)}
WIDTHS = (312, 768, 1024, 1280)


class UpdateShape(NamedTuple):
    """An optimizer step in one pass; the teacher alone takes the place of the backward. Both with and without a flag."""

    sizes: tuple[int, ...] = (3 * triton_adam.CHUNK + 4, 3)

    def call(self, stats: bool) -> Call:
        weights, grads, means, squares, teachers = ([torch.zeros(n) for n in self.sizes] for _ in range(5))
        slots = [Slot(0, *each[:3], torch.zeros(()), each[3]) for each in zip(weights, means, squares, teachers, strict=True)]
        one_pass, teacher = triton_adam.OnePass(slots), triton_adam.LerpUnless(teachers, weights)
        group = dict(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
        skip = torch.zeros(())

        def forward() -> Callable[[], object]:
            one_pass.fill(grads, [group], 0.1)
            one_pass.launch()
            one_pass.launch(skip)
            return lambda: teacher(skip, teachers, weights, 0.1)

        return forward


# Recipes that `benchmarks.kernels` leaves out, because another one has the same kernels at another length or width.
MORE = {
    "beit-base": LossShape("layer", "layer", length=197, k=6, beta=2.0),
    "beit-large": LossShape("layer", "layer", channels=1024, length=197, k=6, beta=2.0),
    "fairseq vision": LossShape("none", "layer", length=197, k=6, beta=2.0),
    "audioset": LossShape("instance", "layer", length=499, k=12, padded=True),
    "eat-base": LossShape("instance", "layer", length=512, k=12, views=16, target_mean=True),
    "v2-large vision": LossShape("instance", "layer", channels=1024, length=196, k=18, views=16, target_mean=True),
    "v2-huge14": LossShape("instance", "layer", channels=1280, length=256, k=24, views=16, target_mean=True),
    "v2-large audio": LossShape("instance", channels=1024, length=999, k=16, padded=True, views=12),
    "v2-large text": LossShape("layer", "instance", channels=1024, k=24, padded=True, views=8),
    "text, fp16": LossShape(dtype=FP16, dtype_z=FP16),
    "decoder, v2-large vision": ConvShape((14, 14), 1024, 1024, (5, 5)),
    "decoder, v2-huge, first": ConvShape((14, 14), 1280, 1024, (5, 5)),
    "decoder, eat-base": ConvShape((64, 8), 768, 768, (3, 3)),
    "decoder, v2-large audio, first": ConvShape((1, 999), 1024, 768, (1, 7)),
    "decoder, tiny-2": ConvShape((8, 8), 192, 192, (3, 3)),
    "positions, wav2vec2": ConvShape((1, 249), 768, 768, (1, 128)),
    "step": UpdateShape(),
}


def recipes() -> dict[str, tuple]:
    """The cases of the recipes by name: a shape and whether the loss computes statistics."""
    found: dict[str, tuple] = {}
    for (name, shape), stats in product(LOSSES.items(), (False, True)):
        found[f"{name}{', stats' * stats}"] = shape, stats
    return found | {name: (shape, False) for name, shape in (CONVOLUTIONS | MORE).items()}


def cases_of(norm: str) -> dict[str, tuple]:
    """The cases of a norm, likewise."""
    found: dict[str, tuple] = {}
    for (name, (length, views)), channels, dtype, stats in product(LENGTHS.items(), WIDTHS, (FP32, BF16), (False, True)):
        shape = LossShape(
            norm, channels=channels, length=length, k=8, views=views, dtype=dtype, dtype_z=dtype, padded=not stats
        )
        found[f"{name} {norm} {channels} {str(dtype).removeprefix('torch.')}{', stats' * stats}"] = shape, stats
    found[f"{norm} 4096 bfloat16"] = LossShape(norm, channels=4096, length=197, k=6), False
    return found


def cases() -> dict[str, tuple]:
    """All of them."""
    return recipes() | {name: case for norm in NORMS for name, case in cases_of(norm).items()}


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
