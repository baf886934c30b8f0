"""The speech model of data2vec 2.0: Data2VecAudio with ALiBi, an attention bias by distance with a learned scale per head.

    waveform → convolutions → projection → + positional convolutions → context norm → blocks, no final norm

The prenet blocks of data2vec 2.0 (method 4.1) are the first blocks of a single stack: post-norm blocks need no layer between
the prenet and the rest.

This file depends only on torch and transformers (with its dependency huggingface_hub), so a copy can be saved with the model:
`AutoModel.from_pretrained(folder, trust_remote_code=True)` then works without d2v-fast.
"""

from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    Data2VecAudioForSequenceClassification,
    Data2VecAudioModel,
    Data2VecAudioPreTrainedModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.data2vec.modeling_data2vec_audio import (
    Data2VecAudioEncoderLayer,
    Data2VecAudioFeatureEncoder,
    Data2VecAudioFeatureProjection,
    Data2VecAudioPositionalConvEmbedding,
)


@strict
class Data2Vec2AudioConfig(Data2VecAudioConfig):
    """The fields of `Data2VecAudioConfig`, with data2vec 2.0 base as defaults, and

    - `use_alibi`: bias attention by distance (method 4.4);
    - `learned_alibi_scale`: learn the scale of the bias per head; otherwise it is 1;
    - `alibi_per_layer`: separate scales for each layer.
    """

    model_type = "data2vec2-audio"

    activation_dropout: float | int = 0.0
    layerdrop: float | int = 0.05
    mask_time_prob: float | int = 0.0
    use_alibi: bool = True
    learned_alibi_scale: bool = True
    alibi_per_layer: bool = False


def alibi_slopes(heads: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Slopes of the heads, (heads,), a geometric series (method 4.4).

    For n heads, n a power of two, they fall from 2^(-8/n) to 2^-8. Otherwise n is the next lower power of two, and the other
    heads take every second slope of 2n heads.
    """
    power = 1 << (heads.bit_length() - 1)
    head = torch.arange(heads, device=device, dtype=dtype or torch.float32)
    return 2 ** (-8 / power * torch.where(head < power, head + 1, head - power + 0.5))


class Data2Vec2AudioPositionalConvEmbedding(Data2VecAudioPositionalConvEmbedding):
    """A stack of convolutions, each followed by a norm without affine parameters and GELU.

    Padding is zeroed before each of them (method 4.9), so real frames get the same values as without padding.
    """

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Position embeddings to add to hidden_states (B, T, C); padding_mask (B, T) bool, True = padding."""
        x = hidden_states.transpose(1, 2)
        for layer in self.layers:
            x = layer(x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(1), 0))
        return x.transpose(1, 2)


