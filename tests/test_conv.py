"""The convolutions over speech as matrix products: features and gradients of the stack of transformers."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2v_fast.ops import conv, native
from tests import models
from tests.test_native_loss import RUNS_HERE

PUBLISHED = dict(
    conv_dim=(24,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2), num_feat_extract_layers=7
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def stacks(name="data2vec-audio", **config):
    plain = models.build_encoder(name, config=models.CONFIGS[name] | config).model.feature_extractor
    fast = copy.deepcopy(plain)
    assert conv.use_matrix_products(fast)
    return plain, fast


@pytest.mark.parametrize(
    "name, config",
    [
        ("data2vec-audio", {}),
        ("wav2vec2", dict(feat_extract_norm="layer")),
        ("hubert", dict(feat_extract_norm="layer", conv_bias=True)),
        # The published stack, narrow; kernels of one, two and three strides; widths that no vector divides.
        ("data2vec-audio", PUBLISHED),
        ("data2vec-audio", dict(conv_dim=(7, 33, 18), conv_kernel=(10, 8, 4), conv_stride=(5, 3, 4), conv_bias=True)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch, samples", [(1, 1000), (3, 1237)])
def test_features_and_gradients_are_those_of_transformers(name, config, batch, samples):
    plain, fast = stacks(name, **config)
    plain.double().eval()  # in train mode it does not accept a waveform that requires a gradient
    wave = torch.randn(batch, samples, requires_grad=True)
    exact = wave.detach().double().requires_grad_()
    expected, found = plain(exact), fast(wave)
    assert found.shape == expected.shape and relative(found, expected) < 1e-5
    weight = torch.randn(found.shape)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    for (parameter, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert q.grad.shape == p.grad.shape and relative(q.grad, p.grad) < 1e-4, parameter
    assert relative(wave.grad, exact.grad) < 1e-4


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kernel, stride", [(10, 5), (3, 2), (2, 2), (8, 3)])
def test_a_convolution_and_its_gradients(channels, kernel, stride):
    """One channel is included; no stack has that after a norm, which would zero it."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((61, channels), (4, channels, kernel), (4,))]
    x, weight, bias = (tensor.double() for tensor in inputs)
    expected, found = F.conv1d(x.t(), weight, bias, stride).t(), conv._Convolution.apply(*inputs, stride)
    grad = torch.randn(found.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, exact in zip(*(torch.autograd.grad(y, inputs, grad.to(y.dtype)) for y in (found, expected)), strict=True):
        assert relative(ours, exact) < 1e-5


def test_samples_do_not_touch_each_other():
    _, fast = stacks()
    waves = torch.randn(3, 1237)
    together = fast(waves)
    for wave, row in zip(waves, together, strict=True):
        torch.testing.assert_close(fast(wave[None])[0], row, rtol=1e-4, atol=1e-5)
    waves[1] = float("nan")
    assert torch.equal(fast(waves)[0], together[0]) and torch.equal(fast(waves)[2], together[2])


def test_samples_that_no_frame_reads_do_not_matter():
    plain, fast = stacks()
    waves = torch.randn(2, 1237)
    waves[:, -1] = float("nan")
    for extractor in (plain, fast):
        extractor(waves.clone()).sum().backward()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch, samples", [(2, 30), (0, 400)])
def test_the_shortest_waveform_and_none(batch, samples):
    plain, fast = stacks()
    waves = torch.randn(batch, samples)
    torch.testing.assert_close(fast(waves), plain(waves.clone()), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="waveforms: found 29 samples, expected at least 30"):
        fast(torch.randn(2, 29))


def test_replacement_is_idempotent_and_saves_the_original_layout(tmp_path):
    _, fast = stacks()
    kind = type(fast)
    assert conv.use_matrix_products(fast) and type(fast) is kind
    torch.save(fast, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is type(copy.deepcopy(fast)) is kind
    wave = torch.randn(2, 400)
    assert torch.equal(loaded(wave), fast(wave))


def test_under_autocast_it_is_as_exact_as_transformers():
    plain, fast = stacks()
    wave = torch.randn(2, 1500)
    exact = copy.deepcopy(plain).double()(wave.double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = plain(wave.clone()), fast(wave)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 1.5 * relative(theirs, exact)


def test_unsupported_stacks_are_left_to_torch():
    group = models.build_encoder("wav2vec2", config=models.CONFIGS["wav2vec2"] | dict(feat_extract_norm="group"))
    kind = type(group.model.feature_extractor)
    assert not conv.use_matrix_products(group.model.feature_extractor) and type(group.model.feature_extractor) is kind
    relu = models.build_encoder(
        "data2vec-audio", config=models.CONFIGS["data2vec-audio"] | dict(feat_extract_activation="relu")
    )
    assert not conv.use_matrix_products(relu.model.feature_extractor)
    tanh = models.build_encoder("data2vec-audio", config=models.CONFIGS["data2vec-audio"]).model.feature_extractor
    tanh.conv_layers[0].activation = nn.GELU(approximate="tanh")
    assert not conv.use_matrix_products(tanh)
    assert not conv.use_matrix_products(None) and not conv.use_matrix_products(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_left_to_torch(dtype):
    """The kernel reads parameters as fp32."""
    plain, fast = stacks()
    wave = torch.randn(2, 1000).to(dtype)
    expected, found = plain.to(dtype)(wave.clone()), fast.to(dtype)(wave)
    assert found.dtype == dtype and relative(found, expected) < (2e-2 if dtype == torch.bfloat16 else 1e-12)


def test_without_the_library_it_is_left(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: "the C++ library is not built")
    built = models.build_encoder("data2vec-audio", config=models.CONFIGS["data2vec-audio"])
    assert not conv.use_matrix_products(built.model.feature_extractor)


def norm_gelu(x, weight, bias):
    return conv.norm_gelu(x, weight, bias, 1e-5)


def reference(x, weight, bias):
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 16), (33, 100), (2000, 512)])
@pytest.mark.parametrize("location", [0.0, 100.0])
def test_norm_and_gelu_against_float64(dtype, rows, columns, location):
    """error ≤ 2 · error of torch in the same dtype + a few roundings, for values and all gradients."""
    x = (torch.randn(rows, columns) + location).to(dtype)
    weight, bias, grad = torch.randn(columns) + 1, torch.randn(columns), torch.randn(rows, columns).to(dtype)

    def run(function, kind):
        parameters = [p.to(torch.promote_types(kind, torch.float32)) for p in (weight, bias)]
        inputs = [tensor.clone().requires_grad_() for tensor in (x.to(kind), *parameters)]
        y = function(*inputs)
        y.backward(grad.to(kind))
        return [y.detach(), *(t.grad for t in inputs)]

    exact, torchs, ours = run(reference, torch.float64), run(reference, dtype), run(norm_gelu, dtype)
    for name, a, b, c in zip(("y", "x", "weight", "bias"), exact, torchs, ours, strict=True):
        assert c.dtype == b.dtype and c.shape == b.shape
        rounding = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        # One column is constant after the norm: its gradient is only rounding.
        if columns > 1 or name != "x":
            assert relative(c, a) <= 2 * relative(b, a) + rounding * (1 + location / 10), name


def test_the_default_dtype_does_not_matter(default_dtype):
    x, weight, bias = torch.randn(3, 8, 8, dtype=torch.float32)
    y, stats = native.norm_gelu(x, weight[0], bias[0], 1e-5)
    assert stats.dtype == torch.float32  # written by the kernel
    torch.testing.assert_close(y, reference(x, weight[0], bias[0]))


def test_the_whole_range_of_gelu():
    """Large, infinite and NaN values, made by a norm whose weight is 0 and whose bias is the value."""
    values = torch.cat([torch.linspace(-12, 12, 997), torch.tensor([-1e4, 1e4, 90.0, -90.0, float("inf"), float("nan"), 0.0])])
    y, _ = native.norm_gelu(torch.zeros(1, len(values)), torch.zeros(len(values)), values, 1e-5)
    expected = F.gelu(values.double())
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-5, atol=2e-7, equal_nan=True)


