"""Registers, shared memory, spills and instructions of the GPU kernels, and launches and bytes of each loss call.

The kernels are compiled without a GPU; nothing is timed.

python -m benchmarks.kernels                 compile the recipes' kernels for three GPUs, write results/kernels.json, print them
python -m benchmarks.kernels --only audio    only recipes whose names contain this; print without writing
python -m benchmarks.kernels --against OLD   also list differences from OLD, a result file or a commit
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2v_fast.ops import loss_implementation, triton_conv, triton_loss

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
LOSS_KERNELS = (
    "_order_kernel",
    "_loss_rows_kernel",
    "_loss_instance_kernel",
    "_channel_stats_kernel",
    "_target_mean_kernel",
    "_finish_kernel",
    "_scale_kernel",
)
CONV_KERNELS = ("_conv_kernel", "_weight_grad_kernel")
TYPES = {FP32: "*fp32", BF16: "*bf16", FP16: "*fp16", torch.float64: "*fp64"}
TYPES |= {torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64"}
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
Call = Callable[[], Callable[[], object]]


class LossShape(NamedTuple):
    """A call of the loss; M = 0 views is a mask (B, T)."""

    norm: str = "layer"
    target_norm: str = "none"
    channels: int = 768
    length: int = 512
    k: int = 10
    dtype: torch.dtype = BF16
    dtype_z: torch.dtype = BF16
    padded: bool = False
    views: int = 0
    beta: float = 0.0
    target_mean: bool = False

    def call(self, stats: bool, batch: int = 1) -> Call:
        """A function that runs the forward on uninitialised inputs and returns one that runs the backward."""
        mask = (torch.arange(self.length) % 2 == 0).repeat(batch, *([self.views] if self.views else []), 1)
        layers = [torch.empty(batch, self.length, self.channels, dtype=self.dtype) for _ in range(self.k)]
        z = torch.empty(int(mask.sum()), self.channels, dtype=self.dtype_z, requires_grad=True)
        padding = torch.zeros(batch, self.length, dtype=torch.bool) if self.padded else None
        norms = dict(norm=self.norm, target_norm=self.target_norm, beta=self.beta, scale=1.0, padding_mask=padding)
        extra = dict(reduction="mean", stats=stats, target_mean=self.target_mean)
        zero = torch.zeros(())  # with a factor of 1 the backward would launch nothing on a CPU

        def forward() -> Callable[[], object]:
            loss, *_ = loss_implementation("triton", z, layers)(z, layers, mask, **norms, **extra)
            return lambda: torch.autograd.grad(loss, z, zero)

        return forward


class ConvShape(NamedTuple):
    """A call of the grouped convolution and its backward."""

    grid: tuple[int, int]  # H, W
    c_in: int
    c_out: int
    kernel: tuple[int, int]
    groups: int = 16
    dtype: torch.dtype = BF16

    def call(self, stats: bool = False, batch: int = 2) -> Call:
        """A function that runs the forward on uninitialised inputs and returns one that runs the backward."""
        x = torch.empty(batch, *self.grid, self.c_in, dtype=self.dtype, requires_grad=True)
        weight = torch.empty(self.c_out, self.c_in // self.groups, *self.kernel, requires_grad=True)
        inputs = x, weight, torch.empty(self.c_out, requires_grad=True)

        def forward() -> Callable[[], object]:
            y = triton_conv.conv(*inputs, self.groups)
            return lambda: torch.autograd.grad(y, inputs, torch.empty_like(y))

        return forward


LOSSES = {
    "text": LossShape(),
    "vision": LossShape(length=197, k=6, beta=2.0),
    "audio": LossShape("instance", length=780, k=8, padded=True),
    "audio, 5 s": LossShape("instance", length=250, k=8, padded=True),
    "audio, 5 s, no padding": LossShape("instance", length=250, k=8),
    "vision, instance": LossShape("instance", length=197, k=6),
    "tokens, then layer": LossShape("instance", "layer", channels=192, length=65, k=3),
    "vision, 16 views": LossShape("instance", "layer", length=196, views=16, target_mean=True),
    "audio, 8 views": LossShape("instance", length=750, k=8, padded=True, views=8),
    "text, 8 views": LossShape("instance", k=12, views=8),
    "text, 8 views, layer": LossShape(k=12, views=8),
    "vision, 16 views, fp32": LossShape("instance", "layer", length=196, dtype=FP32, dtype_z=FP32, views=16, target_mean=True),
    "text, fp32 head": LossShape(dtype_z=FP32),
    "text, fp32": LossShape(dtype=FP32, dtype_z=FP32),
    "text, large": LossShape(channels=1024),
    "vision, huge": LossShape(channels=1280, length=257),
    "audio, fp32": LossShape("instance", length=780, k=8, dtype=FP32, dtype_z=FP32),
    "C a multiple of 8 alone": LossShape(channels=312, length=65, k=2),
    "C not a multiple of 8": LossShape(channels=100, length=64, k=2, dtype=FP16, dtype_z=FP16),
}
CONVOLUTIONS = {
    "image decoder, base": ConvShape((14, 14), 768, 768, (3, 3)),
    "image decoder, large": ConvShape((14, 14), 1024, 1024, (3, 3)),
    "image decoder, huge": ConvShape((16, 16), 1280, 1280, (3, 3)),
    "audio decoder, first": ConvShape((1, 249), 768, 384, (1, 7), dtype=FP16),
    "audio decoder": ConvShape((1, 249), 384, 384, (1, 7)),
    "audio positions, base": ConvShape((1, 249), 768, 768, (1, 19)),
}


class Launch(NamedTuple):
    kernel: Any  # triton.JITFunction
    arguments: dict[str, Any]


@contextmanager
def recorded(module: Any, names: Iterable[str]) -> Iterator[list[Launch]]:
    """Record launches of these kernels of the module in a list instead of running them."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            given = self.kernel.arg_names
            return lambda *a, **k: launches.append(Launch(self.kernel, dict(zip(given, a, strict=False)) | k))

    with mock.patch.multiple(module, **{name: Recorder(getattr(module, name)) for name in names}):
        yield launches


