"""The fused loss on a real GPU: the gate of tests/test_triton_loss.py at real sizes, and GPU-only properties."""

from itertools import product

import pytest
import torch

from d2v_fast import data2vec_loss
from tests.gate import BF16, FP16, FP32, NORMS, Case, gate, inputs, outcome
from tests.gpu import ABSENT, DEVICE, needs_gpu, nothing_waits
from tests.test_triton_loss import CASES

if ABSENT:
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

HOT = [
    Case(channels=768, length=512, k=10, dtype=BF16, dtype_z=BF16, masked=0.15, batch=8),
    Case(channels=768, length=197, k=6, dtype=BF16, dtype_z=BF16, masked=0.6, batch=64, beta=2.0),
    Case("instance", channels=768, length=800, k=8, dtype=BF16, dtype_z=BF16, batch=4, padded=True),
    Case("instance", "layer", channels=768, length=196, k=10, dtype=BF16, dtype_z=BF16, masked=0.8, batch=8, views=16),
    Case("instance", channels=768, length=750, k=8, dtype=BF16, dtype_z=BF16, batch=2, padded=True, views=8),
    Case(channels=768, length=512, k=12, dtype=BF16, dtype_z=BF16, masked=0.48, batch=2, views=8),
]
REAL = [
    Case(norm, target_norm, beta, dense, dtype=dtype, dtype_z=dtype_z, k=12, channels=768, length=length, padded=padded)
    for norm, target_norm, beta, dense, (dtype, dtype_z), (length, padded) in product(
        NORMS[:4],
        NORMS[:3],
        (0.0, 1.0),
        (False, True),
        ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16)),
        ((800, True), (197, False)),
    )
]
WIDE = [
    Case(norm, dtype=dtype, channels=channels, length=length, k=2, layout=layout, batch=4)
    for norm, dtype, channels, length, layout in product(
        ("layer", "instance", "batch"), (FP32, BF16), (64, 100, 1024, 1280, 2048), (50, 1500), ("BTC", "TBC", "strided")
    )
]


VIEWS = [
    Case(norm, target_norm, 1.0, dtype=dtype, dtype_z=dtype, k=3, channels=768, length=length, padded=padded, views=views)
    for norm, target_norm, dtype, (length, padded, views) in product(
        NORMS, NORMS[:3], (FP32, BF16), ((196, False, 16), (300, True, 8), (1100, True, 2), (50, False, 1))
    )
]
MORE = [pytest.param(case, marks=pytest.mark.slow) for case in (*REAL, *WIDE, *VIEWS)]  # minutes to compile


@pytest.mark.parametrize("case", [*HOT, *CASES, *MORE], ids=str)
def test_against_float64(case):
    assert gate(case, "triton", DEVICE) == []


def _step(case, run=data2vec_loss):
    z, layers, mask, padding = inputs(case, DEVICE)
    z.requires_grad_()
    settings = dict(norm=case.norm, target_norm=case.target_norm, beta=case.beta, padding_mask=padding)
    return z, lambda: run(z, layers, mask, impl="triton", **settings).backward()


@pytest.mark.parametrize("case", HOT, ids=str)
def test_two_runs_agree_bit_by_bit(case):
    first, second = outcome(case, "triton", DEVICE), outcome(case, "triton", DEVICE)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("target_norm", ["none", "layer", "instance"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["rows", "dense", "views"])
def test_kernels_do_not_synchronise(norm, target_norm, form):
    _, step = _step(Case(norm, target_norm, dense=form == "dense", padded=True, views=3 if form == "views" else 0))
    step()
    with nothing_waits():
        step()


@needs_gpu
@pytest.mark.parametrize("case", HOT, ids=str)
def test_captured_in_a_graph(case):
    z, step = _step(case)
    step()
    expected, z.grad = z.grad, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    z.grad.fill_(float("nan"))
    graph.replay()
    assert torch.equal(z.grad, expected)


@needs_gpu
@pytest.mark.parametrize("case", HOT, ids=str)
def test_inside_a_compiled_step(case):
    z, step = _step(case)
    step()
    compiled_z, compiled_step = _step(case, torch.compile(data2vec_loss, fullgraph=True))
    compiled_step()
    torch.testing.assert_close(compiled_z.grad, z.grad)


@needs_gpu
@pytest.mark.parametrize("views", [0, 8])
@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_another_length_or_number_of_rows_compiles_nothing(norm, views):
    from d2v_fast.ops import triton_loss

    kernel = triton_loss._loss_rows_kernel if norm == "layer" else triton_loss._loss_instance_kernel

    def compiled():
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    counts = set()
    for length, masked in ((97, 0.5), (101, 0.2), (112, 0.3), (128, 0.9), (65, 0.01)):
        _step(Case(norm, length=length, masked=masked, views=views))[1]()
        counts.add(compiled())
    assert len(counts) == 1


@needs_gpu
def test_auto_takes_it(caplog):
    _, layers, mask, _ = inputs(Case(), DEVICE)
    with caplog.at_level("INFO", "d2v_fast.ops"):
        data2vec_loss(torch.zeros(int(mask.sum()), 64, device=DEVICE), layers, mask)
    assert not caplog.messages or "triton" in caplog.text