def test_norm_and_gelu_of_any_magnitude_are_right_or_nan():
    for exponent in (-44, -30, -10, 3, 10, 18, 19, 20, 25, 37):
        x, weight, bias = torch.randn(5, 64) * 10.0**exponent, torch.rand(64), torch.rand(64)
        y, _ = native.norm_gelu(x, weight, bias, 1e-5)
        expected = reference(*(t.double() for t in (x, weight, bias)))
        assert relative(y, expected) < 1e-6 or (y.isnan().all() and exponent > 18), exponent


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_build_gives_the_same(isa):
    if isa not in RUNS_HERE:
        pytest.skip(f"the processor does not run {isa}")
    program = (
        "import torch; from d2v_fast.ops import native; torch.manual_seed(0); x, g = torch.randn(2, 50, 99);"
        "w, b = torch.randn(2, 99); y, s = native.norm_gelu(x, w, b, 1e-5);"
        "print([float(t.double().sum()) for t in (y, *native.norm_gelu_backward(x, g, w, b, s))])"
    )
    here, there = (
        json.loads(subprocess.check_output([sys.executable, "-c", program], env={**os.environ, **more}))
        for more in ({}, {"D2V_ISA": isa})
    )
    assert there == pytest.approx(here, rel=1e-4, abs=1e-3)


