"""The C++ loss against float64 (tests/gate.py), for every instruction set, and under PyTorch's autograd, compiler and DDP.

The settings have several million combinations. These are run: all 720 of norms, dtypes, beta, form and padding at one small
shape, and 1440 with several views; 63 cases (`PAIRS`) that cover every pair of values of any two settings; edge cases; and 300
random ones marked slow.
"""

import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2v_fast import Data2VecLoss, data2vec_loss, ops
from d2v_fast.ops import native
from tests.gate import BF16, FP16, FP32, NORMS, Case, faults, gate, inputs, outcome, relative

TARGET_NORMS = NORMS[:3]
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]

if not Path(native.__file__).with_name("libd2v_fast.so").exists():
    pytest.skip("the C++ library is not built: no cmake or no compiler", allow_module_level=True)

CROSS = dict(
    norm=NORMS,
    target_norm=TARGET_NORMS,
    beta=[0.0, 1.0, 4.0],
    form=["dense", "rows", 1, 2, 8, 16],  # a number is a number of views
    layout=["BTC", "TBC", "strided"],
    dtypes=[*DTYPES, (FP16, FP32), (FP32, BF16), (BF16, FP16)],
    k=[1, 2, 8, 12],
    channels=[64, 100, 768, 1024, 1280],
    length=[1, 7, 16, 50, 197, 800],
    padded=[False, True],
    masked=[0.0, 0.5, 1.0],
    reduction=["mean", "sum"],
)


def drawn(rng: random.Random, elements: int, **fixed) -> dict:
    """A random case whose layers hold at most `elements` per sample."""
    while True:
        case = {name: rng.choice(values) for name, values in CROSS.items()} | fixed
        views = case["form"] if isinstance(case["form"], int) else 1
        if max(case["k"], views) * case["channels"] * case["length"] <= elements:
            return case


def as_case(values: dict) -> Case:
    values = dict(values)
    (dtype, dtype_z), form = values.pop("dtypes"), values.pop("form")
    return Case(dtype=dtype, dtype_z=dtype_z, dense=form == "dense", views=form if isinstance(form, int) else 0, **values)


def pairwise() -> list[Case]:
    """Cases that cover every pair of values of any two settings, chosen greedily from random ones."""
    rng = random.Random(0)
    missing = dict.fromkeys(((a, x), (b, y)) for (a, xs), (b, ys) in combinations(CROSS.items(), 2) for x, y in product(xs, ys))
    cases = []
    while missing:
        pair = dict(next(iter(missing)))
        tried = [drawn(rng, 1_100_000, **pair) for _ in range(30)]
        best = max(tried, key=lambda case: sum(met in missing for met in combinations(case.items(), 2)))
        for met in combinations(best.items(), 2):
            missing.pop(met, None)
        cases.append(as_case(best))
    return cases


PAIRS = pairwise()
EDGES = [
    # More positions than a cache block holds, so columns are split; with statistics, over several samples.
    *(
        Case(norm, channels=channels, k=1, length=800, padded=True, masked=0.9)
        for norm in ("instance", "batch")
        for channels in (768, 1280)
    ),
    Case("none", "instance", channels=1000, k=1, length=800, dense=True, padded=True),
    Case("instance", channels=130, k=1, length=6000, batch=1, masked=0.1),
    Case("instance", channels=200, k=2, length=2000, layout="strided", dtype=BF16),
    Case("layer", channels=2048, k=2, length=40, dtype_z=BF16),
    # The same with several views, mostly or hardly masked.
    *(
        Case(norm, channels=768, k=1, length=750, views=2, masked=masked)
        for norm in ("instance", "layer")
        for masked in (0.8, 0.1)
    ),
    Case("instance", "layer", channels=1280, k=1, length=197, views=8, padded=True, dtype=BF16, dtype_z=BF16, masked=0.8),
    # Fewer channels than a vector holds, and every remainder of the unrolled loops.
    *(Case(norm, channels=channels) for norm, channels in product(("layer", "instance"), (1, 3, 15, 16, 17, 63, 65, 127))),
    # Samples of padding only, alone or between others.
    *(Case(norm, target_norm, length=7, padded=True, batch=4) for norm, target_norm in product(NORMS, TARGET_NORMS)),
    # Values that cancel in a single pass: |mean| = 300 σ.
    *(Case(norm, location=300.0, length=90, channels=200) for norm in NORMS),
    *(Case("none", target_norm, location=300.0, length=90, channels=200) for target_norm in TARGET_NORMS[1:]),
    *(Case(norm, location=300.0, length=90, padded=True, batch=3) for norm in NORMS),
    *(Case(norm, location_z=300.0, channels=20, length=200) for norm in ("layer", "instance")),
]
RANGE = (1e-30, 1e-10, 1e-3, 1e3, 1e10, 1e17, 1e18, 1e19, 1e20, 1e25, 1e37)


