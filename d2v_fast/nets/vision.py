"""The image model of data2vec 2.0: a vision transformer with post-norm blocks.

    patches + positions, CLS in front → context norm → blocks, no final norm

The prenet blocks of data2vec 2.0 (method 4.1) are the first blocks of a single stack: post-norm blocks need no layer between
the prenet and the rest.

This file depends only on torch and transformers (with its dependency huggingface_hub), so a copy can be saved with the model:
`AutoModel.from_pretrained(folder, trust_remote_code=True)` then works without d2v-fast.
"""

from typing import Any, Literal, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.models.bert.modeling_bert import BertEncoder, BertLayer, BertSelfAttention
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


@strict
class Data2Vec2VisionConfig(PreTrainedConfig):
    """Fields as in `ViTConfig`; `image_size` and `patch_size` are a side or (height, width).

    `pooling` selects the input of the classifier in `Data2Vec2VisionForImageClassification`: the mean of the patches or CLS.
    """

    model_type = "data2vec2-vision"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    pooling: Literal["mean", "cls"] = "mean"
    # Further fields that BertLayer reads.
    is_decoder: bool = False
    add_cross_attention: bool = False
    chunk_size_feed_forward: int = 0


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sincos(high: int, wide: int, channels: int) -> Tensor:
    """Sine-cosine embeddings of the column and row of each patch, row-major, as in MAE (method 4.1).

    Returns:
        (high · wide, channels) float32.
    """
    omega = 10_000 ** -(torch.arange(channels // 4, dtype=torch.float64, device="cpu") / (channels // 4))
    column = torch.arange(wide, device="cpu").repeat(high)
    row = torch.arange(high, device="cpu").repeat_interleave(wide)
    angles = [axis[:, None] * omega for axis in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


class Data2Vec2VisionPatchEmbeddings(nn.Module):
    """Pixels (B, channels, height, width) → patches (B, N, C)."""

    def __init__(self, config: Data2Vec2VisionConfig):
        super().__init__()
        self.image_size, patch = _pair(config.image_size), _pair(config.patch_size)
        self.grid = self.image_size[0] // patch[0], self.image_size[1] // patch[1]
        if (self.grid[0] * patch[0], self.grid[1] * patch[1]) != self.image_size:
            raise ValueError(f"image_size={config.image_size}: not a multiple of patch_size={config.patch_size}")
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            found, expected = ("×".join(map(str, size)) for size in (pixel_values.shape[-2:], self.image_size))
            raise ValueError(
                f"pixel_values: found images of {found}, image_size is {expected}; resize them, or load the model with another "
                "image_size=…, which works because its positions are computed and not learned"
            )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class Data2Vec2VisionEmbeddings(nn.Module):
    """Pixels → CLS and patches with their positions, normalised: (B, 1 + N, C).

    Attributes:
        position_embeddings: (1, 1 + N, C), zero for CLS. A non-persistent buffer: `from_pretrained` would make a parameter
            trainable, and a table computed from the config fits any image size.
    """

    position_embeddings: Tensor

    def __init__(self, config: Data2Vec2VisionConfig):
        super().__init__()
        if config.hidden_size % 4:
            raise ValueError(f"hidden_size={config.hidden_size}: sin-cos positions need a multiple of 4")
        self.patch_embeddings = Data2Vec2VisionPatchEmbeddings(config)
        high, wide = self.patch_embeddings.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_buffer("position_embeddings", torch.zeros(1, 1 + high * wide, config.hidden_size), persistent=False)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixel_values)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.dropout(self.layernorm(x + self.position_embeddings))


class Data2Vec2VisionPreTrainedModel(PreTrainedModel):
    config_class = Data2Vec2VisionConfig
    base_model_prefix = "data2vec2_vision"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple, as in transformers' models
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Data2Vec2VisionEmbeddings", "BertLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": BertLayer,
        "attentions": OutputRecorder(BertSelfAttention, index=1, layer_name="encoder"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear weights N(0, .02), CLS N(0, 1), patches Xavier-uniform on (C, 3p²) with torch's default bias (method 4.2)."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
            bound = (6 / sum(module.weight.flatten(1).shape)) ** 0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, Data2Vec2VisionEmbeddings):
            init.normal_(module.cls_token, std=1.0)
            positions = module.position_embeddings
            table = sincos(*module.patch_embeddings.grid, positions.shape[-1])
            init.copy_(positions, nn.functional.pad(table, (0, 0, 1, 0))[None])


class Data2Vec2VisionModel(Data2Vec2VisionPreTrainedModel):
    """The image encoder of data2vec 2.0 (method 4.1, 4.2).

    Raises:
        ValueError: `hidden_size` is not a multiple of 4, `image_size` not one of `patch_size`, or images have another size.
    """

    def __init__(self, config: Data2Vec2VisionConfig):
        super().__init__(config)
        self.embeddings = Data2Vec2VisionEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """States (B, 1 + N, C) of CLS and patches; pixel_values (B, channels, height, width) of `config.image_size`."""
        states = self.encoder(self.embeddings(pixel_values), **kwargs).last_hidden_state
        return BaseModelOutput(last_hidden_state=states)


class Data2Vec2VisionForImageClassification(Data2Vec2VisionPreTrainedModel):
    """Mean of the patches, or CLS → norm → Linear (method 5.3)."""

    def __init__(self, config: Data2Vec2VisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.data2vec2_vision = Data2Vec2VisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (B, num_labels); with labels (B,) int64 also the loss."""
        outputs = self.data2vec2_vision(pixel_values, **kwargs)
        states = outputs.last_hidden_state
        pooled = states[:, 0] if self.config.pooling == "cls" else states[:, 1:].mean(1)
        logits = self.classifier(self.norm(pooled))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