class Operations(TorchDispatchMode):
    """Report each torch operation that launches a kernel, with the tensors of its arguments and results.

    This includes operations inside our operators. Allocations, views and empty results launch nothing.
    """

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self, report: Callable[[Any, list[Tensor]], None]):
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "d2v_fast":  # look inside instead of seeing one call
            with self:
                return function.redispatch(CPU, *args, **kwargs)
        out = function(*args, **kwargs)
        taken, made = ([x for x in tree_leaves(each) if isinstance(x, Tensor)] for each in ((args, kwargs), out))
        memory = {x.untyped_storage().data_ptr() for x in taken}
        # `to` is called a view, but copies.
        view = function.is_view and all(x.untyped_storage().data_ptr() in memory for x in made)
        if any(x.numel() for x in made) and not view and function.__name__.partition(".")[0] not in self.FREE:
            self.report(function, taken + made)
        return out


def launches(shape: LossShape | ConvShape, stats: bool = False) -> list[Launch]:
    """All kernels of ours that a call and its backward launch."""
    with (
        mock.patch.object(triton_loss, "obstacle", lambda device: None),
        recorded(triton_loss, LOSS_KERNELS) as loss,
        recorded(triton_conv, CONV_KERNELS) as conv,
    ):
        shape.call(stats)()()
    return loss + conv


def traffic(launch: Launch) -> int:
    """Bytes of the tensors that a launch of the loss reads or writes, each counted once. Teacher rows count only if read."""
    arguments = dict(launch.arguments)
    layers = arguments.pop("x_ptrs", ())
    if not arguments.get("PADDED"):
        arguments.pop("padding_ptr", None)
    distinct = {x.data_ptr(): x.nbytes for x in arguments.values() if isinstance(x, Tensor)}
    share = 1.0
    if launch.kernel.__name__ == "_loss_rows_kernel" and not arguments.get("WITH_MEAN"):
        share = len(arguments["z_ptr"]) / (arguments.get("n_views", 1) * layers[0].shape[:2].numel())
    return sum(distinct.values()) + round(share * sum(x.nbytes for x in layers))


def call(shape: LossShape, stats: bool, batch: int = 8) -> dict[str, Any]:
    """Number of launches (our kernels and torch operations) of a loss call and its backward, and the bytes that they touch."""
    found: list[list[int]] = [[]]

    def operation(function: Any, tensors: list[Tensor]) -> None:
        distinct = {x.data_ptr(): min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors}
        found[-1].append(sum(distinct.values()))

    with (
        mock.patch.object(triton_loss, "obstacle", lambda device: None),
        mock.patch.object(triton_loss, "_n_processors", lambda device: 132),
        recorded(triton_loss, LOSS_KERNELS) as ours,
    ):
        forward = shape.call(stats, batch)
        with Operations(operation):
            backward = forward()
            first = len(ours)
            found.append([])
            backward()
    counts = dict(forward=first + len(found[0]), backward=len(ours) - first + len(found[1]))
    return dict(batch=batch, **counts, bytes=sum(map(traffic, ours)) + sum(map(sum, found)))


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel that the JIT would compile for this launch on a GPU of compute capability `arch` / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments = launch
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(TYPES[x.dtype] for x in value)
            divisible |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
                divisible[(i,)] = [["tt.divisibility", 16]]
    options = dict(num_warps=arguments.get("num_warps", 4))
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, option: str, made: Any) -> str:
    """Output of one of Triton's CUDA tools for a compiled kernel."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(code: str) -> tuple[int, int]:
    """Number of instructions of a kernel, and of its first innermost loop that reads global memory (0 if none)."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?);", line):
            found.append(instruction[1])
    branches = ((i, re.match(r"BRA.*?(\.L_x_\d+)", text)) for i, text in enumerate(found))
    loops = [(labels[to[1]], i + 1) for i, to in branches if to and labels.get(to[1], len(found)) <= i]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    reading = [b - a for a, b in sorted(innermost) if any(text.startswith("LDG") for text in found[a:b])]
    return len(found), reading[0] if reading else 0