@pytest.mark.parametrize("norm, target_norm", list(product(NORMS, TARGET_NORMS)))
def test_every_setting_at_a_small_shape(norm, target_norm):
    wrong = {}
    for beta, dense, padded, (dtype, dtype_z) in product((0.0, 1.0, 4.0), (False, True), (False, True), DTYPES):
        case = Case(norm, target_norm, beta, dense, "BTC", dtype, dtype_z, k=2, channels=36, length=11, padded=padded)
        wrong[str(case)] = gate(case, "native")
    assert len(wrong) == 48 and {case: found for case, found in wrong.items() if found} == {}


@pytest.mark.parametrize("norm, target_norm", list(product(NORMS, TARGET_NORMS)))
def test_every_setting_of_several_views(norm, target_norm):
    wrong = {}
    settings = product((0.0, 1.0, 4.0), (1, 2, 8, 16), (False, True), DTYPES)
    for i, (beta, views, padded, (dtype, dtype_z)) in enumerate(settings):
        masked, expanded = (0.1, 0.5, 0.8, 1.0, 0.0)[i % 5], i % 3 == 1
        case = Case(
            norm, target_norm, beta, False, "BTC", dtype, dtype_z, 2, 36, 11, padded, masked, views=views, expanded=expanded
        )
        wrong[str(case)] = gate(case, "native")
    assert len(wrong) == 96 and {case: found for case, found in wrong.items() if found} == {}


@pytest.mark.parametrize("case", [*PAIRS, *EDGES], ids=str)
def test_against_float64(case):
    assert gate(case, "native") == []


@pytest.mark.parametrize("dtype, magnitudes", [(FP32, RANGE), (BF16, RANGE), (FP16, (1e-7, 1e-3, 1e3))])
def test_at_every_magnitude(dtype, magnitudes):
    wrong = {}
    for norm, target_norm, magnitude in product(NORMS, TARGET_NORMS, magnitudes):
        case = Case(norm, target_norm, dtype=dtype, length=24, magnitude=magnitude)
        wrong[str(case)] = gate(case, "native")
    assert {case: found for case, found in wrong.items() if found} == {}


@pytest.mark.parametrize("dtype_z", [FP32, BF16])
def test_at_every_magnitude_of_the_predictions(dtype_z):
    cases = [Case(dtype_z=dtype_z, magnitude_z=magnitude) for magnitude in RANGE]
    assert [gate(case, "native") for case in cases] == [[]] * len(cases)
    for beta, case in product((1e-30, 1.0, 1e30), cases):  # here the loss is finite where the moments are not
        found, exact = outcome(case._replace(beta=beta), "native"), outcome(case._replace(beta=beta), "eager", exact=True)
        assert relative(found["gradient"], exact["gradient"]) < (1e-5 if dtype_z == FP32 else 2**-7), (beta, case)
        assert relative(found["loss"], exact["loss"]) < 1e-5 or not found["loss"].isfinite(), (beta, case)


