"""Benchmark cases: batch, length, top-K and masked share of published recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from d2v_fast.config import EMAConfig, HeadConfig, LossConfig, TargetsConfig
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, visible_positions

CHANNELS = 768


@dataclass(frozen=True)
class LossCase:
    name: str
    batch: int
    length: int
    top_k: int
    masked: float
    norm: str
    target_norm: str = "none"
    views: int = 0  # per sample, for data2vec 2.0; all mask the same number of positions
    channels: int = CHANNELS

    @property
    def scored(self) -> int:
        return self.batch * self.views * round(self.length * self.masked) or round(self.batch * self.length * self.masked)

    @property
    def rows(self) -> int:
        """Rows of a layer that are masked; with several views, nearly every row is masked in some view."""
        return self.batch * self.length if self.views else self.scored

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that must move, each counted once: teacher rows that the norm reads, predictions and their gradient."""
        read = self.rows if self.norm == "layer" else self.batch * self.length
        return (self.top_k * read + 2 * self.scored) * self.channels * dtype.itemsize

    def tensors(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Predictions (N, C) that require a gradient, K teacher layers (B, T, C), mask (B, T) or (B, M, T); N is fixed."""
        random = dict(device=device, generator=torch.Generator(device).manual_seed(seed))
        shape = (self.batch, self.length, self.channels)
        layers = [torch.randn(shape, dtype=dtype, **random) for _ in range(self.top_k)]
        if self.views:
            order = torch.rand(self.batch, self.views, self.length, **random).argsort(-1)
            mask = order < round(self.length * self.masked)
        else:
            mask = torch.zeros(self.batch * self.length, dtype=torch.bool, device=device)
            mask[torch.randperm(self.batch * self.length, **random)[: self.scored]] = True
            mask = mask.view(shape[:2])
        predictions = torch.randn(self.scored, self.channels, dtype=dtype, **random)
        return predictions.requires_grad_(), layers, mask


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

# data2vec 2.0: the M views of a sample share its targets.
LOSS_CASES_2 = [
    LossCase("image-16x16x196", 16, 196, 10, 0.80, "instance", "layer", views=16),
    LossCase("image-large-8x16x196", 8, 196, 18, 0.80, "instance", "layer", views=16, channels=1024),
    LossCase("audio-4x8x750", 4, 750, 8, 0.50, "instance", views=8),
    LossCase("text-4x8x512", 4, 512, 12, 0.48, "instance", views=8),
]


@dataclass(frozen=True)
class StepCase:
    name: str
    modality: str
    model: str
    batch: int
    shape: tuple[int, ...]  # of one input: (tokens,), (3, side, side) or (waveform samples,)
    masked: float
    targets: TargetsConfig  # this and the next three follow the published recipe
    loss: LossConfig = LossConfig()
    head: HeadConfig = HeadConfig()
    ema: EMAConfig = EMAConfig()
    config: dict = field(default_factory=dict)  # of the encoder
    gpu_batch: int = 0  # all variants, each in its own process, fit into 70 GB
    views: int = 0  # per sample, for data2vec 2.0
    mask: RandomMask | ExactBlockMask | None = None
    decoder: dict = field(default_factory=dict)

    def on(self, device: str) -> StepCase:
        """The case with the batch size for this device."""
        if device == "cpu":
            return self
        return replace(self, batch=self.gpu_batch, name=self.name.replace(f"-{self.batch}x", f"-{self.gpu_batch}x"))

    def batch_of(self, encoder, device: str) -> dict[str, Tensor]:
        """Inputs of `Data2Vec.forward`: source, mask, index, `visible` with views, else `target` for text; no padding."""
        generator = torch.Generator().manual_seed(0)
        if self.modality == "text":
            target = torch.randint(10, 50_000, (self.batch, *self.shape), generator=generator)
            grid = positions = self.shape[0]
        else:
            target = torch.randn(self.batch, *self.shape, generator=generator)
            grid = encoder.positions(self.shape[-1])
            positions = grid if isinstance(grid, int) else grid[0] * grid[1]
        if self.views:
            mask = self.mask(Draws(0, 0, range(self.batch), self.views), positions if isinstance(grid, int) else grid)
            mask = mask.reshape(self.batch, self.views, positions)
            batch = dict(source=target, mask=torch.from_numpy(mask), visible=torch.from_numpy(visible_positions(mask)))
            batch["index"] = batch["mask"].flatten().nonzero().squeeze(1)
            return {name: value.to(device) for name, value in batch.items()}
        mask = torch.zeros(self.batch, positions, dtype=torch.bool)
        for row in mask:  # the same number in every sample
            row[torch.randperm(positions, generator=generator)[: round(self.masked * positions)]] = True
        batch = dict(source=target, mask=mask, index=mask.flatten().nonzero().squeeze(1))
        if self.modality == "text":
            batch |= dict(source=target.masked_fill(mask, 3), target=target)
        return {name: value.to(device) for name, value in batch.items()}


_TEXT = dict(
    targets=TargetsConfig(top_k=10),
    loss=LossConfig(beta=4.0, scale=1.0),
    head=HeadConfig(layers=2),
    ema=EMAConfig(scope="layers"),
)
_VISION = dict(targets=TargetsConfig(top_k=6, source="block_output"), loss=LossConfig(beta=2.0), ema=EMAConfig(start=0.9998))
_AUDIO = dict(targets=TargetsConfig(top_k=8, norm="instance"), ema=EMAConfig(scope="encoder"))

STEP_CASES = [
    StepCase("text-8x128", "text", "roberta", 8, (128,), 0.15, gpu_batch=128, **_TEXT),
    StepCase("text-4x512", "text", "roberta", 4, (512,), 0.15, gpu_batch=32, **_TEXT),
    StepCase("vision-8x224", "vision", "beit", 8, (3, 224, 224), 0.60, gpu_batch=128, **_VISION),
    StepCase("audio-4x5s", "audio", "data2vec-audio", 4, (80_000,), 0.49, gpu_batch=32, **_AUDIO),
]

# data2vec 2.0, published recipes of base size; each is compared with the 1.0 case of its modality.
_VISION_2 = dict(
    targets=TargetsConfig(top_k=10, norm="instance", target_norm="layer"),
    loss=LossConfig(cls_weight=2.56),
    ema=EMAConfig(start=0.9998),
    mask=ExactBlockMask(prob=0.8, length=3, adjust=0.07),
    decoder=dict(axes=2, width=768, kernel=3, layers=6, groups=16),
)
_AUDIO_2 = dict(
    targets=TargetsConfig(top_k=8, norm="instance"),
    ema=EMAConfig(scope="encoder"),
    mask=ExactBlockMask(prob=0.5, length=5, adjust=0.05, inverse=False),
    decoder=dict(width=384, kernel=7, layers=4, groups=16, dropout=0.1),
)
_TEXT_2 = dict(
    targets=TargetsConfig(top_k=12, norm="instance"),
    loss=LossConfig(scale=1.0),
    ema=EMAConfig(scope="layers"),
    mask=RandomMask(prob=0.48),
    decoder=dict(width=768, kernel=9, layers=5, groups=1, residual=False, projection_layers=2, dropout=0.1),
)
STEP_CASES_2 = [
    StepCase("vision-2x16", "vision", "data2vec2-vision", 2, (3, 224, 224), 0.8, views=16, gpu_batch=16, **_VISION_2),
    StepCase("vision-4x8", "vision", "data2vec2-vision", 4, (3, 224, 224), 0.8, views=8, gpu_batch=32, **_VISION_2),
    StepCase("audio-2x8", "audio", "data2vec2-audio", 2, (80_000,), 0.5, views=8, gpu_batch=16, **_AUDIO_2),
    StepCase("text-1x8", "text", "roberta", 1, (512,), 0.48, views=8, gpu_batch=8, **_TEXT_2),
]

# Models of known families, and the path of the feature module used when the model runs whole.
SPLICED_CASES = [
    (STEP_CASES[0], "embeddings"),
    (replace(STEP_CASES[2], name="vit-8x224", model="vit"), "embeddings.patch_embeddings"),
    (STEP_CASES_2[-1], "embeddings"),
]

# Vary one size of the step at a time; 4 layers unless depth is varied, so that the sweep takes minutes.
_SMALL = replace(STEP_CASES[0], name="sweep", batch=4, targets=TargetsConfig(top_k=2), config=dict(num_hidden_layers=4))
SWEEPS = {
    "batch": {size: replace(_SMALL, batch=size) for size in (1, 2, 4, 8, 16, 32)},
    "length": {size: replace(_SMALL, shape=(size,)) for size in (32, 64, 128, 256, 384, 512)},
    "layers": {size: replace(_SMALL, config=dict(num_hidden_layers=size)) for size in (2, 4, 6, 8, 10, 12)},
}
