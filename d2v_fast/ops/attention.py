"""Attention as one more implementation of transformers.

On a CPU `scaled_dot_product_attention` leaves its fast path for dropout, and is slow at the lengths of data2vec, above all
in the backward. Two matrix products around a softmax, with the fast dropout between them, are quicker; for long inputs without
gradients they are not. On a GPU torch's own choice of flash and cuDNN kernels stays, and nobody waits for a look at the mask.
"""

from __future__ import annotations

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
    **kwargs,
) -> tuple[Tensor, None]:
    """softmax(Q·Kᵀ·scaling + mask)·V as transformers calls it.

    Args:
        module: The calling layer.
        query: (B, H, T, D); key and value likewise.
        attention_mask: Bool, True = attend, or a float bias that is added; broadcast to (B, H, T, T).
        dropout: Share of the probabilities that is dropped.
        scaling: Factor of the scores, None = 1/√D.

    Returns:
        (B, T, H, D) contiguous, and None in place of the probabilities.
    """
    long = not torch.is_grad_enabled() and query.shape[2] > LONG
    if query.device.type != "cpu" or long or kwargs.get("position_bias") is not None:
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


def padding(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """The mask of transformers' sdpa from a padding mask (B, T) bool, True = attend.

    There it is looked at first whether it pads at all, and a GPU waited for; our batches have one only if it does. A causal
    mask is always made: `attention` knows no other way to be causal.
    """
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def use(model: nn.Module, device: torch.device) -> str | None:
    """Let a transformers model attend in the way that is fastest on this device.

    Returns:
        Its name: "explicit" on a CPU, on a GPU "flash_attention_2" where that package is installed, else "sdpa"; None if the
        model keeps what it has, as one does that is causal or whose heads share keys.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.utils import is_flash_attn_2_available

    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != "sdpa":
        return None
    if any(getattr(m, "is_causal", False) or getattr(m, "num_key_value_groups", 1) > 1 for m in model.modules()):
        return None
    wanted, name = NAME, "explicit" if device.type == "cpu" else "sdpa"
    if device.type != "cpu" and is_flash_attn_2_available() and model._supports_flash_attn:
        wanted = name = "flash_attention_2"
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding)  # without one padding would be dropped in silence
    try:
        model.set_attn_implementation(wanted)
    except ValueError:
        return None
    return name if model.config._attn_implementation == wanted else None