@pytest.mark.slow
def test_against_float64_anywhere():
    rng = random.Random(1)
    wrong = {str(case): gate(case, "native") for case in (as_case(drawn(rng, 8_000_000)) for _ in range(300))}
    assert {case: found for case, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    "case",
    [
        Case("layer", k=2, dtype=BF16, length=30, padded=True),
        Case("instance", "layer", 1.0, dense=True, k=2, channels=100, dtype=BF16, dtype_z=BF16, padded=True),
    ],
    ids=str,
)
def test_compile_against_float64(case):
    assert gate(case, "compile") == []


@pytest.mark.parametrize("wrong", [lambda g: 0 * g, lambda g: -g, lambda g: g / 2, lambda g: g * float("nan"), lambda g: g[1:]])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_gate_sees_a_wrong_gradient(wrong, dtype):
    case = Case(dtype_z=dtype)
    exact, eager, found = outcome(case, "eager", exact=True), outcome(case, "eager"), outcome(case, "native")
    assert faults(found, eager, exact) == []
    assert "gradient" in faults(found | dict(gradient=wrong(found["gradient"])), eager, exact, rounding=2**-7)[0]


# Instruction sets. The library selects one when it is loaded, so each runs in a separate process.

ISAS = ("baseline", "avx2", "avx512")
RUNS_HERE = ISAS[: {"AVX2": 2, "AVX512": 3}.get(torch.backends.cpu.get_cpu_capability(), 1)]


def _start():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN


def _isa() -> str:
    found = native.library()
    return found if isinstance(found, str) else found.d2v_isa().decode()


@pytest.fixture(scope="module", params=ISAS)
def build(request):
    """Calls a function in a process where this build runs."""
    if request.param not in RUNS_HERE:
        pytest.skip(f"the processor does not run {request.param}")
    with ProcessPoolExecutor(1, get_context("spawn"), _start) as pool:
        with mock.patch.dict(os.environ, D2V_ISA=request.param):
            assert pool.submit(_isa).result() == request.param
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def _gates(cases: list[Case]) -> dict:
    wrong = {str(case): gate(case, "native") for case in cases}
    return {case: found for case, found in wrong.items() if found}


def test_every_build_against_float64(build):
    small = [case for case in PAIRS if case.k * case.channels * case.length < 100_000]
    assert len(small) > 15
    assert build(_gates, [*small, *(case for case in EDGES if case.length < 800)]) == {}


def _conversions():
    """Bit by bit against PyTorch: with scale ½ and norm none the gradient is -target. Reads every half, writes floats."""
    one = torch.ones(1, 1, dtype=torch.bool)

    def gradient(targets, dtype):
        z = torch.zeros(1, targets.numel(), dtype=dtype)
        _, grad, factor, *_ = native.loss(z, [targets.view(1, 1, -1)], one, None, "none", "none", 0.0, 0.5, False, False, False)
        return grad, factor

    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (BF16, FP16):
        grad, _ = gradient(patterns.view(dtype), FP32)
        torch.testing.assert_close(grad[0], 0 - patterns.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    # Random floats, floats halfway between two bf16 or two fp16 or next to that, and the ends of the ranges.
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    halfway = [(bits & ~(2**n - 1) | 2 ** (n - 1)) + d for n in (13, 16) for d in (-1, 0, 1)]
    near_fp16 = [(part & 0x800FFFFF) | (103 + part % 42 << 23) for part in (bits, *halfway)]
    values = torch.cat([bits, *halfway, *near_fp16]).to(torch.int32).view(FP32)
    grad, _ = gradient(values, BF16)
    torch.testing.assert_close(grad[0], (0 - values).to(BF16), rtol=0, atol=0, equal_nan=True)
    grad, factor = gradient(values, FP16)
    exact = ((0 - values).double() / factor.double()).float()  # a power of two
    torch.testing.assert_close(grad[0], exact.to(FP16), rtol=0, atol=0, equal_nan=True)


def test_every_build_converts_as_pytorch_does(build):
    build(_conversions)


def test_an_unknown_build_is_refused():
    code = "from d2v_fast.ops import native; print(native.obstacle(__import__('torch').device('cpu')))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "D2V_ISA": "sse9"}).stdout
    assert "D2V_ISA='sse9': expected 'avx512', 'avx2' or 'baseline'" in found


# Threads


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "case",
    [
        *(Case(norm, channels=200, length=70, batch=3, padded=True) for norm in NORMS),
        Case("layer", "instance", channels=200, length=70, batch=3),
        Case("instance", "layer", channels=200, length=70, batch=3),
        *(Case(norm, channels=700, length=800, k=1, masked=1.0) for norm in ("instance", "batch")),  # the columns are split
    ],
    ids=str,
)
def test_threads_change_no_gradient(threads, case):
    found = {}
    for n in (1, 2, 5):
        threads(n)
        found[n], again = outcome(case, "native"), outcome(case, "native")
        assert all(torch.equal(value, again[name]) for name, value in found[n].items())
    for name, value in found[1].items():
        for n in (2, 5):
            if "gradient" in name:
                assert torch.equal(value, found[n][name])
            else:
                assert relative(found[n][name], value.double()) < 1e-6, name


