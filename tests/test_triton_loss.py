"""The Triton loss without a GPU: interpreted and compared with float64, and compiled for three GPUs.

Triton decides at import whether it interprets, so each of the two runs in a separate process (`interpreted`, `compiler`); this
module itself never runs a kernel. tests/gpu/test_loss.py runs the same cases on a GPU.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import kernels
from d2v_fast.ops.reference import Moments
from tests.gate import BF16, FP16, FP32, NORMS, Case, gate, inputs, relative

pytest.importorskip("triton")

TEACHER_KERNELS = ("_loss_rows_kernel", "_loss_instance_kernel", "_channel_stats_kernel")


def _turn(values, i):
    return values[i % len(values)]


def _cases():
    """Every norm × target norm × form; the other settings cycle with coprime lengths, so that pairs of values meet."""
    dtypes = ((FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, BF16), (FP16, FP16), (BF16, FP32))
    for i, (norm, target_norm, dense) in enumerate(product(NORMS[:4], NORMS[:3], (False, True))):
        dtype, dtype_z = _turn(dtypes, i)
        yield Case(
            norm,
            target_norm,
            beta=_turn((0.0, 1.0, 4.0), i + i // 6),
            dense=dense,
            layout=_turn(("BTC", "TBC", "BTC", "strided", "BTC"), i),
            dtype=dtype,
            dtype_z=dtype_z,
            k=_turn((3, 1, 2, 8, 2, 12, 1, 3), i),
            channels=_turn((64, 100, 48, 64, 100, 130, 64, 20, 100), i),
            length=_turn((13, 33, 7, 100, 19, 16, 1, 50, 31, 5, 64), i),
            padded=_turn((False, True, True), i // 2),
        )


def _views():
    dtypes = ((FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP16))
    for i, (norm, target_norm, padded) in enumerate(product(NORMS, NORMS[:3], (False, True))):
        dtype, dtype_z = _turn(dtypes, i + i // 4)
        yield Case(
            norm,
            target_norm,
            beta=_turn((0.0, 1.0), i // 3),
            layout=_turn(("BTC", "TBC", "strided"), i // 2),
            dtype=dtype,
            dtype_z=dtype_z,
            k=_turn((2, 3, 1), i),
            channels=_turn((64, 100, 130, 48), i + i // 5),
            length=_turn((13, 7, 33, 18), i // 2 + i // 7),
            padded=padded,
            masked=_turn((0.5, 0.8, 0.15), i // 2),
            batch=3,
            reduction=_turn(("mean", "sum"), i // 2),
            views=_turn((1, 2, 8, 16), i),
            expanded=i % 7 == 3,
        )


CASES = [
    *_cases(),
    # The two hot cases at real widths.
    Case(channels=768, k=10, dtype=BF16, dtype_z=BF16, length=9),
    Case(channels=768, k=2, length=9, dense=True, padded=True, beta=1.0),
    Case(channels=1024, k=1, dtype=BF16, length=9),
    Case(channels=1280, k=2, dtype=FP16, length=9),
    Case("instance", channels=768, k=2, dtype=BF16, dtype_z=BF16, length=25, padded=True),
    Case("instance", channels=130, k=8, length=70, masked=0.2, layout="TBC"),
    Case("instance", "layer", channels=768, k=1, length=20, padded=True),
    # Masks: none, all, few, all of the unpadded ones.
    *(Case(norm, dense=dense, masked=0.0) for norm in ("layer", "instance") for dense in (False, True)),
    *(Case(norm, dense=True, masked=1.0, padded=True) for norm in ("layer", "instance", "batch")),
    Case("instance", masked=1.0, padded=True, batch=3),
    Case("layer", masked=1.0, padded=True, batch=5, length=13),  # the last sample is nearly all padding
    Case("instance", masked=0.05, length=90, beta=1.0),
    # Values that cancel in a single pass; more positions than a program's registers hold; the norm that no recipe uses.
    *(Case(norm, location=300.0, length=60, channels=24) for norm in NORMS),
    Case("none", location=300.0, length=100, k=1, dense=True, padded=True),
    *(Case(norm, location_z=300.0, channels=20) for norm in ("layer", "instance")),
    Case("instance", length=1030, channels=8, k=1, padded=True),
    Case("group", "instance", padded=True),
    # Several views: every norm × target norm, with every number of views, padding, and a mask stored once for all views.
    *_views(),
    # Squares that vanish next to epsilon, and squares that overflow.
    *(Case(norm, channels=24, magnitude=magnitude) for norm in NORMS for magnitude in (1e-30, 1e17, 1e19, 1e25, 1e37)),
    *(Case("none", target_norm, channels=24, magnitude=1e25) for target_norm in NORMS[1:3]),
    *(Case(beta=beta, channels=24, magnitude_z=magnitude) for beta in (0.0, 1.0) for magnitude in (1e-30, 1e18)),
]


def _interpret():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in a process where Triton interprets its kernels on the CPU."""
    with ProcessPoolExecutor(1, get_context("spawn"), _interpret) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(int).result()  # starts the process
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def interpreted_gate(case: Case) -> list[str]:
    return gate(case, "triton", rounding=2**-7 if case.dtype_z == BF16 else None)  # the interpreter truncates to bf16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(interpreted, case):
    assert interpreted(interpreted_gate, case) == []


