"""Shapes of real recipes: batch, positions, top-K and masked share as the published models train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = 768


@dataclass(frozen=True)
class LossCase:
    name: str
    batch: int
    length: int
    top_k: int
    masked: float
    norm: str

    def needed_bytes(self, dtype: torch.dtype, scored: int) -> int:
        """Each needed byte once: the rows of the teacher that the norm reads, the predictions, their gradient."""
        read = scored if self.norm == "layer" else self.batch * self.length
        return (self.top_k * read + 2 * scored) * CHANNELS * dtype.itemsize

    def tensors(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Predictions (N, C) that require a gradient, K teacher layers (B, T, C), mask (B, T); the same N for every seed."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.length, CHANNELS)
        layers = [torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(self.top_k)]
        scored = round(self.batch * self.length * self.masked)
        chosen = torch.randperm(self.batch * self.length, generator=generator, device=device)[:scored]
        mask = torch.zeros(self.batch * self.length, dtype=torch.bool, device=device)
        mask[chosen] = True
        predictions = torch.randn(scored, CHANNELS, dtype=dtype, device=device, generator=generator)
        return predictions.requires_grad_(), layers, mask.view(shape[:2])


LOSS_CASES = [
    LossCase("text-8x512-15%", 8, 512, 10, 0.15, "layer"),
    LossCase("text-8x512-31%", 8, 512, 10, 0.31, "layer"),
    LossCase("text-32x512-15%", 32, 512, 10, 0.15, "layer"),
    LossCase("text-32x512-31%", 32, 512, 10, 0.31, "layer"),
    LossCase("vision-32x197", 32, 197, 6, 0.60, "layer"),
    LossCase("vision-128x197", 128, 197, 6, 0.60, "layer"),
    LossCase("audio-8x250", 8, 250, 8, 0.49, "instance"),
    LossCase("audio-16x250", 16, 250, 8, 0.49, "instance"),
    LossCase("audio-8x780", 8, 780, 8, 0.49, "instance"),
    LossCase("audio-16x780", 16, 780, 8, 0.49, "instance"),
]
