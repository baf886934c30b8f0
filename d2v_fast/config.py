"""One run as typed dataclasses, from a preset or YAML file and dotted overrides.

The options of `data` and `mask` are the arguments of the classes in `d2v_fast.data` and `d2v_fast.masking`; which class,
`modality` and `mask.kind` say, or for data of one's own `data.class`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from d2v_fast.masking import BlockMask, ExactBlockMask, RandomMask, SpanMask, TokenMask

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PRESETS = Path(__file__).parent / "presets"
MASKS = {"span": SpanMask, "block": BlockMask, "random": RandomMask, "token": TokenMask, "exact": ExactBlockMask}
FLAGS = ("-h", "--help", "--fused", "--print_config")
# What may differ in a run that goes on, as no weight depends on it. Samples are compared by their content.
FREE = (
    *(f"train.{name}" for name in ("output", "workers", "graphs", "log_every", "export_every", "save_every", "keep_last")),
    *("train.checkpointing", "train.shard", "train.timeout_minutes"),
    *(f"train.{name}" for name in ("callbacks", "trackers", "probe_every", "probe_data")),
    *("train.max_broken", "train.max_skipped", "collapse", "data.path", "data.cache"),
)
COMPARED = ("samples", "samples.number", "samples.content", "processes")  # beside the settings, when a run goes on
PART = re.compile(r"^several\.parts\.\w+\.")  # of one modality of several


@dataclass(frozen=True)
class Modality:
    """What a modality stands for.

    Attributes:
        data: Its data set, "module:Class" in `d2v_fast.data`.
        masks: Kinds of masks that it takes, the default one first.
        axes: Axes of its positions.
        reads: What its encoders take, as they name it.
        files: Settings of data that a pretrained encoder's files tell, and what they are called there.
    """

    data: str | None
    masks: tuple[str, ...]
    axes: int = 1
    reads: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


MODALITIES = {
    "text": Modality("text:TextData", ("token", "random", "exact"), reads=("text",), files={"tokenizer": "tokenizer"}),
    "vision": Modality(
        "vision:ImageData",
        ("block", "random", "exact"),
        axes=2,
        reads=("vision",),
        files={"image_size": "image_size", "mean": "image_mean", "std": "image_std"},
    ),
    "audio": Modality(
        "audio:AudioData",
        ("span", "random", "exact"),
        reads=("audio",),
        files={"sample_rate": "sampling_rate", "normalize": "do_normalize"},
    ),
    "spectrogram": Modality(
        "spectrograms:SpectrogramData",
        ("exact", "random", "block"),
        axes=2,
        reads=("spectrogram", "vision"),
        files={
            **{"sample_rate": "sampling_rate", "target_length": "max_length", "mel_bins": "num_mel_bins"},
            **{"mean": "mean", "std": "std"},
        },
    ),
    "custom": Modality(None, ("random", "exact", "span", "block")),
}
NO_SETTINGS = {"mask", "seed", "max_broken"}  # arguments of data sets that other sections give
LAYERED = ("data2vec-audio", "data2vec2-audio")  # their num_conv_pos_embeddings counts layers, elsewhere it is a width
SEVERAL = ("random", "exact")  # kinds that leave as many positions visible in every view


class ConfigError(ValueError):
    """A key or value that cannot be used; the message names it and what would do."""


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder.

    Args:
        model: Model type of transformers (roberta, beit, wav2vec2, data2vec-audio, …), timm/NAME for a model of timm, or your
            own "package.module:Class".
        pretrained: Hub name or folder to start from instead of random weights.
        config: Fields of the model's configuration class, such as encoder.config.num_hidden_layers; for timm, arguments of the
            model, such as encoder.config.depth.
        init: hf = as transformers does; for images also data2vec = as its authors do, sincos = with fixed
            sin-cos positions.
        layers: Path of the list of blocks, where it is not found by itself.
        ffn: Path inside a block of the FFN output, where it is not the block's last Linear.
        feature_grad_mult: Scale of the gradient into the convolutions of a speech encoder.
        attention: Attention implementation of transformers.
        features: Path of the module that makes local features, in a model that runs whole (docs/encoders.md), where it is not
            found by itself.
        bidirectional: Let the attention of a decoder-only model (gpt2, llama, …) see later positions too; causal models are
            refused without it.
    """

    model: str | None = None
    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init: Literal["hf", "data2vec", "sincos"] = "hf"
    layers: str | None = None
    ffn: str | None = None
    feature_grad_mult: float = 1.0
    attention: str = "sdpa"
    features: str | None = None
    bidirectional: bool = False


@dataclass(frozen=True)
class TargetsConfig:
    """What the student predicts.

    Args:
        top_k: Number of last layers of the teacher that are averaged.
        source: A layer's result: FFN output, output or input of the block.
        norm: Normalisation of each layer's result.
        target_norm: Normalisation of the average.
        teacher_fp32: Run the teacher in fp32 under mixed precision.
    """

    top_k: int = 8
    source: Literal["ffn", "block_output", "block_input"] = "ffn"
    norm: Literal["none", "layer", "instance", "batch", "group"] = "layer"
    target_norm: Literal["none", "layer", "instance"] = "none"
    teacher_fp32: bool = False


