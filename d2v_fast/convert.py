"""Convert checkpoints of fairseq, EAT, the paper's vision code and arxyzan/data2vec-pytorch to transformers (method 6).

None of these projects needs to be installed. Weights are renamed, never changed; a key that matches no rule is an error.
"""

from __future__ import annotations

import ast
import logging
import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2v_fast.data import first_line
from d2v_fast.encoders import class_arguments, model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Rules = list[tuple[str, str | None]]  # pattern of the whole key, and its replacement or None to drop it; the first match wins

AUDIO: Rules = [
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.+)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(.+)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"layer_norm\.(.+)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(.+)", r"feature_projection.projection.\1"),
    (r"mask_emb", "masked_spec_embed"),
    (r"encoder\.pos_conv\.(\d+)\.0\.(.+)", r"encoder.pos_conv_embed.layers.\1.conv.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.attention.\2"),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.(.+)", r"\1.layer_norm.\2"),
    (r"(encoder\.layers\.\d+)\.fc1\.(.+)", r"\1.feed_forward.intermediate_dense.\2"),
    (r"(encoder\.layers\.\d+)\.fc2\.(.+)", r"\1.feed_forward.output_dense.\2"),
    (r"(encoder\.layers\.\d+\.final_layer_norm|encoder\.layer_norm)\.(.+)", r"\1.\2"),
    (r"final_proj\..+", None),
]
BERT: Rules = [
    (r"layers\.(\d+)\.self_attn\.q_proj\.(.+)", r"encoder.layer.\1.attention.self.query.\2"),
    (r"layers\.(\d+)\.self_attn\.k_proj\.(.+)", r"encoder.layer.\1.attention.self.key.\2"),
    (r"layers\.(\d+)\.self_attn\.v_proj\.(.+)", r"encoder.layer.\1.attention.self.value.\2"),
    (r"layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"encoder.layer.\1.attention.output.LayerNorm.\2"),
    (r"layers\.(\d+)\.fc1\.(.+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"layers\.(\d+)\.fc2\.(.+)", r"encoder.layer.\1.output.dense.\2"),
    (r"layers\.(\d+)\.final_layer_norm\.(.+)", r"encoder.layer.\1.output.LayerNorm.\2"),
]
TEXT: Rules = [
    (r"embed_tokens\.weight", "embeddings.word_embeddings.weight"),
    (r"embed_positions\.weight", "embeddings.position_embeddings.weight"),
    (r"layernorm_embedding\.(.+)", r"embeddings.LayerNorm.\1"),
    *BERT,
    (r"(regression_head|lm_head)\..+|(.+\.)?version|embed_positions\._float_tensor", None),
]
BLOCK_2: Rules = [  # data2vec 2.0, whose blocks follow timm's
    (r"blocks\.(\d+)\.attn\.([qkv])\.(.+)", r"layers.\1.self_attn.\2_proj.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"layers.\1.self_attn.out_proj.\2"),
    (r"blocks\.(\d+)\.norm1\.(.+)", r"layers.\1.self_attn_layer_norm.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(.+)", r"layers.\1.\2.\3"),
    (r"blocks\.(\d+)\.norm2\.(.+)", r"layers.\1.final_layer_norm.\2"),
]
# Rules for a modality encoder of 2.0: first to names of v1 where v1 has the module, then to those of transformers.
NAMES_2: dict[str, tuple[Rules, Rules]] = {
    "IMAGE": (
        [
            *BLOCK_2,
            (r"local_encoder\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
            (r"extra_tokens", "embeddings.cls_token"),
            (r"context_encoder\.norm\.(.+)", r"embeddings.layernorm.\1"),
            (r"fixed_positional_encoder\.positions|alibi_scale", None),  # checked against what the model computes, or unused
        ],
        [*BERT, (r"embeddings\..+", r"\g<0>")],
    ),
    "AUDIO": (
        [
            *((pattern, f"encoder.{name}") for pattern, name in BLOCK_2),
            (r"local_encoder\.(conv_layers\..+)", r"feature_extractor.\1"),
            (r"project_features\.1\.(.+)", r"layer_norm.\1"),
            (r"project_features\.2\.(.+)", r"post_extract_proj.\1"),
            (r"relative_positional_encoder\.(\d+)\.0\.(.+)", r"encoder.pos_conv.\1.0.\2"),
            (r"context_encoder\.norm\.(.+)", r"encoder.layer_norm.\1"),
            (r"alibi_scale", r"encoder.\g<0>"),
        ],
        [*AUDIO, (r"encoder\.alibi_scale", r"\g<0>")],
    ),
    "TEXT": ([*BLOCK_2, (r"local_encoder\.(.+)", r"\1"), (r"alibi_scale", None)], TEXT),
}
DECODER_2: Rules = [
    (r"blocks\.(\d+)\.0\.(.+)", r"convolutions.\1.\2"),
    (r"proj\.(\d+\..+)", r"projection.\1"),
    (r"proj\.(weight|bias)", r"projection.0.\1"),
]
HEAD_2: dict[str, Rules] = {  # heads of fine-tuned models
    "IMAGE": [(r"fc_norm\.(.+)", r"norm.\1"), (r"head\.(.+)", r"classifier.\1")],
    "AUDIO": [(r"w2v_encoder\.proj\.(.+)", r"lm_head.\1")],
    "TEXT": [(r"classification_heads\.\w+\.((?:dense|out_proj)\..+)", r"classifier.\1")],
}
# Prefixes of weights and of pre-training settings in a checkpoint; all but the first occur in fine-tuned models.
BODIES_2 = ("", "model.", "w2v_encoder.w2v_model.")
RUNS_2 = ("model.", "model.pretrained_model_args.model.", "model.w2v_args.model.")
# Settings of 2.0 that no published model changes: modalities, name ("own." for settings of the modality), the only supported
# value, and the meaning of any other value.
ONLY_2: list[tuple[str, str, Any, str]] = [
    ("AUDIO IMAGE TEXT", "layer_norm_first", False, "its blocks normalise before attention and FFN, ours after them"),
    ("AUDIO IMAGE TEXT", "own.learned_alibi", False, "its attention bias is a learned table"),
    ("AUDIO IMAGE TEXT", "own.decoder.add_positions_masked", False, "its decoder adds positions"),
    ("AUDIO IMAGE TEXT", "own.decoder.add_positions_all", False, "its decoder adds positions"),
    ("IMAGE", "own.use_alibi_encoder", False, "its attention has a bias that depends on the distance in the grid"),
    ("IMAGE", "own.transformer_decoder", False, "its decoder is a transformer"),
    ("IMAGE", "own.enc_dec_transformer", False, "its decoder is a transformer"),
    ("IMAGE", "own.num_extra_tokens", 1, "our models have one extra token, CLS"),
    ("AUDIO", "own.num_extra_tokens", 0, "its blocks see extra tokens, ours only frames"),
    ("AUDIO", "own.extractor_mode", "layer_norm", "its convolutions use a different norm"),
    ("AUDIO", "own.conv_pos_pre_ln", False, "a norm precedes its positional convolutions"),
    ("AUDIO TEXT", "norm_eps", 1e-5, "our models use one epsilon for all norms"),
    ("TEXT", "own.use_alibi_encoder", False, "its attention has a distance bias, RoBERTa's does not"),
    ("TEXT", "own.prenet_depth", 0, "its prenet has a norm that RoBERTa lacks"),
    ("TEXT", "own.num_extra_tokens", 0, "its blocks see extra tokens, RoBERTa's only the text"),
    ("TEXT", "own.no_scale_embedding", True, "its embeddings are scaled"),
]
POOLING_2 = {"mean_pooling": "mean", "1": "mean", "cls_token": "cls", "2": "cls"}  # a pickled enum is read as its number
# Licences of the weights that the authors of 2.0 and of EAT released, as the hub writes them.
LICENCES_2 = {"AUDIO": "mit", "IMAGE": "cc-by-nc-4.0", "TEXT": "mit", "EAT": "mit"}
EAT_SIZE = 1024, 128  # default number of frames; number of mel bins, which its settings never give
# Mean and std of the spectrograms where they are not AudioSet's, by the setting that selects them: ESC-50, Speech Commands.
EAT_NORMS = {"task.esc50_eval": (-6.627, 5.359), "task.spcv2_eval": (-6.846, 5.565)}
VISION: Rules = [  # names of BEiT, as in the code of the paper
    (r"cls_token|mask_token", r"embeddings.\g<0>"),
    (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(.+)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(.+)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.q(?:\.|_)(.+)", r"encoder.layer.\1.attention.attention.query.\2"),
    (r"blocks\.(\d+)\.attn\.k\.(.+)", r"encoder.layer.\1.attention.attention.key.\2"),
    (r"blocks\.(\d+)\.attn\.v(?:\.|_)(.+)", r"encoder.layer.\1.attention.attention.value.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.+)", r"encoder.layer.\1.output.dense.\2"),
    (r"blocks\.(\d+)\.gamma_([12])", r"encoder.layer.\1.lambda_\2"),
    (r"rel_pos_bias\.relative_position_bias_table", "encoder.relative_position_bias.relative_position_bias_table"),
    (r"norm\.(.+)", r"layernorm.\1"),
    (r"(.+\.)?relative_position_index|(lm_head|final_proj)\..+", None),
]
VISION_PORT: Rules = [  # names of the fairseq port
    (r"cls_emb", "cls_token"),
    (r"mask_emb", "mask_token"),
    (r"patch_embed\.conv\.(.+)", r"patch_embed.proj.\1"),
    (r"encoder\.(blocks\.\d+\.mlp)\.0\.(.+)", r"\1.fc1.\2"),
    (r"encoder\.(blocks\.\d+\.mlp)\.2\.(.+)", r"\1.fc2.\2"),
    (r"encoder\.(.+)", r"\1"),
    (r"final_proj\..+", None),
]
# Classes that pickled settings may refer to. Each is replaced by an inert object.
HARMLESS = re.compile(
    r"argparse\.Namespace|(omegaconf|fairseq|(examples\.)?data2vec)\.[\w.]+|typing\.\w+|collections\.defaultdict"
    r"|builtins\.(bool|int|float|str|list|tuple|dict|object|NoneType)|pathlib\.\w*Path|torch\.torch_version\.TorchVersion"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+)"
)


@dataclass
class Released:
    """Contents of a fairseq checkpoint.

    Attributes:
        model: In fp32 and eval mode: the student, or a fine-tuned model with its head.
        settings: Arguments of the run under flat, dotted names, such as model.average_top_k_layers; empty if there are none.
        decoder: Weights of `ConvDecoder` in fp32, for a pre-trained data2vec 2.0.
        decoder_settings: Arguments of that `ConvDecoder`, except `hidden_size`.
        teacher: Weights of its teacher in fp32, if saved, under the names of the student's `state_dict`. Those that a teacher
            of 2.0 lacks are the student's (method 1.6).
        licence: Hub identifier of the licence under which the authors of 2.0 and EAT released their weights. It does not apply
            to weights that you trained yourself.
    """

    model: PreTrainedModel
    settings: dict[str, Any]
    decoder: State | None = None
    decoder_settings: dict[str, Any] | None = None
    teacher: State | None = None
    licence: str | None = None


class _Inert:
    """Stand-in for the class of a pickled object: holds its arguments and state, and runs no code."""

    def __new__(cls, *args: Any) -> Any:
        inert = object.__new__(cls)
        inert.state = args[0] if args else None
        return inert

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty(*args: Any) -> dict:
    return {}


@contextmanager
def error_context(file: str, what: str) -> Iterator[None]:
    """Turn any error into a ValueError that starts with the file name; errors that already do pass unchanged."""
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, ValueError) and str(error).startswith(f"{file}: "):
            raise
        raise ValueError(f"{file}: {what}: {type(error).__name__}: {first_line(error)}") from error


def load_checkpoint(file: str) -> dict[str, Any]:
    """Load a file written by `torch.save` without running code from it; tensors are on the CPU and memory-mapped.

    Raises:
        ValueError: Not such a file, or it holds objects that no checkpoint of these projects needs.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: not a file written by torch.save (torch 1.6 or later)")
    with error_context(file, "cannot be read as a checkpoint"):
        names = get_unsafe_globals_in_checkpoint(file)
        disallowed = [name for name in names if not HARMLESS.fullmatch(name)]
        if disallowed:
            raise ValueError(
                f"{file}: holds {', '.join(sorted(disallowed))}, which no checkpoint needs and which may run code; "
                "not loaded. If you trust the file, save only its weights: torch.save({'model': …}, …)"
            )
        stand_ins: list[Any] = [(_empty if name == "collections.defaultdict" else _Inert, name) for name in names]
        with safe_globals(stand_ins):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: found a {type(loaded).__name__}, expected a checkpoint, which is a dict")
    return loaded


def _settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """The arguments of a run, a dict, Namespace or DictConfig, with flat dotted keys."""
    if isinstance(value, _Inert):
        value = value.state
        if isinstance(value, dict):
            value = value.get("_content", value.get("_val", value))  # omegaconf's containers and values
        return _settings(value, prefix)
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for name, inner in value.items() for k, v in _settings(inner, f"{prefix}{name}.").items()}


def _rename(state: State, rules: Rules, file: str) -> State:
    """Rename the keys of `state` by `rules`.

    Raises:
        ValueError: A key matches no rule.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, name in rules:
            if match := re.fullmatch(pattern, key):
                if name is not None:
                    renamed[match.expand(name)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{file}: holds {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}, which the data2vec classes of "
            "transformers do not have: another architecture, or a fine-tuned model"
        )
    return renamed


def _split_qkv(state: State) -> State:
    """`attn.qkv` as `attn.q`, `attn.k` and `attn.v`."""
    split: State = {}
    for key, value in state.items():
        if ".qkv." in key:
            split |= {key.replace(".qkv.", f".{name}."): part for name, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[key] = value
    return split


def make_model(config: PreTrainedConfig, state: State, file: str, cls: Any = None) -> PreTrainedModel:
    """A model of transformers with exactly these weights, in fp32 and eval mode.

    Args:
        config: Configuration.
        state: Weights under the names that the model's `save_pretrained` writes.
        file: Where they come from, for messages.
        cls: A class with a head; default is the encoder that the configuration belongs to.

    Raises:
        ValueError: Weights are missing, left over or of another shape.
    """
    cls = cls or model_class(type(config))
    model, found = cls.from_pretrained(
        None,
        config=config,
        # Copied, because they may be mapped from a file that is later replaced.
        state_dict={k: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True) for k, v in state.items()},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below
        **class_arguments(cls),
    )
    wrong = {kind: sorted(map(str, found[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    # Heads and poolers that pre-training does not use are dropped.
    wrong["unexpected"] = [key for key in wrong["unexpected"] if not key.startswith(("pooler.", "lm_head."))]
    if any(wrong.values()):
        details = "; ".join(f"{kind}: {', '.join(keys[:5])}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{file}: its weights are not those of {cls.__name__}: {details}")
    return model.eval()


def from_fairseq(file: str, eat: bool = False) -> Released:
    """Load a checkpoint of fairseq, EAT, or the paper's vision code.

    v1 audio → Data2VecAudioModel, v1 text → Data2VecTextModel, v1 vision → Data2VecVisionModel; v2 audio, text and images →
    Data2Vec2AudioModel, RobertaModel and Data2Vec2VisionModel. Fine-tuned models keep their head. The weights are the
    student's, as in fine-tuning (method 1.6). EAT (Chen et al. 2024) is the image model of v2 on single-channel spectrograms
    (frames, 128 mel bins).

    Args:
        file: The checkpoint.
        eat: Whether it is a checkpoint of EAT.

    Raises:
        ValueError: Not such a checkpoint, or there is no class for its model; the message gives the reason.
    """
    checkpoint = load_checkpoint(file)
    if not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{file}: holds {list(checkpoint)[:8]}, expected 'model' as in a checkpoint of fairseq")
    with error_context(file, "its weights and settings do not form a model"):
        settings = _settings(checkpoint.get("cfg") or checkpoint.get("args") or {})
        # The teacher is a dict stored among the weights.
        state = {k: v for k, v in checkpoint["model"].items() if isinstance(v, Tensor) and "_ema." not in k}
        _check_whole(state, file)
        if any("modality_encoders." in k for k in state):
            return _version_2(state, checkpoint["model"].get("_ema"), settings, file, eat)
        if eat:
            raise ValueError(f"{file}: has no modality_encoders.IMAGE, so it is not a model of EAT; try --from fairseq")
        if "encoder.sentence_encoder.embed_tokens.weight" in state:
            stripped = {k.removeprefix("encoder.").removeprefix("sentence_encoder."): v for k, v in state.items()}
            return Released(_text(stripped, settings, file), settings)
        if "feature_extractor.conv_layers.0.0.weight" in state:
            return Released(_audio(state, settings, file), settings)
        if "patch_embed.proj.weight" in state or "patch_embed.conv.weight" in state:
            return Released(_vision(state, file), settings)
    raise ValueError(f"{file}: not a pre-trained data2vec model of audio, text or vision; it starts with {list(state)[:3]}")


def _heads(settings: dict[str, Any], hidden_size: int, file: str) -> int:
    for key in ("model.encoder_attention_heads", "model.transformer.encoder.attention_heads", "model.num_heads"):
        for name in (key, key.removeprefix("model.")):
            if settings.get(name):
                return int(settings[name])
    heads = max(1, hidden_size // 64)
    log.warning("%s: does not give its number of attention heads; assuming %d, with 64 channels each", file, heads)
    return heads


def _depth(state: State, pattern: str) -> int:
    """Number of layers. They are counted, because a single name with a large index could otherwise demand a huge model."""
    return len({m[1] for key in state if (m := re.match(pattern, key))})


def _audio(state: State, settings: dict[str, Any], file: str) -> PreTrainedModel:
    from transformers import AutoConfig

    if "encoder.pos_conv.0.0.weight" not in state:
        raise ValueError(
            f"{file}: has no positional convolution of several layers (model.pos_conv_depth), so it is not the "
            "architecture of Data2VecAudioModel"
        )
    if settings.get("model.layer_norm_first", settings.get("layer_norm_first")):
        raise ValueError(f"{file}: model.layer_norm_first=true, but Data2VecAudioModel normalises after each block")
    layers = settings.get("model.conv_feature_layers", settings.get("conv_feature_layers"))
    position, hidden_size = state["encoder.pos_conv.0.0.weight"], len(state["encoder.layer_norm.weight"])
    fields = dict(
        hidden_size=hidden_size,
        num_hidden_layers=_depth(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(settings, hidden_size, file),
        intermediate_size=len(state["encoder.layers.0.fc1.bias"]),
        num_conv_pos_embeddings=_depth(state, r"encoder\.pos_conv\.(\d+)\."),
        conv_pos_kernel_size=position.shape[2],
        num_conv_pos_embedding_groups=hidden_size // position.shape[1],
        layer_norm_eps=1e-5,
        **_convolutions(state, "feature_extractor", layers, file),
    )
    return make_model(AutoConfig.for_model("data2vec-audio", **fields), _rename(state, AUDIO, file), file)


def _convolutions(state: State, prefix: str, layers: str | None, file: str) -> dict[str, Any]:
    """Config fields of the convolutions over a waveform; their strides are only in the settings."""
    count = _depth(state, rf"{re.escape(prefix)}\.conv_layers\.(\d+)\.0\.")
    kernels = [state[f"{prefix}.conv_layers.{i}.0.weight"] for i in range(count)]
    strides = _strides(layers, file) if layers else [5, *[2] * 6]
    if len(strides) != len(kernels):
        raise ValueError(f"{file}: has {len(kernels)} convolutions, but its settings list {len(strides)}: {layers}")
    return dict(
        conv_dim=[w.shape[0] for w in kernels],
        conv_kernel=[w.shape[2] for w in kernels],
        conv_stride=strides,
        conv_bias=f"{prefix}.conv_layers.0.0.bias" in state,
        num_feat_extract_layers=len(kernels),
    )


def _strides(layers: str, file: str) -> list[int]:
    """Strides of "[(512, 10, 5)] + [(512, 3, 2)] * 4", which fairseq evaluates as Python; only this form is accepted here."""
    term = r"\s*(\[[\s\d,()]*\])\s*(?:\*\s*(\d\d?))?\s*"
    if not re.fullmatch(rf"{term}(?:\+{term})*", layers):
        raise ValueError(f"{file}: conv_feature_layers={layers!r}: expected a sum of lists of (width, kernel, stride)")
    return [stride for part, times in re.findall(term, layers) for _, _, stride in ast.literal_eval(part) * int(times or 1)]


def _text(state: State, settings: dict[str, Any], file: str) -> PreTrainedModel:
    from transformers import AutoConfig

    fields = _roberta(state, "")
    fields["num_hidden_layers"] = _depth(state, r"layers\.(\d+)\.")
    fields["intermediate_size"] = len(state["layers.0.fc1.bias"])
    fields["num_attention_heads"] = _heads(settings, fields["hidden_size"], file)
    return make_model(AutoConfig.for_model("data2vec-text", **fields), _add_token_type(_rename(state, TEXT, file)), file)


def _roberta(state: State, prefix: str) -> dict[str, Any]:
    """Config fields of RoBERTa, except those of its blocks."""
    vocab_size, hidden_size = state[f"{prefix}embed_tokens.weight"].shape
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=len(state[f"{prefix}embed_positions.weight"]),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def _add_token_type(state: State) -> State:
    """Add the token-type embedding that RoBERTa has in transformers but not in fairseq: one type, zeros."""
    hidden_size = state["embeddings.word_embeddings.weight"].shape[1]
    return state | {"embeddings.token_type_embeddings.weight": torch.zeros(1, hidden_size)}


def _vision(state: State, file: str) -> PreTrainedModel:
    from transformers import AutoConfig

    port = "patch_embed.conv.weight" in state
    if port:
        state = _rename(state, VISION_PORT, file)
    projection = state["patch_embed.proj.weight"]
    table = state.get("rel_pos_bias.relative_position_bias_table")
    if table is None:
        raise ValueError(
            f"{file}: has no relative-position bias shared by all layers, so it is not a pre-trained data2vec model"
        )
    side = (math.isqrt(len(table) - 3) + 1) // 2  # (2·side - 1)² distances and three for the extra token
    fields = dict(
        hidden_size=len(projection),
        num_hidden_layers=_depth(state, r"blocks\.(\d+)\."),
        num_attention_heads=table.shape[1],
        intermediate_size=len(state["blocks.0.mlp.fc1.bias"]),
        patch_size=projection.shape[2],
        image_size=side * projection.shape[2],
        use_mask_token="mask_token" in state,
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
        layer_norm_eps=1e-5 if port else 1e-6,
        layer_scale_init_value=1e-4 if "blocks.0.gamma_1" in state else 0,
        drop_path_rate=0.0,
    )
    return make_model(AutoConfig.for_model("data2vec-vision", **fields), _rename(_split_qkv(state), VISION, file), file)


def _version_2(state: State, ema: Any, settings: dict[str, Any], file: str, eat: bool) -> Released:
    """Build a model of data2vec 2.0 or EAT, pre-trained or fine-tuned; `ema` holds the teacher's weights, if saved."""
    prefix = next(key for key in state if "modality_encoders." in key).partition("modality_encoders.")[0]
    if prefix not in BODIES_2:
        raise ValueError(f"{file}: has a model of data2vec 2.0 under {prefix!r}, expected {' or '.join(map(repr, BODIES_2))}")
    body = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    modalities = {key.split(".")[1] for key in body if key.startswith("modality_encoders.")}
    if len(modalities) > 1 or not modalities <= NAMES_2.keys():
        raise ValueError(
            f"{file}: has encoders of {', '.join(sorted(modalities))}, expected one of {', '.join(NAMES_2)}; there is no class "
            "for several modalities that share blocks"
        )
    (modality,) = modalities
    cfg = _settings_2(settings, modality, file)
    if eat and modality != "IMAGE":
        raise ValueError(f"{file}: has an encoder of {modality}, but EAT's is one of IMAGE; use --from fairseq")
    if eat:
        settings = {"model.prediction_mode": "cls_token"} | settings  # its default
        lengths = (settings.get("model.target_length"), cfg.get("own.target_length"), settings.get("task.target_length"))
        cfg["spectrogram"] = [int(next(filter(None, lengths), EAT_SIZE[0])), EAT_SIZE[1]]
    body = {key.removeprefix(f"modality_encoders.{modality}."): value for key, value in body.items()}
    # Both are prediction heads of pre-training that are not needed here.
    body = {key: value for key, value in body.items() if not key.startswith(("shared_decoder.", "recon_proj."))}
    decoder = {key.removeprefix("decoder."): value for key, value in body.items() if key.startswith("decoder.")}
    encoder = {key: value for key, value in body.items() if not key.startswith("decoder.")}
    config = {"AUDIO": _audio_2, "IMAGE": _image_2, "TEXT": _text_2}[modality](encoder, cfg, file)
    weights = _rename_2(encoder, modality, config, file)
    with torch.device("meta"):  # otherwise a small file could demand much memory
        cls = model_class(type(config))
        model = cls(config, **class_arguments(cls))
    _check_shapes(weights, model.state_dict(), "weights", file)
    licence = LICENCES_2["EAT" if eat else modality]
    if head := {key: value for key, value in state.items() if not key.startswith(prefix)}:
        return Released(_fine_tuned_2(config, weights, head, modality, settings, file), settings, licence=licence)
    released = Released(make_model(config, weights, file), settings, licence=licence)
    if decoder:
        axes = 2 if modality == "IMAGE" else 1
        released.decoder, released.decoder_settings = _decoder_2(decoder, config.hidden_size, axes, cfg, file)
    if ema:
        teacher = _rename_2(_teacher_2(encoder, ema, modality, file), modality, config, file)
        _check_shapes(teacher, weights, "teacher", file)
        released.teacher = {key: value.to(torch.float32, copy=True) for key, value in teacher.items()}
    return released


def _check_whole(state: State, file: str) -> None:
    """Raise ValueError for expanded tensors, with which a small file could demand a large model."""
    for key, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{file}: {key} has shape {list(value.shape)}, but the file holds fewer numbers")


def _check_shapes(found: State, expected: State, what: str, file: str) -> None:
    for key in sorted(found.keys() | expected.keys()):
        shapes = [list(state[key].shape) if key in state else "nothing" for state in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{file}: {what}: {key}: found {shapes[0]}, expected {shapes[1]}")


def _settings_2(settings: dict[str, Any], modality: str, file: str) -> dict[str, Any]:
    """Settings of the model; the names of those of its modality start with "own.".

    Raises:
        ValueError: A setting selects an unsupported architecture.
    """
    run = next((run for run in RUNS_2 if any(key.startswith(f"{run}modalities.") for key in settings)), RUNS_2[0])
    prefix = f"{run}modalities.{modality.lower()}."
    cfg = {key.removeprefix(run): value for key, value in settings.items() if key.startswith(run)}
    cfg |= {f"own.{key.removeprefix(prefix)}": value for key, value in settings.items() if key.startswith(prefix)}
    for where, key, expected, why in ONLY_2:
        found = cfg.get(key)
        if isinstance(expected, float) and found is not None:
            found = float(found)  # PyYAML reads 1e-6 as a string
        if modality in where.split() and found not in (None, expected):
            name = f"{prefix}{key.removeprefix('own.')}" if key.startswith("own.") else f"{run}{key}"
            raise ValueError(f"{file}: {name}: found {found!r}, expected {expected!r}: {why}")
    return cfg


def _shift(state: State, name: str, by: int) -> State:
    """Add `by` to the index i of keys `name.i.…`."""
    pattern = re.compile(rf"{name}\.(\d+)\.(.+)")
    return {f"{name}.{int(m[1]) + by}.{m[2]}" if (m := pattern.fullmatch(key)) else key: v for key, v in state.items()}


def _rename_2(state: State, modality: str, config: PreTrainedConfig, file: str) -> State:
    """Rename the weights of a modality's encoder and of the blocks to those of the transformers model."""
    # In a post-norm model nothing separates the prenet's blocks from the others, so all form one stack.
    state = _shift(state, "blocks", _depth(state, r"context_encoder\.blocks\.(\d+)\."))
    state = {re.sub(r"^context_encoder\.blocks\.", "blocks.", key): value for key, value in state.items()}
    state = _shift(state, "relative_positional_encoder", -1)  # its first layer transposes
    if modality == "IMAGE":
        _check_positions(state["fixed_positional_encoder.positions"], config, file)
    elif modality == "AUDIO":
        state = state | _alibi_scale(state.pop("alibi_scale", None), config, file)
    first, second = NAMES_2[modality]
    state = _rename(_rename(_split_qkv(state), first, file), second, file)
    return _add_token_type(state) if modality == "TEXT" else state


def _check_positions(positions: Tensor, config: PreTrainedConfig, file: str) -> None:
    """Raise ValueError unless Data2Vec2VisionModel computes these positions; EAT's may extend to longer recordings."""
    from d2v_fast.nets.vision import sincos

    eat, channels = isinstance(config.image_size, list), config.hidden_size
    high, wide = (side // config.patch_size for side in (config.image_size if eat else [config.image_size] * 2))
    rounding = 1e-3 if positions.element_size() < 4 else 1e-5
    used = positions[:, : high * wide] if eat else positions
    same = used.shape == (1, high * wide, channels) and channels % 4 == 0
    if not (same and (used[0] - sincos(high, wide, channels)).abs().max() <= rounding):
        grid = f"{high} × {wide} patches (frames, mel bins)" if eat else "a square of patches"
        hint = "" if eat or config.num_channels > 1 else "; for a model of EAT, use --from eat"
        raise ValueError(
            f"{file}: fixed_positional_encoder.positions are not the sines and cosines of {grid}, column first, "
            f"which Data2Vec2VisionModel computes{hint}"
        )


def _alibi_scale(scale: Tensor | None, config: PreTrainedConfig, file: str) -> State:
    """Scale of ALiBi (rows, 1, heads, 1, 1). Older versions omit the first axis, and heads may share one scale."""
    if not config.use_alibi:
        return {}
    heads = config.num_attention_heads
    scale = torch.ones(1, 1, 1, 1, 1) if scale is None else scale
    scale = scale.unsqueeze(0) if scale.dim() == 4 else scale
    rows = config.num_hidden_layers if config.alibi_per_layer else 1
    if scale.shape not in ((rows, 1, heads, 1, 1), (rows, 1, 1, 1, 1)):
        raise ValueError(f"{file}: alibi_scale: found {list(scale.shape)}, expected {[rows, 1, heads, 1, 1]}")
    return {"alibi_scale": scale.expand(-1, -1, heads, -1, -1)}


def _pick(cfg: dict[str, Any], **names: str) -> dict[str, Any]:
    """The settings that are present, renamed by field=setting."""
    return {field: cfg[name] for field, name in names.items() if cfg.get(name) is not None}


def _layers_2(state: State) -> dict[str, Any]:
    """Config fields of the blocks, including the prenet's."""
    layers = _depth(state, r"blocks\.(\d+)\.") + _depth(state, r"context_encoder\.blocks\.(\d+)\.")
    return dict(num_hidden_layers=layers, intermediate_size=len(state["blocks.0.mlp.fc1.bias"]))


def _image_2(state: State, cfg: dict[str, Any], file: str) -> PreTrainedConfig:
    from d2v_fast.nets import Data2Vec2VisionConfig

    if "local_encoder.0.proj.weight" in state:
        raise ValueError(
            f"{file}: modalities.image.embed_dim is not the width of the blocks, so a Linear follows the patches; "
            "Data2Vec2VisionModel has none"
        )
    if "fixed_positional_encoder.positions" not in state:
        raise ValueError(f"{file}: has no fixed_positional_encoder.positions, but Data2Vec2VisionModel adds them")
    projection, positions = state["local_encoder.proj.weight"], state["fixed_positional_encoder.positions"]
    size = cfg.get("spectrogram", math.isqrt(positions.shape[1]) * projection.shape[2])
    if "spectrogram" in cfg and projection.shape[1] != 1:
        raise ValueError(f"{file}: its patches have {projection.shape[1]} channels, EAT's have 1; use --from fairseq")
    return Data2Vec2VisionConfig(
        hidden_size=len(projection),
        num_attention_heads=_heads(cfg, len(projection), file),
        num_channels=projection.shape[1],
        patch_size=projection.shape[2],
        image_size=size,
        layer_norm_eps=float(cfg.get("norm_eps", 1e-6)),
        **_layers_2(state),
        **_pick(cfg, hidden_dropout_prob="encoder_dropout", attention_probs_dropout_prob="attention_dropout"),
    )


def _audio_2(state: State, cfg: dict[str, Any], file: str) -> PreTrainedConfig:
    from d2v_fast.nets import Data2Vec2AudioConfig

    position = state["relative_positional_encoder.1.0.weight"]
    scale = state.get("alibi_scale")
    fields = _pick(
        cfg,
        hidden_dropout="encoder_dropout",
        attention_dropout="attention_dropout",
        activation_dropout="activation_dropout",
        layerdrop="layerdrop",
    )
    return Data2Vec2AudioConfig(
        hidden_size=len(position),
        num_attention_heads=_heads(cfg, len(position), file),
        num_conv_pos_embeddings=_depth(state, r"relative_positional_encoder\.(\d+)\."),
        conv_pos_kernel_size=position.shape[2],
        num_conv_pos_embedding_groups=len(position) // position.shape[1],
        layer_norm_eps=1e-5,
        use_alibi=bool(cfg.get("own.use_alibi_encoder", scale is not None)),
        learned_alibi_scale=scale is not None and bool(cfg.get("own.learned_alibi_scale", True)),
        alibi_per_layer=scale is not None and scale.dim() == 5 and len(scale) > 1,
        **_layers_2(state),
        **_convolutions(state, "local_encoder", cfg.get("own.feature_encoder_spec"), file),
        **fields,
    )


def _text_2(state: State, cfg: dict[str, Any], file: str) -> PreTrainedConfig:
    from transformers import RobertaConfig

    fields = _roberta(state, "local_encoder.") | _layers_2(state)
    fields |= _pick(cfg, hidden_dropout_prob="encoder_dropout", attention_probs_dropout_prob="attention_dropout")
    return RobertaConfig(num_attention_heads=_heads(cfg, fields["hidden_size"], file), **fields)


def _fine_tuned_2(
    config: PreTrainedConfig, weights: State, head: State, modality: str, settings: dict[str, Any], file: str
) -> PreTrainedModel:
    """A fine-tuned model with its head: a classifier of images or texts, or CTC."""
    from transformers import RobertaForSequenceClassification

    from d2v_fast.nets import Data2Vec2AudioForCTC, Data2Vec2VisionForImageClassification

    cls: Any
    fields: dict[str, Any]
    renamed = _rename(head, HEAD_2[modality], file)
    if len(renamed) < len(head):
        raise ValueError(f"{file}: has several heads: {', '.join(sorted(head))}")
    if modality == "AUDIO":
        cls, fields = Data2Vec2AudioForCTC, {"vocab_size": len(renamed["lm_head.weight"])}
    elif modality == "IMAGE":
        cls, fields = Data2Vec2VisionForImageClassification, {"num_labels": len(renamed["classifier.weight"])}
        mode = str(settings.get("model.prediction_mode") or "mean_pooling").lower().rpartition(".")[2]
        fields["pooling"] = POOLING_2.get(mode)
        if fields["pooling"] is None:
            raise ValueError(f"{file}: model.prediction_mode: found {mode}, expected one of {', '.join(POOLING_2)}")
        if "norm.weight" not in renamed:
            raise ValueError(f"{file}: has no fc_norm, but {cls.__name__} normalises the input of its classifier (method 5.3)")
    else:
        cls, fields = RobertaForSequenceClassification, {"num_labels": len(renamed["classifier.out_proj.weight"])}
    config.update(fields)
    weights = {f"{cls.base_model_prefix}.{key}": value for key, value in weights.items()}
    return make_model(config, weights | renamed, file, cls)


def _decoder_2(state: State, hidden_size: int, axes: int, cfg: dict[str, Any], file: str) -> tuple[State, dict[str, Any]]:
    """Weights and settings of a `ConvDecoder`."""
    from d2v_fast.decoders import ConvDecoder

    state = _rename(state, DECODER_2, file)
    first = state["convolutions.0.weight"]
    settings = dict(
        axes=axes,
        width=len(first),
        kernel=first.shape[2],
        layers=_depth(state, r"convolutions\.(\d+)\."),
        groups=hidden_size // first.shape[1],
        residual=bool(cfg.get("own.decoder.decoder_residual", True)),
        projection_layers=_depth(state, r"projection\.(\d+)\."),
        **_pick(cfg, dropout="own.decoder.input_dropout", noise="own.mask_noise_std"),
    )
    with torch.device("meta"):
        expected = ConvDecoder(hidden_size, **settings).state_dict()
    _check_shapes(state, expected, "decoder", file)
    return {key: value.to(torch.float32, copy=True) for key, value in state.items()}, settings


def _teacher_2(student: State, ema: Any, modality: str, file: str) -> State:
    """Weights of a complete teacher under the original names; those that it lacks are the student's (method 1.6, 6.2)."""
    if not isinstance(ema, dict) or not all(isinstance(value, Tensor) for value in ema.values()):
        raise ValueError(f"{file}: _ema: is not a dict of the teacher's weights")
    names = {key: key.removeprefix(f"modality_encoders.{modality}.") for key in ema}
    # A teacher that consists only of the blocks names them 0, 1, ….
    own = {f"blocks.{name}" if re.match(r"\d", name) else name: ema[key] for key, name in names.items()}
    if unknown := sorted(own.keys() - student.keys()):
        raise ValueError(f"{file}: _ema: the teacher has {', '.join(unknown[:5])}, which the student lacks")
    return student | own


def from_data2vec_pytorch(file: str, encoder: str) -> tuple[PreTrainedModel, State]:
    """The student in a checkpoint of arxyzan/data2vec-pytorch, and its regression head under the names of `Data2Vec.head`.

    Args:
        file: A dict of `data2vec`, `encoder` and `optimizer`.
        encoder: Hub name or folder whose configuration the encoder has; model.encoder_checkpoint of the run's YAML file.

    Raises:
        ValueError: Not such a file, or weights of another encoder.
    """
    from transformers import AutoConfig

    checkpoint = load_checkpoint(file)
    if not all(isinstance(checkpoint.get(part), dict) for part in ("data2vec", "encoder")):
        raise ValueError(
            f"{file}: holds {list(checkpoint)[:8]}, expected 'data2vec', 'encoder' and 'optimizer' as data2vec-pytorch saves"
        )
    try:
        config = AutoConfig.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--encoder {encoder}: neither a folder with config.json nor a model on the hub: {reason}") from error
    prefix = "regression_head."
    with error_context(file, "its weights do not form a model"):
        head = {k.removeprefix(prefix): v for k, v in checkpoint["data2vec"].items() if k.startswith(prefix)}
        # A plain Linear there is a Sequential of one Linear here.
        head = {f"0.{name}" if name in ("weight", "bias") else name: value for name, value in head.items()}
        return make_model(config, checkpoint["encoder"], file), head
