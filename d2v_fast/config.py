"""The settings of a run as typed dataclasses, from a preset or YAML file and dotted overrides.

The settings under `data` and `mask` are the arguments of the classes in `d2v_fast.data` and `d2v_fast.masking`. `modality` and
`mask.kind` select the class; `data.class` names a data set class of your own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from d2v_fast.choices import (
    Beta,
    Checked,
    ClosedUnitInterval,
    CLSReduction,
    EMAScope,
    Implementation,
    Init,
    LayerSource,
    NonNegativeFloat,
    NonNegativeInt,
    Norm,
    PositiveFloat,
    PositiveInt,
    Range,
    Rule,
    TargetNorm,
    argument_defaults,
    arguments,
    nearest,
    ranges,
)
from d2v_fast.files import CHECKPOINTS, CONFIG, LOG
from d2v_fast.masking import BlockMask, ExactBlockMask, RandomMask, SpanMask, TokenMask

Made = TypeVar("Made")
# jsonargparse.ArgumentParser. If this file imported it for type checkers only, jsonargparse would parse this file's source once
# for each section, which takes longer than everything else in `parse`.
Parser = Any
PRESETS = Path(__file__).parent / "presets"
MASKS = {"span": SpanMask, "block": BlockMask, "random": RandomMask, "token": TokenMask, "exact": ExactBlockMask}
FLAGS = ("-h", "--help", "--fused", "--print_config")
# Settings that may change when a run resumes, because no weight depends on them. Samples are compared by content.
FREE = (
    *(f"train.{name}" for name in ("output", "workers", "graphs", "log_every", "export_every", "save_every", "keep_last")),
    *("train.checkpointing", "train.shard", "train.timeout_minutes"),
    *(f"train.{name}" for name in ("callbacks", "trackers", "probe_every", "probe_data")),
    *("train.max_broken", "train.max_skipped", "collapse", "data.path", "data.cache", "data.stream_timeout"),
)
COMPARED = ("samples", "samples.number", "samples.content", "processes")  # compared on resume, in addition to the settings
PART = re.compile(r"^several\.parts\.\w+\.")  # prefix of the settings of one of several modalities


@dataclass(frozen=True)
class Modality:
    """Properties of a modality.

    Attributes:
        data: Its data set, "module:Class" in `d2v_fast.data`.
        masks: The mask kinds it accepts, the default first.
        axes: Number of axes of its positions.
        reads: Accepted values of `Encoder.reads`.
        task: The hub's name of the task on which a model is probed.
        pipeline: The hub's name of the pipeline for an exported encoder.
        length_multiple: Default of data.length_multiple on a GPU; None if all samples have one length.
    """

    data: str | None
    masks: tuple[str, ...]
    axes: int = 1
    reads: tuple[str, ...] = ()
    task: str = "feature-extraction"
    pipeline: str = "feature-extraction"
    length_multiple: int | None = None


MODALITIES = {
    "text": Modality(
        "text:TextData",
        ("token", "random", "exact"),
        reads=("text",),
        task="fill-mask",
        length_multiple=8,
    ),
    "vision": Modality(
        "vision:ImageData",
        ("block", "random", "exact"),
        axes=2,
        reads=("vision",),
        task="image-classification",
        pipeline="image-feature-extraction",
    ),
    "audio": Modality(
        "audio:AudioData",
        ("span", "random", "exact"),
        reads=("audio",),
        task="audio-classification",
        length_multiple=32,
    ),
    "spectrogram": Modality(
        "spectrograms:SpectrogramData",
        ("exact", "random", "block"),
        axes=2,
        reads=("spectrogram", "vision"),
        task="audio-classification",
    ),
    "custom": Modality(None, ("random", "exact", "span", "block")),
}
NO_SETTINGS = {"mask", "seed", "max_broken"}  # data set arguments that come from other sections
LAYERED = ("data2vec-audio", "data2vec2-audio")  # num_conv_pos_embeddings counts layers here; elsewhere it is a width
SEVERAL = ("random", "exact")  # mask kinds that leave the same number of positions visible in every view


class ConfigError(ValueError):
    """An invalid key or value. The message names it and the valid alternatives."""


def in_section(section: str, call: Callable[..., Made], *args: Any, **settings: Any) -> Made:
    """Call a function; a ValueError about a setting becomes a ConfigError that names it by its dotted key."""
    try:
        return call(*args, **settings)
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from None


@dataclass(frozen=True)
class EncoderConfig(Checked):
    """The encoder.

    Args:
        model: A transformers model type (roberta, beit, wav2vec2, data2vec-audio, …), timm/NAME for a timm model, or your own
            "package.module:Class".
        pretrained: Hub name or folder of pretrained weights to start from; by default weights are random.
        config: Fields of the model's configuration class, such as encoder.config.num_hidden_layers; for timm, arguments of the
            model, such as encoder.config.depth.
        init: Weight initialization. hf = that of transformers; for images also data2vec = that of the data2vec authors, and
            sincos = with fixed sin-cos positions.
        layers: Path to the list of blocks, if it is not detected automatically.
        ffn: Path inside a block to the module with the FFN output, if that is not the block's last Linear.
        feature_grad_mult: Scale of the gradient into the convolutions of a speech encoder.
        attention: Attention implementation of transformers.
        features: Path to the module that computes local features, for a model that runs as a whole (docs/encoders.md), if it
            is not detected automatically.
        bidirectional: Let a decoder-only model (gpt2, llama, …) attend to later positions too; causal models are rejected
            without it.
    """

    model: str | None = None
    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init: Init = "hf"
    layers: str | None = None
    ffn: str | None = None
    feature_grad_mult: NonNegativeFloat = 1.0
    attention: str = "sdpa"
    features: str | None = None
    bidirectional: bool = False


@dataclass(frozen=True)
class TargetsConfig(Checked):
    """What the student predicts.

    Args:
        top_k: Number of top teacher layers to average.
        source: What to take from each layer: the FFN output, or the output or input of the block.
        norm: Normalization of each layer before averaging; batch and group are for fairseq configs that set them.
        target_norm: Normalization of the average.
        teacher_fp32: Run the teacher in fp32 under mixed precision.
    """

    top_k: PositiveInt = 8
    source: LayerSource = "ffn"
    norm: Norm = "layer"
    target_norm: TargetNorm = "none"
    teacher_fp32: bool = False


@dataclass(frozen=True)
class LossConfig(Checked):
    """How predictions are scored.

    Args:
        beta: 0 = squared error; otherwise smooth-L1 loss, quadratic for errors below beta.
        scale: Factor on the error summed over channels: auto = 1/sqrt(C), mean = 1/C, or a number.
        reduction: global = mean over the masked positions of all ranks and micro-batches; local = mean of means.
        impl: Implementation of the loss.
        cls_weight: With head.kind=conv, weight of the loss that trains CLS to predict the mean of the targets; 0 = none.
        cls_reduction: mean over the views of a batch, or their sum as in the reference code.
    """

    beta: Beta = 0.0
    scale: PositiveFloat | Literal["auto", "mean"] = "auto"
    reduction: Literal["global", "local"] = "global"
    impl: Implementation = "auto"
    cls_weight: NonNegativeFloat = 0.0
    cls_reduction: CLSReduction = "mean"


@dataclass(frozen=True)
class HeadConfig(Checked):
    """The head that maps states to predictions.

    `conv` selects data2vec 2.0: each sample is masked in `data.views` ways, and only the visible positions are encoded.

    Args:
        kind: linear = a regression head on the masked positions (data2vec 1.0); conv = a decoder over all positions (2.0).
        layers: Number of Linear layers, with GELU in between, or of convolutions; 0 = none.
        zero_init: Initialize the last Linear to zero.
        pretrained: Folder with a head.safetensors to start from, as d2v-export writes it for another project's checkpoint;
            default is the folder of encoder.pretrained, if it has one.
        width: Channels of the convolutions.
        kernel: Kernel size of the convolutions.
        groups: Channel groups of the convolutions.
        residual: Add the input of a convolution to its output.
        projection_layers: Number of Linear layers after the convolutions; the hidden ones are twice as wide as their input.
        dropout: Dropout on the decoder's input states.
        noise: Standard deviation of the noise at masked positions.
    """

    kind: Literal["linear", "conv"] = "linear"
    layers: NonNegativeInt = 1
    zero_init: bool = False
    pretrained: str | None = None
    width: PositiveInt = 384
    kernel: PositiveInt = 7
    groups: PositiveInt = 16
    residual: bool = True
    projection_layers: PositiveInt = 1
    dropout: Annotated[float, Range("[0, 1)")] = 0.0
    noise: NonNegativeFloat = 0.01


@dataclass(frozen=True)
class EMAConfig(Checked):
    """How the teacher follows the student.

    Args:
        start: Initial decay.
        end: Final decay.
        anneal_steps: Steps from the initial to the final decay.
        scope: What is averaged: all, the encoder without its local features, or only its layers; the rest is copied.
        copied: Name patterns of further parameters to copy.
    """

    start: ClosedUnitInterval = 0.999
    end: ClosedUnitInterval = 0.9999
    anneal_steps: NonNegativeInt = 30_000
    scope: EMAScope = "all"
    copied: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """The optimizer.

    Args:
        kind: adamw, or lamb for large batches: the update of each tensor has the norm of the tensor times lr. On a GPU lamb
            uses NVIDIA apex's FusedLAMB, if apex is installed.
        lr: Peak learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        decay_1d: Apply weight decay to biases, norms and other vectors too, as fairseq does.
        lr_scale: Learning rate factors by parameter name pattern, such as {"*feature_extractor*": 0.1}.
        one_pass: With --fused on a GPU, AdamW also updates the teacher, in one pass over memory; no gain was measured.
    """

    kind: Literal["adamw", "lamb"] = "adamw"
    lr: PositiveFloat = 5e-4
    betas: Annotated[tuple[float, float], Range("[0, 1)")] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.01
    decay_1d: bool = False
    lr_scale: dict[str, NonNegativeFloat] = field(default_factory=dict)
    one_pass: bool = False


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The learning rate schedule.

    Args:
        kind: Shape after warm-up; tri_stage holds the peak, then decays exponentially.
        warmup: Warm-up steps, or if below 1 their share of all steps.
        hold: Share of all steps at the peak (tri_stage).
        final: Final learning rate as a share of the peak.
        initial: Initial learning rate as a share of the peak.
    """

    kind: Literal["cosine", "linear", "constant", "tri_stage"] = "cosine"
    warmup: NonNegativeFloat = 0.03
    hold: ClosedUnitInterval = 0.9
    final: NonNegativeFloat = 0.0
    initial: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class TrainConfig(Checked):
    """The training run.

    Args:
        output: Folder of the run; default is a new folder in runs/, named after the config and the time.
        steps: Optimizer steps.
        epochs: Passes over the data; overrides steps.
        batch_size: Samples per process in each micro-batch.
        accumulate: Micro-batches per optimizer step on each process.
        clip_norm: Maximum norm of the gradient, 0 = no clipping.
        precision: Compute precision; auto = bf16 if the device has instructions for it, else fp32. The weights of student and
            teacher stay in fp32.
        device: auto = GPU if there is one. CUDA_VISIBLE_DEVICES=1 selects one of several.
        graphs: With --fused on one GPU, replay passes over batches of the same shape as CUDA graphs, which speeds up small
            batches; each shape keeps its own set of gradients, up to four sets.
        checkpointing: Keep only the input of each student block for the backward pass and recompute the rest: less memory, the
            same gradients, about a third more time.
        shard: On several ranks, shard weights, gradients, optimizer and teacher across them (FSDP2); hybrid = shard within a
            machine and replicate across machines.
        timeout_minutes: Minutes after which a rank that waits for another one gives up.
        seed: Seed of weights, masks, augmentations and sample order.
        workers: Data loading processes on each rank.
        threads: CPU threads of torch, 0 = its default.
        log_every: Steps between lines of the log.
        export_every: Steps between exports of the student, 0 = only at the end.
        save_every: Steps between checkpoints, 0 = only when the run ends or is asked to stop.
        keep_last: Number of checkpoints to keep.
        max_broken: Maximum share of unreadable samples; the run stops above it.
        max_skipped: The run stops after this many steps in a row with a loss or gradient that is not finite.
        callbacks: Your own callback objects, each as "package.module:Class" or, with arguments, as
            {class_path: package.module:Class, init_args: {...}}; see docs/callbacks.md.
        trackers: Where metrics and settings are logged in addition to log.jsonl; default is TensorBoard, if it is installed.
        probe_every: Steps between k-NN probes of the teacher on labelled samples, 0 = none; the result goes into the first
            line of the log after that many steps, and into the last line.
        probe_data: Labelled data for the probe, as for d2v-probe --data; default is the builtin set for a run on builtin data.
    """

    output: str | None = None
    steps: PositiveInt = 100_000
    epochs: Annotated[float | None, Range("(0, inf)")] = None
    batch_size: PositiveInt = 16
    accumulate: PositiveInt = 1
    clip_norm: NonNegativeFloat = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    graphs: bool = True
    checkpointing: bool = False
    shard: bool | Literal["hybrid"] = False
    timeout_minutes: Annotated[float, Range("(0, 100000]")] = 30.0
    seed: Annotated[int, Range("[0, 9223372036854775807]")] = 0
    workers: Annotated[int, Range("[0, 1024]")] = 2
    threads: Annotated[int, Range("[0, 1024]")] = 0  # far more crash the thread pool
    log_every: PositiveInt = 50
    export_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 1000
    keep_last: PositiveInt = 2
    max_broken: ClosedUnitInterval = 0.01
    max_skipped: PositiveInt = 20
    callbacks: list[str | dict[str, Any]] = field(default_factory=list)
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)
    probe_every: NonNegativeInt = 0
    probe_data: str | None = None