@dataclass(frozen=True)
class LossConfig:
    """How a prediction is scored.

    Args:
        beta: 0 = squared error, else smooth-L1 that is quadratic below it.
        scale: Factor of the error summed over channels: auto = 1/sqrt(C), mean = 1/C, or a number.
        reduction: global = mean over the masked positions of all ranks and micro-batches; local = mean of means.
        impl: Implementation of the loss.
        cls_weight: With head.kind=conv, weight of the loss by which CLS learns the mean of the targets; 0 = none.
        cls_reduction: mean over the views of a batch, or their sum, as the reference code has it.
    """

    beta: float = 0.0
    scale: float | Literal["auto", "mean"] = "auto"
    reduction: Literal["global", "local"] = "global"
    impl: Literal["auto", "eager", "compile", "native", "triton"] = "auto"
    cls_weight: float = 0.0
    cls_reduction: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class HeadConfig:
    """What turns states into predictions.

    `conv` makes it data2vec 2.0: of each of the `data.views` views of a sample, only what is visible is encoded.

    Args:
        kind: linear = a regression head on the masked positions, data2vec 1.0; conv = a decoder over all positions, 2.0.
        layers: Linears, with GELU between, or convolutions; 0 = none.
        zero_init: Start the last Linear at zero.
        pretrained: Folder with the head.safetensors to start from, as d2v-export leaves of another project's checkpoint;
            default is the folder of encoder.pretrained, where it holds one.
        width: Channels of the convolutions.
        kernel: Their side.
        groups: Groups of channels that each of them keeps apart.
        residual: Add the input of a convolution to its output.
        projection_layers: Linears after them, twice as wide inside.
        dropout: Of the states that are decoded.
        noise: Standard deviation of what stands at masked positions.
    """

    kind: Literal["linear", "conv"] = "linear"
    layers: int = 1
    zero_init: bool = False
    pretrained: str | None = None
    width: int = 384
    kernel: int = 7
    groups: int = 16
    residual: bool = True
    projection_layers: int = 1
    dropout: float = 0.0
    noise: float = 0.01