def resources(made: Any) -> dict[str, Any]:
    """Resources of a compiled kernel.

    Sizes are in bytes; registers are per thread. `loads` counts global loads by width in bits; `copies` lists the widths in
    bytes of asynchronous copies to shared memory.
    """
    usage = tool("cuobjdump", "--dump-resource-usage", made)
    ptx = made.asm["ptx"]
    copies = [int(n, 16) for n in re.findall(r"cp\.async\.c\w\.shared\.global .*?, (0x\w+)", ptx)]
    widths = [int(n or 1) * int(bits) for n, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    return dict(
        warps=made.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=made.metadata.shared,
        loads=dict(Counter(widths + [8 * n for n in copies])),
        copies=sorted(set(copies)),
        wgmma="wgmma" in ptx,
    )


def described(made: Any) -> dict[str, Any]:
    """Resources and instructions of a compiled kernel."""
    everything, loop = instructions(tool("nvdisasm", "-c", made))
    return resources(made) | dict(instructions=everything, loop=loop)


def offline(
    arch: int,
    shapes: dict[str, LossShape] | dict[str, ConvShape],
    describe: Callable[[Any], dict[str, Any]] = described,
) -> list[dict]:
    """A row for each kernel of these shapes, compiled for sm_`arch`. A shared kernel is listed under the first shape only."""
    table, seen = [], set()
    for name, shape in shapes.items():
        for stats in (False, True) if isinstance(shape, LossShape) else (False,):
            for launch in launches(shape, stats):
                made = compiled(launch, arch)
                if made.hash in seen:
                    continue
                seen.add(made.hash)
                dtype = str(shape.dtype).removeprefix("torch.")
                about = dict(case=name, kernel=launch.kernel.__name__, dtype=dtype, stats=stats, arch=arch)
                table.append(about | dict(turned=launch.arguments.get("TURNED", False)) | describe(made))
    return table


def calls(shapes: dict[str, LossShape]) -> list[dict]:
    """A row for each call of these shapes, without and with statistics."""
    about = ((name, shape, stats) for name, shape in shapes.items() for stats in (False, True))
    return [
        dict(case=name, dtype=str(shape.dtype).removeprefix("torch."), stats=stats) | call(shape, stats)
        for name, shape, stats in about
    ]


COMPARED = ("warps", "registers", "spills", "shared", "instructions", "loop")


def changes(new: list[dict], old: list[dict]) -> list[str]:
    """Figures that differ between rows of the same kernel, case and GPU, as text."""

    def keyed(table: list[dict]) -> dict[tuple, dict]:
        return {(row["case"], row["kernel"], row["stats"], row["turned"], row["arch"]): row for row in table}

    now, before, found = keyed(new), keyed(old), []
    for key in now.keys() & before.keys():
        differ = [f"{name} {before[key][name]} → {now[key][name]}" for name in COMPARED if before[key][name] != now[key][name]]
        if differ:
            case, kernel, stats, turned, arch = key
            found.append(f"{case}, {kernel}{', stats' * stats}{', turned' * turned}, sm_{arch}: {', '.join(differ)}")
    return sorted(found)


def main() -> None:
    from pytest_benchmark.utils import get_commit_info

    from benchmarks.report import RESULTS, calls_table, kernels_table, rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only recipes whose names contain this; writes nothing")
    parser.add_argument("--against", help="a result file, or a commit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file, only = RESULTS / "kernels.json", arguments.only or ""
    old = None
    if arguments.against and Path(arguments.against).is_file():
        old = Path(arguments.against).read_text(encoding="utf-8")
    elif arguments.against:
        command = ["git", "show", f"{arguments.against}:./{file.name}"]
        old = subprocess.run(command, cwd=file.parent, check=True, capture_output=True, text=True).stdout
    entries = [
        dict(name=f"kernels[sm_{arch}]", extra_info=found)
        for arch in ARCHITECTURES
        for shapes in (LOSSES, CONVOLUTIONS)
        for found in offline(arch, {name: shape for name, shape in shapes.items() if only in name})
    ]
    found = calls({name: shape for name, shape in LOSSES.items() if only in name})
    entries += [dict(name="calls", extra_info=row) for row in found]
    import triton

    about = dict(gpu=f"compiled for {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}, not run", triton=triton.__version__)
    commit = {key: value for key, value in get_commit_info().items() if key in ("id", "time", "dirty")}
    result = json.dumps(dict(benchmarks=entries, machine_info=about, commit_info=commit), indent=1)
    with tempfile.TemporaryDirectory() as folder:
        if only:
            file = Path(folder) / file.name
        file.write_text(result + "\n", encoding="utf-8")
        print(kernels_table(file, everything=True))
        if old is not None:
            before = Path(folder) / "old.json"
            before.write_text(old, encoding="utf-8")
            differ = changes(rows(file, "kernels"), rows(before, "kernels"))
            print("\n".join(["", *(differ or ["no kernel differs"]), "", calls_table(file, before)]))


if __name__ == "__main__":
    main()