def test_more_threads_than_work(threads):
    threads(5)
    for case in (Case(batch=1, length=3), Case("instance", batch=1), Case("batch", k=1, masked=0.0), Case("batch", length=0)):
        assert gate(case, "native") == [], case


# Values


def compared(z, layers, mask, **how) -> list[str]:
    """The gate on given tensors."""

    def run(z, layers, impl):
        z = z.clone().requires_grad_()
        loss, stats = data2vec_loss(z, layers, mask, impl=impl, return_stats=True, **how)
        loss.backward()
        return dict(loss=loss.detach(), gradient=z.grad, unscored=z.grad[~mask], target=stats.target.mean, std=stats.target.std)

    exact = run(z.double(), [x.double() for x in layers], "eager")
    return faults(run(z, layers, "native"), run(z, layers, "eager"), exact)


@pytest.mark.parametrize("target_norm", TARGET_NORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_constants_and_spikes(norm, target_norm, dtype):
    z, layers, mask, _ = inputs(Case(dense=True, length=90, channels=200))
    constant, spike, same_rows = ([x.clone() for x in layers] for _ in range(3))
    for x in constant:
        x[..., ::3] = 7.3
        x[0] = -2.7
    spike[0][0, 0] = 1e4  # the first rows and columns are what the kernels shift by
    spike[1][:, :, 0] = -1e4
    for x in same_rows:
        x[:] = x[:, :1].clone()
    for given_layers in (constant, spike, same_rows):
        assert compared(z, [x.to(dtype) for x in given_layers], mask, norm=norm, target_norm=target_norm) == []


@pytest.mark.parametrize("norm", NORMS[1:])
def test_a_mean_far_away_costs_less_than_in_eager(norm):
    """|mean| = 3000 σ: rounding the mean to fp32, as eager does, costs 1e-4."""
    case = Case(norm, location=3000.0, length=90, channels=200)
    assert relative(outcome(case, "native")["gradient"], outcome(case, "eager", exact=True)["gradient"]) < 1e-5


def test_fp16_gradients_at_the_ends_of_the_range():
    """Twice the error would overflow, and the error times 1/(√C·N) would underflow."""
    z, layers, mask, _ = inputs(Case(dense=True, length=400, dtype_z=FP16))
    for factor in (1e-3, 1.0, 1e4):
        assert compared((z * factor).clamp(-65504, 65504), layers, mask) == []
    z = torch.full((2, 400, 64), 65504.0, dtype=FP16)
    assert compared(z, [torch.full((2, 400, 64), -65504.0)], mask, norm="none") == []
    for reduction in ("mean", "sum"):
        q = torch.full((2, 400, 64), 60000.0, dtype=FP16, requires_grad=True)
        data2vec_loss(q, layers, mask, scale=1.0, reduction=reduction, impl="native").backward()
        assert q.grad[mask].isinf().all() == (reduction == "sum")  # as it must


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["prediction", "layer", "late"])
@pytest.mark.parametrize("norm, beta", list(product(NORMS, (0.0, 1.0))))
def test_nan_and_inf_give_a_non_finite_loss(norm, beta, where, bad):
    z, layers, mask, _ = inputs(Case(dense=True, length=40, channels=100))
    mask[1, 30] = True
    (z if where == "prediction" else layers[1])[1, 30, 90 if where == "late" else 5] = bad
    for target_norm in TARGET_NORMS:
        found = {}
        for impl in ("native", "eager"):
            q = z.clone().requires_grad_()
            loss = data2vec_loss(q, layers, mask, norm=norm, target_norm=target_norm, beta=beta, impl=impl)
            loss.backward()
            found[impl] = q.grad
            assert not loss.isfinite()
        assert torch.equal(found["native"].isnan(), found["eager"].isnan())


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_scored_may_hold_anything(norm):
    z, layers, mask, _ = inputs(Case(dense=True))
    how = dict(norm=norm, impl="native")
    expected = data2vec_loss(z, layers, mask, **how)
    z[~mask] = float("nan")
    if norm in ("none", "layer"):  # the others read every position
        for x in layers:
            x[~mask] = float("nan")
    z.requires_grad_()
    loss = data2vec_loss(z, layers, mask, **how)
    loss.backward()
    assert loss == expected and z.grad.isfinite().all() and (z.grad[~mask] == 0).all()


