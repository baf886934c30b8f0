"""Run a transformer block in two halves, for the model families whose blocks are known.

Each function computes the same as the block's own forward and also returns the FFN's result before dropout and residual.
With `rows`, everything after the attention runs at these positions only.

    halves(block, x, rows, **arguments) -> (output, ffn)

x is (B, T, C), `rows` (N,) int64 into the flattened (B, T), `arguments` are the block's own. Both results are (B, T, C), or
(1, N, C) with `rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Halves = Callable[..., tuple[Tensor, Tensor]]


def first(output: Any) -> Tensor:
    """A block's result; some blocks return it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def flat(x: Tensor) -> Tensor:
    """x (B, T, C); the result of a block that keeps a grid (B, H, W, C) is flattened."""
    return x.flatten(1, 2) if x.ndim == 4 else x


def select(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, T, C) at `rows`, (N, C); on a GPU the backward of indexing would sort them."""
    return x.flatten(0, 1).index_select(0, rows)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """x (B, T, C) at `rows`, as a batch of one sample; all of x without rows."""
    return x if rows is None else select(x, rows).unsqueeze(0)


def bert(block: Any, x: Tensor, rows: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """BERT, RoBERTa, Data2VecText and similar, with the norm after the residual or, in RoBERTa-PreLayerNorm, before."""
    x = take(block.attention(x, **arguments)[0], rows)
    ffn = block.output.dense(block.intermediate(x))
    x = block.output.dropout(ffn) + x
    return block.output.LayerNorm(x) if hasattr(block.output, "LayerNorm") else x, ffn


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    x = module.intermediate_dropout(module.intermediate_act_fn(module.intermediate_dense(x)))
    return module.output_dense(x)


def wave(block: Any, x: Tensor, rows: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Wav2Vec2, HuBERT, Data2VecAudio: norms after the residuals."""
    x = take(x, rows) + block.dropout(take(block.attention(x, **arguments)[0], rows))
    x = block.layer_norm(x)
    ffn = _feed_forward(block.feed_forward, x)
    return block.final_layer_norm(x + block.feed_forward.output_dropout(ffn)), ffn


def stable_wave(block: Any, x: Tensor, rows: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The same with `do_stable_layer_norm`: norms before attention and FFN."""
    x = take(x, rows) + block.dropout(take(block.attention(block.layer_norm(x), **arguments)[0], rows))
    ffn = _feed_forward(block.feed_forward, block.final_layer_norm(x))
    return x + block.feed_forward.output_dropout(ffn), ffn


def vit(block: Any, x: Tensor, rows: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """ViT and DeiT."""
    attended = take(block.attention(block.layernorm_before(x), **arguments)[0], rows)
    x = block.dropout(attended) + take(x, rows)
    ffn = block.mlp(block.layernorm_after(x))
    return block.dropout(ffn) + x, ffn


def dinov2(block: Any, x: Tensor, rows: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """DINOv2, with layer scale and stochastic depth; the FFN's result is the scaled one, as in BEiT."""
    attended = take(block.attention(block.norm1(x), **arguments)[0], rows)
    x = block.drop_path(block.layer_scale1(attended)) + take(x, rows)
    ffn = block.layer_scale2(block.mlp(block.norm2(x)))
    return block.drop_path(ffn) + x, ffn


def beit(block: Any, x: Tensor, rows: Tensor | None = None, resolution=None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """BEiT with relative positions shared by all blocks, layer scale and stochastic depth."""
    attended = take(block.attention(block.layernorm_before(x), **arguments)[0], rows)
    x = block.drop_path(block.lambda_1 * block.dropout(attended)) + take(x, rows)
    ffn = block.mlp(block.layernorm_after(x))
    return block.drop_path(block.lambda_2 * block.dropout(ffn)) + x, ffn


def data2vec_vision(block: Any, x: Tensor, rows: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Data2VecVision, the older form of BEiT in transformers."""
    attended = take(block.attention(block.layernorm_before(x), **arguments)[0], rows)
    x = block.drop_path(attended if block.lambda_1 is None else block.lambda_1 * attended) + take(x, rows)
    ffn = block.output.dense(block.intermediate(block.layernorm_after(x)))
    fed = block.output.dropout(ffn)
    return block.drop_path(fed if block.lambda_2 is None else block.lambda_2 * fed) + x, ffn


KNOWN: dict[str, Halves] = {
    **dict.fromkeys(("BertLayer", "RobertaLayer", "Data2VecTextLayer", "XLMRobertaLayer", "CamembertLayer"), bert),
    **dict.fromkeys(("ElectraLayer", "ErnieLayer", "RobertaPreLayerNormLayer"), bert),
    **dict.fromkeys(("Wav2Vec2EncoderLayer", "HubertEncoderLayer", "Data2VecAudioEncoderLayer"), wave),
    **dict.fromkeys(("UniSpeechEncoderLayer", "UniSpeechSatEncoderLayer"), wave),
    **dict.fromkeys(("Wav2Vec2EncoderLayerStableLayerNorm", "HubertEncoderLayerStableLayerNorm"), stable_wave),
    **dict.fromkeys(("UniSpeechEncoderLayerStableLayerNorm", "UniSpeechSatEncoderLayerStableLayerNorm"), stable_wave),
    **dict.fromkeys(("ViTLayer", "DeiTLayer", "ViTMSNLayer"), vit),
    "Dinov2Layer": dinov2,
    "BeitLayer": beit,
    "Data2VecVisionLayer": data2vec_vision,
}


def known(block: nn.Module) -> Halves | None:
    """The function for this class of block; None if there is none."""
    extra = ("adapter_layer", "relative_position_bias", "crossattention")  # not handled by the functions above
    if any(getattr(block, name, None) is not None for name in extra):
        return None
    return KNOWN.get(type(block).__name__)
