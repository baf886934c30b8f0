"""Load the encoder of a run from its newest checkpoint or from export/, whichever is newer."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2v_fast.checkpoint import Checkpoint, CheckpointError, Checkpoints
from d2v_fast.config import Config, ConfigError, load_yaml, parse
from d2v_fast.data.text import load_tokenizer, token_fields
from d2v_fast.encoders import Encoder, build_encoder
from d2v_fast.files import CHECKPOINTS, CONFIG, EXPORT, STEP, TOKENIZER
from d2v_fast.train.build import make_encoder

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """The encoder of a run.

    Attributes:
        config: The run's settings; `data.tokenizer` is the tokenizer's current location.
        encoder: Student or teacher, in eval mode, on the CPU.
        tokenizer: For text.
        step: Number of training steps; None if export/ does not record it.
        tokens: For text, the fields of the tokenizer that `make_encoder` needs.
    """

    config: Config
    encoder: Encoder
    tokenizer: Any
    step: int | None
    tokens: dict[str, int] | None

    def untrained(self) -> Encoder:
        """The encoder with the weights that the run started from, in eval mode."""
        return make_encoder(self.config, self.tokens).eval()


def check_utf8(folder: Path) -> None:
    """Raise ConfigError for a path that safetensors and tokenizers do not accept."""
    if str(folder).encode(errors="replace").decode() != str(folder):
        raise ConfigError(f"{str(folder)!r}: is not UTF-8, which weight and tokenizer files require; rename or link it")


def read_config(run: Path) -> Config:
    """The settings of a run.

    Raises:
        ConfigError: `run` is not the folder of a run, or its settings cannot be read.
    """
    check_utf8(run)
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run}: has no {CONFIG}, so it is not the folder of a run")
    config, _ = parse(["--config", str(run / CONFIG)])
    if config.parts:
        raise ConfigError(
            f"{run}: a run of several modalities; name one: {', '.join(str(run / name) for name in config.parts)}"
        )
    return config


def parent_run(run: Path) -> Path | None:
    """The folder of the multi-modality run that `run` is a part of, if any."""
    parent = run.resolve().parent
    try:
        settings = load_yaml((parent / CONFIG).read_text(encoding="utf-8"))
    except Exception:  # the parent need not be a run
        return None
    parts = settings.get("several", {}).get("parts", {}) if isinstance(settings, dict) else {}
    return parent if run.resolve().name in parts else None


def load(config: Config, run: Path, checkpoint: str | None = None, teacher: bool = False) -> Trained:
    """Load the newest intact weights of a run.

    Args:
        config: The run's settings.
        run: Folder of the run.
        checkpoint: Name of the checkpoint to load instead, such as step-1000.
        teacher: Load the teacher's weights.

    Raises:
        ConfigError: The run has no such weights, or they do not fit the encoder that its settings describe.
        CheckpointError: The requested checkpoint is damaged.
    """
    step, saved = _newest(run, checkpoint, teacher)
    weights = saved.tensors("teacher" if teacher else "student") if saved else {}
    tokenizer, tokens = None, None
    if config.is_text:
        kept = [str(run / name) for name in (EXPORT, TOKENIZER) if (run / name / "tokenizer.json").is_file()]
        config = replace(config, data=config.data | {"tokenizer": next(iter(kept), config.data["tokenizer"])})
        if config.data["tokenizer"] == "train":
            raise ConfigError(f"{run}: holds no tokenizer, neither in {TOKENIZER}/ nor in {EXPORT}/")
        tokenizer = load_tokenizer(config.data["tokenizer"])
        size = _vocab_size(weights, run)
        tokens = token_fields(tokenizer, size) if size else None
    if saved is None:
        encoder = _exported(config, run)
    else:
        encoder = make_encoder(config, tokens)
        part = f"{run.resolve().name}." if parent_run(run) else ""
        prefix = f"{part}teacher.module." if teacher else f"{part}student."
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f"{saved.folder}: does not fit the encoder in {CONFIG}: {' '.join(str(error).split())}"
            ) from error
    place = saved.folder if saved else run / EXPORT
    log.info("%s of step %s, from %s", "teacher" if teacher else "student", "unknown" if step is None else step, place)
    return Trained(config, encoder.eval(), tokenizer, step, tokens)


def _newest(run: Path, checkpoint: str | None, teacher: bool) -> tuple[int | None, Checkpoint | None]:
    """The step of the weights to load, and their checkpoint, or None for export/."""
    checkpoints = Checkpoints((parent_run(run) or run) / CHECKPOINTS, keep_last=1)
    steps = checkpoints.steps()
    if checkpoint is not None:
        name = Path(checkpoint).name
        if name not in [f"step-{step}" for step in steps]:
            available = ", ".join(f"step-{step}" for step in steps) or "none"
            raise ConfigError(f"--checkpoint {checkpoint}: not in {checkpoints.folder}; available: {available}")
        named = Checkpoint(checkpoints.folder / name)
        return named.step, named
    exported = not teacher and any((run / EXPORT).glob("*.safetensors"))
    step = _export_step(run) if exported else None
    saved = None
    if steps and (step or 0) < steps[-1]:
        try:
            saved = checkpoints.newest()
        except CheckpointError:  # damaged checkpoints have been logged
            pass
    if exported and (saved is None or (step or 0) >= saved.step):
        return step, None
    if saved is None:
        damaged = f"none of its {len(steps)} checkpoints is intact" if steps else "it has no checkpoint"
        if teacher:
            raise ConfigError(f"--teacher: only checkpoints hold the teacher, and {run}: {damaged}")
        raise ConfigError(f"{run}: {damaged} and no {EXPORT}/, so there are no trained weights")
    return saved.step, saved


def _export_step(run: Path) -> int | None:
    try:
        return int(json.loads((run / EXPORT / STEP).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return None


def _exported(config: Config, run: Path) -> Encoder:
    own = ":" in (config.encoder.model or "")
    settings = vars(config.encoder) | {"pretrained": str(run / EXPORT)}
    return build_encoder(**(settings if own else settings | {"config": {}}))


def _vocab_size(weights: dict[str, Any], run: Path) -> int | None:
    """Rows of the token embedding, which may differ from the tokenizer's size if its ids have gaps."""
    tables = ("word_embeddings.weight", "tok_embeddings.weight", "embed_tokens.weight")
    rows = [len(value) for name, value in weights.items() if name.endswith(tables)]
    if rows:
        return rows[0]
    config = run / EXPORT / "config.json"  # a custom encoder has none and does not need the number
    return json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