@dataclass(frozen=True)
class EMAConfig:
    """How the teacher follows the student.

    Args:
        start: First decay.
        end: Last decay.
        anneal_steps: Steps from first to last.
        scope: What is averaged: all, the encoder without its local features, or its layers; the rest is copied.
        copied: Further patterns of parameter names to copy.
    """

    start: float = 0.999
    end: float = 0.9999
    anneal_steps: int = 30_000
    scope: Literal["all", "encoder", "layers"] = "all"
    copied: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Args:
        lr: Peak learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        decay_1d: Decay biases, norms and other vectors too, as fairseq does.
        lr_scale: Factors of the learning rate by pattern of parameter names, such as {"*feature_extractor*": 0.1}.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    decay_1d: bool = False
    lr_scale: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time.

    Args:
        kind: Shape after warm-up; tri_stage holds the peak, then decays exponentially.
        warmup: Steps, or below 1 the share of all steps.
        hold: Share of all steps at the peak (tri_stage).
        final: Last learning rate as a share of the peak.
        initial: First learning rate as a share of the peak.
    """

    kind: Literal["cosine", "linear", "constant", "tri_stage"] = "cosine"
    warmup: float = 0.03
    hold: float = 0.9
    final: float = 0.0
    initial: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """The run.

    Args:
        output: Folder of the run; default is runs/ with the name of the config and the time.
        steps: Optimizer steps.
        epochs: Passes over the data; replaces steps.
        batch_size: Samples a process takes at once.
        accumulate: Batches an optimizer step, on each process.
        clip_norm: Largest norm of the gradient, 0 = no clipping.
        precision: Precision of the computation; weights and teacher are fp32.
        device: auto = GPU if there is one. CUDA_VISIBLE_DEVICES=1 selects one of several.
        graphs: With --fused on one GPU, replay passes over batches of one shape as CUDA graphs, which small batches gain from;
            each shape keeps a set of gradients, four at most.
        checkpointing: Keep only the input of each of the student's blocks for the backward, which computes the rest again:
            less memory, the same gradients, about a third more time.
        shard: On several ranks, spread weights, gradients, optimizer and teacher over them (FSDP2); hybrid = over those of a
            machine, and copies on each machine.
        timeout_minutes: After which ranks that wait for another one give up.
        seed: Of weights, masks, augmentations and order.
        workers: Processes that load data, on each rank.
        threads: CPU threads of torch, 0 = its default.
        log_every: Steps between lines of the log.
        export_every: Steps between exports of the student, 0 = only at the end.
        save_every: Steps between checkpoints, 0 = only when the run ends or is asked to stop.
        keep_last: Checkpoints to keep.
        max_broken: Largest share of unreadable samples; the run stops above it.
        max_skipped: Steps in a row whose loss or gradient is not finite; the run stops there.
        callbacks: Objects of your own that the run calls, "package.module:Class" each, or with arguments
            {class_path: package.module:Class, init_args: {...}}; docs/callbacks.md.
        trackers: Where figures and settings go beside log.jsonl; default is TensorBoard alone, if it is installed.
        probe_every: Steps between probes of the teacher by a k-NN on labelled samples, 0 = none; one goes into the first line
            of the log after that many, and into the last.
        probe_data: What to probe on, as d2v-probe --data; default is the builtin set for a run on builtin data.
    """

    output: str | None = None
    steps: int = 100_000
    epochs: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    clip_norm: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    graphs: bool = True
    checkpointing: bool = False
    shard: bool | Literal["hybrid"] = False
    timeout_minutes: float = 30.0
    seed: int = 0
    workers: int = 2
    threads: int = 0
    log_every: int = 50
    export_every: int = 0
    save_every: int = 1000
    keep_last: int = 2
    max_broken: float = 0.01
    max_skipped: int = 20
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)
    probe_every: int = 0
    probe_data: str | None = None


@dataclass(frozen=True)
class CollapseConfig:
    """When a run counts as collapsed; a bound of 0 switches its rule off.

    Args:
        distinct: Least share of different samples among some that are compared before the first step.
        target_std: Least std of the targets.
        prediction_std: Least std of the predictions.
        rank: Least effective rank of the states of student and teacher.
        variation: Least std of the local features, as a share of their size.
        divergence: Largest loss, as a multiple of what predicting a constant would cost.
        leak: Least loss, as a multiple of what predicting each position's mean would cost.
        distance: Least distance of teacher and student, relative to the student's weights.
        decay: Largest decay of the teacher, as measured on its weights.
        update: Least change of the weights in a step at the peak learning rate, as a share of their norm.
        gradient: Largest norm of the gradient, as a multiple of what was usual before.
        after: Steps before the first that is judged; default is 5000, in a shorter run a tenth of it but at least 100, and
            never before the learning rate has warmed up.
        action: What to do.
    """

    distinct: float = 0.5
    target_std: float = 0.1
    prediction_std: float = 0.01
    rank: float = 4.0
    variation: float = 0.2
    divergence: float = 2.0
    leak: float = 0.1
    distance: float = 1e-6
    decay: float = 0.999999
    update: float = 1e-5
    gradient: float = 1000.0
    after: int | None = None
    action: Literal["warn", "stop", "off"] = "warn"


SECTIONS = {
    "encoder": EncoderConfig,
    "targets": TargetsConfig,
    "loss": LossConfig,
    "head": HeadConfig,
    "ema": EMAConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "collapse": CollapseConfig,
}


GROUPS = {*SECTIONS, "mask", "data"}
DEFAULTS = {f"{name}.{f.name}": f.default for name, cls in SECTIONS.items() for f in fields(cls)}
DEFAULTS |= {"data.class": None, "data.views": None, "data.whole_seconds": 60.0}

# The interval of a number or of each of several; a round bracket leaves the bound out.
RANGES = {
    "collapse.after": "[0, inf)",
    "collapse.decay": "[0, 1]",
    "collapse.distance": "[0, inf)",
    "collapse.distinct": "[0, 1]",
    "collapse.divergence": "[0, inf)",
    "collapse.gradient": "[0, inf)",
    "collapse.leak": "[0, inf)",
    "collapse.prediction_std": "[0, inf)",
    "collapse.rank": "[0, inf)",
    "collapse.target_std": "[0, inf)",
    "collapse.update": "[0, inf)",
    "collapse.variation": "[0, inf)",
    "data.batch_seconds": "(0, inf)",
    "data.block_size": "[2, inf)",
    "data.channel_length": "[1, inf)",
    "data.channel_prob": "[0, 1)",
    "data.crop_ratio": "(0, inf)",
    "data.crop_scale": "(0, 1]",
    "data.flip": "[0, 1]",
    "data.image_size": "[1, inf)",
    "data.jitter": "[0, inf)",
    "data.join_seconds": "[0, inf)",
    "data.max_seconds": "(0, 86400]",
    "data.mean": "(-inf, inf)",
    "data.mel_bins": "[1, inf)",
    "data.min_seconds": "[0, inf)",
    "data.sample_rate": "[1, inf)",
    "data.std": "(0, inf)",
    "data.target_length": "[1, inf)",
    "data.views": "[1, inf)",
    "data.vocab_size": "[261, 16777216]",  # 256 bytes and 5 special tokens; tokenizers aborts where memory ends
    "data.whole_seconds": "(0, inf)",
    "ema.anneal_steps": "[0, inf)",
    "ema.end": "[0, 1]",
    "ema.start": "[0, 1]",
    "encoder.feature_grad_mult": "[0, inf)",
    "head.dropout": "[0, 1)",
    "head.groups": "[1, inf)",
    "head.kernel": "[1, inf)",
    "head.layers": "[0, inf)",
    "head.noise": "[0, inf)",
    "head.projection_layers": "[1, inf)",
    "head.width": "[1, inf)",
    "loss.beta": "[0, inf)",
    "loss.cls_weight": "[0, inf)",
    "loss.scale": "(0, inf)",
    "mask.adjust": "[-1, 1]",
    "mask.count": "[1, inf)",
    "mask.dropout": "[0, 1)",
    "mask.keep_prob": "[0, 1]",
    "mask.length": "[1, inf)",
    "mask.length_other": "[0, inf)",
    "mask.length_std": "[0, inf)",
    "mask.max_area": "[1, inf)",
    "mask.min_area": "[1, inf)",
    "mask.min_aspect": "(0, 1]",
    "mask.min_space": "[0, inf)",
    "mask.min_spans": "[0, inf)",
    "mask.prob": "(0, 1)",
    "mask.random_prob": "[0, 1]",
    "optimizer.betas": "[0, 1)",
    "optimizer.eps": "(0, inf)",
    "optimizer.lr": "(0, inf)",
    "optimizer.lr_scale": "[0, inf)",
    "optimizer.weight_decay": "[0, inf)",
    "schedule.final": "[0, inf)",
    "schedule.hold": "[0, 1]",
    "schedule.initial": "[0, inf)",
    "schedule.warmup": "[0, inf)",
    "targets.top_k": "[1, inf)",
    "train.accumulate": "[1, inf)",
    "train.batch_size": "[1, inf)",
    "train.clip_norm": "[0, inf)",
    "train.epochs": "(0, inf)",
    "train.export_every": "[0, inf)",
    "train.keep_last": "[1, inf)",
    "train.log_every": "[1, inf)",
    "train.max_broken": "[0, 1]",
    "train.max_skipped": "[1, inf)",
    "train.probe_every": "[0, inf)",
    "train.save_every": "[0, inf)",
    "train.seed": "[0, 9223372036854775807]",
    "train.steps": "[1, inf)",
    "train.timeout_minutes": "(0, 100000]",
    "train.threads": "[0, 1024]",  # far more end in a crash of the thread pool
    "train.workers": "[0, 1024]",
}


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)


def _in_words(interval: str) -> str:
    low = interval[1:].partition(",")[0]
    if interval.endswith("inf)"):
        return {"[": f"at least {low}", "(": "a number" if low == "-inf" else f"a number above {low}"}[interval[0]]
    return f"a number in {interval}"


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. `mask` and `data` hold the arguments of their classes, `data` also `class`.

    `own_data`: the data have not the settings of those of the modality, as their class does not derive from it.
    """

    modality: Literal["text", "vision", "audio", "spectrogram", "custom"]
    encoder: EncoderConfig
    targets: TargetsConfig
    loss: LossConfig
    head: HeadConfig
    ema: EMAConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    collapse: CollapseConfig
    mask: SpanMask | BlockMask | RandomMask | TokenMask | ExactBlockMask
    data: dict[str, Any]
    parts = ()  # those of several modalities, `d2v_fast.several`
    own_data: bool = False
    yaml: str = ""
    name: str = "run"  # what a run without train.output is called
    resume: bool | Literal["auto"] = False  # auto = if there is a checkpoint
    resume_allow: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """All settings by their dotted keys."""
        values = {f"{section}.{k}": v for section in (*SECTIONS, "mask") for k, v in vars(getattr(self, section)).items()}
        return values | {f"data.{k}": v for k, v in self.data.items()}

    def check(self) -> None:
        """Raise ConfigError for values that no run can use."""
        values = self.settings()
        for key, value in values.items():
            if isinstance(value, str) and value.encode(errors="replace").decode() != value:
                raise ConfigError(
                    f"{key}: found {value!r}, which is not UTF-8, so config.yaml cannot hold it; rename or link it"
                )
        if self.own_data:  # whose settings may have the names of others
            values = {key: value for key, value in values.items() if not key.startswith("data.") or key == "data.views"}
        for key, interval in RANGES.items():
            value = values.get(key)
            several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            for number in several:
                if isinstance(number, int | float) and not _inside(number, interval):
                    raise ConfigError(f"{key}: found {number}, expected {_in_words(interval)}")
        for key in ("data.crop_scale", "data.crop_ratio"):
            if key in values and values[key][0] > values[key][1]:
                raise ConfigError(f"{key}: found {list(values[key])}, expected the lower number first")
        if values.get("mask.min_area", 0) > values.get("mask.max_area", 0):
            raise ConfigError(
                f"mask.min_area: found {values['mask.min_area']}, expected at most mask.max_area={self.mask.max_area}"
            )
        replaced = values.get("mask.random_prob", 0) + values.get("mask.keep_prob", 0)
        if replaced > 1:
            raise ConfigError(f"mask.random_prob + mask.keep_prob: found {replaced}, expected at most 1")
        if values.get("data.block_size") == 2 and not values["data.cross_documents"]:
            raise ConfigError("data.block_size: found 2, expected at least 3 without data.cross_documents: <s>, a token, </s>")
        conv, views = self.head.kind == "conv", values.get("data.views")
        if conv != (views is not None):
            raise ConfigError(
                f"head.kind={self.head.kind} with data.views={'null' if views is None else views}: data2vec 2.0 takes "
                "head.kind=conv and a number of views, such as 8; 1.0 takes head.kind=linear and data.views=null"
            )
        if conv and not isinstance(self.mask, tuple(MASKS[kind] for kind in SEVERAL)):
            raise ConfigError(
                f"mask: {type(self.mask).__name__} leaves another number of positions visible in each view, and data2vec 2.0 "
                f"(head.kind=conv) needs the same; expected mask.kind={' or '.join(SEVERAL)}"
            )
        if self.train.shard and self.train.probe_every:
            raise ConfigError(
                "train.probe_every: runs the teacher on one rank alone, and train.shard has spread it over all; leave it out, "
                "d2v-probe reads the run's checkpoints"
            )
        if self.train.shard and self.train.precision == "fp16":
            raise ConfigError("train.precision=fp16: has no scale of gradients that sharded ranks agree on; take bf16 or fp32")
        if self.loss.cls_weight and not conv:
            raise ConfigError(f"loss.cls_weight: found {self.loss.cls_weight}, which is for head.kind=conv; expected 0")
        if self.train.output == "" or "\0" in (self.train.output or ""):
            raise ConfigError(f"train.output: found {self.train.output!r}, expected a folder; by default one in runs/ is made")
        if not values.get("data.path", True):
            raise ConfigError("data.path: found nothing, expected builtin, a file, a folder or the name of a Hugging Face set")
        if (self.encoder.model is None) == (self.encoder.pretrained is None) and not (self.encoder.model or "").count(":"):
            raise ConfigError("encoder: give either encoder.model (random weights) or encoder.pretrained")
        if self.mask.__class__ not in [MASKS[kind] for kind in MODALITIES[self.modality].masks]:
            raise ConfigError(f"mask.kind: modality {self.modality} takes one of {MODALITIES[self.modality].masks}")


