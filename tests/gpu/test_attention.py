"""Attention in segments on a real GPU: torch's flash kernels on padded batches, compared with float64."""

import pytest
import torch
from torch import nn

from d2v_fast.ops import attention
from tests.gpu import nothing_waits

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("needs a GPU of compute capability 8.0", allow_module_level=True)


def make(lengths, longest, heads=12, size=64):
    """Query, key and value (B, H, T, D) as a layer produces them, and the padding mask."""
    torch.manual_seed(0)
    shape = (len(lengths), longest, heads, size)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    return inputs, torch.arange(longest, device="cuda") >= torch.tensor(lengths, device="cuda")[:, None]


def outcome(inputs, mask, padding, dropout=0.0):
    """The result at positions without padding, and the gradients of a fixed function of it."""
    result = attention.attention(nn.Module(), *inputs, mask, dropout=dropout)[0][~padding]
    weights = torch.randn(result.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return [result, *torch.autograd.grad((result * weights).sum(), inputs)]


@pytest.mark.parametrize("lengths, longest", [((512, 300, 1), 512), ((250, 250, 250), 250), ((129, 128, 127, 7), 130)])
def test_against_float64(lengths, longest):
    inputs, padding = make(lengths, longest)
    plain = (~padding)[:, None, None].expand(-1, 1, longest, -1)
    exact = outcome([x.detach().double().requires_grad_() for x in inputs], plain, padding)
    masked = outcome(inputs, plain, padding)
    segmented = outcome(inputs, attention.segments(attention_mask=~padding), padding)
    for truth, theirs, ours in zip(exact, masked, segmented, strict=True):
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-6 * truth.norm()


def test_dropout_keeps_the_mean():
    inputs, padding = make((64, 33), 64)
    boundaries = attention.segments(attention_mask=~padding)
    exact = outcome(inputs, boundaries, padding)[0].float()
    drawn = torch.stack([outcome(inputs, boundaries, padding, 0.1)[0].float() for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    deviation = (drawn.mean(0) - exact) / (drawn.std(0) / 400**0.5 + 1e-3)
    assert deviation.abs().mean() < 1.2


def test_it_does_not_synchronise():
    inputs, padding = make((100, 60), 100)
    outcome(inputs, attention.segments(attention_mask=~padding), padding)
    with nothing_waits():
        result = attention.attention(nn.Module(), *inputs, attention.segments(attention_mask=~padding), dropout=0.1)[0]
        result.sum().backward()


def test_inside_a_compiled_function():
    inputs, padding = make((100, 60), 100)
    boundaries = attention.segments(attention_mask=~padding)
    compiled = torch.compile(attention.attention, fullgraph=True)
    expected = attention.attention(nn.Module(), *inputs, boundaries)[0][~padding]
    assert torch.equal(compiled(nn.Module(), *inputs, boundaries)[0][~padding], expected)
