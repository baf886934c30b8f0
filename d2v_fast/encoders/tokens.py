"""Text: token ids → embeddings → blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d2v_fast.encoders.base import Encoder


class TokenEncoder(Encoder):
    """RoBERTa, BERT, Data2VecText and similar: ids → token and position embeddings → blocks.

    Masking is applied to the ids, so the student's features are already masked.
    """

    reads = "text"
    local = ("embeddings",)
    masks_features = False

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model.embeddings(input_ids=inputs)

    def _attend(self, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        from transformers.masking_utils import create_bidirectional_mask

        if padding_mask is None:
            return None
        return create_bidirectional_mask(config=self.model.config, inputs_embeds=x, attention_mask=~padding_mask)

    def _enter(
        self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None
    ) -> tuple[Tensor, int, list[dict[str, Any]]]:
        return x, 0, [dict(attention_mask=self._attend(x, padding_mask))] * len(self.blocks)

    def _leave(self, x: Tensor) -> Tensor:
        norm = getattr(self.model, "LayerNorm", None)  # RobertaPreLayerNorm
        return x if norm is None else norm(x)

    def _whole(self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None) -> Tensor:
        return self._leave(self.model.encoder(x, attention_mask=self._attend(x, padding_mask)).last_hidden_state)
