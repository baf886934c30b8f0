"""Several modalities in one model: a shared stack of blocks, and separate inputs and decoders for each modality.

Experimental. Each part is a data2vec 2.0 model with an ordinary config. Its blocks share their parameters with those of the
first part, in the student and in the teacher. A step trains one part; over time the blocks learn from all of them.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from d2v_fast.choices import nearest
from d2v_fast.config import (
    GROUPS,
    MODALITIES,
    SECTIONS,
    CollapseConfig,
    Config,
    ConfigError,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    _flat,
    check_layer,
    in_section,
    load_yaml,
    new_parser,
    parse,
    parse_settings,
    read_yaml,
)
from d2v_fast.encoders import Encoder, blocks
from d2v_fast.model import Data2Vec, Data2VecOutput

log = logging.getLogger(__name__)

NAMES = tuple(name for name in MODALITIES if name != "custom")  # names of parts are their modalities
WHOLE = ("optimizer", "schedule", "train", "collapse")  # sections of the whole run; the others belong to a part
# Names of the linear maps and norms in blocks that compute the same, in the same order.
LAYOUTS: dict[Any, tuple[str, ...]] = {
    blocks.bert: (
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    blocks.wave: (
        *(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
        *("layer_norm", "feed_forward.intermediate_dense", "feed_forward.output_dense", "final_layer_norm"),
    ),
}
SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")  # fields that must agree


def share_blocks(first: Encoder, other: Encoder) -> None:
    """Make the blocks of `other` use the parameters of `first`. Dropout and the eps of norms are not shared.

    Raises:
        ConfigError: The blocks do not compute the same. The caller adds the name of the part to the message.
    """
    modules = {name for name, _ in other.blocks[0].named_modules()}
    if not modules.issuperset(LAYOUTS.get(other.halves, ("nothing",))):
        raise ConfigError(
            f"encoder: the blocks of {type(other.model).__name__} cannot be shared: their type is unknown, or their norms do "
            "not follow the residuals; use data2vec2-vision, data2vec2-audio, roberta or a similar model"
        )
    for key in SAME:
        expected, found = getattr(first.model.config, key), getattr(other.model.config, key)
        if found != expected:
            raise ConfigError(f"encoder.config.{key}: found {found}, expected {expected}, as in the first part")
    for ours, theirs in zip(first.blocks, other.blocks, strict=True):
        for mine, its in zip(LAYOUTS[first.halves], LAYOUTS[other.halves], strict=True):
            source, target = ours.get_submodule(mine), theirs.get_submodule(its)
            target.weight, target.bias = source.weight, source.bias


class Several(nn.ModuleDict):
    """The parts by name, each with a student, a teacher and a decoder, around the blocks of the first part.

    Args:
        parts: data2vec 2.0 models; the block parameters of all but the first are replaced.

    Raises:
        ConfigError: Blocks that cannot be shared.
    """

    def __init__(self, parts: Mapping[str, Data2Vec]):
        super().__init__(parts)
        first: Any = next(iter(self.values()))
        part: Any
        for name, part in self.items():  # the first too, to check it
            try:
                share_blocks(first.student, part.student)
                share_blocks(first.teacher.module, part.teacher.module)
            except ConfigError as error:
                raise ConfigError(f"several.parts.{name}: {error}") from error

    def forward(self, part: str, **batch: Any) -> Data2VecOutput:
        """A pass of one part; `batch` as `Data2Vec.forward` takes it."""
        return self[part](**batch)


@dataclass(frozen=True)
class SeveralConfig:
    """Config of a run of several parts. Each config in `parts` is complete and includes the sections of the run."""

    parts: dict[str, Config]
    shares: dict[str, float]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    collapse: CollapseConfig
    yaml: str = ""
    name: str = "several"
    resume: bool | Literal["auto"] = False
    resume_allow: list[str] = field(default_factory=list)
    modality = "several"

    def settings(self) -> dict[str, Any]:
        """All settings by their dotted keys."""
        values = {f"{section}.{key}": value for section in WHOLE for key, value in vars(getattr(self, section)).items()}
        values |= {f"several.shares.{name}": share for name, share in self.shares.items()}
        for name, part in self.parts.items():
            own = {key: value for key, value in part.settings().items() if key.partition(".")[0] not in WHOLE}
            values |= {f"several.parts.{name}.{key}": value for key, value in own.items()}
        return values

    def defaults(self) -> dict[str, Any]:
        """Default values by the dotted keys of `settings`."""
        parts = {f"several.parts.{name}.{k}": v for name, part in self.parts.items() for k, v in part.defaults().items()}
        first = next(iter(self.parts.values())).defaults()
        return parts | {key: value for key, value in first.items() if key.partition(".")[0] in WHOLE}


def configure(
    settings: dict[str, Any], arguments: list[str], name: str, resume: bool | Literal["auto"], resume_allow: list[str]
) -> tuple[SeveralConfig, bool, list[str]]:
    """The config of a run of several parts, whether --fused was given, and all valid settings.

    Args:
        settings: Settings from presets and files.
        arguments: Command-line arguments, `--key=value`.
        name: Name of a run without train.output.
        resume: Whether to resume a run.
        resume_allow: Settings that may change on resume.

    Raises:
        ConfigError: An invalid key or value.
    """
    settings = dict(settings)
    given = settings.pop("several", {})
    if not isinstance(given, dict) or given.keys() - {"parts", "shares"} or not isinstance(given.get("parts", {}), dict):
        raise ConfigError(f"several: found {given}, expected parts, a mapping of {', '.join(NAMES)} to presets, and shares")
    parts, changes, rest = dict(given.get("parts", {})), dict[str, list[tuple[str, str]]](), []
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        part, _, setting = key.removeprefix("several.parts.").partition(".")
        if not key.startswith("several.parts."):
            rest.append(argument)
        elif setting:
            changes.setdefault(part, []).append((setting, value))
        else:
            parts[part] = value
    asks = [argument for argument in rest if argument.startswith("--print_config")]
    shows_help = {"-h", "--help"} & set(rest)
    if not shows_help:
        _check_parts(parts, changes)
    shares = given.get("shares")
    if shares is None:
        shares = dict.fromkeys(parts, 1 / max(1, len(parts)))

    overrides = {a[2:].partition("=")[0]: a.partition("=")[2] for a in rest if "=" in a}
    if "several.parts" in overrides:
        raise ConfigError(f"several.parts: found {overrides['several.parts']}; set each part, several.parts.NAME=PRESET")
    parser = new_parser("several", ("several",), WHOLE)
    parser.add_argument("--several.parts", type=dict[str, Any], help="A preset, file or settings for each modality.")
    parser.add_argument("--several.shares", type=dict[str, float], help="Share of steps per modality; default is equal.")
    known = [action.dest for action in parser._actions]
    for key in [*_flat(settings), *overrides]:
        if key not in known and not key.startswith(("optimizer.lr_scale.", "several.shares.")):
            where = f"; it belongs to a part, several.parts.{next(iter(parts), 'vision')}.{key}"
            hint = where if key.partition(".")[0] in GROUPS.difference(WHOLE) else nearest(key, known)
            raise ConfigError(f"{key}: no such setting of a run of several modalities{hint}")
    whole = settings | {"several": {"shares": shares}}
    try:
        namespace = parse_settings(parser, whole, [a for a in rest if a not in asks], _flat(settings) | overrides)
    except ConfigError as error:
        remedy = f"; {_remedy(dict.fromkeys(parts, 1))}" if str(error).startswith("several.shares") else ""
        raise ConfigError(f"{error}{remedy}") from None
    values = namespace.as_dict()
    shares = values["several"]["shares"]
    _check_shares(shares, parts)
    shares = {part: shares[part] for part in parts}
    sections = {section: in_section(section, SECTIONS[section], **values[section]) for section in WHOLE}
    if sections["train"].epochs is not None:
        raise ConfigError("train.epochs: several data sets have no epoch in common; expected train.steps")
    inner = {section: vars(value) for section, value in sections.items()}
    inner["train"] = inner["train"] | {"output": None}
    configs = {}
    for part, base in parts.items():
        try:
            configs[part] = _part(part, base, inner, changes.get(part, []))
        except ConfigError as error:
            whose = "" if str(error).partition(".")[0] in WHOLE else f"several.parts.{part}: "
            raise ConfigError(f"{whose}{error}") from error
    resolved = {part: load_yaml(config.yaml) for part, config in configs.items()}
    namespace.several.parts = {
        part: {key: value for key, value in found.items() if key in GROUPS.difference(WHOLE)} | {"modality": part}
        for part, found in resolved.items()
    }
    yaml = parser.dump(namespace, skip_unset=False)
    if asks:
        print(yaml)
        sys.exit()
    config = SeveralConfig(
        parts={part: replace(config, resume=resume, resume_allow=resume_allow) for part, config in configs.items()},
        shares=shares,
        **sections,
        yaml=yaml,
        name=name or "several",
        resume=resume,
        resume_allow=resume_allow,
    )
    return config, values["fused"], [*known, *config.settings()]


def _check_parts(parts: dict[str, Any], changes: dict[str, list]) -> None:
    for name in [*parts, *changes]:
        if name not in NAMES:
            raise ConfigError(f"several.parts.{name}: no such part; expected {', '.join(NAMES)}{nearest(name, NAMES)}")
    for name, settings in changes.items():
        if name not in parts:
            raise ConfigError(
                f"several.parts.{name}.{settings[0][0]}: the run has no such part; found {', '.join(parts) or 'none'}; "
                f"several.parts.{name}=PRESET adds it"
            )
        for setting, value in settings:
            if setting.partition(".")[0] in WHOLE:
                raise ConfigError(f"several.parts.{name}.{setting}: belongs to the whole run; set {setting}={value}")
    if len(parts) < 2:
        raise ConfigError(
            f"several.parts: found {', '.join(parts) or 'none'}, expected two or more of {', '.join(NAMES)}; one modality is "
            "an ordinary run, d2v-train --config PRESET"
        )


def _check_shares(shares: dict[str, float], parts: dict[str, Any]) -> None:
    found = f"several.shares: found {', '.join(f'{name} {share:g}' for name, share in shares.items()) or 'none'}"
    for name in sorted(shares.keys() - parts.keys()):
        raise ConfigError(f"{found}, but {name} is no part of the run; leave it out, or add several.parts.{name}=PRESET")
    for name in sorted(parts.keys() - shares.keys()):
        raise ConfigError(f"{found}, but {name} has no share; {_remedy(dict.fromkeys(parts, 1))}")
    if not all(0 < share < math.inf for share in shares.values()):
        raise ConfigError(f"{found}, expected numbers above 0; leave out what is not to be trained")
    total = sum(shares.values())
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise ConfigError(f"{found}, which sum to {total:g}, expected 1; {_remedy(shares)}")


def _remedy(shares: Mapping[str, float]) -> str:
    """Settings with the proportions of `shares` that sum to 1."""
    right = {name: round(share / sum(shares.values()), 4) for name, share in shares.items()}
    last = list(right)[-1]
    right[last] = round(1 - sum(right.values()) + right[last], 4)
    return "set " + " ".join(f"several.shares.{name}={share:g}" for name, share in right.items())


def _part(name: str, base: Any, whole: dict[str, Any], changes: list[tuple[str, str]]) -> Config:
    """An ordinary config: a preset, a file or settings, among them `config` for those below, with the sections of the run."""
    layers = [read_yaml(base)] if isinstance(base, str) else [check_layer(base, "")]
    if (below := layers[0].pop("config", None)) is not None:
        layers.insert(0, read_yaml(str(below)))
    config, _ = parse([f"{key}={value}" for key, value in changes], [*layers, whole])
    if config.modality != name:
        raise ConfigError(f"modality: found {config.modality}, expected {name}; parts are named after their modality")
    if config.head.kind != "conv":
        raise ConfigError(
            f"head.kind: found {config.head.kind}, expected conv; several modalities need data2vec 2.0, such as {name}/tiny-2"
        )
    return config
