"""Find out which encoders of the installed transformers or timm work, on tiny configurations with random weights.

python -m d2v_fast.encoders.table                     print the table of docs/encoders.md
python -m d2v_fast.encoders.table docs/encoders.md    write it to the page
python -m d2v_fast.encoders.table modernbert swin     try only these
python -m d2v_fast.encoders.table --timm              the same for vision transformers of timm; also takes PAGE.md or models
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from d2v_fast.config import HeadConfig, TargetsConfig
from d2v_fast.decoders import ConvDecoder
from d2v_fast.encoders import Encoder, SplicedEncoder, build_encoder, class_arguments, example, model_class, wrap
from d2v_fast.encoders.spliced import READS
from d2v_fast.model import Data2Vec

LARGEST = 100_000_000  # parameters; a configuration that cannot be made small is not tried

# Encoders that transformers' own lists lack.
OTHERS = (
    "IJepaModel",
    "WhisperModel",
    "DINOv3ViTModel",
    "JinaEmbeddingsV3Model",
    "GteModel",
    "EsmcModel",
    "ViTMAEModel",
    "PixioModel",
)

# Decoder-only models and others with causal attention, which are tried with `encoder.bidirectional=true`.
CAUSAL = (
    *("bloom", "clip_text_model", "codegen", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neo"),
    *("gpt_neox", "gpt_oss", "gptj", "granite", "helium", "llama", "mamba", "mistral", "mixtral", "mpt", "nemotron", "olmo2"),
    *("opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2", "xglm"),
)

# Fields that make a configuration small, if it has them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "embedding_size", "emb_dim", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "encoder_layers", "num_layers"), 3),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(
        ("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 48
    ),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size"), 16),
    "vocab_size": 60,
    "max_position_embeddings": 200,
    **dict.fromkeys(("pad_token_id", "mask_token_id"), 1),
    **dict.fromkeys(("bos_token_id", "cls_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 32,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feature_projection_input_dim": 24,
    "num_mel_bins": 16,
    "max_source_positions": 40,
    "max_target_positions": 40,
}
# Further fields that a model needs; None leaves a field unchanged.
_SWIN = dict(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, hidden_size=None)
_DEBERTA = dict(relative_attention=True, pos_att_type=["c2p", "p2c"])
MORE: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": dict(max_length=32, frequency_stride=4, time_stride=4),
    "big_bird": dict(attention_type="original_full"),
    **dict.fromkeys(("deberta", "deberta-v2"), _DEBERTA),
    "dinov3_vit": dict(num_register_tokens=4),
    "falcon": dict(head_dim=None),
    "gpt_neo": dict(num_layers=2, num_hidden_layers=None, attention_types=[[["global", "local"], 1]]),
    "codegen": dict(rotary_dim=8),
    "gptj": dict(rotary_dim=8),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), _SWIN),
    "hiera": dict(image_size=[32, 32], patch_size=None, hidden_size=None, depths=[1, 1], num_heads=[1, 2], num_query_pool=1),
    "funnel": dict(num_hidden_layers=None, block_sizes=[1, 1], block_repeats=None),
    "longformer": dict(attention_window=4),
    "luke": dict(entity_vocab_size=20),
    "mobilebert": dict(hidden_size=None, intermediate_size=None, num_attention_heads=None),
    "reformer": dict(
        axial_pos_embds=False, attn_layers=["local", "lsh", "local"], local_attn_chunk_length=4, lsh_attn_chunk_length=4
    ),
    "vit_mae": dict(mask_ratio=0.0),
    "xmod": dict(languages=("en_XX",), default_language="en_XX"),
}
FFN = {"mobilebert": "output.bottleneck.dense"}  # FFN modules that are not found automatically

# The same for timm: arguments for all models that accept them, and arguments that a single family needs.
HYBRID = dict.fromkeys(("img_size", "patch_size"))  # patches of a ResNet's features
SMALL_TIMM = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=4, depth=3)
MORE_TIMM: dict[str, dict[str, Any]] = {
    "samvit_*": dict(neck_chans=0, window_size=3),
    "vit_*_sapiens2": dict(num_kv_heads=2),
    **dict.fromkeys(("tnt_*", "tnt_*_legacy_*"), dict.fromkeys(SMALL_TIMM)),
    **dict.fromkeys((f"vit_*_{stem}_*" for stem in ("r", "r26", "r50", "resnet26d", "resnet50d")), HYBRID),
}
# Name parts that denote sizes, smallest first.
SIZES = """atto femto pico nano xxtiny xxs xs xtiny tiny ti t wee pwee dwee dpwee little dlittle xsmall s small medium mediumd
betwixt m base b plus so150m so150m2 intern300m so400m l large large2 xl xlarge huge h giant giantopt gigantic enormous"""


class Row(NamedTuple):
    """Result for a model type: its input, how it runs, and why 1.0 and 2.0 reject it ("" if they work)."""

    reads: str
    name: str
    cls: str
    way: str
    first: str
    second: str


def names() -> list[str]:
    """Model types of transformers that are encoders of one modality, from its Auto class lists and those above."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    used = (
        *(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
        *(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES),
        auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
        *(auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_CTC_MAPPING_NAMES),
    )
    found = {name for mapping in used for name in mapping}
    found |= {name for name in auto.MODEL_MAPPING_NAMES if name.endswith(("_vision", "_vision_model", "_audio", "_encoder"))}
    found |= {name for name in auto.MODEL_MAPPING_NAMES if auto.MODEL_MAPPING_NAMES[name] in OTHERS}
    found |= set(CAUSAL)
    single = []
    for name in sorted(found & set(auto.MODEL_MAPPING_NAMES)):
        cls = model_class(CONFIG_MAPPING[name])
        modalities = getattr(cls, "input_modalities", None)
        several = isinstance(modalities, tuple | list) and len(modalities) > 1
        tower = (
            name.endswith(("_vision", "_vision_model", "_audio", "_encoder"))
            and getattr(cls, "main_input_name", None) != "input_ids"
        )
        if (
            (not several and getattr(cls, "main_input_name", None) in READS and not name.endswith("_vision"))
            or tower
            or name == "whisper"
        ):
            single.append(name)
    return single


