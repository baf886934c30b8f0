"""The loss in plain PyTorch: the short, readable reference for every kernel (method 1.2, 1.4, 1.7).

With `upcast=torch.float64` it is the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
NORM_DIMS = {"layer": (2,), "instance": (1,), "batch": (0, 1), "group": (1, 2)}  # of (B, T, C)


class Moments(NamedTuple):
    """Mean and summed squared deviation per channel; unlike sums of squares they pool over ranks without cancellation."""

    count: Tensor  # type: ignore[assignment]  # (), in place of tuple.count
    mean: Tensor  # (C,)
    m2: Tensor  # (C,)

    def __repr__(self) -> str:
        return f"Moments(count={int(self.count)}, channels={len(self.mean)}, std={float(self.std):.4g})"

    @property
    def std(self) -> Tensor:
        """Mean over channels of sqrt(unbiased variance + 1e-6), the collapse figure of method 1.7; 0 for less than two rows."""
        variance = self.m2 / (self.count - 1).clamp(min=1)
        return torch.where(self.count > 1, (variance + 1e-6).sqrt().mean(), 0.0)

    @staticmethod
    def pooled(parts: Sequence[Moments]) -> Moments:
        """Moments of all rows together (Chan et al. 1979)."""
        counts, means, m2s = (torch.stack(field) for field in zip(*parts, strict=True))
        count = counts.sum()
        mean = (counts[:, None] * means).sum(0) / count.clamp(min=1)
        return Moments(count, mean, (m2s + counts[:, None] * (means - mean) ** 2).sum(0))


class LossStats(NamedTuple):
    """Moments of targets and predictions at the scored positions."""

    target: Moments
    prediction: Moments


def inverse_std(variance: Tensor) -> Tensor:
    """1/σ. NaN where the variance overflowed, because a factor of 0 would silently give targets of 0."""
    return (variance.masked_fill(variance.isinf(), torch.nan) + EPS).rsqrt()


def normalize(x: Tensor, kind: str, padding_mask: Tensor | None = None) -> Tensor:
    """Normalise x (B, T, C) without affine, biased variance, over the dimensions of `kind`; padding is excluded."""
    if kind == "none":
        return x
    dims = NORM_DIMS[kind]
    if padding_mask is None or kind == "layer":
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    else:
        padding = padding_mask.unsqueeze(-1)
        count = (~padding).expand_as(x).sum(dims, keepdim=True).clamp(min=1)
        mean = x.masked_fill(padding, 0).sum(dims, keepdim=True) / count
        variance = ((x - mean) ** 2).masked_fill(padding, 0).sum(dims, keepdim=True) / count
    return (x - mean) * inverse_std(variance)


def make_targets(
    layers: Sequence[Tensor],
    norm: str,
    target_norm: str,
    padding_mask: Tensor | None = None,
    upcast: torch.dtype = torch.float32,
) -> Tensor:
    """Average of the normalised teacher layers, normalised again: K × (B, T, C) → (B, T, C) in `upcast` (method 1.2)."""
    total: Any = 0
    for layer in layers:
        total = total + normalize(layer.detach().to(upcast), norm, padding_mask)
    return normalize(total / len(layers), target_norm, padding_mask)


def mean_over_time(targets: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Mean of targets (B, T, C) over the positions that are not padding, (B, C): the target of CLS (method 4.7)."""
    if padding_mask is None:
        return targets.sum(1) / max(targets.shape[1], 1)
    padding = padding_mask.unsqueeze(-1)
    # Fill, not multiply: padding may hold anything, NaN included.
    return targets.masked_fill(padding, 0).sum(1) / (~padding).sum(1).clamp(min=1)


def moments_of(rows: Tensor, scored: Tensor) -> Moments:
    """Moments of the rows (N, C) selected by `scored` (N,); the others must be finite."""
    weight = scored.unsqueeze(-1).to(rows.dtype)
    count = weight.sum()
    mean = (rows * weight).sum(0) / count.clamp(min=1)
    return Moments(count, mean, ((rows - mean) ** 2 * weight).sum(0))


def errors(error: Tensor, beta: float) -> Tensor:
    """The squared error, or smooth-L1 that is quadratic below `beta` (method 1.4)."""
    if beta == 0:
        return error**2
    distance = error.abs()
    return torch.where(distance < beta, error**2 / (2 * beta), distance - beta / 2)


def data2vec_loss(
    predictions: Tensor,
    layers: Sequence[Tensor],
    mask: Tensor,
    *,
    norm: str,
    target_norm: str,
    beta: float,
    scale: float,
    padding_mask: Tensor | None,
    reduction: str,
    stats: bool = True,
    target_mean: bool = False,
    upcast: torch.dtype | None = None,
) -> tuple[Tensor, LossStats | None, Tensor | None]:
    """Loss, statistics, mean of the targets; arguments as in `d2v_fast.loss.data2vec_loss`, layers in (B, T, C).

    All is computed in `upcast`; None = fp32, or fp64 for fp64 predictions.
    """
    upcast = upcast or torch.promote_types(predictions.dtype, torch.float32)
    targets = make_targets(layers, norm, target_norm, padding_mask, upcast)
    mean = mean_over_time(targets, padding_mask) if target_mean else None
    targets = targets.flatten(0, 1)
    keep = torch.ones_like(mask[:, 0] if mask.ndim == 3 else mask) if padding_mask is None else ~padding_mask
    if predictions.ndim == 3:
        rows, scored = predictions.flatten(0, 1).to(upcast), (mask & keep).flatten()
    else:
        rows = predictions.to(upcast)
        # size= keeps the number of rows on the host, which avoids a GPU sync.
        index = torch.nonzero_static(mask.flatten(), size=len(rows)).squeeze(1)
        length = mask.shape[-1]
        position = index // math.prod(mask.shape[1:]) * length + index % length  # all views of a sample share its targets
        targets, scored = targets[position], keep.flatten()[position]
    # Fill, not multiply: unscored rows may hold anything, NaN included.
    rows = rows.masked_fill(~scored.unsqueeze(-1), 0)
    targets = targets.masked_fill(~scored.unsqueeze(-1), 0)
    loss = errors(rows - targets, beta).sum() * scale
    if reduction == "mean":
        loss = loss / scored.sum().clamp(min=1)
    found = LossStats(moments_of(targets, scored), moments_of(rows.detach(), scored)) if stats else None
    return loss, found, mean