def _wrong_number_of_rows(norm: str, n_rows: int) -> list[Tensor]:
    """Run with `n_rows` predictions for 12 masked positions; the memory after them holds NaN (input) or 7 (output)."""
    from d2v_fast.ops import triton_loss

    layers = [torch.randn(2, 9, 20) for _ in range(2)]
    mask = torch.arange(9).expand(2, 9) < 6
    z, memory = torch.full((40, 20), float("nan")), torch.full((40, 20), 7.0)
    z[:n_rows] = 1
    with mock.patch.object(torch, "empty_like", lambda x: memory[: len(x)]):
        loss, grad, _, count, *_ = triton_loss.loss(z[:n_rows], layers, mask, None, norm, "none", 0.0, 1.0, True, False, False)
    return loss, grad, count, memory


@pytest.mark.parametrize("norm", ["layer", "instance"])
@pytest.mark.parametrize("n_rows", [5, 16, 30])
def test_a_wrong_number_of_rows_stays_in_bounds(interpreted, norm, n_rows):
    loss, grad, count, memory = interpreted(_wrong_number_of_rows, norm, n_rows)
    assert loss.isfinite() and count == min(n_rows, 12)
    assert (memory[n_rows:] == 7).all() and (memory[:12] != 7).all() == (n_rows >= 12)
    assert (grad[12:18] == 0).all()


def _nan_where_unmasked(case: Case) -> list[Tensor]:
    """Loss, gradient and moments with a teacher that is NaN at each position that no view masks."""
    from d2v_fast import data2vec_loss

    z, layers, mask, _ = inputs(case)
    for x in layers:
        x[~(mask.any(1) if case.views else mask)] = float("nan")
    z.requires_grad_()
    loss, stats, _ = data2vec_loss(z, layers, mask, norm="layer", impl="triton", return_stats=True, return_target_mean=True)
    loss.backward()
    return [loss.detach(), z.grad, *stats.target, *stats.prediction]


@pytest.mark.parametrize("case", [Case(dense=True), Case(), Case(views=2)], ids=str)
def test_unscored_positions_may_hold_anything(interpreted, case):
    assert all(x.isfinite().all() for x in interpreted(_nan_where_unmasked, case))


def _finish(losses: Tensor, counts: Tensor, moments: Tensor) -> tuple[Tensor, ...]:
    from d2v_fast.ops import triton_loss

    out = torch.empty(()), torch.empty(()), torch.empty(()), torch.empty(4, 40)
    sizes = len(losses), len(counts)
    settings = dict(C=40, BLOCK_C=32, MEAN=True, WITH_STATS=True)
    triton_loss._finish_kernel[(2, 2)](losses, counts, moments, *out, *sizes, 0.5, **settings)
    return out


def test_many_partial_results(interpreted):
    """More results than the last kernel reads at once, some without rows, with means far from 0 and from each other."""
    losses, counts, moments = torch.rand(2500), torch.randint(0, 5, (1300,)).float(), torch.rand(4, 1300, 40)
    moments[0] += 300
    loss, factor, count, (*found,) = interpreted(_finish, losses, counts, moments)
    parts = moments.double()
    assert count == counts.sum() and relative(factor, 0.5 / counts.double().sum()) < 1e-6
    assert relative(loss, losses.double().sum() * factor) < 1e-6
    for i in (0, 2):
        pooled = Moments.pooled([Moments(*part) for part in zip(counts.double(), parts[i], parts[i + 1], strict=True)])
        assert relative(found[i], pooled.mean) < 1e-6 and relative(found[i + 1], pooled.m2) < 1e-5