def tiny(name: str) -> nn.Module:
    """A small model of this type with random weights; the encoder alone if it has a decoder."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    known, other = kind(), getattr(kind, "attribute_map", {})
    fields = {}
    for field, value in SMALL.items():
        default = getattr(known, field, ...)
        if default is not ... and isinstance(default, list | tuple) == isinstance(value, tuple):
            fields[other.get(field, field)] = value
    fields |= MORE.get(name, {})
    fields = {field: value for field, value in fields.items() if value is not None}
    config, cls = kind(**fields), model_class(kind)
    if name in CAUSAL:
        config.is_causal = False
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > LARGEST:
        raise ValueError(f"no small configuration is known: {count:,} parameters")
    torch.manual_seed(0)
    model: Any = cls(config, **class_arguments(cls))
    return model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model


def attempt(name: str) -> Row:
    """Try a model type: wrap it, and take a step of data2vec 1.0 and one of 2.0."""
    from transformers import CONFIG_MAPPING

    cls = model_class(CONFIG_MAPPING[name]).__name__
    try:
        model = tiny(name)
    except Exception as error:  # model classes raise all kinds of errors
        return Row("", name, cls, "", _line(error), "")
    reads = READS.get(getattr(model, "main_input_name", ""), "")
    try:
        encoder = wrap(model, ffn=FFN.get(name))
    except ValueError as error:
        return Row(reads, name, type(model).__name__, "", _line(error), "")
    way = "whole" if isinstance(encoder, SplicedEncoder) else "in pieces"
    return Row(encoder.reads or reads, name, type(model).__name__, way, _step(encoder), _step(encoder, views=2))


def family(name: str) -> str:
    """The name of a timm model with stars for sizes."""

    def starred(part: str) -> str:
        size = part in SIZES.split() or re.fullmatch(r"(?!r\d|reg\d)([a-z]{0,3}|patch|window)\d\w*", part)
        return "*" if size else re.sub(r"^reg\d$", "reg*", part)

    first, *rest = name.split("_")
    return re.sub(r"(_\*)+", "_*", "_".join([first, *map(starred, rest)]))


def families() -> dict[str, str]:
    """The smallest model of each timm family that has attention."""
    import timm

    order, found = SIZES.split(), dict[str, str]()

    def sizes(name: str) -> list[int]:
        return [order.index(part) for part in name.split("_") if part in order] or [len(order)]

    for name in sorted(timm.list_models(exclude_filters="test_*"), key=sizes):
        if "num_heads" in inspect.getsource(sys.modules[timm.model_entrypoint(name).__module__]):
            found.setdefault(family(name), name)
    return found


def attempt_timm(title: str, name: str) -> Row | None:
    """Try a model of timm; None if it has no multi-head attention."""
    import timm

    fields, model = SMALL_TIMM | MORE_TIMM.get(family(name), {}), None
    fields = {field: value for field, value in fields.items() if value is not None}
    while model is None:
        try:
            model = timm.create_model(name, num_classes=0, **fields)
        except Exception as error:  # model classes raise all kinds of errors
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not fields:
                return Row("", title, "", "", _line(error), "")
            fields = {field: value for field, value in fields.items() if unknown and field != unknown[1]}
    if (count := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        return Row("", title, "", "", f"no small configuration is known: {count:,} parameters", "")
    if not any(hasattr(module, "num_heads") or hasattr(module, "heads") for module in model.modules()):
        return None
    try:
        encoder = build_encoder(f"timm/{name}", config=fields)
    except ValueError as error:
        return Row("vision", title, type(model).__name__, "", _line(error), "")
    return Row("vision", title, type(model).__name__, "whole", _step(encoder), _step(encoder, views=2))


def _step(encoder: Encoder, views: int = 0) -> str:
    """Why a step fails, or "" if it works."""
    try:
        inputs = torch.randn(2, 2000) if encoder.reads == "audio" else example(encoder, 2, 16)
        length = encoder.embed(inputs).shape[1]
        predictor: HeadConfig | ConvDecoder = HeadConfig()
        if views:
            grid = encoder.positions(inputs.shape[-1])
            axes = len(grid) if isinstance(grid, tuple) else 1
            predictor = ConvDecoder(encoder.hidden_size, axes, width=16, kernel=3, groups=2)
        model = Data2Vec(encoder, predictor, targets=TargetsConfig(top_k=1))
        mask = (torch.arange(length) % 2 == 0).expand(len(inputs), length)
        if views:
            output = model(inputs, mask[:, None].expand(-1, views, -1))
        elif encoder.masks_features:
            output = model(inputs, mask)
        else:
            output = model(torch.where(mask, inputs.flip(1), inputs), mask, inputs)
        output.loss.backward()
        model.update_teacher()
    except Exception as error:  # model classes raise all kinds of errors
        return _line(error)
    return "" if output.loss.isfinite() else "the loss is not finite"


def _line(error: Exception) -> str:
    """The reason on one line, for a table cell."""
    text = " ".join(str(error).split()).partition("; ")[0] or type(error).__name__
    text = re.sub(r"^(encoder: )?\w+ cannot (be spliced|encode the visible positions alone)( at [\w.]+)?: ", "", text)
    text = re.sub(r"^cannot find the transformer layers of .*", "no list of blocks with attention was found", text)
    text = re.sub(r"it does not run on \w+ alone: \w+: \S+ missing .* arguments?: (.*)", r"needs \1 too", text)
    text = re.sub(
        r"^\w+ has neither hidden_size .*", "has no single hidden_size, like hierarchical and convolutional models", text
    )
    text = re.sub(r" requires the (\w+) library.*", r" requires \1", text)
    return text.replace("|", "\\|")[:120]


def report(found: list[Row]) -> str:
    """The table as Markdown."""
    import transformers

    tried = [row for row in found if row.reads]
    first = [row for row in tried if row.way and not row.first]
    second = [row for row in first if not row.second]
    lines = [
        f"Tried with transformers {transformers.__version__}, on tiny configurations with random weights: {len(tried)} model "
        f"types, of which {len(first)} work with data2vec 1.0 and {len(second)} of them with 2.0."
    ]
    titles = {"text": "Text", "causal": "Text, with encoder.bidirectional=true"}
    titles |= {"vision": "Images", "audio": "Waveforms", "spectrogram": "Spectrograms"}
    for kind, title in titles.items():
        of_kind = [row for row in tried if ("causal" if row.name in CAUSAL else row.reads) == kind]
        if not of_kind:
            continue
        works, refused = ([row for row in of_kind if (row in first) is worked] for worked in (True, False))
        lines += ["", f"**{title}**", "", "| model type | class | run | 1.0 | 2.0 |", "|---|---|---|---|---|"]
        lines += [f"| `{r.name}` | {r.cls} | {r.way} | yes | {f'no: {r.second}' if r.second else 'yes'} |" for r in works]
        lines += [f"| `{r.name}` | {r.cls} | | no: {r.first} | no |" for r in refused]
    left = [f"`{row.name}` ({row.first})" for row in found if not row.reads]
    if left:
        lines += ["", f"Not tried: {', '.join(left)}."]
    return "\n".join(lines) + "\n"


def report_timm(found: list[Row]) -> str:
    """The timm table as Markdown. Families with the same class and result share a row."""
    import timm

    first = [row for row in found if row.way and not row.first]
    second = [row for row in first if not row.second]
    lines = [
        f"Tried with timm {timm.__version__} and torch {torch.__version__.partition('+')[0]}, on the smallest model of each "
        f"family with attention, made smaller where its arguments allow it: {len(found)} families, of which {len(first)} work "
        f"with data2vec 1.0 and {len(second)} of them with 2.0.",
        *("", "| models | class | 1.0 | 2.0 |", "|---|---|---|---|"),
    ]
    shared: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(found, key=lambda row: (bool(row.first), bool(row.second))):
        results = ("no: " + row.first, "no") if row.first else ("yes", f"no: {row.second}" if row.second else "yes")
        shared.setdefault((row.cls, *results), []).append(f"`{row.name}`")
    lines += [f"| {', '.join(names)} | {' | '.join(rest)} |" for rest, names in shared.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    from transformers import CONFIG_MAPPING

    parser = argparse.ArgumentParser(prog="python -m d2v_fast.encoders.table", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arguments", nargs="*", metavar="TYPE|PAGE.md", help="model types to try, default all; pages to update")
    parser.add_argument("--timm", action="store_true", help="try one model of each timm family; arguments are timm names")
    options = parser.parse_args(arguments)
    files = [Path(argument) for argument in options.arguments if argument.endswith(".md")]
    chosen = [argument for argument in options.arguments if not argument.endswith(".md")]
    if options.timm:
        each = {name: name for name in chosen} or families()
        rows = [attempt_timm(title, name) for title, name in each.items()]
        text, marker = report_timm([row for row in rows if row]), "timm"
    elif unknown := sorted(set(chosen) - set(CONFIG_MAPPING)):
        parser.error(f"not a model type of transformers: {', '.join(unknown)}")
    else:
        text, marker = report([attempt(name) for name in chosen or names()]), "encoders"
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    for file in files:
        page = file.read_text(encoding="utf-8")
        before, _, rest = page.partition(begin)
        if end not in rest:
            sys.exit(f"{file}: found no markers {begin} … {end} for the table")
        file.write_text(f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}", encoding="utf-8")
    if not files:
        print(text, end="")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