def test_no_channel_and_no_position():
    for shape in ((2, 5, 0), (2, 0, 5), (0, 5, 5)):
        for norm, target_norm in product(NORMS, TARGET_NORMS):
            z = torch.zeros(shape, requires_grad=True)
            mask = torch.ones(shape[:2], dtype=torch.bool)
            how = dict(norm=norm, target_norm=target_norm, scale=1.0, impl="native", return_stats=True)
            loss, stats = data2vec_loss(z, [torch.zeros(shape)], mask, **how)
            loss.backward()
            assert loss == 0 and stats.target.mean.shape == shape[2:] and z.grad.shape == shape


def test_layers_of_any_strides():
    z, layers, mask, _ = inputs(Case("instance", length=30))
    expanded = layers[0][:1, :1].expand_as(layers[0])
    mixed = [
        layers[0],
        layers[1].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        layers[2][:, :, :1].expand_as(layers[2]),
        expanded,
    ]
    for norm in NORMS:
        expected = data2vec_loss(z, [x.contiguous() for x in mixed], mask, norm=norm, impl="native")
        assert relative(data2vec_loss(z, mixed, mask, norm=norm, impl="native"), expected.double()) < 1e-6


def test_the_default_dtype_does_not_matter(default_dtype):
    for case in (Case(), Case("instance", channels=1000, dense=True)):
        expected, found = outcome(case, "eager"), outcome(case, "native")
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


# Autograd


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_autograd(dtype):
    z, layers, mask, _ = inputs(Case(dtype_z=dtype, channels=100))
    how = dict(impl="native", beta=1.0)
    assert data2vec_loss(z, layers, mask, **how).grad_fn is None  # nothing to differentiate
    z.requires_grad_()
    loss = data2vec_loss(z, layers, mask, **how)
    (once,) = torch.autograd.grad(loss, z, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, z, retain_graph=True)
    (zero,) = torch.autograd.grad(0 * loss, z, retain_graph=True)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.equal(once, again) and not zero.any()
    # With a factor left out, fp16 is rounded once more.
    assert relative(tripled, 3 * once.double()) < (1e-6 if dtype == FP32 else 1e-3)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    for _ in range(2):
        data2vec_loss(z, layers, mask, **how).backward()
    assert relative(z.grad, 2 * once.double()) < (1e-6 if dtype == FP32 else 1e-3)


@pytest.mark.parametrize("outer", [lambda loss: loss, lambda loss: loss**2, lambda loss: 0.5 * loss])
def test_second_derivatives_are_refused(outer):
    z, layers, mask, _ = inputs(Case())
    z.requires_grad_()
    (plain,) = torch.autograd.grad(outer(data2vec_loss(z, layers, mask, impl="native")), z)
    (first,) = torch.autograd.grad(outer(data2vec_loss(z, layers, mask, impl="native")), z, create_graph=True)
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match='no second derivative; use impl="eager" for the loss'):
        (first + z).square().sum().backward()  # only z would get a gradient


