"""Speech: waveform → convolutions → projection → positional convolution → blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2v_fast.encoders.base import Encoder, gather


class WaveEncoder(Encoder):
    """Wav2Vec2, HuBERT, Data2VecAudio: waveform → conv stack → projection → positional conv → blocks.

    `feature_grad_mult` scales the gradient into the conv stack; 0 freezes it (method 3.1).
    """

    reads = "audio"
    local = ("feature_extractor", "feature_projection", "masked_spec_embed")
    positional = ("encoder.pos_conv_embed",)
    mask_token_name = "masked_spec_embed"
    feature_grad_mult: float = 1.0

    def embed(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.feature_grad_mult > 0):
            # The conv stack of transformers sets requires_grad on its input, in place.
            features = self.model.feature_extractor(inputs.detach()).transpose(1, 2)
        if 0 < self.feature_grad_mult < 1:
            features = features * self.feature_grad_mult + features.detach() * (1 - self.feature_grad_mult)
        norm = getattr(self.model.feature_projection, "layer_norm", None)
        return self.model.feature_projection.projection(features if norm is None else norm(features))

    def mask_features(self, features: Tensor, mask: Tensor) -> Tensor:
        # The projection's dropout is for the student only; the teacher may share the output of `embed` (method 1.6).
        return super().mask_features(self.model.feature_projection.dropout(features), mask)

    @property
    def _stable(self) -> bool:  # the norm comes after the blocks, not before
        return getattr(self.model.config, "do_stable_layer_norm", False)

    def place(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if self.halves is None:
            return features  # the model itself adds positions
        if padding_mask is not None:
            features = features.masked_fill(padding_mask.unsqueeze(-1), 0)
        encoder = self.model.encoder
        zeroed = (padding_mask,) if hasattr(encoder, "alibi") else ()  # the model in `nets` zeroes padding in each convolution
        return features + encoder.pos_conv_embed(features, *zeroed)

    def place_visible(self, features: Tensor, mask: Tensor, visible: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        # Positions come from convolutions, which must not see masked content, so each view gets its own copy.
        views = mask.shape[1]
        features = self.model.feature_projection.dropout(features)  # student only, as in `mask_features`
        features = features.repeat_interleave(views, 0).masked_fill(mask.flatten(0, 1).unsqueeze(-1), 0)
        padding_mask = None if padding_mask is None else padding_mask.repeat_interleave(views, 0)
        return gather(self.place(features, padding_mask), visible)

    def _enter(
        self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None
    ) -> tuple[Tensor, int, list[dict[str, Any]]]:
        from transformers.masking_utils import create_bidirectional_mask

        encoder = self.model.encoder
        if hasattr(encoder, "alibi"):
            attend = encoder.alibi(x, visible, padding_mask)
        else:
            attend = None if padding_mask is None else ~padding_mask
            attend = create_bidirectional_mask(config=self.model.config, inputs_embeds=x, attention_mask=attend)
        if not self._stable:
            x = encoder.layer_norm(x)
        each = attend if isinstance(attend, list) else [attend] * len(self.blocks)
        return encoder.dropout(x), 0, [dict(attention_mask=bias) for bias in each]

    def _leave(self, x: Tensor) -> Tensor:
        return self.model.encoder.layer_norm(x) if self._stable else x

    def _whole(self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None) -> Tensor:
        attend = None
        if padding_mask is not None:
            attend = ~padding_mask
            x = x.clone()  # transformers zeroes padding in place
        return self.model.encoder(x, attention_mask=attend).last_hidden_state

    def _dropped(self) -> bool:
        drop = self.model.config.layerdrop
        return self.training and drop > 0 and bool(torch.rand([]) < drop)

    def positions(self, size: int) -> int:
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            size = (size - kernel) // stride + 1 if size >= kernel else 0
        return size