def _opcheck(case: Case) -> dict:
    import d2v_fast.ops  # noqa: F401

    z, layers, mask, padding = inputs(case)
    arguments = (z, layers, mask, padding, case.norm, case.target_norm, case.beta, 1.0, True, True, True, "triton")
    return torch.library.opcheck(torch.ops.d2v_fast.loss, arguments)


@pytest.mark.parametrize("case", [Case(channels=20), Case("instance", dense=True, padded=True, channels=20)], ids=str)
def test_opcheck(interpreted, case):
    assert set(interpreted(_opcheck, case).values()) == {"SUCCESS"}


def _scaled(x: Tensor, factor: float, weight: float) -> Tensor:
    from d2v_fast.ops import triton_loss

    return triton_loss.scaled(x, torch.tensor(factor), torch.tensor(weight))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(5, 1000), (0, 7), (3, 4, 5)])
def test_scaled_in_fp32(interpreted, dtype, shape):
    x = torch.randn(shape).to(dtype)
    found = interpreted(_scaled, x, 3e-5, 1024.0)
    torch.testing.assert_close(found, (x.double() * 3e-5 * 1024).to(dtype), rtol=2**-7 if dtype == BF16 else 1e-3, atol=1e-6)


def test_only_layers_that_differ_are_copied():
    from d2v_fast.ops.triton_loss import _uniform

    layers = [torch.randn(2, 3, 32) for _ in range(5)]
    layers[2] = torch.randn(3, 2, 32).transpose(0, 1)
    layers[3] = torch.randn(2 * 3 * 32 + 1)[1:].view(2, 3, 32)  # starts 4 bytes too late
    made = _uniform(layers)
    assert [a is b for a, b in zip(made, layers, strict=True)] == [True, True, False, False, True]
    wide = [torch.randn(2, 1, 32).expand(2, 3, 32) for _ in range(2)]  # all positions in the same memory
    for before, after in ((layers, made), (wide, _uniform(wide))):
        assert len({x.stride() for x in after}) == 1 and all(x.data_ptr() % 16 == 0 for x in after)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_obstacles():
    from d2v_fast.ops import triton_loss

    assert triton_loss.obstacle(torch.device("cuda")) is None
    with mock.patch.object(triton_loss, "INTERPRETED", False):
        assert "found cpu" in triton_loss.obstacle(torch.device("cpu"))


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from d2v_fast.ops import triton_loss
assert "not installed" in triton_loss.obstacle(torch.device("cuda"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Calls a function in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        with mock.patch.dict(os.environ, environment, clear=True):
            pool.submit(int).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


ALL = tuple(kernels.LOSSES)
# Every kernel.
SOME = ("text", "tokens, then layer", "audio, 5 s", "audio, fp32", "vision, 16 views, fp32", "C not a multiple of 8")


@pytest.mark.parametrize(
    "arch, names",
    [(80, SOME), (90, ALL), (100, SOME), *(pytest.param(arch, ALL, marks=pytest.mark.slow) for arch in (80, 100))],
    ids=lambda value: str(value) if isinstance(value, int) else "all" if value == ALL else "some",
)
def test_compiles_without_spills(compiler, arch, names):
    table = compiler(kernels.offline, arch, {name: kernels.LOSSES[name] for name in names}, kernels.resources)
    for row in table:
        print(*row.values(), sep=" | ")
    assert {row["kernel"] for row in table} == set(kernels.LOSS_KERNELS)
    assert [(row["case"], row["stats"], row["spills"]) for row in table if row["spills"]] == []
    # The teacher, and nothing else is that large, is read 16 bytes at a time.
    for row in table:
        if row["kernel"] in TEACHER_KERNELS and row["case"] != "C not a multiple of 8":
            assert row["loads"].get(128, 0) > 0, row


@pytest.mark.parametrize("arch", kernels.ARCHITECTURES)
def test_padding_costs_few_instructions(compiler, arch):
    """A load of the padding as (T, 1) gets a layout that multiplies the instructions by 2.4."""
    names = ("audio, 5 s", "audio, 5 s, no padding")
    table = compiler(kernels.offline, arch, {name: kernels.LOSSES[name] for name in names})
    loops = {row["case"]: row["loop"] for row in table if row["kernel"] == "_loss_instance_kernel" and not row["stats"]}
    assert 0 < loops["audio, 5 s"] < 1.5 * loops["audio, 5 s, no padding"]
