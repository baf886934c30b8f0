"""An attention implementation for transformers.

On a CPU `scaled_dot_product_attention` has no fast path with dropout and is slow at data2vec's lengths, especially in the
backward. Two matrix products with a softmax and the fast dropout in between are faster, except for long inputs without
gradients. On a GPU, flash-attn is used if installed, else torch's own choice of kernels; the mask is never inspected, because
that would synchronise with the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.ops.dropout import dropout as fast_dropout

NAME = "d2v_fast"
LONG = 512  # above this length the scores of all pairs no longer fit in the cache


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
        attention_mask: Bool, True = attend, or a float bias that is added; broadcast to (B, H, T, T).
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores, None = 1/√D.
        flash: `flash_attn_func`, used on a GPU in bf16 and fp16 without a mask. Padded batches go to torch: flash-attn needs
            sequence lengths, and computing them synchronises with the host in every layer.

    Returns:
        (B, T, H, D) contiguous, and None in place of the probabilities.
    """
    long = not torch.is_grad_enabled() and query.shape[2] > LONG
    if query.device.type != "cpu" or long or kwargs.get("position_bias") is not None:
        if flash and query.device.type == "cuda" and attention_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return flash(*(x.transpose(1, 2) for x in (query, key, value)), dropout, scaling), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs["is_causal"] = False  # else taken as True for a module without the attribute
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

    transformers first checks whether the mask pads at all, which synchronises with the GPU; our batches have a mask only if it
    does. Causal masks are always materialised, because `attention` has no other way to be causal.
    """
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    kwargs["attention_mask"] = attention_mask
    return sdpa_mask(*args, **kwargs)


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
    AttentionInterface.register(NAME, functools.partial(attention, flash=flash) if flash else attention)
    AttentionMaskInterface.register(NAME, padding)  # without it padding would be ignored silently
    try:
        model.set_attn_implementation(NAME)
    except ValueError:
        return None
    if model.config._attn_implementation != NAME:
        return None
    return "explicit" if device.type == "cpu" else "flash-attn where nothing pads, else sdpa" if flash else "sdpa"
