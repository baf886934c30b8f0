"""Checkpoints of fairseq, of the paper's vision code and of arxyzan/data2vec-pytorch as Hugging Face models (spec 8).

Neither project needs to be installed. The weights are renamed, never changed; a key that no rule knows is an error.
"""

from __future__ import annotations

import ast
import logging
import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2v_fast.data import first_line
from d2v_fast.encoders import class_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Rules = list[tuple[str, str | None]]  # a pattern of the whole key and what it becomes, None = left out; the first counts

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
TEXT: Rules = [
    (r"embed_tokens\.weight", "embeddings.word_embeddings.weight"),
    (r"embed_positions\.weight", "embeddings.position_embeddings.weight"),
    (r"layernorm_embedding\.(.+)", r"embeddings.LayerNorm.\1"),
    (r"layers\.(\d+)\.self_attn\.q_proj\.(.+)", r"encoder.layer.\1.attention.self.query.\2"),
    (r"layers\.(\d+)\.self_attn\.k_proj\.(.+)", r"encoder.layer.\1.attention.self.key.\2"),
    (r"layers\.(\d+)\.self_attn\.v_proj\.(.+)", r"encoder.layer.\1.attention.self.value.\2"),
    (r"layers\.(\d+)\.self_attn\.out_proj\.(.+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"layers\.(\d+)\.self_attn_layer_norm\.(.+)", r"encoder.layer.\1.attention.output.LayerNorm.\2"),
    (r"layers\.(\d+)\.fc1\.(.+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"layers\.(\d+)\.fc2\.(.+)", r"encoder.layer.\1.output.dense.\2"),
    (r"layers\.(\d+)\.final_layer_norm\.(.+)", r"encoder.layer.\1.output.LayerNorm.\2"),
    (r"(regression_head|lm_head)\..+|(.+\.)?version|embed_positions\._float_tensor", None),
]
TEXT_2: Rules = [  # data2vec 2.0: blocks after those of timm
    (r"modality_encoders\.TEXT\.local_encoder\.(.+)", r"\1"),
    (r"blocks\.(\d+)\.attn\.([qkv])\.(.+)", r"layers.\1.self_attn.\2_proj.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"layers.\1.self_attn.out_proj.\2"),
    (r"blocks\.(\d+)\.norm1\.(.+)", r"layers.\1.self_attn_layer_norm.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(.+)", r"layers.\1.\2.\3"),
    (r"blocks\.(\d+)\.norm2\.(.+)", r"layers.\1.final_layer_norm.\2"),
    (r"modality_encoders\.TEXT\.decoder\..+|shared_decoder\..+", None),
]
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
WHY_NOT_2 = {
    "AUDIO": "its attention has ALiBi biases with learned scales",
    "IMAGE": "it normalises after each block and before the first one, and its positions are sines and cosines",
}
# What the settings in a checkpoint may be made of. Each is replaced by an object without behaviour.
HARMLESS = re.compile(
    r"argparse\.Namespace|(omegaconf|fairseq|examples\.data2vec)\.[\w.]+|typing\.Any|collections\.defaultdict"
    r"|builtins\.(bool|int|float|str|list|tuple|dict|object|NoneType)|pathlib\.\w*Path|torch\.torch_version\.TorchVersion"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+)"
)


class _Inert:
    """Stands in for whatever class an object was pickled from: holds its arguments and state and runs nothing."""

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
def named(file: str, what: str) -> Iterator[None]:
    """Turn whatever is raised into a ValueError that begins with the file; those that do already pass."""
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, ValueError) and str(error).startswith(f"{file}: "):
            raise
        raise ValueError(f"{file}: {what}: {type(error).__name__}: {first_line(error)}") from error


def load_checkpoint(file: str) -> dict[str, Any]:
    """What `torch.save` wrote, tensors on the CPU and memory-mapped, without running any code that it may hold.

    Raises:
        ValueError: Not such a file, or it holds objects that a checkpoint of these projects has no use for.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: not a file that torch.save of torch 1.6 or later wrote")
    with named(file, "cannot be read as a checkpoint"):
        names = get_unsafe_globals_in_checkpoint(file)
        strange = [name for name in names if not HARMLESS.fullmatch(name)]
        if strange:
            raise ValueError(
                f"{file}: holds {', '.join(sorted(strange))}, which a checkpoint has no use for and which may run code; "
                "not loaded. If you trust the file, save its weights alone: torch.save({'model': …}, …)"
            )
        stand_ins = [(_empty if name == "collections.defaultdict" else _Inert, name) for name in names]
        with safe_globals(stand_ins):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: found a {type(loaded).__name__}, expected a checkpoint, which is a dict")
    return loaded


def _settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """The arguments of a run as flat, dotted keys, whether they are a dict, a Namespace or a DictConfig."""
    if isinstance(value, _Inert):
        value = value.state
        if isinstance(value, dict):
            value = value.get("_content", value.get("_val", value))  # of omegaconf: a container or a value
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for name, inner in value.items() for k, v in _settings(inner, f"{prefix}{name}.").items()}


def _rename(state: State, rules: Rules, file: str) -> State:
    """`state` under the names that `rules` give.

    Raises:
        ValueError: A key that no rule knows.
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
            f"{file}: holds {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}, which the classes of transformers "
            "for data2vec have no place for: another architecture, or a fine-tuned model"
        )
    return renamed