def test_a_second_derivative_is_refused_when_asked_for():
    """Also for a sum, whose incoming gradient has no graph."""
    _, fast = stacks()
    wave = torch.randn(1, 1000, requires_grad=True)
    (grad,) = torch.autograd.grad(fast.eval()(wave).sum(), wave, create_graph=True)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [dict(kernel_size=9, padding=4), dict(kernel_size=4, padding=2, dilation=2), dict(kernel_size=10, stride=5)]
)
@pytest.mark.parametrize("time_first", [False, True])
def test_channels_last_is_the_same_convolution(dtype, settings, time_first):
    plain = nn.Conv1d(6, 10, **settings, dtype=dtype)
    fast = copy.deepcopy(plain)
    assert conv.use_channels_last(nn.Sequential(fast))
    x = torch.randn(3, 40, 6, dtype=dtype)
    x = x.transpose(1, 2) if time_first else x.transpose(1, 2).contiguous()
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    expected, found = plain.double()(exact), fast(x)
    assert found.shape == expected.shape and found.transpose(1, 2).is_contiguous()
    weight = torch.randn(found.shape, dtype=torch.float64)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in [
        (found, expected),
        (x.grad, exact.grad),
        (fast.weight.grad, plain.weight.grad),
        (fast.bias.grad, plain.bias.grad),
    ]:
        assert relative(a, b) < tolerance


@pytest.mark.parametrize(
    "plain, shape",
    [
        (nn.Conv1d(8, 12, 5, padding=2, groups=4), (2, 8, 9)),
        (nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=2), (2, 8, 4, 7)),
    ],
)
def test_convolutions_in_groups_are_left_to_the_kernel(plain, shape, monkeypatch):
    def kernel(x, weight, bias, groups):
        assert x.ndim == weight.ndim == 4 and x.is_contiguous() and x.dtype == torch.bfloat16
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        with torch.autocast("cpu", enabled=False):
            y = F.conv2d(x.permute(0, 3, 1, 2).float(), weight, bias, padding=padding, groups=groups)
        return y.permute(0, 2, 3, 1).to(x.dtype)

    fast = copy.deepcopy(plain)
    assert conv.use_channels_last(nn.Sequential(fast))
    x = torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(fast(x), plain(x))  # no GPU
    monkeypatch.setattr(conv.triton_conv, "obstacle", lambda device, dtype: None)
    monkeypatch.setattr(conv.triton_conv, "conv", kernel)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(x)
    expected = plain(x)
    assert found.shape == expected.shape and relative(found, expected) < 1e-2


def test_other_convolutions_keep_their_order():
    others = [
        nn.Conv1d(4, 4, 3, groups=2),
        nn.Conv1d(4, 4, 4, padding=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2),
        nn.Conv1d(4, 4, 3, padding="same"),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    ]
    assert not conv.use_channels_last(nn.Sequential(*others, nn.Conv2d(4, 4, 3)))


def test_a_convolution_with_channels_last_is_saved_whole():
    fast = nn.Sequential(nn.Conv1d(4, 4, 3))
    conv.use_channels_last(fast)
    again, x = pickle.loads(pickle.dumps(fast)), torch.randn(2, 4, 9)
    assert type(again[0]) is conv.ChannelsLast1d and torch.equal(again(x), fast(x))
