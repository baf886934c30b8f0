import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from d2v_fast import Data2VecLoss, data2vec_loss
from d2v_fast.choices import Norm, TargetNorm
from d2v_fast.ops import triton_loss
from d2v_fast.ops.reference import NORM_DIMS, Moments, make_targets, normalize
from tests import oracle

NORMS = get_args(Norm)


def test_norms_are_the_same_in_all_implementations():
    assert {"none", *NORM_DIMS} == set(NORMS)
    assert {"none", "layer", *triton_loss.POOLED} == set(NORMS)
    assert set(get_args(TargetNorm)) < set(NORMS)


def case(batch=2, length=7, channels=5, k=3, masked=0.5, padded=False, dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)
    layers = [torch.from_numpy(rng.normal(1.0, 2.0, (batch, length, channels))).to(dtype) for _ in range(k)]
    predictions = torch.from_numpy(rng.normal(0.0, 2.0, (batch, length, channels))).to(dtype)
    mask = torch.from_numpy(rng.random((batch, length)) < masked)
    padding = None
    if padded:
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0, length - 2 :] = True
    return predictions, layers, mask, padding


def relative(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm, target_norm", list(itertools.product(NORMS, NORMS[:3])))
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_against_a_second_transcription(norm, target_norm, beta, padded, dtype, tolerance):
    predictions, layers, mask, padding = case(padded=padded)
    expected, gradient = oracle.loss(
        predictions.numpy(),
        [x.numpy() for x in layers],
        mask.numpy(),
        norm,
        target_norm,
        beta,
        5**-0.5,
        None if padding is None else padding.numpy(),
    )
    dense = predictions.clone().to(dtype).requires_grad_()
    rows = predictions[mask].clone().to(dtype).requires_grad_()
    layers = [x.to(dtype) for x in layers]
    settings = dict(norm=norm, target_norm=target_norm, beta=beta, padding_mask=padding)
    for given, wanted in ((dense, torch.from_numpy(gradient)), (rows, torch.from_numpy(gradient)[mask])):
        loss = data2vec_loss(given, layers, mask, **settings)
        loss.backward()
        assert relative(loss.detach(), expected) <= tolerance
        assert relative(given.grad, wanted) <= tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm, target_norm", list(itertools.product(NORMS, NORMS[:3])))
def test_views_against_a_second_transcription(norm, target_norm, padded, dtype, tolerance):
    """Three views per sample: unequal counts, a position masked in none, one masked in all, and a view without masks."""
    _, layers, _, padding = case(padded=padded)
    rng = np.random.default_rng(1)
    mask, predictions = rng.random((2, 3, 7)) < 0.5, rng.normal(0.0, 2.0, (2, 3, 7, 5))
    mask[:, :, 0], mask[:, :, 1], mask[1, 2] = False, True, False
    hidden = None if padding is None else padding.numpy()
    given = [x.numpy() for x in layers]
    expected, gradient = oracle.loss(predictions, given, mask, norm, target_norm, 1.0, 5**-0.5, hidden)
    rows = torch.from_numpy(predictions[mask]).to(dtype).requires_grad_()
    settings = dict(norm=norm, target_norm=target_norm, beta=1.0, padding_mask=padding)
    layers = [x.to(dtype) for x in layers]
    loss, stats, mean = data2vec_loss(
        rows, layers, torch.from_numpy(mask), return_stats=True, return_target_mean=True, **settings
    )
    loss.backward()
    assert relative(loss.detach(), expected) <= tolerance and relative(rows.grad, gradient[mask]) <= tolerance
    scored = mask if hidden is None else mask & ~hidden[:, None]
    y = oracle.targets(given, norm, target_norm, hidden)
    assert stats.target.count == scored.sum()
    seen = np.broadcast_to(y[:, None], predictions.shape)[scored]
    for moments, values in ((stats.target, seen), (stats.prediction, predictions[scored])):
        assert (
            relative(moments.mean, values.mean(0)) <= 10 * tolerance
            and relative(moments.m2 / len(values), values.var(0)) <= 10 * tolerance
        )
    keep = np.ones((2, 7), bool) if hidden is None else ~hidden
    mean_target = torch.from_numpy(np.stack([y[b, keep[b]].mean(0) for b in range(2)]))
    torch.testing.assert_close(mean.double(), mean_target, rtol=0, atol=tolerance)


def test_by_hand():
    # One channel pair, one masked position: layer norm of (1, 3) is (-1, 1), of (5, 1) it is (1, -1); their mean is 0.
    layers = [torch.tensor([[[1.0, 3.0], [5.0, 1.0]]]), torch.tensor([[[4.0, 0.0], [9.0, 1.0]]])]
    mask = torch.tensor([[True, False]])
    predictions = torch.tensor([[3.0, -0.5]])
    loss, stats = data2vec_loss(predictions, layers, mask, scale=1.0, return_stats=True)
    assert loss == pytest.approx(9.25, rel=1e-4)
    assert data2vec_loss(predictions, layers, mask, scale=1.0, beta=1.0) == pytest.approx(2.5 + 0.125, rel=1e-4)
    assert stats.target.count == 1


def test_instance_norm_is_over_time_and_layer_norm_over_channels():
    x = torch.randn(3, 50, 20, dtype=torch.float64) * 3 + 5
    over_time, over_channels = normalize(x, "instance"), normalize(x, "layer")
    assert over_time.mean(1).abs().max() < 1e-12 and (over_time.var(1, correction=0) - 1).abs().max() < 1e-4
    assert over_channels.mean(2).abs().max() < 1e-12 and (over_channels.var(2, correction=0) - 1).abs().max() < 1e-4
    assert over_time.mean(2).abs().max() > 0.1 and over_channels.mean(1).abs().max() > 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_padding_changes_nothing_and_may_hold_anything(norm):
    predictions, layers, mask, _ = case(batch=2, length=6)
    longer = [torch.cat([x, torch.full((2, 3, 5), float("nan"), dtype=x.dtype)], 1) for x in layers]
    wide = torch.cat([predictions, torch.full((2, 3, 5), float("nan"), dtype=predictions.dtype)], 1).requires_grad_()
    marked = torch.cat([mask, torch.ones(2, 3, dtype=torch.bool)], 1)
    padding = torch.arange(9).expand(2, 9) >= 6
    loss = data2vec_loss(wide, longer, marked, norm=norm, padding_mask=padding)
    loss.backward()
    assert loss.item() == pytest.approx(data2vec_loss(predictions, layers, mask, norm=norm).item(), rel=1e-12)
    assert (wide.grad[:, 6:] == 0).all() and wide.grad[:, :6].isfinite().all()


@pytest.mark.parametrize("form", ["rows", "dense"])
def test_an_empty_mask_costs_nothing(form):
    predictions, layers, _, _ = case()
    mask = torch.zeros(2, 7, dtype=torch.bool)
    given = (predictions[mask] if form == "rows" else predictions).requires_grad_()
    loss, stats = data2vec_loss(given, layers, mask, return_stats=True)
    loss.backward()
    assert loss == 0 and (given.grad == 0).all()
    assert stats.target.std == 0 and stats.prediction.std == 0


def test_an_all_masked_input_is_scored_everywhere():
    predictions, layers, _, _ = case()
    mask = torch.ones(2, 7, dtype=torch.bool)
    dense, rows = data2vec_loss(predictions, layers, mask), data2vec_loss(predictions.flatten(0, 1), layers, mask)
    assert dense == pytest.approx(rows.item(), rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_time_first_layout_and_strides(norm):
    predictions, layers, mask, _ = case()
    expected = data2vec_loss(predictions, layers, mask, norm=norm)
    time_first = [x.transpose(0, 1).contiguous() for x in layers]
    assert data2vec_loss(predictions, time_first, mask, norm=norm, layout="TBC") == pytest.approx(expected.item(), rel=1e-12)
    strided = [torch.stack([x, x.neg()], -1)[..., 0] for x in layers]
    assert not strided[0].is_contiguous()
    assert data2vec_loss(predictions, strided, mask, norm=norm) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    predictions, layers, mask, _ = case(channels=64, dtype=dtype)
    rows = predictions[mask].requires_grad_()
    loss = data2vec_loss(rows, layers, mask, norm="instance")
    exact = data2vec_loss(predictions[mask].double(), [x.double() for x in layers], mask, norm="instance")
    assert loss.dtype == torch.float32 and relative(loss.detach(), exact) < 1e-5
    loss.backward()
    assert rows.grad.dtype == dtype


@pytest.mark.parametrize("target_norm", NORMS[:3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_any_magnitude_give_the_right_gradient_or_no_finite_loss(norm, target_norm, dtype):
    predictions, layers, mask, padding = case(padded=True)
    finite = []
    for exponent in (-44, -30, -10, -3, 3, 10, 18, 19, 20, 25, 30, 37, 38):
        given = [(x * 10.0**exponent).to(dtype) for x in layers]
        found, exact = predictions.float().requires_grad_(), predictions.clone().requires_grad_()
        settings = dict(norm=norm, target_norm=target_norm, padding_mask=padding)
        loss = data2vec_loss(found, given, mask, impl="eager", **settings)
        loss.backward()
        data2vec_loss(exact, [x.double() for x in given], mask, **settings).backward()
        assert not loss.isfinite() or relative(found.grad, exact.grad) < 1e-5, exponent
        finite.append(bool(loss.isfinite()))
    assert all(finite[:7])  # to 1e18


def test_the_sum_is_the_mean_times_the_count():
    predictions, layers, mask, _ = case()
    mean = data2vec_loss(predictions, layers, mask)
    assert data2vec_loss(predictions, layers, mask, reduction="sum") == pytest.approx(mean.item() * int(mask.sum()))


def test_statistics_are_the_pooled_unbiased_std():
    predictions, layers, mask, _ = case(batch=6, length=20, channels=8)
    _, stats = data2vec_loss(predictions, layers, mask, return_stats=True)
    z = predictions[mask]
    assert float(stats.prediction.std) == pytest.approx(float((z.var(0) + 1e-6).sqrt().mean()), abs=1e-6)
    y = make_targets(layers, "layer", "none", upcast=torch.float64)[mask]
    assert float(stats.target.std) == pytest.approx(float((y.var(0) + 1e-6).sqrt().mean()), abs=1e-6)
    # Over three simulated ranks with unequal shares.
    parts = [
        data2vec_loss(predictions[i], [x[i] for x in layers], mask[i], return_stats=True)[1] for i in ([0], [1, 2, 3], [4, 5])
    ]
    pooled = Moments.pooled([part.prediction for part in parts])
    assert float(pooled.std) == pytest.approx(float(stats.prediction.std), abs=1e-12)


def test_statistics_survive_a_large_mean():
    """E[x²] - μ² loses everything here in fp32; the moments must not."""
    z = torch.randn(400, 16) * 0.1 + 300
    mask = torch.ones(1, 400, dtype=torch.bool)
    _, stats = data2vec_loss(z, [torch.randn(1, 400, 16)], mask, return_stats=True)
    assert float(stats.prediction.std) == pytest.approx(float((z.double().var(0) + 1e-6).sqrt().mean()), rel=1e-3)


@pytest.mark.parametrize("impl", ["eager", "native"])
def test_the_teacher_gets_no_gradient(impl):
    predictions, layers, mask, _ = case(dtype=torch.float32)
    layers = [x.requires_grad_() for x in layers]
    data2vec_loss(predictions.requires_grad_(), layers, mask, impl=impl).backward()
    assert predictions.grad.abs().sum() > 0 and all(x.grad is None for x in layers)


def test_the_module_is_the_function():
    predictions, layers, mask, padding = case(padded=True)
    module = Data2VecLoss(norm="instance", target_norm="layer", beta=2.0)
    expected = data2vec_loss(predictions, layers, mask, norm="instance", target_norm="layer", beta=2.0, padding_mask=padding)
    assert module(predictions, layers, mask, padding) == expected
    assert "instance" in repr(module)

    settings = dict(scale=3.0, reduction="sum", layout="TBC", impl="eager", return_stats=True, return_target_mean=True)
    module, turned = Data2VecLoss(**settings), [x.transpose(0, 1) for x in layers]
    loss, stats, mean = module(predictions, turned, mask)
    scaled = 3 * 5**0.5 * data2vec_loss(predictions, layers, mask, reduction="sum")
    torch.testing.assert_close(loss, scaled, rtol=1e-12, atol=0)
    assert stats.target.count == mask.sum() and mean.shape == (2, 5)
    with pytest.raises(ValueError, match=r"impl='native' cannot run: found torch\.float64"):
        Data2VecLoss(impl="native")(predictions, layers, mask)
    assert repr(Data2VecLoss(beta=2.0)).startswith("Data2VecLoss(norm='layer', target_norm='none', beta=2.0, scale=None, ")


def test_the_mean_of_the_targets_is_returned_without_moments_too():
    predictions, layers, mask, _ = case()
    loss, mean = data2vec_loss(predictions, layers, mask, return_target_mean=True)
    assert loss == data2vec_loss(predictions, layers, mask)
    torch.testing.assert_close(mean, make_targets(layers, "layer", "none", upcast=torch.float64).mean(1))


def test_bounds_are_accepted():
    predictions, layers, mask, _ = case()
    squares = data2vec_loss(predictions, layers, mask)
    quadratic = data2vec_loss(predictions, layers, mask, beta=1e30)
    torch.testing.assert_close(quadratic * 2e30, squares, rtol=1e-12, atol=0)
    for setting in (dict(beta=1e-30), dict(beta=1), dict(scale=1), dict(scale=1e-300)):
        assert data2vec_loss(predictions, layers, mask, **setting) > 0


def test_a_single_channel():
    predictions, layers, mask, _ = case(channels=1, k=1)
    loss = data2vec_loss(predictions, layers, mask, norm="none")
    torch.testing.assert_close(loss, ((predictions - layers[0])[mask] ** 2).mean())


@pytest.mark.parametrize(
    "setting, named",
    [
        (dict(norm="layer_norm"), "norm: found 'layer_norm', expected one of 'none', 'layer', 'instance', 'batch', 'group'"),
        (dict(norm="layernorm"), "; did you mean layer?"),
        (dict(target_norm="batch"), "target_norm: found 'batch', expected one of 'none', 'layer', 'instance'"),
        (dict(norm=None), "norm: found None, expected one of"),
        (dict(beta=-1.0), "beta: found -1.0"),
        (dict(beta=float("nan")), "beta: found nan"),
        (dict(beta=1e-40), "beta: found 1e-40"),
        (dict(beta=float("inf")), "beta: found inf"),
        (dict(beta=1e31), "beta: found 1e+31"),
        (dict(beta="4"), "beta: found '4', expected 0 or a number in [1e-30, 1e30]"),
        (dict(scale=0), "scale: found 0, expected a number above 0"),
        (dict(scale=-1.0), "scale: found -1.0"),
        (dict(scale=float("nan")), "scale: found nan"),
        (dict(scale=float("inf")), "scale: found inf"),
        (dict(scale="mean"), "scale: found 'mean', expected a number above 0 or None"),
        (dict(reduction="none"), "reduction: found 'none', expected one of 'mean', 'sum'"),
        (dict(layout="CTB"), "layout: found 'CTB', expected one of 'BTC', 'TBC'"),
        (dict(impl="cuda"), "impl: found 'cuda', expected one of 'auto', 'eager', 'compile', 'native', 'triton'"),
    ],
)
def test_invalid_settings_raise_with_name_value_and_choices(setting, named):
    predictions, layers, mask, _ = case()
    for call in (lambda: Data2VecLoss(**setting), lambda: data2vec_loss(predictions, layers, mask, **setting)):
        with pytest.raises(ValueError) as error:
            call()
        assert named in str(error.value)


def test_statistics_print_in_a_line():
    predictions, layers, mask, _ = case(channels=400)
    _, stats = data2vec_loss(predictions, layers, mask, return_stats=True)
    std = float(stats.target.std)
    assert repr(stats.target) == f"Moments(count={int(mask.sum())}, channels=400, std={std:.4g})"
    assert repr(stats).startswith("LossStats(target=Moments(") and len(repr(stats)) < 120


def test_compiled_equals_eager():
    predictions, layers, mask, _ = case(dtype=torch.float32)
    a, b = predictions.clone().requires_grad_(), predictions.clone().requires_grad_()
    eager, compiled = data2vec_loss(a, layers, mask), data2vec_loss(b, layers, mask, impl="compile")
    eager.backward()
    compiled.backward()
    assert relative(compiled.detach(), eager.detach()) < 1e-6 and relative(b.grad, a.grad) < 1e-6


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(predictions=torch.zeros(3, 5)), "predictions: found 3 rows"),
        (dict(predictions=torch.zeros(2, 7, 4)), "predictions: found shape (2, 7, 4)"),
        (dict(predictions=torch.zeros(2, 7, 5, dtype=torch.long)), "predictions: found dtype torch.int64"),
        (dict(mask=torch.ones(2, 7, dtype=torch.long)), "mask: found dtype torch.int64"),
        (dict(mask=torch.ones(2, 6, dtype=torch.bool)), "mask: found shape (2, 6)"),
        (dict(padding_mask=torch.ones(7, 2, dtype=torch.bool)), "padding_mask: found shape (7, 2)"),
        (dict(teacher_layers=[]), "teacher_layers: found no tensor"),
        (dict(teacher_layers=torch.zeros(3, 2, 7, 5)), "teacher_layers: found one tensor (3, 2, 7, 5), expected a sequence"),
        (dict(teacher_layers=[torch.zeros(2, 7, 5), torch.zeros(2, 7, 6)]), "teacher_layers[1]: found shape (2, 7, 6)"),
        (dict(predictions=torch.zeros(2, 7, 0), teacher_layers=[torch.zeros(2, 7, 0)]), "scale: found None for 0 channels"),
        (dict(mask=torch.ones(2, 7, dtype=torch.bool, device="meta")), "mask: found on meta"),
        (dict(predictions=torch.zeros(3, 5), mask=torch.ones(2, 7, dtype=torch.bool, device="meta")), "mask: found on meta"),
        (dict(teacher_layers=[torch.zeros(2, 7)]), "teacher_layers[0]: found shape (2, 7), expected three dimensions"),
        (dict(teacher_layers=[torch.zeros(2, 7, 5), torch.zeros(2, 7, 5, dtype=torch.long)]), "teacher_layers[1]: found dtype"),
        (dict(teacher_layers=[torch.zeros(2, 7, 5, device="meta")]), "teacher_layers[0]: found on meta"),
        (dict(padding_mask=torch.zeros(2, 7)), "padding_mask: found dtype torch.float32, expected torch.bool"),
        (dict(padding_mask=torch.zeros(2, 7, dtype=torch.bool, device="meta")), "padding_mask: found on meta"),
        (dict(padding_mask=torch.zeros(2, 3, 7, dtype=torch.bool)), "found shape (2, 3, 7), expected (B, T) = (2, 7)"),
        (dict(mask=torch.ones(2, 3, 6, dtype=torch.bool)), "mask: found shape (2, 3, 6), expected (B, M, T) = (2, M, 7)"),
        (dict(mask=torch.ones(3, 2, 7, dtype=torch.bool)), "mask: found shape (3, 2, 7), expected (B, M, T) = (2, M, 7)"),
        (dict(mask=torch.ones(2, 3, 7, dtype=torch.bool)), "found shape (2, 7, 5), expected (N, C) for a mask (B, M, T)"),
        (dict(predictions=torch.zeros(3, 4)), "predictions: found 4 channels, expected 5"),
        (dict(predictions=torch.zeros(5)), "predictions: found shape (5,), expected (N, C) or (B, T, C)"),
    ],
)
def test_invalid_inputs_are_named(change, named):
    predictions, layers, mask, _ = case()
    arguments = dict(predictions=predictions, teacher_layers=layers, mask=mask) | change
    with pytest.raises(ValueError) as error:
        data2vec_loss(**arguments)
    assert named in str(error.value)
