"""The Triton convolution without a GPU: interpreted and compared with float64, and compiled for three GPUs.

As in tests/test_triton_loss.py, each of the two runs in a separate process; tests/gpu/test_conv.py runs these cases on a GPU.
"""

import subprocess
import sys
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels
from tests import test_triton_loss
from tests.gate import BF16, FP16, FP32, relative

pytest.importorskip("triton")

interpreted, compiler = test_triton_loss.interpreted, test_triton_loss.compiler


class Case(NamedTuple):
    grid: tuple[int, int]  # H, W
    c_in: int
    c_out: int
    kernel: tuple[int, int]
    groups: int
    batch: int = 2
    dtype: torch.dtype = BF16
    dtype_weight: torch.dtype = FP32
    bias: bool = True

    def __str__(self):
        return "-".join(str(value).removeprefix("torch.") for value in self)


CASES = [
    # Speech: odd and even kernels, one as long as the grid and one that is longer, more positions than a tile has.
    Case((1, 30), 96, 96, (1, 19), 2),
    Case((1, 200), 48, 24, (1, 7), 1, batch=1),
    Case((1, 31), 48, 96, (1, 4), 2, dtype=FP16),
    Case((1, 5), 64, 64, (1, 5), 4),
    Case((1, 3), 64, 32, (1, 8), 16, bias=False),
    Case((1, 1), 32, 32, (1, 3), 2, batch=5),
    Case((1, 70), 128, 64, (1, 1), 1),
    # Images: grids of unequal sides, samples that begin and end inside a tile.
    Case((5, 4), 96, 96, (3, 3), 2, batch=3),
    Case((7, 3), 64, 128, (3, 3), 1, dtype=FP16, dtype_weight=FP16),
    Case((3, 9), 96, 48, (4, 4), 4, dtype_weight=BF16),
    Case((2, 2), 48, 48, (5, 5), 1, dtype=FP16),
    Case((6, 5), 64, 64, (3, 5), 16, batch=1),
    Case((4, 6), 64, 96, (2, 3), 2, dtype=FP16, bias=False),
    # More output channels than a tile holds; channels that do not fill a vector.
    Case((3, 4), 16, 160, (3, 3), 1),
    Case((4, 4), 10, 15, (3, 3), 5),
]


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight, bias and the gradient of the output."""
    random = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    x = torch.randn(case.batch, *case.grid, case.c_in, **random).to(case.dtype)
    fan_in = case.c_in // case.groups * case.kernel[0] * case.kernel[1]
    weight = (torch.randn(case.c_out, case.c_in // case.groups, *case.kernel, **random) / fan_in**0.5).to(case.dtype_weight)
    bias = torch.randn(case.c_out, **random).to(case.dtype_weight) if case.bias else None
    return x, weight, bias, torch.randn(case.batch, *case.grid, case.c_out, **random).to(case.dtype)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The reference in plain torch."""
    height, width = x.shape[1:3]
    y = F.conv2d(x.movedim(-1, 1), weight, bias, padding=[side // 2 for side in weight.shape[2:]], groups=groups)
    return y[:, :, :height, :width].movedim(1, -1)


def outcome(case: Case, device: str = "cpu", exact: bool = False) -> dict[str, Tensor]:
    """Output and gradients; from torch in float64 if `exact`."""
    from d2v_fast.ops.triton_conv import conv

    x, weight, bias, grad = inputs(case, device)
    if exact:
        weight = weight.to(case.dtype)
        x, weight, bias, grad = (None if t is None else t.double() for t in (x, weight, bias, grad))
    leaves = dict(x=x, weight=weight) | ({} if bias is None else dict(bias=bias))
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = (expected if exact else conv)(x, weight, bias, case.groups)
    y.backward(grad)
    return dict(y=y.detach()) | {name: leaf.grad for name, leaf in leaves.items()}


def gate(case: Case, device: str = "cpu", rounding: float = 0.5, sums: float = 1e-5) -> list[str]:
    """Errors against float64 above `rounding` units in the last place plus `sums` for fp32 accumulation, as text."""
    wrong = []
    truth = outcome(case, device, exact=True)
    for name, value in outcome(case, device).items():
        dtype = case.dtype if name in ("y", "x") else case.dtype_weight
        if value.dtype != dtype or not value.is_contiguous():
            wrong.append(f"{name}: {value.dtype}, strides {value.stride()}")
        error = (value.double() - truth[name]).abs()
        allowed = truth[name].abs() * torch.finfo(dtype).eps * rounding + sums * truth[name].abs().max()
        if not (error <= allowed).all():
            wrong.append(f"{name}: off by {relative(value, truth[name]):.1e}")
    return wrong


def interpreted_gate(case: Case) -> list[str]:
    return gate(case, rounding=1)  # the interpreter truncates to bf16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(interpreted, case):
    assert interpreted(interpreted_gate, case) == []


def _splits(programs: int) -> list[Tensor]:
    from d2v_fast.ops import triton_conv

    x, weight, _, grad = inputs(Case((1, 300), 48, 48, (1, 3), 2, batch=3))
    with mock.patch.object(triton_conv, "PROGRAMS", programs):
        return [torch.ops.d2v_fast.conv_weight_grad(x, grad, weight.shape[2:], 2) for _ in range(2)]


def test_the_weight_gradient_in_parts(interpreted):
    """Split over so many programs that the last one gets few positions or none; a second call gives the same bits."""
    whole, _ = interpreted(_splits, 1)
    parts = [interpreted(_splits, programs) for programs in (4, 8, 14, 1000)]
    assert not torch.equal(parts[0][0], whole)
    for first, second in parts:
        assert torch.equal(first, second)
        assert relative(first, whole.double()) < 1e-6


def _strided() -> list[tuple[Tensor, ...]]:
    from d2v_fast.ops.triton_conv import conv

    x, weight, bias, grad = inputs(Case((3, 5), 32, 32, (3, 3), 2))
    found = []
    for strided in (False, True):
        if strided:
            x, grad = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (x, grad))
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = conv(*leaves, bias, 2)
        y.backward(grad)
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    return found


def test_tensors_that_are_not_contiguous(interpreted):
    for one, other in zip(*interpreted(_strided), strict=True):
        assert torch.equal(one, other)


def _launches_of_a_step(needed: str) -> list[str]:
    from d2v_fast.ops import triton_conv

    x, weight, bias, grad = inputs(Case((1, 9), 32, 32, (1, 3), 2))
    dict(x=x, weight=weight, bias=bias)[needed].requires_grad_()
    with kernels.recorded(triton_conv, kernels.CONV_KERNELS) as launches:
        triton_conv.conv(x, weight, bias, 2).backward(grad)
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize(
    "needed, launches", [("x", kernels.CONV_KERNELS[:1]), ("weight", kernels.CONV_KERNELS[1:]), ("bias", ())]
)
def test_only_gradients_that_are_needed(interpreted, needed, launches):
    assert interpreted(_launches_of_a_step, needed) == ["_conv_kernel", *launches]


def _empty() -> tuple[Tensor, ...]:
    from d2v_fast.ops.triton_conv import conv

    x = torch.zeros(0, 3, 4, 32, dtype=BF16, requires_grad=True)
    weight = torch.randn(48, 16, 3, 3, requires_grad=True)
    y = conv(x, weight, torch.randn(48), 2)
    y.sum().backward()
    return y.detach(), x.grad, weight.grad


def test_no_sample(interpreted):
    y, grad_x, grad_weight = interpreted(_empty)
    assert y.shape == (0, 3, 4, 48) and grad_x.shape == (0, 3, 4, 32)
    assert torch.equal(grad_weight, torch.zeros(48, 16, 3, 3))


def _opcheck() -> list[dict]:
    import d2v_fast.ops.triton_conv  # noqa: F401

    x, weight, bias, grad = inputs(Case((3, 5), 32, 48, (3, 3), 2))
    ops = torch.ops.d2v_fast
    calls = [
        (ops.conv, (x, weight, bias, 2, False)),
        (ops.conv, (grad, weight, None, 2, True)),
        (ops.conv_weight_grad, (x, grad, [3, 3], 2)),
    ]
    return [torch.library.opcheck(op, arguments) for op, arguments in calls]


def test_opcheck(interpreted):
    assert {status for found in interpreted(_opcheck) for status in found.values()} == {"SUCCESS"}


def _compiled() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from d2v_fast.ops import triton_conv

    case = Case((3, 5), 32, 48, (3, 3), 2)
    plain = outcome(case)
    compiled = torch.compile(triton_conv.conv, fullgraph=True, backend="aot_eager", dynamic=True)
    with mock.patch.object(triton_conv, "conv", compiled):
        return plain, outcome(case)


def test_inside_a_compiled_step(interpreted):
    plain, compiled = interpreted(_compiled)
    for name, value in plain.items():
        assert torch.equal(value, compiled[name]), name


def _refused(*shapes, dtype=BF16, groups=2) -> str:
    from d2v_fast.ops.triton_conv import conv

    with pytest.raises(ValueError) as error:
        conv(torch.zeros(shapes[0], dtype=dtype), torch.zeros(shapes[1]), None, groups)
    return str(error.value)


def _refusals() -> list[str]:
    return [
        _refused((2, 3, 5, 32), (32, 16, 3, 3), dtype=FP32),
        _refused((2, 5, 32), (32, 16, 3)),
        _refused((2, 3, 5, 32), (32, 32, 3, 3)),
        _refused((2, 3, 5, 32), (31, 16, 3, 3)),
    ]


def test_refusals(interpreted):
    dtype, *shapes = interpreted(_refusals)
    assert "found torch.float32, expected torch.bfloat16 or torch.float16" in dtype
    assert all("expected (N, H, W, C_in)" in shape for shape in shapes)


def _second_derivative() -> str:
    from d2v_fast.ops.triton_conv import conv

    x, weight, _, _ = inputs(Case((1, 5), 32, 32, (1, 3), 2))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conv(x, weight, None, 2).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as error:
        grad.sum().backward()
    return str(error.value)


def test_no_second_derivative(interpreted):
    assert "no second derivative" in interpreted(_second_derivative)


def test_obstacles():
    from d2v_fast.ops import triton_conv, triton_loss

    assert triton_conv.obstacle(torch.device("cuda"), BF16) is None
    assert "found torch.float32" in triton_conv.obstacle(torch.device("cuda"), FP32)
    with mock.patch.object(triton_loss, "INTERPRETED", False):
        assert "found cpu" in triton_conv.obstacle(torch.device("cpu"), BF16)


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from d2v_fast.ops import triton_conv
assert "not installed" in triton_conv.obstacle(torch.device("cuda"), torch.bfloat16)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


RECIPES = {name: Case(*shape[:5], dtype=shape.dtype) for name, shape in kernels.CONVOLUTIONS.items()}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(compiler, arch):
    table = compiler(kernels.offline, arch, kernels.CONVOLUTIONS, kernels.resources)
    for row in table:
        print(*row.values(), sep=" | ")
    assert {row["kernel"] for row in table} == set(kernels.CONV_KERNELS)
    assert [row for row in table if row["spills"] or row["shared"] > 99 * 1024] == []
    assert {width for row in table for width in row["copies"]} == {16} and all(row["copies"] for row in table)
    assert arch != 90 or all(row["wgmma"] for row in table)
