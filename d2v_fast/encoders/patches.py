"""Images: pixels → patch embeddings → extra tokens and positions → blocks."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.encoders import blocks
from d2v_fast.encoders.base import Encoder


class _PositionIndex:
    """Caches a bias module's index of relative positions on the device of its table.

    transformers keeps the index on the host, so each look-up in forward and backward copies it and synchronises with the GPU.
    """

    def __init__(self, bias: Any):
        self.bias, self.kept = bias, dict[Any, Tensor]()

    def __call__(self, window_size: tuple[int, int]) -> Tensor:
        key = window_size, self.bias.relative_position_bias_table.device
        if key not in self.kept:
            self.kept[key] = type(self.bias).generate_relative_position_index(window_size).to(key[1], non_blocking=True)
        return self.kept[key]


class PatchEncoder(Encoder):
    """BEiT, ViT, DeiT, Data2VecVision: pixels → patch embeddings → extra tokens and positions → blocks → final norm."""

    reads = "vision"
    local: tuple[str, ...] = ("embeddings",)
    positional: tuple[str, ...] = ("shared_position_bias", "encoder.relative_position_bias")
    mask_token_name = "embeddings.mask_token"
    extra_tokens = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if hasattr(self.model.embeddings, "layernorm"):  # in data2vec 2.0, CLS and this norm are not local (method 1.6)
            self.local, self.positional = ("embeddings.patch_embeddings",), ("embeddings",)
        for module in self.model.modules():
            if hasattr(module, "generate_relative_position_index"):
                module.generate_relative_position_index = _PositionIndex(module)

    def embed(self, inputs: Tensor) -> Tensor:
        patches = self.model.embeddings.patch_embeddings(inputs)
        return patches[0] if isinstance(patches, tuple) else patches

    def place(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        positions = self.model.embeddings.position_embeddings
        return features if positions is None else features + positions[:, -features.shape[1] :]

    def _enter(
        self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None
    ) -> tuple[Tensor, int, list[dict[str, Any]]]:
        model, embeddings = self.model, self.model.embeddings
        tokens = [embeddings.cls_token]
        if hasattr(embeddings, "distillation_token"):
            tokens.append(embeddings.distillation_token)
        extra = torch.cat(tokens, dim=1)
        if embeddings.position_embeddings is not None:
            extra = extra + embeddings.position_embeddings[:, : extra.shape[1]]
        count = extra.shape[1]
        x = torch.cat([extra.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if hasattr(embeddings, "layernorm"):
            x = embeddings.layernorm(x)
        x = embeddings.dropout(x)
        size, arguments = self._image_size(), {}
        if hasattr(model, "encoder") and hasattr(model.encoder, "has_relative_position_bias"):  # Data2VecVision
            arguments = dict(relative_position_bias=self._bias(model.encoder, visible, count), resolution=size)
        elif hasattr(model, "shared_position_bias"):  # BEiT
            arguments = dict(attention_mask=self._bias(model, visible, count), resolution=size)
        return x, count, [arguments] * len(self.blocks)

    def _bias(self, owner: nn.Module, visible: Tensor | None, extra: int) -> Tensor | None:
        """Relative-position bias of the attention, (1 or B, H, E + T, E + T)."""
        bias = getattr(owner, "shared_position_bias", None) or getattr(owner, "relative_position_bias", None)
        if bias is None:
            return None
        high, wide = self.positions(0)
        bias = bias((high, wide), dim_size=extra + high * wide)
        if visible is None:
            return bias
        rows = F.pad(visible + extra, (extra, 0))
        rows[:, :extra] = torch.arange(extra, device=rows.device)
        return bias[0][:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)

    def _leave(self, x: Tensor) -> Tensor:
        norm = getattr(self.model, "layernorm", None)  # the model in `nets` has its norm before the blocks
        return x if norm is None else norm(x)

    def _whole(self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None) -> Tensor:
        x, _, each = self._enter(x, padding_mask)
        for block, arguments in zip(self.blocks, each, strict=True):
            x = blocks.first(block(x, **arguments))
        return self._leave(x)

    def positions(self, size: int) -> tuple[int, int]:
        (high, wide), patch = self._image_size(), _pair(self.model.config.patch_size)
        return high // patch[0], wide // patch[1]

    def _image_size(self) -> tuple[int, int]:
        return _pair(self.model.config.image_size)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@torch.no_grad()
def init_data2vec(encoder: Encoder) -> None:
    """Truncated normal weights, std 0.02 cut at one std; output projections of block i are divided by √(2i) (method 3.3)."""

    def draw(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)

    for name, parameter in encoder.named_parameters():
        if name.endswith(("cls_token", "mask_token")) or (parameter.ndim > 1 and "position" not in name):
            draw(parameter)
    for depth, block in enumerate(encoder.blocks, start=1):
        attention_out = [m for n, m in block.named_modules() if "att" in n and isinstance(m, nn.Linear)][-1]
        for linear in (attention_out, cast(nn.Linear, encoder._ffn(block))):
            linear.weight.div_((2 * depth) ** 0.5)


@torch.no_grad()
def init_sincos(encoder: Encoder) -> None:
    """Set the absolute positions to sines and cosines of column and row, as in MAE, and freeze them (method 4.1)."""
    positions = encoder.model.embeddings.position_embeddings
    if positions is None:
        name = type(encoder.model).__name__
        raise ValueError(f"encoder.init='sincos': {name} has no absolute positions; use encoder.init=hf or data2vec")
    high, wide = cast(tuple[int, int], encoder.positions(0))
    omega = 10_000 ** -(torch.arange(encoder.hidden_size // 4) / (encoder.hidden_size // 4))
    column, row = torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)
    angles = [axis[:, None] * omega for axis in (column, row)]
    positions.zero_()
    positions[0, -high * wide :] = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    positions.requires_grad_(False)