def test_inside_a_larger_graph():
    z, layers, mask, _ = inputs(Case(channels=100))
    gradients = []
    for impl in ("native", "eager"):
        head, x = torch.nn.Linear(100, 100), z.clone().requires_grad_()
        with torch.no_grad():
            head.weight.copy_(torch.eye(100) * 0.5)
            head.bias.zero_()
        y = head(x)
        both = data2vec_loss(y, layers, mask, impl=impl) + 2 * data2vec_loss(y, layers[:1], mask, norm="instance", impl=impl)
        (both.exp().log() + y.square().mean()).backward()
        gradients.append(torch.cat([x.grad.flatten(), head.weight.grad.flatten()]))
    assert relative(gradients[0], gradients[1].double()) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
def test_predictions_of_any_strides(dense):
    z, layers, mask, _ = inputs(Case(dense=dense))
    for strided in (torch.stack([z, z], -1)[..., 0], z.transpose(0, 1).contiguous().transpose(0, 1), z[..., :1].expand_as(z)):
        a, b = strided.detach().requires_grad_(), strided.clone(memory_format=torch.contiguous_format).requires_grad_()
        data2vec_loss(a, layers, mask.t().contiguous().t(), impl="native").backward()
        data2vec_loss(b, layers, mask, impl="native").backward()
        assert torch.equal(a.grad, b.grad)


def test_autocast():
    z, layers, mask, _ = inputs(Case(dtype=BF16))
    gradients = []
    for impl in ("native", "eager"):
        torch.manual_seed(0)
        head = nn.Linear(64, 64)
        with torch.autocast("cpu", dtype=BF16):
            y = head(z)
            loss = data2vec_loss(y, layers, mask, impl=impl)
        assert y.dtype == BF16 and loss.dtype == FP32
        loss.backward()
        gradients.append(head.weight.grad)
    assert relative(gradients[0], gradients[1].double()) < 5e-3


class Head(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.linear, self.loss = nn.Linear(64, 64), Data2VecLoss(**how)

    def forward(self, x, layers, mask, padding):
        return self.loss(self.linear(x), layers, mask, padding)


@pytest.mark.parametrize("impl, stats, dense", [*product(("native", "auto"), (False, True), (False, True))])
def test_inside_a_compiled_module(impl, stats, dense):
    x, layers, mask, padding = inputs(Case("instance", dense=dense, padded=True))
    x = x.nan_to_num()
    module = Head(norm="instance", beta=1.0, impl=impl, return_stats=stats)
    found = []
    torch._dynamo.reset()
    # inductor takes most of the time, so only one case uses it.
    backend = "inductor" if stats and dense and impl == "auto" else "aot_eager"
    for run in (module, torch.compile(module, fullgraph=True, backend=backend)):
        module.zero_grad()
        out = run(x, layers, mask, padding)
        (2 * (out[0] if stats else out)).backward()
        found.append([out[0], out[1].target.std, out[1].prediction.std] if stats else [out])
        found[-1].append(module.linear.weight.grad.clone())
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_views_inside_a_compiled_function():
    z, layers, mask, padding = inputs(Case(views=3, padded=True))
    how = dict(norm="instance", target_norm="layer", padding_mask=padding, impl="native")
    how |= dict(return_stats=True, return_target_mean=True)
    torch._dynamo.reset()
    found = []
    for run in (data2vec_loss, torch.compile(data2vec_loss, fullgraph=True, backend="aot_eager")):
        q = z.clone().requires_grad_()
        loss, stats, mean = run(q, layers, mask, **how)
        (2 * loss).backward()
        assert not mean.requires_grad and mean.shape == (2, 64)
        found.append([loss, q.grad, stats.target.std, stats.prediction.std, mean])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [-1, 3])