def presets() -> list[str]:
    """Names of the presets in the package, such as text/roberta-base."""
    return sorted(str(file.relative_to(PRESETS).with_suffix("")) for file in PRESETS.rglob("*.yaml"))


def nearest(word: str, words: Any) -> str:
    """ "; did you mean …?" or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def read_yaml(name: str) -> dict[str, Any]:
    """The settings of a preset or YAML file, those of arxyzan/data2vec-pytorch translated.

    Raises:
        ConfigError: No such preset or file, or not a mapping.
    """
    from d2v_fast.compat import is_arxyzan, translate_arxyzan

    if not name:
        raise ConfigError(f"--config: found nothing, expected a YAML file or one of {', '.join(presets())}")
    file = Path(name).expanduser()
    if (file / "config.yaml").is_file():
        raise ConfigError(f"--config {name}: a folder; its settings are in {file / 'config.yaml'}")
    if not file.is_file():
        file = PRESETS / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"--config {name}: no such file or preset{nearest(name, presets())}\npresets: {', '.join(presets())}")
    try:
        settings = load_yaml(file.read_text(encoding="utf-8"))
    except Exception as error:
        raise ConfigError(f"--config {name}: not valid YAML: {error}") from error
    if isinstance(settings, dict) and is_arxyzan(settings):
        settings, changes = translate_arxyzan(settings)
        for change in changes:
            print(f"{name}: {change}", file=sys.stderr)
    return check_layer(settings, f"--config {name}: ")


def check_layer(settings: Any, where: str) -> dict[str, Any]:
    """Settings as they were written, without those that are null.

    Raises:
        ConfigError: Not a mapping, or one of its groups is none.
    """
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}found {type(settings).__name__}, expected a mapping of settings")
    settings = {key: value for key, value in settings.items() if value is not None}
    if not isinstance(settings.get("modality", ""), str):
        raise ConfigError(f"{where}modality: found {settings['modality']}, expected one of {', '.join(MODALITIES)}")
    for key in filter(settings.__contains__, sorted(GROUPS)):
        if not isinstance(settings[key], dict):
            raise ConfigError(f"{where}{key}: found {settings[key]}, expected a mapping of settings")
    return settings


def load_yaml(text: str) -> Any:
    """What YAML says, its numbers as `d2v-train` reads them.

    Raises:
        ValueError: Aliases or deep nesting.
        yaml.YAMLError: Not YAML.
    """
    from jsonargparse import get_loader

    _refuse_bombs(text)
    return get_loader("yaml")(text)


def _refuse_bombs(text: str) -> None:
    """Raise ValueError for what a few lines of YAML can blow up: aliases unfold to any size, and nesting to any depth."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor}: an alias; write out what it stands for")
        if depth > 20:
            raise ValueError("nested more than 20 deep")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _make_way(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Take out of `settings` what goes with a mask, an encoder or a length that `later`, as flat keys, replaces by another."""
    encoder, mask = settings.get("encoder", {}), settings.get("mask", {})
    known = MODALITIES.get(settings.get("modality"))
    default = known and known.masks[0]
    if "mask.kind" in later and later["mask.kind"] != mask.get("kind", default):
        settings.pop("mask", None)
    if later.get("data.class"):
        _keep_what_it_takes(settings, later)
    if "train.steps" in later and "train.epochs" not in later:
        settings.get("train", {}).pop("epochs", None)  # which would replace the steps
    if later.get("encoder.pretrained") and ":" not in (encoder.get("model") or ""):
        encoder.pop("model", None)
        encoder.pop("config", None)
    elif later.get("encoder.model"):
        encoder.pop("pretrained", None)
        _keep_what_fits(encoder, later["encoder.model"])
    if later.get("encoder.pretrained"):
        _fit_data(settings, later)


def _fit_data(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Replace what `settings` say of the data by what the pretrained encoder of `later` was trained with, where that is known.

    What `later` itself says of the data stays.
    """
    name = os.path.expanduser(later["encoder.pretrained"])
    modality = later.get("modality", settings.get("modality"))
    keys = MODALITIES[modality].files if modality in MODALITIES else ()
    wanted = [key for key in keys if f"data.{key}" not in later]
    if own := later.get("data.class", settings.get("data", {}).get("class")):
        wanted = [key for key in wanted if key in data_settings(data_class(modality, own))]
    known = _preprocessing(name, modality) if wanted else {}
    data = settings.setdefault("data", {})
    changed = {key: known[key] for key in wanted if key in known and known[key] != data.get(key)}
    if changed:
        words = " ".join(f"data.{key}={value}" for key, value in changed.items())
        print(f"encoder.pretrained={name}: {words}, as it was trained", file=sys.stderr)
    data.update(changed)


def _preprocessing(name: str, modality: str) -> dict[str, Any]:
    """How inputs were prepared for a pretrained encoder, as settings of `data`; without what its files do not say."""
    from transformers import AutoConfig, FeatureExtractionMixin, ImageProcessingMixin

    import d2v_fast.nets  # noqa: F401  our models are known to transformers as well

    if modality == "text":
        from d2v_fast.data import DataError
        from d2v_fast.data.text import load_tokenizer

        try:
            load_tokenizer(name)
        except DataError as error:
            reason = str(error).partition(": ")[2].partition(";")[0]
            print(f"encoder.pretrained={name}: has no usable tokenizer: {reason}", file=sys.stderr)
            return {}
        return {"tokenizer": name}
    image = modality == "vision"
    read = ImageProcessingMixin.get_image_processor_dict if image else FeatureExtractionMixin.get_feature_extractor_dict
    try:
        said, _ = read(name)
    except OSError:
        said = {}
    found = {key: said.get(there) for key, there in MODALITIES[modality].files.items()}
    if not said.get("do_normalize", True) and "mean" in found:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3} if image else {"mean": 0.0, "std": 0.5}  # spectrograms: 2 std
    if image:
        try:
            size = getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "image_size", None)
        except (OSError, ValueError):  # whoever loads the model says what is wrong with it
            size = None
        found["image_size"] = size if isinstance(size, int) else None
    return {key: value for key, value in found.items() if value is not None}