@dataclass(frozen=True)
class CollapseConfig(Checked):
    """When a run counts as collapsed. A bound of 0 disables its rule.

    Args:
        distinct: Minimum share of distinct samples among a few that are compared before the first step.
        target_std: Minimum std of the targets.
        prediction_std: Minimum std of the predictions.
        rank: Minimum effective rank of the states of student and teacher.
        variation: Minimum std of the local features, relative to their size.
        divergence: Maximum loss, as a multiple of the loss of predicting a constant.
        leak: Minimum loss, as a multiple of the loss of predicting each position's mean.
        distance: Minimum distance between teacher and student, relative to the student's weights.
        decay: Maximum decay of the teacher, as measured on its weights.
        update: Minimum change of the weights per step at the peak learning rate, relative to their norm.
        gradient: Maximum norm of the gradient, as a multiple of its previous usual value.
        after: Steps before the rules apply; default is 5000, in a shorter run a tenth of its steps but at least 100, and never
            before the end of the warm-up.
        action: What to do when a rule is broken.
    """

    distinct: ClosedUnitInterval = 0.5
    target_std: NonNegativeFloat = 0.1
    prediction_std: NonNegativeFloat = 0.01
    rank: NonNegativeFloat = 4.0
    variation: NonNegativeFloat = 0.2
    divergence: NonNegativeFloat = 2.0
    leak: NonNegativeFloat = 0.1
    distance: NonNegativeFloat = 1e-6
    decay: ClosedUnitInterval = 0.999999
    update: NonNegativeFloat = 1e-5
    gradient: NonNegativeFloat = 1000.0
    after: Annotated[int | None, Range("[0, inf)")] = None
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


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. `mask` and `data` hold the arguments of their classes; `data` also holds `class`.

    `own_data` is set if the data class does not take the settings of the modality's own data set.
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
    parts = ()  # only a `d2v_fast.several.SeveralConfig` has some
    own_data: bool = False
    yaml: str = ""
    name: str = "run"  # names the folder of a run without train.output
    resume: bool | Literal["auto"] = False  # auto = resume if there is a checkpoint
    resume_allow: list[str] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        """Whether the samples are blocks of tokens from our own text data set."""
        return self.modality == "text" and not self.own_data

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained for the run."""
        return self.is_text and self.data["tokenizer"] == "train"

    def settings(self) -> dict[str, Any]:
        """All settings by their dotted keys."""
        values = {f"{section}.{k}": v for section in (*SECTIONS, "mask") for k, v in vars(getattr(self, section)).items()}
        return values | {f"data.{k}": v for k, v in self.data.items()}

    def defaults(self) -> dict[str, Any]:
        """Default values by the dotted keys of `settings`."""
        sections = {name: cls() for name, cls in SECTIONS.items()} | {"mask": type(self.mask)()}
        values = {f"{section}.{k}": v for section, found in sections.items() for k, v in vars(found).items()}
        data = argument_defaults(data_class(self.modality, self.data["class"]))
        # Older runs padded to no multiple; in newer ones null has become a number before settings are compared.
        return values | {f"data.{k}": v for k, v in data.items()} | {"data.class": None, "data.length_multiple": 1}

    def check(self) -> None:
        """Raise ConfigError for invalid values."""
        values = self.settings()
        for key, value in values.items():
            if isinstance(value, str) and value.encode(errors="replace").decode() != value:
                raise ConfigError(
                    f"{key}: found {value!r}, which is not UTF-8, so config.yaml cannot hold it; rename or link it"
                )
        for name, hint in arguments(data_class(self.modality, self.data["class"])).items():
            if name in self.data:
                in_section("data", Rule(hint).check, name, self.data[name])
        if self.own_data:  # its settings may share a name with built-in ones and mean something else
            values = {key: value for key, value in values.items() if not key.startswith("data.") or key == "data.views"}
        for key in ("data.crop_scale", "data.crop_ratio"):
            if key in values and values[key][0] > values[key][1]:
                raise ConfigError(f"{key}: found {list(values[key])}, expected the lower number first")
        if values.get("mask.min_area", 0) > values.get("mask.max_area", 0):
            raise ConfigError(
                f"mask.min_area: found {values['mask.min_area']}, expected at most mask.max_area={values['mask.max_area']}"
            )
        replaced = values.get("mask.random_prob", 0) + values.get("mask.keep_prob", 0)
        if replaced > 1:
            raise ConfigError(f"mask.random_prob + mask.keep_prob: found {replaced}, expected at most 1")
        if values.get("data.block_size") == 2 and not values["data.cross_documents"]:
            raise ConfigError("data.block_size: found 2, expected at least 3 without data.cross_documents: <s>, a token, </s>")
        self._check_combinations(values)

    def _check_combinations(self, values: dict[str, Any]) -> None:
        """Raise ConfigError for sections that do not fit together; `values` are the settings by their dotted keys."""
        conv, views = self.head.kind == "conv", values.get("data.views")
        if conv != (views is not None):
            raise ConfigError(
                f"head.kind={self.head.kind} with data.views={'null' if views is None else views}: data2vec 2.0 takes "
                "head.kind=conv and a number of views, such as 8; 1.0 takes head.kind=linear and data.views=null"
            )
        if conv and not isinstance(self.mask, tuple(MASKS[kind] for kind in SEVERAL)):
            raise ConfigError(
                f"mask: {type(self.mask).__name__} leaves a different number of positions visible in each view, but data2vec "
                f"2.0 (head.kind=conv) needs equal numbers; expected mask.kind={' or '.join(SEVERAL)}"
            )
        streamed = values.get("data.streaming") or "://" in str(values.get("data.path"))
        if self.train.epochs is not None and streamed and not self.own_data:
            raise ConfigError(
                f"train.epochs={self.train.epochs:g}: the length of a stream is unknown; give train.steps instead of "
                f"train.epochs (data.path={values['data.path']})"
            )
        if self.train.shard and self.train.probe_every:
            raise ConfigError(
                "train.probe_every: the probe runs the teacher on one rank, but train.shard spreads it over all of them; leave "
                "it out and use d2v-probe, which reads the run's checkpoints"
            )
        if self.train.shard and self.train.precision == "fp16":
            raise ConfigError("train.precision=fp16: sharded ranks cannot agree on a gradient scale; use bf16 or fp32")
        if self.optimizer.kind == "lamb" and self.optimizer.weight_decay == 0:
            raise ConfigError(
                "optimizer.kind=lamb with optimizer.weight_decay=0: tensors without weight decay are not scaled, so this is "
                "Adam; set optimizer.weight_decay, such as 0.01, or optimizer.kind=adamw"
            )
        if self.optimizer.kind == "lamb" and self.train.shard:
            raise ConfigError(
                "optimizer.kind=lamb with train.shard: the norm of a tensor needs all of its shards, which is not implemented; "
                "set train.shard=false or optimizer.kind=adamw"
            )
        if self.loss.cls_weight and not conv:
            raise ConfigError(f"loss.cls_weight: found {self.loss.cls_weight}, which is for head.kind=conv; expected 0")
        if self.train.output == "" or "\0" in (self.train.output or ""):
            raise ConfigError(f"train.output: found {self.train.output!r}, expected a folder; default is a new one in runs/")
        if not values.get("data.path", True):
            raise ConfigError("data.path: found nothing, expected builtin, a file, a folder or the name of a Hugging Face set")
        if (self.encoder.model is None) == (self.encoder.pretrained is None) and not (self.encoder.model or "").count(":"):
            raise ConfigError("encoder: give either encoder.model (random weights) or encoder.pretrained")
        if type(self.mask) not in [MASKS[kind] for kind in MODALITIES[self.modality].masks]:
            raise ConfigError(f"mask.kind: modality {self.modality} takes one of {MODALITIES[self.modality].masks}")


def presets() -> list[str]:
    """Names of the built-in presets, such as text/roberta-base."""
    return sorted(str(file.relative_to(PRESETS).with_suffix("")) for file in PRESETS.rglob("*.yaml"))


def read_yaml(name: str) -> dict[str, Any]:
    """The settings of a preset or YAML file. Files of arxyzan/data2vec-pytorch are translated.

    Raises:
        ConfigError: No such preset or file, or not a mapping.
    """
    from d2v_fast.compat import is_arxyzan, translate_arxyzan

    if not name:
        raise ConfigError(f"--config: found nothing, expected a YAML file or one of {', '.join(presets())}")
    file = Path(name).expanduser()
    if (file / CONFIG).is_file():
        raise ConfigError(f"--config {name}: is a folder; its settings are in {file / CONFIG}")
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
    """The settings without those that are null.

    Raises:
        ConfigError: The settings or one of their groups are not a mapping.
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
    """Parse YAML, with numbers as `d2v-train` reads them.

    Raises:
        ValueError: Aliases or deep nesting.
        yaml.YAMLError: Not YAML.
    """
    from jsonargparse import get_loader

    _refuse_bombs(text)
    return get_loader("yaml")(text)


