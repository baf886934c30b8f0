"""An attention implementation for transformers.

On a CPU `scaled_dot_product_attention` has no fast path with dropout and is slow at data2vec's lengths, especially in the
backward. Two matrix products with a softmax and the fast dropout in between are faster, except for long inputs without
gradients. On a GPU, flash-attn is used if installed, else the kernels that torch chooses. With a padding mask torch chooses
none of its flash kernels; `segments` gives them the lengths instead. No mask value is read on the host, because that would
synchronise with the GPU.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops.dropout import dropout as fast_dropout

log = logging.getLogger(__name__)

NAME, SEGMENTS = "d2v_fast", "d2v_fast_segments"
LONG = 512  # above this length the scores of all pairs no longer fit into the CPU cache


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    flash: Callable | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """softmax(Q·Kᵀ·scaling + mask)·V as transformers calls it.

    Args:
        module: The calling layer.
        query: (B, H, T, D); key and value likewise.
        attention_mask: Bool, True = attend, or a float bias that is added; broadcast to (B, H, T, T). Or the result of
            `segments`.
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores, None = 1/√D.
        flash: `flash_attn_func`, used on a GPU in bf16 and fp16 without a mask.

    Returns:
        (B, T, H, D) contiguous, and None in place of the probabilities.
    """
    if attention_mask is not None and attention_mask.ndim == 1:
        if _has_kernel(query):
            return _attend_in_segments(query, key, value, attention_mask, dropout, scaling), None
        lengths = attention_mask[1::2] - attention_mask[:-1:2]
        attention_mask = (torch.arange(key.shape[2], device=key.device) < lengths[:, None])[:, None, None]
    long = not torch.is_grad_enabled() and query.shape[2] > LONG
    if query.device.type != "cpu" or long or kwargs.get("position_bias") is not None:
        if flash and query.device.type == "cuda" and attention_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return flash(*(x.transpose(1, 2) for x in (query, key, value)), dropout, scaling), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs["is_causal"] = False  # transformers assumes True for a module without the attribute
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(-1, -2))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # The lowest finite number rather than -inf: a row without any key must not become NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    probabilities = fast_dropout(scores.softmax(-1, dtype=scores.dtype), dropout)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


def padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' sdpa from a padding mask (B, T) bool, True = attend.

    transformers first checks whether the mask contains padding, which synchronises with the GPU; our batches only have a mask
    if it does. Causal masks are always materialised, because `attention` has no other way to be causal.
    """
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    kwargs["attention_mask"] = attention_mask
    return sdpa_mask(*args, **kwargs)


def segments(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Boundaries of segments in the flattened (B, T): for each sample its positions, then its padding. (2·B + 1,) int32.

    Because padding forms separate segments, torch's flash attention for sequences of different lengths runs directly on a
    padded batch. Nothing is packed, and no size depends on the lengths. Padding attends to padding; no other result depends on
    it.

    Args:
        attention_mask: (B, T) bool, True = attend; padding must be on the right, or the device stops with an assertion.
    """
    if attention_mask is None:
        return padding(*args, **kwargs)
    torch._assert_async(~(attention_mask[:, 1:] & ~attention_mask[:, :-1]).any(), "padding_mask: padding must be on the right")
    starts = torch.arange(len(attention_mask), device=attention_mask.device) * attention_mask.shape[1]
    boundaries = torch.stack([starts, starts + attention_mask.sum(1)], dim=1).flatten()
    return F.pad(boundaries, (0, 1), value=attention_mask.numel()).int()


def _has_kernel(query: Tensor) -> bool:
    size = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and half and size % 8 == 0 and size <= 128


def _attend_in_segments(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Attention within segments, (B, T, H, D). torch's public function for this operator, `varlen_attn`, has no dropout."""
    length = query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    rows = [x.flatten(0, 1) for x in (query, key, value)]
    forward = torch.ops.aten._flash_attention_forward
    attended = forward(*rows, boundaries, boundaries, length, length, dropout, False, False, scale=scaling)[0]
    return attended.view_as(query)


def use_fast_attention(model: nn.Module, device: torch.device) -> str | None:
    """Switch a transformers model to the attention that is fastest on this device.

    Returns:
        A description for the log; None if the model is unchanged, such as a causal one or one whose heads share keys.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.utils import is_flash_attn_2_available

    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != "sdpa":
        return None
    if any(getattr(m, "is_causal", False) or getattr(m, "num_key_value_groups", 1) > 1 for m in model.modules()):
        return None
    flash: Any = None
    if device.type == "cuda" and is_flash_attn_2_available():
        from flash_attn import flash_attn_func

        flash = flash_attn_func
    for name, mask in ((NAME, padding), (SEGMENTS, segments)):
        AttentionInterface.register(name, functools.partial(attention, flash=flash) if flash else attention)
        AttentionMaskInterface.register(name, mask)  # without it padding would be ignored silently
    try:
        model.set_attn_implementation(NAME)
    except ValueError:
        return None
    if model.config._attn_implementation != NAME:
        return None
    return "explicit" if device.type == "cpu" else "flash-attn where nothing pads, else sdpa" if flash else "sdpa"


@functools.cache  # student and teacher ask for the same device
def _agrees(device: torch.device) -> bool:
    """Whether torch's kernels for segments give the same values and gradients as a mask, on a small batch."""
    inputs = (
        torch.randn(3, 2, 2, 40, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16).requires_grad_()
    )
    attend = torch.arange(40, device=device) < torch.tensor([[40], [7]], device=device)
    found = []
    for mask in (segments(attention_mask=attend), attend[:, None, None]):
        states = attention(nn.Module(), inputs[0], inputs[1], inputs[2], mask)[0].float()[attend]
        found.append((states, *torch.autograd.grad(states.square().sum(), inputs)))
    return all((a - b).norm() < 0.03 * b.norm() for a, b in zip(*found, strict=True))


def use_segments(model: nn.Module, device: torch.device) -> bool:
    """Make a model with this attention use `segments` if torch has the kernels for this device; return whether it does.

    The kernels are called through an operator that torch does not document, so they are first compared with a mask.
    """
    available = device.type == "cuda" and torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    config: Any = getattr(model, "config", None)
    if not available or torch.cuda.get_device_capability(device) < (8, 0) or config._attn_implementation != NAME:
        return False
    try:
        obstacle = "" if _agrees(device) else "its results differ from those with a mask"
    except Exception as error:
        obstacle = str(error)
    if obstacle:
        log.warning("padded batches use a mask; attention in segments was tried on %s and failed: %s", device, obstacle)
        return False
    cast(Any, model).set_attn_implementation(SEGMENTS)
    return True