class Data2Vec2AudioEncoder(nn.Module):
    """Positions, context norm and blocks.

    Attributes:
        alibi_scale: (1 or num_hidden_layers, 1, num_attention_heads, 1, 1), clamped to at least 0 (method 4.4). A buffer if it
            is not learned, because `from_pretrained` makes every parameter trainable.
    """

    def __init__(self, config: Data2Vec2AudioConfig):
        super().__init__()
        self.config = config
        self.pos_conv_embed = Data2Vec2AudioPositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([Data2VecAudioEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        if config.use_alibi:
            rows = config.num_hidden_layers if config.alibi_per_layer else 1
            scale = torch.ones(rows, 1, config.num_attention_heads, 1, 1)
            if config.learned_alibi_scale:
                self.alibi_scale = nn.Parameter(scale)
            else:
                self.register_buffer("alibi_scale", scale)

    def alibi(
        self, x: Tensor, positions: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor | list[Tensor] | None:
        """The attention bias of the blocks, passed as `attention_mask`: -scale · slope · |p_i - p_j|, with padded keys masked.

        Args:
            x: (N, T, C), input of the blocks; only its shape, device and dtype are used.
            positions: (N, T) int64, positions of the frames in the whole sequence; default is 0 to T - 1.
            padding_mask: (N, T) bool, True = padding: these keys get the lowest finite value of the dtype.

        Returns:
            (N or 1, heads or 1, T or 1, T) in the dtype of x; a list with one per layer if `alibi_per_layer`; None if there is
            neither ALiBi nor padding.
        """
        lowest = torch.finfo(x.dtype).min
        keys = None if padding_mask is None else padding_mask[:, None, None]
        if not self.config.use_alibi:
            return None if keys is None else torch.zeros_like(keys, dtype=x.dtype).masked_fill(keys, lowest)
        exact = torch.promote_types(x.dtype, torch.float32)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        distances = (positions[:, None, :, None] - positions[:, None, None, :]).abs().to(exact)
        slopes = alibi_slopes(self.config.num_attention_heads, x.device, exact)
        biases = []
        for scale in self.alibi_scale.to(exact).clamp(min=0):  # (1, heads, 1, 1)
            bias = (distances * (-scale * slopes[:, None, None])).to(x.dtype)
            biases.append(bias if keys is None else torch.where(keys, lowest, bias))
        return biases if self.config.alibi_per_layer else biases[0]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """States (B, T, C) of features (B, T, C); attention_mask (B, T) bool, False = padding."""
        padding_mask = None if attention_mask is None else ~attention_mask
        if padding_mask is not None:
            hidden_states = hidden_states.masked_fill(padding_mask.unsqueeze(-1), 0)
        hidden_states = hidden_states + self.pos_conv_embed(hidden_states, padding_mask)
        hidden_states = self.dropout(self.layer_norm(hidden_states))
        bias = self.alibi(hidden_states, padding_mask=padding_mask)
        biases = bias if isinstance(bias, list) else [bias] * len(self.layers)
        # Ranks that shard a layer's weights must all run it.
        drop = 0 if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self) else self.config.layerdrop
        for layer, bias in zip(self.layers, biases, strict=True):
            if self.training and drop > 0 and torch.rand([]) < drop:
                continue
            hidden_states = layer(hidden_states, bias, **kwargs)  # positional: checkpointing drops gradients of keywords
        return BaseModelOutput(last_hidden_state=hidden_states)


class Data2Vec2AudioPreTrainedModel(Data2VecAudioPreTrainedModel):
    config_class = Data2Vec2AudioConfig
    # Neither supports an additive bias.
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Data2Vec2AudioEncoder) and module.config.use_alibi:
            init.ones_(module.alibi_scale)


class Data2Vec2AudioModel(Data2Vec2AudioPreTrainedModel, Data2VecAudioModel):
    """The speech encoder of data2vec 2.0 (method 4.1, 4.4); `forward` is that of `Data2VecAudioModel`."""

    def __init__(self, config: Data2Vec2AudioConfig):
        PreTrainedModel.__init__(self, config)
        if config.add_adapter:
            raise ValueError("add_adapter=True: data2vec 2.0 has no adapter; remove the setting")
        self.feature_extractor = Data2VecAudioFeatureEncoder(config)
        self.feature_projection = Data2VecAudioFeatureProjection(config)
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:  # SpecAugment in fine-tuning
            self.masked_spec_embed = nn.Parameter(torch.zeros(config.hidden_size))
        self.encoder = Data2Vec2AudioEncoder(config)  # type: ignore[assignment]  # replaces transformers' encoder
        self.adapter = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Linear weights N(0, .02), convolutions Kaiming-normal; positions and projection as in torch (method 4.2)."""
        super()._init_weights(module)
        # Checked for each module, because transformers skips modules of custom models that hold no weights directly.
        torch_own = [self.feature_projection.projection, *(layer.conv for layer in self.encoder.pos_conv_embed.layers)]
        if any(module is own for own in torch_own):
            cast(nn.Linear, module).reset_parameters()
        elif module is self and hasattr(self, "masked_spec_embed"):  # transformers 5.17 leaves it uninitialised
            init.uniform_(self.masked_spec_embed)


class Data2Vec2AudioForCTC(Data2Vec2AudioPreTrainedModel, Data2VecAudioForCTC):
    """Speech recognition with connectionist temporal classification; `forward` is that of `Data2VecAudioForCTC`."""

    def __init__(self, config: Data2Vec2AudioConfig):
        PreTrainedModel.__init__(self, config)
        self.data2vec_audio = Data2Vec2AudioModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()


class Data2Vec2AudioForSequenceClassification(Data2Vec2AudioPreTrainedModel, Data2VecAudioForSequenceClassification):
    """Classification of recordings; `forward` is that of `Data2VecAudioForSequenceClassification`."""

    def __init__(self, config: Data2Vec2AudioConfig):
        PreTrainedModel.__init__(self, config)
        self.data2vec_audio = Data2Vec2AudioModel(config)
        if config.use_weighted_layer_sum:
            layers = config.num_hidden_layers + 1
            self.layer_weights = nn.Parameter(torch.full((layers,), 1 / layers))
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, cast(int, config.num_labels))
        self.post_init()