def _refuse_bombs(text: str) -> None:
    """Raise ValueError for aliases and deep nesting, with which a few lines of YAML can exhaust memory or the stack."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor}: an alias; write out its content")
        if depth > 20:
            raise ValueError("nested more than 20 deep")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _drop_replaced(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Remove from `settings` all settings of a mask, encoder or run length that `later` (flat keys) replaces."""
    encoder, mask = settings.get("encoder", {}), settings.get("mask", {})
    known = MODALITIES.get(settings.get("modality", ""))
    default = known and known.masks[0]
    if "mask.kind" in later and later["mask.kind"] != mask.get("kind", default):
        settings.pop("mask", None)
    if later.get("data.class"):
        _drop_unknown_data(settings, later)
    if "train.steps" in later and "train.epochs" not in later:
        settings.get("train", {}).pop("epochs", None)  # would override the new steps
    if later.get("encoder.pretrained") and ":" not in (encoder.get("model") or ""):
        encoder.pop("model", None)
        encoder.pop("config", None)
    elif later.get("encoder.model"):
        encoder.pop("pretrained", None)
        _drop_unknown_fields(encoder, later["encoder.model"])
    if later.get("encoder.pretrained"):
        _fit_data(settings, later)


def _fit_data(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Replace data `settings` by those with which the pretrained encoder in `later` was trained, where known.

    Data settings given in `later` itself are kept.
    """
    name = os.path.expanduser(later["encoder.pretrained"])
    modality: Any = later.get("modality", settings.get("modality"))
    built_in: Any = data_class(modality) if modality in MODALITIES and MODALITIES[modality].data else None
    wanted = [key for key in (built_in.files if built_in else ()) if f"data.{key}" not in later]
    if own := later.get("data.class", settings.get("data", {}).get("class")):
        wanted = [key for key in wanted if key in data_settings(data_class(modality, own))]
    if wanted:
        import d2v_fast.nets  # noqa: F401  registers our models with transformers
    known = built_in.read_files(name) if wanted else {}
    data = settings.setdefault("data", {})
    changed = {key: known[key] for key in wanted if known.get(key) not in (None, data.get(key))}
    if changed:
        words = " ".join(f"data.{key}={value}" for key, value in changed.items())
        print(f"encoder.pretrained={name}: {words}, as it was trained", file=sys.stderr)
    data.update(changed)


def _drop_unknown_data(settings: dict[str, Any], later: dict[str, Any]) -> None:
    """Remove the data settings that the data class of `later` does not take."""
    data, name = settings.get("data", {}), later["data.class"]
    if data.get("class") != name:
        accepted = data_settings(data_class(later.get("modality", settings.get("modality", "custom")), name))
        if unknown := sorted(data.keys() - accepted - {"class"}):
            before = data.get("class") or settings.get("modality")
            print(f"data.class={name}: dropped {', '.join(unknown)}, set for {before}", file=sys.stderr)
        settings["data"] = {key: value for key, value in data.items() if key in accepted}


def _drop_unknown_fields(encoder: dict[str, Any], model: str) -> None:
    """Remove from `encoder`, set for another model, the fields that `model` does not know."""
    before, config = encoder.get("model"), encoder.get("config", {})
    if before in (None, model):
        return
    unknown = set(config)
    if ":" in model or model.startswith("timm/"):
        for name in ("init", "layers", "ffn", "features"):
            encoder.pop(name, None)
    else:
        from transformers import CONFIG_MAPPING

        import d2v_fast.nets  # noqa: F401  registers our models with transformers

        if model not in CONFIG_MAPPING:
            return
        known = CONFIG_MAPPING[model]()
        unknown = {name for name in config if not hasattr(known, name)}
        if (before in LAYERED) != (model in LAYERED):
            unknown |= config.keys() & {"num_conv_pos_embeddings"}
    if unknown:
        print(f"encoder.model={model}: dropped {', '.join(sorted(unknown))}, set for {before}", file=sys.stderr)
    encoder["config"] = {name: value for name, value in config.items() if name not in unknown}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if key in GROUPS else {str(key): value}
    return flat


def data_class(modality: str, own: str | None = None) -> type:
    """The data set class of a modality, imported lazily: one modality does not need the libraries of another.

    Args:
        modality: One of `MODALITIES`.
        own: Value of data.class, used instead of the modality's data set.

    Raises:
        ConfigError: Unknown modality, or `own` is not a data set class.
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
            raise ConfigError(f"data.class={own}: its arguments become settings, so they need type hints: {error}") from error
        return cls
    if modality not in MODALITIES:
        raise ConfigError(
            f"modality: found {modality!r}, expected one of {', '.join(MODALITIES)}, several"
            + (nearest(str(modality), [*MODALITIES, "several"]) if modality else "; a preset without one must follow another")
        )
    if (built_in := MODALITIES[modality].data) is None:
        raise ConfigError(
            f"modality={modality}: found no data.class, expected package.module:Class, a class of your own that derives from "
            "d2v_fast.data.PretrainingData; docs/own-data.md has an example"
        )
    module, _, name = built_in.partition(":")
    return getattr(importlib.import_module(f"d2v_fast.data.{module}"), name)


def data_settings(cls: type) -> set[str]:
    """Names of the settings that a data class takes, including its parents' if it passes arguments on to them."""
    from jsonargparse import ArgumentParser

    return set(ArgumentParser().add_class_arguments(cls, skip=NO_SETTINGS))


DESCRIPTION = """Pre-train an encoder for text, images, speech or sounds with data2vec.

  d2v-train --config vision/tiny                          a preset on builtin data
  d2v-train --config text/roberta-base data.path=corpus/  a preset on your data
  d2v-train --config mine.yaml train.batch_size=64        your settings, some overridden
  d2v-train --config audio/tiny --print_config > mine.yaml
  d2v-train --resume runs/mine                            resume a run from its newest checkpoint
  d2v-train --config mine.yaml train.output=run --resume  the same, with the command that started it
  d2v-train … train.output=run --resume=auto              start, or resume if there is a checkpoint (requeued jobs)

Settings are given as key=value; later ones win. A run writes its resolved config.yaml, log.jsonl, checkpoints/ and the student
in Hugging Face format in export/. On Ctrl-C, SIGTERM or SIGUSR1 the run saves after the current step and exits with code 130.
It resumes only with the same settings and samples; --resume-allow KEY, which can be repeated, accepts an intended change.
Callbacks, trackers and the online probe: docs/callbacks.md.
Data and mask settings of a modality: d2v-train --config PRESET --help. Your own data: docs/own-data.md.

presets: """
WHICH = "--resume: which run? --resume RUN, or train.output=RUN with the settings it was started with"


def new_parser(modality: str, modalities: tuple[str, ...], sections: Iterable[str]) -> Parser:
    """A command-line parser for these sections."""
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
    help = "Use fused kernels, and bf16 if the device has it, or stop with the reason."
    parser.add_argument("--fused", action="store_true", help=help)
    parser.add_argument("--modality", type=Literal[modalities], default=modality, help="Modality of the data.")
    for name in sections:
        add_settings(parser, SECTIONS[name], name)
    return parser


def add_settings(parser: Parser, cls: type, section: str, skip: Iterable[str] = ()) -> None:
    """Add the arguments of a class as settings of a section, with their ranges in the help."""
    parser.add_class_arguments(cls, section, skip=set(skip))
    expected = {f"{section}.{name}": str(found) for name, found in ranges(cls).items()}
    for action in parser._actions:
        if action.help and action.dest in expected:
            words = expected[action.dest]
            action.help += f" {words[0].upper()}{words[1:]}."


def _parser(modality: str, kind: str, own: str | None = None) -> Parser:
    parser = new_parser(modality, tuple(MODALITIES), SECTIONS)
    help = 'Your own data set, "package.module:Class", usually with modality=custom.'
    parser.add_argument("--data.class", type=str | None, default=own, help=help)
    add_settings(parser, data_class(modality, own), "data", NO_SETTINGS)
    parser.add_argument("--mask.kind", type=Literal[MODALITIES[modality].masks], default=kind, help="How positions are masked.")
    add_settings(parser, MASKS[kind], "mask")
    return parser


def parse(args: list[str], layers: Iterable[dict[str, Any]] = ()) -> tuple[Config, bool]:
    """Parse a command line into its config and whether --fused was given; modality=several gives a `SeveralConfig`.

    Args:
        args: Command-line arguments.
        layers: Settings of lower precedence, as `read_yaml` returns them.

    Raises:
        ConfigError: An invalid key or value.
    """
    args, resume, resume_allow = _resume(args)
    files, rest = _split(args)
    settings: dict[str, Any] = {}
    for layer in [*layers, *map(read_yaml, files)]:
        _drop_replaced(settings, _flat(layer))
        settings = _merge(settings, layer)
    name, run = _name(files)
    overrides: dict[str, Any] = {a[2:].partition("=")[0]: a.partition("=")[2] for a in rest if "=" in a}
    overrides.pop("print_config", None)
    if overrides.get("data.class") == "null":
        overrides["data.class"] = None
    _drop_replaced(settings, overrides)
    given = _flat(settings)
    help_only = {"-h", "--help"} & set(rest)
    if not settings and not overrides and resume:
        raise ConfigError(WHICH)
    if not settings and not overrides and not help_only:
        raise ConfigError(f"no settings: d2v-train --config PRESET, one of {', '.join(presets())}; see --help")
    own = overrides.get("data.class", given.get("data.class"))
    modality: Any = overrides.get("modality", given.get("modality", "custom" if own else "text" if help_only else None))
    if modality == "several":
        from d2v_fast.several import configure

        several, fused, known = configure(settings, rest, name, resume, resume_allow)
        return _finish(several, known, run, "train.output" in overrides), fused
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
            accepted = f"; {own} takes {', '.join(sorted(data_settings(cls)))}" if own and key.startswith("data.") else ""
            raise ConfigError(f"{key}: no such setting{accepted}{nearest(key, known)}")
    namespace = parse_settings(parser, settings, rest, given | overrides)
    values = namespace.as_dict()
    fused = values["fused"]
    kind = values["mask"].pop("kind")
    built_in = own is None or (
        MODALITIES[modality].data is not None and data_settings(data_class(modality)) <= data_settings(cls)
    )
    config = Config(
        modality=values["modality"],
        **{name: in_section(name, cls, **values[name]) for name, cls in SECTIONS.items()},
        mask=in_section("mask", MASKS[kind], **values["mask"]),
        data=values["data"],
        own_data=not built_in,
        yaml=parser.dump(namespace, skip_unset=False),
        name=name or values["modality"],
        resume=resume,
        resume_allow=resume_allow,
    )
    config.check()
    return _finish(config, known, run, "train.output" in overrides), fused


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """The values of --config, and all other arguments as flags or --key=value."""
    files: list[str] = []
    rest: list[str] = []
    remaining = iter(args)
    for argument in remaining:
        if argument == "--config" or argument.startswith("--config="):
            files.append(argument.partition("=")[2] or next(remaining, ""))
        elif argument in FLAGS or argument.startswith("--print_config="):
            rest.append(argument)
        elif "=" in argument:
            rest.append(argument if argument.startswith("-") else f"--{argument}")
        elif argument.startswith("--"):
            rest.append(f"{argument}={next(remaining, '')}")
        else:
            raise ConfigError(f"{argument!r}: expected key=value, such as train.steps=1000")
    return files, rest


def _name(files: list[str]) -> tuple[str, str | None]:
    """The name of a run of these files, and the folder of the run that one of them belongs to, if any."""
    names: list[str] = []
    run: str | None = None
    for file in files:
        names.append(Path(file).stem if Path(file).is_file() else file.replace("/", "-"))
        if Path(file).with_name(LOG).exists() or Path(file).with_name(CHECKPOINTS).exists():
            run = str(Path(file).parent)
            names[-1] = Path(run).resolve().name
    return "-".join(names), run


def has_bf16(device: str) -> bool:
    """Whether `train.device` has instructions for bf16. Without them, products on a CPU can take 100 times as long."""
    import torch  # not at the top: --help works without it

    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = torch.cpu.get_capabilities()
    return device != "cpu" or bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


def parse_settings(parser: Parser, settings: dict[str, Any], rest: list[str], given: dict[str, Any]) -> Any:
    """The namespace of `settings`, overridden by the arguments `rest`, with the precision that "auto" means here.

    Args:
        parser: From `new_parser`.
        settings: From presets and files.
        rest: Flags and --key=value.
        given: All settings that either of them sets, by their dotted keys.

    Raises:
        ConfigError: An invalid value.
    """
    try:
        namespace = parser.parse_args(["--config", json.dumps(settings, default=str), *rest])
    except argparse.ArgumentError as error:
        raise ConfigError(_readable(str(error), given, parser)) from None
    if namespace.fused and "train.precision" not in given:
        namespace.train.precision = "auto"
    if namespace.train.precision == "auto":
        namespace.train.precision = "bf16" if has_bf16(namespace.train.device) else "fp32"
    return namespace


def _finish(config: Any, known: list[str], run: str | None, named: bool) -> Config:
    """Resolve the output folder of `config`.

    Args:
        config: The parsed config.
        known: All valid settings.
        run: Folder of the run whose config.yaml was read, if any.
        named: Whether the command sets train.output.

    Raises:
        ConfigError: --resume-allow with an unknown setting, or --resume without a run.
    """
    for key in config.resume_allow:
        if key not in [*known, *GROUPS, *COMPARED] and not key.startswith(("encoder.config.", "optimizer.lr_scale.")):
            raise ConfigError(f"--resume-allow {key}: no such setting{nearest(key, [*known, *COMPARED])}")
    output = config.train.output
    if run and not named:  # resume that run, even if it was moved, or start a new one like it
        output = run if config.resume else None
    if output is None and config.resume:
        raise ConfigError(WHICH)
    return replace(config, train=replace(config.train, output=output and os.path.expanduser(output)))


def _resume(args: list[str]) -> tuple[list[str], bool | Literal["auto"], list[str]]:
    """Replace --resume RUN by RUN's settings; returns the arguments, whether to resume, and the keys of --resume-allow."""
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
    if run and "=" in run:  # --resume without RUN, followed by a setting
        run, rest = "", [run, *rest]
    if run:
        from d2v_fast.checkpoint import refuse_pickle

        refuse_pickle(run)
        if not os.path.isfile(os.path.join(run, CONFIG)):
            raise ConfigError(f"--resume {run}: holds no config.yaml, so it is not the folder of a run")
        rest = ["--config", os.path.join(run, CONFIG), *rest, f"train.output={run}"]
    return rest, run is not None, found.resume_allow


def _readable(message: str, given: dict[str, Any], parser: Parser) -> str:
    """Rewrite a jsonargparse error as "key: found value, expected …", with the nearest valid value."""
    if missing := message.partition("arguments are required: ")[2]:
        return f"{missing}: missing; {given.get('data.class')} has no default"
    key = re.search(r'key "([^"]+)"', message)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    if not key or not hints.get(key[1]):
        return message
    # An error in one entry of a mapping names the mapping and shows the entry.
    found = given.get(key[1], message.rpartition("Got value: ")[2])
    kind, choices = _type_in_words(hints[key[1]])
    return f"{key[1]}: found {found}, expected {kind}{nearest(str(found), choices)}"


def _type_in_words(hint: Any) -> tuple[str, list[str]]:
    """Describe a type in words; returns the description and the choices it contains."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return _type_in_words(inner[0])
    if kind is Literal:
        return f"one of {', '.join(inner)}", list(inner)
    if kind in (Union, UnionType):
        parts = [_type_in_words(part) for part in inner]
        return " or ".join(words for words, _ in parts), [choice for _, choices in parts for choice in choices]
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a string",
        NoneType: "null",
        list: "a list",
        tuple: f"a list of {len(inner)} numbers",
        dict: "a mapping to numbers" if float in inner else "a mapping",
    }
    return words.get(kind, str(hint)), []
