"""The grouped convolution on a real GPU: the gate of tests/test_triton_conv.py at real sizes, and GPU-only properties."""

import pytest
import torch

from d2v_fast.ops import triton_conv
from tests.gate import FP16
from tests.gpu import ABSENT, DEVICE, needs_gpu, nothing_waits
from tests.test_triton_conv import CASES, RECIPES, Case, expected, gate, inputs, outcome

if ABSENT:
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

REAL = [
    *(case._replace(batch=33) for case in RECIPES.values()),
    *(case._replace(batch=5, dtype=FP16) for case in RECIPES.values()),
    Case((1, 249), 768, 768, (1, 128), 16, batch=4),  # of Wav2Vec2
]


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_against_float64(case):
    assert gate(case, DEVICE, sums=1e-4) == []  # tensor cores truncate sums instead of rounding


@pytest.mark.parametrize("case", REAL[:4], ids=str)
def test_two_runs_agree_bit_by_bit(case):
    first, second = outcome(case, DEVICE), outcome(case, DEVICE)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _step(case: Case, conv=triton_conv.conv):
    x, weight, bias, grad = inputs(case, DEVICE)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    return leaves, lambda: conv(x, weight, bias, case.groups).backward(grad)


@pytest.mark.parametrize("case", REAL[:4], ids=str)
def test_kernels_do_not_synchronise(case):
    _, step = _step(case)
    step()
    with nothing_waits():
        step()


@needs_gpu
@pytest.mark.parametrize("case", REAL[:4], ids=str)
def test_inside_a_compiled_step(case):
    leaves, step = _step(case)
    step()
    compiled_leaves, compiled_step = _step(case, torch.compile(triton_conv.conv, fullgraph=True))
    compiled_step()
    for leaf, compiled, tolerance in zip(leaves, compiled_leaves, (0, 0, 1e-4), strict=True):
        # The kernels are the same; the compiler sums the bias gradient in another order.
        torch.testing.assert_close(compiled.grad, leaf.grad, rtol=tolerance, atol=tolerance)


@needs_gpu
def test_inside_a_graph():
    x, weight, bias, grad = inputs(REAL[0], DEVICE)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]

    def step():
        return torch.autograd.grad(triton_conv.conv(*leaves, REAL[0].groups), leaves, grad)

    first = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for one, other in zip(captured, first, strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_another_grid_or_batch_compiles_nothing():
    kernels = triton_conv._conv_kernel, triton_conv._weight_grad_kernel
    counts = set()
    for batch, grid in ((3, (14, 14)), (16, (16, 16)), (1, (1, 7)), (5, (5, 1))):
        _step(Case(grid, 96, 96, (3, 3), 2, batch=batch))[1]()
        counts.add(sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()))
    assert len(counts) == 1


@needs_gpu
def test_more_than_32_bits_of_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    case = Case((1, 2048), 96, 96, (1, 7), 2, batch=1)
    _, weight, bias, _ = inputs(case, DEVICE)
    x = torch.zeros(11000, 1, 2048, 96, dtype=case.dtype, device=DEVICE)
    x[-2:].normal_()
    x.requires_grad_()
    weight.requires_grad_()
    y = triton_conv.conv(x, weight, bias, 2)
    grad = torch.zeros_like(y)
    grad[-2:].normal_()
    y.backward(grad)
    last, w = x.detach()[-2:].double().requires_grad_(), weight.detach().to(case.dtype).double().requires_grad_()
    truth = expected(last, w, bias.double(), 2)
    truth.backward(grad[-2:].double())
    torch.testing.assert_close(y[-2:].double(), truth, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(x.grad[-2:].double(), last.grad, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-2)