def _split_qkv(state: State) -> State:
    """`attn.qkv` as `attn.q`, `attn.k` and `attn.v`."""
    split = {}
    for key, value in state.items():
        if ".qkv." in key:
            split |= {key.replace(".qkv.", f".{name}."): part for name, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[key] = value
    return split


def make_model(config: PreTrainedConfig, state: State, file: str) -> PreTrainedModel:
    """A model of transformers with exactly these weights, in fp32 and eval mode.

    Args:
        config: Configuration; decides the class.
        state: Weights under the names that its `save_pretrained` writes.
        file: Where they come from, for messages.

    Raises:
        ValueError: Weights are missing, left over or of another shape.
    """
    from transformers import MODEL_MAPPING

    cls = MODEL_MAPPING[type(config)]
    model, found = cls.from_pretrained(
        None,
        config=config,
        state_dict={k: v.float() if v.is_floating_point() else v for k, v in state.items()},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to name them below
        **class_arguments(cls),
    )
    wrong = {kind: sorted(map(str, found[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    # Heads and poolers that pre-training does not use are left behind.
    wrong["unexpected"] = [key for key in wrong["unexpected"] if not key.startswith(("pooler.", "lm_head."))]
    if any(wrong.values()):
        told = "; ".join(f"{kind}: {', '.join(keys[:5])}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{file}: its weights are not those of {cls.__name__}: {told}")
    return model.eval()


def from_fairseq(file: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a pre-trained checkpoint of fairseq, or of the vision code of the paper, and the settings of its run.

    v1 audio → Data2VecAudioModel, v1 and v2 text → Data2VecTextModel, v1 vision → Data2VecVisionModel. The student is
    taken, as fine-tuning does (spec 1.6).

    Raises:
        ValueError: Not such a checkpoint, or a model that transformers has no class for; the message says why.
    """
    checkpoint = load_checkpoint(file)
    if not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{file}: holds {list(checkpoint)[:8]}, expected 'model' as in a checkpoint of fairseq")
    with named(file, "its weights and settings make no model"):
        settings = _settings(checkpoint.get("cfg") or checkpoint.get("args") or {})
        # The teacher is a dict of its own among the weights.
        state = {k: v for k, v in checkpoint["model"].items() if isinstance(v, Tensor) and "_ema." not in k}
        if modalities := {k.split(".")[1] for k in state if k.startswith("modality_encoders.")}:
            return _text_2(state, settings, modalities, file), settings
        if "encoder.sentence_encoder.embed_tokens.weight" in state:
            stripped = {k.removeprefix("encoder.").removeprefix("sentence_encoder."): v for k, v in state.items()}
            return _text(stripped, settings, file, "data2vec-text"), settings
        if "feature_extractor.conv_layers.0.0.weight" in state:
            return _audio(state, settings, file), settings
        if "patch_embed.proj.weight" in state or "patch_embed.conv.weight" in state:
            return _vision(state, file), settings
    raise ValueError(f"{file}: not a pre-trained data2vec model of audio, text or vision, its weights begin {list(state)[:3]}")


def _heads(settings: dict[str, Any], hidden_size: int, file: str) -> int:
    for key in ("model.encoder_attention_heads", "model.transformer.encoder.attention_heads", "model.num_heads"):
        for name in (key, key.removeprefix("model.")):
            if settings.get(name):
                return int(settings[name])
    heads = max(1, hidden_size // 64)
    log.warning("%s: does not say how many attention heads it has; taken to be %d, 64 channels each", file, heads)
    return heads


def _depth(state: State, pattern: str) -> int:
    """How many layers there are; counted, as one name with a large number would ask for as many."""
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
    kernels = [state[f"feature_extractor.conv_layers.{i}.0.weight"] for i in range(_depth(state, r"feature_.*?\.(\d+)\.0\."))]
    layers = settings.get("model.conv_feature_layers", settings.get("conv_feature_layers"))
    strides = _strides(layers, file) if layers else [5, *[2] * 6]
    if len(strides) != len(kernels):
        raise ValueError(f"{file}: has {len(kernels)} convolutions, but its settings {len(strides)}: {layers}")
    position, hidden_size = state["encoder.pos_conv.0.0.weight"], len(state["encoder.layer_norm.weight"])
    fields = dict(
        hidden_size=hidden_size,
        num_hidden_layers=_depth(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(settings, hidden_size, file),
        intermediate_size=len(state["encoder.layers.0.fc1.bias"]),
        conv_dim=[w.shape[0] for w in kernels],
        conv_kernel=[w.shape[2] for w in kernels],
        conv_stride=strides,
        conv_bias="feature_extractor.conv_layers.0.0.bias" in state,
        num_feat_extract_layers=len(kernels),
        num_conv_pos_embeddings=_depth(state, r"encoder\.pos_conv\.(\d+)\."),
        conv_pos_kernel_size=position.shape[2],
        num_conv_pos_embedding_groups=hidden_size // position.shape[1],
        layer_norm_eps=1e-5,
    )
    return make_model(AutoConfig.for_model("data2vec-audio", **fields), _rename(state, AUDIO, file), file)


def _strides(layers: str, file: str) -> list[int]:
    """Strides of "[(512, 10, 5)] + [(512, 3, 2)] * 4", which fairseq evaluates as Python; here only this form is read."""
    term = r"\s*(\[[\s\d,()]*\])\s*(?:\*\s*(\d\d?))?\s*"
    if not re.fullmatch(rf"{term}(?:\+{term})*", layers):
        raise ValueError(f"{file}: conv_feature_layers={layers!r}: expected a sum of lists of (width, kernel, stride)")
    return [stride for part, times in re.findall(term, layers) for _, _, stride in ast.literal_eval(part) * int(times or 1)]


def _text(state: State, settings: dict[str, Any], file: str, model_type: str) -> PreTrainedModel:
    from transformers import AutoConfig

    renamed = _rename(state, TEXT, file)
    vocab_size, hidden_size = renamed["embeddings.word_embeddings.weight"].shape
    renamed["embeddings.token_type_embeddings.weight"] = torch.zeros(1, hidden_size)
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=_depth(state, r"layers\.(\d+)\."),
        num_attention_heads=_heads(settings, hidden_size, file),
        intermediate_size=len(state["layers.0.fc1.bias"]),
        max_position_embeddings=len(renamed["embeddings.position_embeddings.weight"]),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return make_model(AutoConfig.for_model(model_type, **fields), renamed, file)


def _text_2(state: State, settings: dict[str, Any], modalities: set[str], file: str) -> PreTrainedModel:
    if modalities != {"TEXT"}:
        why = "; ".join(f"{name}: {WHY_NOT_2.get(name, 'several modalities share its blocks')}" for name in sorted(modalities))
        raise ValueError(f"{file}: a data2vec 2.0 model that no class of transformers computes exactly: {why}")
    if settings.get("model.layer_norm_first"):
        raise ValueError(f"{file}: model.layer_norm_first=true, but RoBERTa normalises after each block")
    return _text(_rename(_split_qkv(state), TEXT_2, file), settings, file, "roberta")


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
    side = (math.isqrt(len(table) - 3) + 1) // 2  # (2·side - 1)² distances and three of the extra token
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
        raise ValueError(
            f"--encoder {encoder}: neither a folder with config.json nor to be had from the hub: {reason}"
        ) from error
    prefix = "regression_head."
    with named(file, "its weights make no model"):
        head = {k.removeprefix(prefix): v for k, v in checkpoint["data2vec"].items() if k.startswith(prefix)}
        # A single Linear there is a Sequential of one here.
        head = {f"0.{name}" if name in ("weight", "bias") else name: value for name, value in head.items()}
        return make_model(config, checkpoint["encoder"], file), head