def test_a_wrong_number_of_rows_is_seen_when_traced(change):
    z, layers, mask, _ = inputs(Case())
    z = torch.zeros(len(z) + change, 64)
    run = torch.compile(data2vec_loss, fullgraph=True, backend="aot_eager")
    for call in (data2vec_loss, run):
        for norm in ("layer", "instance"):
            with pytest.raises(ValueError, match=f"predictions: found {len(z)} rows, expected {len(z) - change}"):
                call(z, layers, mask, norm=norm, impl="native")


@pytest.mark.parametrize(
    "case",
    [
        Case(channels=20),
        Case("instance", "instance", 1.0, True, "TBC", padded=True, dtype_z=FP16, dtype=BF16),
        Case("instance", "layer", channels=20, views=3, padded=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck(case, stats):
    z, layers, mask, padding = inputs(case)
    arguments = (z, layers, mask, padding, case.norm, case.target_norm, case.beta, 1.0, True, stats, stats, "native")
    assert set(torch.library.opcheck(torch.ops.d2v_fast.loss, arguments).values()) == {"SUCCESS"}
    scaled = torch.library.opcheck(torch.ops.d2v_fast.scaled, (z.nan_to_num(), torch.tensor(0.3), torch.tensor(2.0), "native"))
    assert set(scaled.values()) == {"SUCCESS"}


def _linear_gradient(views: int, share: slice, wrap=lambda model: model) -> torch.Tensor:
    torch.manual_seed(0)
    model, x, layers = nn.Linear(8, 24), torch.randn(4, views, 10, 8), [torch.randn(4, 10, 24) for _ in range(2)]
    mask = torch.rand(4, views, 10).argsort(-1) < 4  # the same number in each sample, so that a mean of means is the mean
    wrapped = wrap(model)
    for _ in range(2):  # the second one adds to the gradient
        scored = wrapped(x[share][mask[share]])
        data2vec_loss(scored, [y[share] for y in layers], mask[share].squeeze(1), norm="instance", impl="native").backward()
    return model.weight.grad


def _rank(rank: int, folder: Path, views: int):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradient = _linear_gradient(views, slice(2 * rank, 2 * rank + 2), nn.parallel.DistributedDataParallel)
    torch.save(gradient, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("views", [1, 3])
def test_two_processes_have_the_gradient_of_one(views, tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path, views), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert relative(first, _linear_gradient(views, slice(None)).double()) < 1e-6


# Falling back


@pytest.fixture
def choice_log(caplog):
    ops._log_choice.cache_clear()
    caplog.set_level("INFO", "d2v_fast.ops")
    yield caplog
    ops._log_choice.cache_clear()


def _missing(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    return "pip install"


def _broken(monkeypatch, tmp_path):
    (tmp_path / "libd2v_fast.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    return "does not load"


def _of_another_abi(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    return "pip install"


def test_a_norm_that_the_library_does_not_know():
    z, layers, mask, _ = inputs(Case())
    with pytest.raises(ValueError, match=r"norm=layr, target_norm=none: one of them is unknown to the C\+\+ library"):
        native.loss(z, layers, mask, None, "layr", "none", 0.0, 1.0, True, False, False)


@pytest.mark.parametrize("spoil", [_missing, _broken, _of_another_abi])
def test_without_a_library_that_fits(spoil, monkeypatch, tmp_path, choice_log):
    remedy = spoil(monkeypatch, tmp_path)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    z, layers, mask, _ = inputs(Case())
    eager = data2vec_loss(z, layers, mask, impl="eager")
    for _ in range(3):
        assert data2vec_loss(z, layers, mask) == eager
    assert len(choice_log.messages) == 1 and "cpu: eager" in choice_log.text and remedy in choice_log.text
    with pytest.raises(ValueError, match=f"impl='native' cannot run: .*{remedy}"):
        data2vec_loss(z, layers, mask, impl="native")


def test_unsupported_dtypes(choice_log):
    z, layers, mask, _ = inputs(Case())
    for _ in range(3):
        assert data2vec_loss(z.double(), [x.double() for x in layers], mask).dtype == torch.float64
    assert len(choice_log.messages) == 1 and "eager (native: found torch.float64" in choice_log.text
    with pytest.raises(ValueError, match=r"impl='native' cannot run: found torch.float64, expected torch.float32"):
        data2vec_loss(z.double(), layers, mask, impl="native")
    with pytest.raises(ValueError, match="impl='native' cannot run: the teacher layers differ in dtype"):
        data2vec_loss(z, [layers[0].half(), *layers[1:]], mask, impl="native")


def test_auto_selects_native(choice_log):
    z, layers, mask, _ = inputs(Case())
    with mock.patch.object(native, "loss", wraps=native.loss) as kernel:
        for _ in range(3):
            data2vec_loss(z, layers, mask)
    assert kernel.call_count == 3 and choice_log.messages == ["data2vec loss on cpu: native"]


# Properties


@st.composite
def cases(draw):
    return Case(
        norm=draw(st.sampled_from(NORMS)),
        target_norm=draw(st.sampled_from(TARGET_NORMS)),
        beta=draw(st.sampled_from([0.0, 0.5, 3.0])),
        dense=True,
        k=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 40)),
        length=draw(st.integers(1, 20)),
        batch=draw(st.integers(1, 4)),
        masked=draw(st.sampled_from([0.2, 0.5, 1.0])),
    )


def loss_and_gradient(case, z, layers, mask, padding=None, **more):
    z = z.detach().clone().requires_grad_()
    how = dict(norm=case.norm, target_norm=case.target_norm, beta=case.beta, padding_mask=padding, impl="native") | more
    loss = data2vec_loss(z, layers, mask, **how)
    loss.backward()
    return loss.detach(), z.grad


# A norm over few nearly equal values magnifies rounding by up to 1/√eps.
close = dict(rtol=1e-4, atol=1e-4)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@few
@given(cases(), st.randoms(use_true_random=False))
def test_order_and_appended_padding_do_not_matter(case, rng):
    z, layers, mask, _ = inputs(case)
    loss, gradient = loss_and_gradient(case, z, layers, mask)

    samples = rng.sample(range(case.batch), case.batch)
    permuted = loss_and_gradient(case, z[samples], [x[samples] for x in rng.sample(layers, case.k)], mask[samples])
    torch.testing.assert_close(permuted, (loss, gradient[samples]), **close)

    def longer(x, fill):
        return torch.cat([x, torch.full((case.batch, 3, *x.shape[2:]), fill, dtype=x.dtype)], 1)

    padding = longer(torch.zeros_like(mask), True)
    nan = float("nan")
    padded = loss_and_gradient(case, longer(z, nan), [longer(x, nan) for x in layers], longer(mask, True), padding)
    torch.testing.assert_close(padded, (loss, longer(gradient, 0.0)), **close)


@few
@given(cases())
def test_twice_the_scale_is_twice_the_loss(case):
    z, layers, mask, _ = inputs(case)
    once, twice = (loss_and_gradient(case, z, layers, mask, scale=scale) for scale in (0.3, 0.6))
    assert torch.equal(2 * once[0], twice[0]) and torch.equal(2 * once[1], twice[1])


@few
@given(cases())
def test_the_gradient_is_the_slope_of_the_loss(case):
    z, layers, mask, _ = inputs(case)
    _, gradient = loss_and_gradient(case, z, layers, mask)
    direction, exact = torch.randn(z.shape, dtype=torch.float64), [x.double() for x in layers]
    ahead, behind = (
        data2vec_loss(z + h * direction, exact, mask, norm=case.norm, target_norm=case.target_norm, beta=case.beta)
        for h in (1e-5, -1e-5)
    )
    slope = (gradient * direction).sum()
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, **close)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("norm", ["layer", "instance", "batch"])
def test_workspace_memory_is_freed(norm):
    z, layers, mask, _ = inputs(Case(channels=768, k=1, length=300, batch=1))

    def used():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(times):
        for _ in range(times):
            data2vec_loss(z, layers, mask, norm=norm, impl="native", return_stats=True)

    run(20)
    before = used()
    run(200)
    assert used() - before < 8 << 20  # a workspace is about 1 MB
