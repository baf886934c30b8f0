"""Attention as one more implementation of transformers.

On a CPU `scaled_dot_product_attention` leaves its fast path for dropout, and is slow at the lengths of data2vec, above all
in the backward. Two matrix products around a softmax, with the fast dropout between them, are quicker; for long inputs without
gradients they are not. On a GPU torch's own choice of flash and cuDNN kernels stays, or flash-attn is called
where it is installed, and nobody waits for a look at the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.ops.dropout import dropout as fast_dropout

NAME = "d2v_fast"
LONG = 512  # positions from which the scores of all pairs no longer stay in the cache


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
        dropout: Share of the probabilities that is dropped.
        scaling: Factor of the scores, None = 1/√D.
        flash: `flash_attn_func`, taken on a GPU in bf16 and fp16 where there is no mask. It knows padding by its own lengths
            only, for which transformers waits in each layer; so padded batches are left to torch.

    Returns:
        (B, T, H, D) contiguous, and None in place of the probabilities.
    """
    long = not torch.is_grad_enabled() and query.shape[2] > LONG
    if query.device.type != "cpu" or long or kwargs.get("position_bias") is not None:
        if flash and query.device.type == "cuda" and attention_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return flash(*(x.transpose(1, 2) for x in (query, key, value)), dropout, scaling), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs["is_causal"] = False  # which it would take for granted of a module that does not say
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(-1, -2))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # The lowest number and not -inf: a row without any key must not become NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    probabilities = fast_dropout(scores.softmax(-1, dtype=scores.dtype), dropout)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


def padding(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' sdpa from a padding mask (B, T) bool, True = attend.

    There it is looked at first whether it pads at all, and a GPU waited for; our batches have one only if it does. A causal
    mask is always made: `attention` knows no other way to be causal.
    """
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    kwargs["attention_mask"] = attention_mask
    return sdpa_mask(*args, **kwargs)


def use_fast_attention(model: nn.Module, device: torch.device) -> str | None:
    """Let a transformers model attend in the way that is fastest on this device.

    Returns:
        What it does, for the log; None if the model keeps what it has, as one does that is causal or whose heads share keys.
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
    AttentionMaskInterface.register(NAME, padding)  # without one padding would be dropped in silence
    try:
        model.set_attn_implementation(NAME)
    except ValueError:
        return None
    if model.config._attn_implementation != NAME:
        return None
    return "explicit" if device.type == "cpu" else "flash-attn where nothing pads, else sdpa" if flash else "sdpa"
