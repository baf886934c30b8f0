"""The convolutional decoder against plain loops in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from d2v_fast.decoders import ConvDecoder, regression_head


def plain(decoder, x, grid, padding=None):
    """Method 4.5 position by position; x (T, C) float64, padding (T,) bool."""
    kernel, axes = decoder.kernel, len(grid)
    cells = list(itertools.product(*map(range, grid)))
    number = {cell: i for i, cell in enumerate(cells)}
    for convolution in decoder.convolutions:
        if padding is not None:
            x = np.where(padding[:, None], 0, x)
        weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
        out = np.zeros((len(cells), len(weight)))
        per_group_in, per_group_out = weight.shape[1], len(weight) // convolution.groups
        for cell in cells:
            for channel in range(len(weight)):
                first = channel // per_group_out * per_group_in
                total = bias[channel]
                for offset in itertools.product(range(kernel), repeat=axes):
                    near = tuple(c + o - kernel // 2 for c, o in zip(cell, offset, strict=True))
                    if near in number:
                        total += weight[(channel, slice(None), *offset)] @ x[number[near], first : first + per_group_in]
                out[number[cell], channel] = total
        out = (out - out.mean(1, keepdims=True)) / np.sqrt(out.var(1, keepdims=True) + 1e-5)
        out = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(out)
        x = x + out if decoder.residual and out.shape == x.shape else out
    for i, linear in enumerate(decoder.projection[::2]):
        if i:
            x = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)
        x = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    return x


@pytest.mark.parametrize(
    "grid, settings",
    [
        ((9,), dict(width=8, kernel=3, layers=3, groups=2)),
        ((9,), dict(width=12, kernel=4, layers=2, groups=4)),  # an even kernel; no residual in the first layer
        ((6,), dict(width=8, kernel=3, layers=2, groups=1, residual=False, projection_layers=2)),
        ((6,), dict(width=4, kernel=3, layers=1, groups=2, projection_layers=3)),
        ((3, 4), dict(width=8, kernel=3, layers=2, groups=2)),
        ((3, 3), dict(width=4, kernel=2, layers=2, groups=4)),
        ((2, 3, 2), dict(width=8, kernel=3, layers=2, groups=4)),
    ],
)
def test_against_plain_loops(grid, settings):
    decoder = ConvDecoder(8, len(grid), **settings).double()
    x = torch.randn(2, math.prod(grid), 8, dtype=torch.float64)
    found = decoder(x, grid)
    for row in range(2):
        np.testing.assert_allclose(found[row].detach().numpy(), plain(decoder, x[row].numpy(), grid), rtol=1e-10, atol=1e-12)
    padding, rows = torch.rand(2, math.prod(grid)) < 0.4, torch.tensor([1, 0, math.prod(grid)])
    padded = [plain(decoder, x[row].numpy(), grid, padding[row].numpy()) for row in range(2)]
    np.testing.assert_allclose(decoder(x, grid, padding).detach().numpy(), padded, rtol=1e-10, atol=1e-12)
    chosen = decoder(x, grid, padding, rows).detach().numpy()
    np.testing.assert_allclose(chosen, np.concatenate(padded)[rows.numpy()], rtol=1e-10, atol=1e-12)


def test_defaults_are_those_of_speech():
    """The defaults are the base model of method 5.2, with one Linear that does not start at zero."""
    decoder = ConvDecoder(32)
    first, *others = decoder.convolutions
    assert len(others) == 3 and all(isinstance(each, torch.nn.Conv1d) for each in decoder.convolutions)
    assert (first.in_channels, first.out_channels, first.kernel_size, first.groups) == (32, 384, (7,), 16)
    assert (decoder.noise, decoder.dropout.p, decoder.residual, len(decoder.projection)) == (0.01, 0.0, True, 1)
    assert decoder.projection[0].weight.abs().min() > 0 and decoder.projection[0].bias.abs().min() > 0


def test_the_regression_head_does_not_start_at_zero_by_default():
    assert all(parameter.abs().min() > 0 for parameter in regression_head(8, 2).parameters())


def test_a_head_that_starts_at_zero_has_random_hidden_layers():
    """Otherwise no gradient would ever reach them."""
    decoder = ConvDecoder(8, groups=2, projection_layers=2, zero_init=True)
    for head in (regression_head(8, 2, zero_init=True), decoder.projection):
        assert (head[0].weight != 0).all() and not head[-1].weight.any() and not head[-1].bias.any()


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: ConvDecoder(8, axes=4), "axes: found 4, expected one of 1, 2, 3"),
        (lambda: ConvDecoder(8, width=12, groups=3), "groups: found 3, expected a divisor of width=12 and hidden_size=8"),
        (lambda: ConvDecoder(8, width=10, groups=4), "groups: found 4, expected a divisor of width=10 and hidden_size=8"),
        (lambda: ConvDecoder(6, width=8, groups=4), "groups: found 4, expected a divisor of width=8 and hidden_size=6"),
        (lambda: ConvDecoder(8, groups=2, width=8)(torch.zeros(1, 6, 8), (2, 3)), r"grid: found \(2, 3\) for 6 positions"),
        (lambda: ConvDecoder(8, 2, groups=2, width=8)(torch.zeros(1, 7, 8), (2, 3)), r"found \(2, 3\) for 7 positions"),
    ],
)
def test_invalid_inputs_are_named(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()