def _keep_what_it_takes(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Take out of the data's `settings`, which are of one class, what that of `later` does not take."""
    data, name = settings.get("data", {}), later["data.class"]
    if data.get("class") != name:
        taken = data_settings(data_class(later.get("modality", settings.get("modality", "custom")), name))
        if strange := sorted(data.keys() - taken - {"class"}):
            before = data.get("class") or settings.get("modality")
            print(f"data.class={name}: without {', '.join(strange)}, which was for {before}", file=sys.stderr)
        settings["data"] = {key: value for key, value in data.items() if key in taken}


def _keep_what_fits(encoder: dict[str, Any], model: str) -> None:
    """Take out of `encoder`, the settings of one model, what another one does not know."""
    before, config = encoder.get("model"), encoder.get("config", {})
    if before in (None, model):
        return
    strange = set(config)
    if ":" in model or model.startswith("timm/"):
        for name in ("init", "layers", "ffn", "features"):
            encoder.pop(name, None)
    else:
        from transformers import CONFIG_MAPPING

        import d2v_fast.nets  # noqa: F401  our models are known to transformers as well

        if model not in CONFIG_MAPPING:
            return
        known = CONFIG_MAPPING[model]()
        strange = {name for name in config if not hasattr(known, name)}
        if (before in LAYERED) != (model in LAYERED):
            strange |= config.keys() & {"num_conv_pos_embeddings"}
    if strange:
        print(f"encoder.model={model}: without {', '.join(sorted(strange))}, which was for {before}", file=sys.stderr)
    encoder["config"] = {name: value for name, value in config.items() if name not in strange}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        if key in GROUPS and not prefix:
            flat |= _flat(value, f"{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def data_class(modality: str, own: str | None = None) -> type:
    """The data set of a modality; imported here, so that one does not need the libraries of the others.

    Args:
        modality: One of `MODALITIES`.
        own: data.class, to take instead.

    Raises:
        ConfigError: No such modality, or no such class that is a data set.
    """
    if own is not None and modality in MODALITIES:
        from d2v_fast.data import DataError
        from d2v_fast.data.own import own_class

        try:
            cls = own_class(own)
            data_settings(cls)
        except DataError as error:
            raise ConfigError(str(error)) from error
        except ValueError as error:
            raise ConfigError(f"data.class={own}: its arguments become settings, which need type hints: {error}") from error
        return cls
    if modality == "custom":
        raise ConfigError(
            "modality=custom: found no data.class, expected package.module:Class, a class of your own that derives from "
            "d2v_fast.data.PretrainingData; docs/own-data.md has one to start from"
        )
    if modality not in MODALITIES:
        raise ConfigError(
            f"modality: found {modality!r}, expected one of {', '.join(MODALITIES)}, several"
            + (nearest(str(modality), [*MODALITIES, "several"]) if modality else "; a preset without it is given after another")
        )
    module, _, name = MODALITIES[modality].data.partition(":")
    return getattr(importlib.import_module(f"d2v_fast.data.{module}"), name)


def data_settings(cls: type) -> set[str]:
    """Names of the settings that a class of data takes, its parents' included where it hands arguments on to them."""
    from jsonargparse import ArgumentParser

    return set(ArgumentParser().add_class_arguments(cls, skip=NO_SETTINGS))


DESCRIPTION = """Pre-train an encoder of text, images, speech or sounds with data2vec.

  d2v-train --config vision/tiny                          a preset on builtin data
  d2v-train --config text/roberta-base data.path=corpus/  a preset on your data
  d2v-train --config mine.yaml train.batch_size=64        your settings, some changed
  d2v-train --config audio/tiny --print_config > mine.yaml
  d2v-train --resume runs/mine                            a run goes on from its newest checkpoint
  d2v-train --config mine.yaml train.output=run --resume  the same, by the command that began it
  d2v-train … train.output=run --resume=auto              begins, or goes on where there is a checkpoint, as after a requeue

Settings are given as key=value; later ones win. A run writes its resolved config.yaml, a log.jsonl, checkpoints/ and, in
Hugging Face format, the student in export/. Ctrl-C, SIGTERM or SIGUSR1: the run saves after the current step and ends with
exit code 130. It goes on only with the settings and samples that it had; --resume-allow KEY, once for each, accepts an
intended change. Callbacks, trackers and a probe on the way: docs/callbacks.md.
What the data and mask of a modality take: d2v-train --config PRESET --help. Data of your own: docs/own-data.md.

presets: """
WHICH = "--resume: which run? --resume RUN, or train.output=RUN beside the settings it was begun with"


def new_parser(modality: str, modalities: tuple[str, ...], sections: Iterable[str]) -> ArgumentParser:
    """A parser of the command line with these sections."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = ArgumentParser(
        prog="d2v-train",
        usage="d2v-train --config PRESET|FILE [key=value ...]\n"
        "       d2v-train --resume RUN [--resume-allow KEY] [key=value ...]",
        description=DESCRIPTION + ", ".join(presets()),
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Preset or YAML file; several are merged.")
    parser.add_argument("--fused", action="store_true", help="Fused kernels and bf16, or stop with the reason.")
    parser.add_argument("--modality", type=Literal[modalities], default=modality, help="What is learned from.")
    for name in sections:
        parser.add_class_arguments(SECTIONS[name], name)
    return parser


def _parser(modality: str, kind: str, own: str | None = None) -> ArgumentParser:
    parser = new_parser(modality, tuple(MODALITIES), SECTIONS)
    help = 'Data of your own, "package.module:Class", mostly with modality=custom.'
    parser.add_argument("--data.class", type=str | None, default=own, help=help)
    parser.add_class_arguments(data_class(modality, own), "data", skip=NO_SETTINGS)
    parser.add_argument("--mask.kind", type=Literal[MODALITIES[modality].masks], default=kind, help="How positions are chosen.")
    parser.add_class_arguments(MASKS[kind], "mask")
    return parser


def parse(args: list[str], layers: Iterable[dict[str, Any]] = ()) -> tuple[Config, bool]:
    """The config of a command line, and whether --fused was given; a `SeveralConfig` for modality=several.

    Args:
        args: Of the command.
        layers: Settings below those, as `read_yaml` gives them.

    Raises:
        ConfigError: A key or value that does not fit.
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        _make_way(settings, _flat(layer))
        settings = _merge(settings, layer)
    names: list[str] = []
    rest: list[str] = []
    args, resume, resume_allow = _resume(args)
    run = None
    arguments = iter(args)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            name = argument.partition("=")[2] or next(arguments, "")
            names.append(Path(name).stem if Path(name).is_file() else name.replace("/", "-"))
            layer = read_yaml(name)
            if Path(name).with_name("log.jsonl").exists() or Path(name).with_name("checkpoints").exists():
                run = str(Path(name).parent)
                names[-1] = Path(run).resolve().name
            _make_way(settings, _flat(layer))
            settings = _merge(settings, layer)
        elif argument in FLAGS or argument.startswith("--print_config="):
            rest.append(argument)
        elif "=" in argument:
            rest.append(argument if argument.startswith("-") else f"--{argument}")
        elif argument.startswith("--"):
            rest.append(f"{argument}={next(arguments, '')}")
        else:
            raise ConfigError(f"{argument!r}: expected key=value, such as train.steps=1000")
    overrides = {a[2:].partition("=")[0]: a.partition("=")[2] for a in rest if "=" in a}
    overrides.pop("print_config", None)
    if overrides.get("data.class") == "null":
        overrides["data.class"] = None
    _make_way(settings, overrides)
    given = _flat(settings)
    asks_only = {"-h", "--help"} & set(rest)
    if not settings and not overrides and resume:
        raise ConfigError(WHICH)
    if not settings and not overrides and not asks_only:
        raise ConfigError(f"no settings: d2v-train --config PRESET, one of {', '.join(presets())}; --help explains")
    own = overrides.get("data.class", given.get("data.class"))
    modality = overrides.get("modality", given.get("modality", "custom" if own else "text" if asks_only else None))
    if modality == "several":
        from d2v_fast.several import configure

        config, fused, known = configure(settings, rest, "-".join(names), resume, resume_allow)
        return _finish(config, known, run, "train.output" in overrides), fused
    cls = data_class(modality, own)
    masks = MODALITIES[modality].masks
    kind = overrides.get("mask.kind", given.get("mask.kind", masks[0]))
    if kind not in masks:
        raise ConfigError(
            f"mask.kind: found {kind!r}, expected for {modality} one of {', '.join(masks)}{nearest(str(kind), masks)}"
        )
    parser = _parser(modality, kind, own)
    known = [action.dest for action in parser._actions]
    for key in [*given, *overrides]:
        if key in GROUPS:
            raise ConfigError(f"{key}: found {overrides[key]}, expected one of its settings, {key}.…=value")
        if key not in known and not key.startswith(("encoder.config.", "optimizer.lr_scale.")):
            takes = f"; {own} takes {', '.join(sorted(data_settings(cls)))}" if own and key.startswith("data.") else ""
            raise ConfigError(f"{key}: no such setting{takes}{nearest(key, known)}")
    try:
        namespace = parser.parse_args(["--config", json.dumps(settings, default=str), *rest])
    except argparse.ArgumentError as error:
        raise ConfigError(_readable(str(error), given | overrides, parser)) from None
    if namespace.fused and "train.precision" not in given | overrides:
        namespace.train.precision = "bf16"
    values = namespace.as_dict()
    fused = values["fused"]
    kind = values["mask"].pop("kind")
    config = Config(
        modality=values["modality"],
        **{name: cls(**values[name]) for name, cls in SECTIONS.items()},
        mask=MASKS[kind](**values["mask"]),
        data=values["data"],
        own_data=own is not None and (modality == "custom" or not data_settings(data_class(modality)) <= data_settings(cls)),
        yaml=parser.dump(namespace, skip_unset=False),
        name="-".join(names) or values["modality"],
        resume=resume,
        resume_allow=resume_allow,
    )
    config.check()
    return _finish(config, known, run, "train.output" in overrides), fused


def _finish(config: Config, known: list[str], run: str | None, named: bool) -> Config:
    """The config with the folder that it is to be trained in.

    Args:
        config: As the settings have it.
        known: All settings that there are.
        run: Folder that the settings are from.
        named: Whether the command names another.

    Raises:
        ConfigError: --resume-allow of no setting, or --resume of no run.
    """
    for key in config.resume_allow:
        if key not in [*known, *GROUPS, *COMPARED] and not key.startswith(("encoder.config.", "optimizer.lr_scale.")):
            raise ConfigError(f"--resume-allow {key}: no such setting{nearest(key, [*known, *COMPARED])}")
    output = config.train.output
    if run and not named:  # the settings of a run: that run, wherever it is now, or one more like it
        output = run if config.resume else None
    if output is None and config.resume:
        raise ConfigError(WHICH)
    return replace(config, train=replace(config.train, output=output and os.path.expanduser(output)))


def _resume(args: list[str]) -> tuple[list[str], bool | Literal["auto"], list[str]]:
    """The command line with RUN's settings in place of --resume RUN; whether to resume, and --resume-allow's keys."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", nargs="?", const="")
    parser.add_argument("--resume-allow", action="append", default=[])
    try:
        found, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from None
    run = found.resume
    if run == "auto":
        return rest, "auto", found.resume_allow
    if run and "=" in run:  # a setting that happened to follow
        run, rest = "", [run, *rest]
    if run:
        from d2v_fast.checkpoint import refuse_pickle

        refuse_pickle(run)
        if not os.path.isfile(os.path.join(run, "config.yaml")):
            raise ConfigError(f"--resume {run}: holds no config.yaml, so it is not the folder of a run")
        rest = ["--config", os.path.join(run, "config.yaml"), *rest, f"train.output={run}"]
    return rest, run is not None, found.resume_allow


def _readable(message: str, given: dict[str, Any], parser: ArgumentParser) -> str:
    """jsonargparse's complaint as "key: found value, expected …", with the nearest of the values allowed."""
    if missing := message.partition("arguments are required: ")[2]:
        return f"{missing}: missing; {given.get('data.class')} has no default"
    key = re.search(r'key "([^"]+)"', message)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    if not key or not hints.get(key[1]):
        return message
    # A complaint about one entry of a mapping names the mapping and shows the entry.
    found = given.get(key[1], message.rpartition("Got value: ")[2])
    kind, choices = _type_in_words(hints[key[1]])
    return f"{key[1]}: found {found}, expected {kind}{nearest(str(found), choices)}"


def _type_in_words(hint: Any) -> tuple[str, list[str]]:
    """What a value of this type looks like, and the words among its values."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(inner)}", list(inner)
    if kind in (Union, UnionType):
        parts = [_type_in_words(part) for part in inner]
        return " or ".join(words for words, _ in parts), [choice for _, choices in parts for choice in choices]
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        NoneType: "null",
        list: "a list",
        tuple: f"a list of {len(inner)} numbers",
        dict: "a mapping to numbers" if float in inner else "a mapping",
    }
    return words.get(kind, str(hint)), []
