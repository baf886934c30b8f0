"""From local features to predictions at the masked positions, for data2vec 1.0 and 2.0.

`in_place` (1.0) encodes all positions, with the mask vector at the masked ones. `visible_only` (2.0) encodes the visible
positions, and a decoder predicts the masked ones.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from d2v_fast.decoders import ConvDecoder
from d2v_fast.encoders import Encoder


class Predicted(NamedTuple):
    """The student's output.

    Attributes:
        predictions: (N, C), one row for each masked position in the order of (B, M, T).
        states: (rows, C), encoded states of the masked positions (`in_place`) or of the visible ones (`visible_only`).
        extra: (B·M, E, C), states of extra tokens such as CLS; None for `in_place`.
    """

    predictions: Tensor
    states: Tensor
    extra: Tensor | None = None


def in_place(student: Encoder, head: nn.Module, features: Tensor, index: Tensor, padding_mask: Tensor | None) -> Predicted:
    """Encode all positions of masked features (method 1.1).

    Args:
        student: The encoder.
        head: Maps states to predictions.
        features: (B, T, C), already masked.
        index: (N,) int64, masked positions of the flattened (B, T).
        padding_mask: (B, T) bool, True = padding.
    """
    states = student.transform(student.place(features, padding_mask), padding_mask, rows=index).states
    return Predicted(head(states), states)


def visible_only(
    student: Encoder,
    decoder: ConvDecoder,
    features: Tensor,
    mask: Tensor,
    index: Tensor,
    visible: Tensor,
    grid: tuple[int, ...],
    padding_mask: Tensor | None,
) -> Predicted:
    """Encode the visible positions of each view, then decode all positions (method 4.3, 4.5).

    Args:
        student: The encoder.
        decoder: Maps all positions to predictions.
        features: (B, T, C), computed once for all views.
        mask: (B, M, T) bool, True = masked.
        index: (N,) int64, masked positions of the flattened (B, M, T).
        visible: (B·M, V) int64, visible positions of each view, see `masking.visible_positions`.
        grid: Positions along each axis.
        padding_mask: (B, T) bool, True = padding.
    """
    padding = None if padding_mask is None else padding_mask.repeat_interleave(mask.shape[1], 0)
    x = student.place_visible(features, mask, visible, padding_mask)
    encoded = student.transform(x, None if padding is None else padding.gather(1, visible), visible=visible)
    x = decoder.restore(encoded.states, visible, mask.shape[-1])
    return Predicted(decoder(x, grid, padding, index), encoded.states.flatten(0, 1), encoded.extra)
