"""The loop: data → step → log, until a student in Hugging Face format is left.

One optimizer step = `accumulate` micro-batches on each of R ranks. Their loss is divided by the masked positions of all of
them together, so that each counts the same wherever it was (spec 1.4); then clip, optimizer, schedule, teacher, in this order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2v_fast.checkpoint import Checkpoint, CheckpointError, Checkpoints, Tensors, sync, write_text
from d2v_fast.config import DEFAULTS, FREE, MODALITIES, Config, ConfigError, OptimizerConfig, ScheduleConfig, data_class
from d2v_fast.data import Batch, DataError, EpochBatches, PretrainingData, first_line, make_loader
from d2v_fast.data.own import blamed, check_batch, check_class
from d2v_fast.decoders import ConvDecoder
from d2v_fast.diagnostics import CollapseError, Monitor, distinct_share, environment
from d2v_fast.encoders import Encoder, build_encoder, describe
from d2v_fast.fused import fuse
from d2v_fast.graphs import Graphs
from d2v_fast.model import Data2Vec
from d2v_fast.report import read_lines

log = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code of a run that was asked to stop and can be resumed
EMPTY = 100  # batches in a row without anything to score, after which the mask is to blame; of short samples one happens
TOKENIZER = "tokenizer"  # folder of one that was trained for the run
HEAD, TEACHER = "head.safetensors", "teacher.safetensors"  # beside the encoder of a checkpoint of another project
STEP = "step.json"  # in export/: the step its weights are from
PROGRESS = (
    "loss {loss:.4f}  target std {target_std:.3f}  prediction std {prediction_std:.3f}  "
    "{samples_per_s:.1f} samples/s  data wait {data_wait:.0%}"
)
SUMMARY = (
    "step {step}: loss {loss:.4f}, target std {target_std:.3f}, prediction std {prediction_std:.3f}, "
    "feature std {feature_std:.3f}; student in {folder}"
)


def make_data(config: Config) -> PretrainingData:
    """The data set that the config describes; a tokenizer that its run has trained already stays as it is.

    Raises:
        ConfigError: Settings that do not fit each other.
        DataError: Data that cannot be used, or a class of one's own that leaves something out.
    """
    data, trained = dict(config.data), Path(config.train.output or "", TOKENIZER)
    own = data.pop("class")
    learns_tokens = data.get("tokenizer") == "train" and not config.own_data
    if config.resume and learns_tokens and trained.exists():
        data["tokenizer"] = str(trained)
    elif learns_tokens and config.encoder.pretrained:
        raise ConfigError(
            f"data.tokenizer=train: makes a new vocabulary, but encoder.pretrained={config.encoder.pretrained} has learned "
            "another one; leave data.tokenizer out, or name the tokenizer that the encoder was trained with"
        )
    if config.modality == "text" and not config.own_data:
        data["max_broken"] = config.train.max_broken
    cls = data_class(config.modality, own)
    with blamed(own, cls, "cannot be made"):
        made = cls(mask=config.mask, seed=config.train.seed, **data)
    if own:
        check_class(own, made)
    return made


def make_encoder(config: Config, tokens: dict[str, int] | None = None) -> Encoder:
    """The student's encoder; the same weights for the same train.seed.

    Args:
        config: Its settings.
        tokens: Of text, the size of the vocabulary and the ids of special tokens, by the fields that are left to them if open.

    Raises:
        ConfigError: An encoder without a vocabulary for text, or of another modality.
    """
    from transformers import CONFIG_MAPPING

    fields, name = dict(config.encoder.config), config.encoder.model
    if tokens and config.encoder.pretrained is None and name in CONFIG_MAPPING:
        known = CONFIG_MAPPING[name]()
        if not hasattr(known, "vocab_size"):
            raise ConfigError(f"encoder.model={name}: has no vocabulary, so it cannot read text; roberta and bert do")
        fields = {field: value for field, value in tokens.items() if hasattr(known, field)} | fields
    torch.manual_seed(config.train.seed)
    settings = {k: v for k, v in vars(config.encoder).items() if k != "config"}
    encoder = build_encoder(config=fields, **settings)
    if config.modality != "custom" and encoder.reads not in (None, *MODALITIES[config.modality].reads):
        setting = "model" if config.encoder.pretrained is None else "pretrained"
        raise ConfigError(
            f"encoder.{setting}={getattr(config.encoder, setting)}: {type(encoder.model).__name__} does not read what "
            f"modality={config.modality} gives; take an encoder of this modality, or another modality with its data"
        )
    return encoder


def make_model(config: Config, encoder: Encoder, axes: int | None = None) -> Data2Vec:
    """Student, teacher and head.

    Args:
        config: Its settings.
        encoder: The student's.
        axes: Of the grid of positions; by default those of the modality.

    Raises:
        ConfigError: head.pretrained holds no head, or another one.
    """
    head, decoder = vars(config.head).copy(), None
    kind, layers, zero_init, _ = (head.pop(name) for name in ("kind", "layers", "zero_init", "pretrained"))
    if kind == "conv":
        axes = axes or MODALITIES[config.modality].axes
        try:
            decoder = ConvDecoder(encoder.hidden_size, axes, layers=layers, zero_init=zero_init, **head)
        except ValueError as error:
            raise ConfigError(f"head.{error}") from error
    loss = {name: value for name, value in vars(config.loss).items() if name != "reduction"}
    model = Data2Vec(
        encoder,
        **vars(config.targets),
        **loss,
        head_layers=layers,
        head_zero_init=zero_init,
        decoder=decoder,
        **{f"ema_{name}": value for name, value in vars(config.ema).items()},
    )
    if not config.resume:  # else a checkpoint has them
        _go_on(model, config)
    return model


def _go_on(model: Data2Vec, config: Config) -> None:
    """Take over the head and the teacher that lie beside pretrained weights, as d2v-export leaves them.

    Raises:
        ConfigError: head.pretrained has no head that fits, or a teacher is of another encoder.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    encoder = config.encoder.pretrained and Path(config.encoder.pretrained).expanduser()
    asked, made = config.head.pretrained is not None, {}
    file = (Path(config.head.pretrained).expanduser() if asked else encoder or Path()) / HEAD
    if asked or (encoder and file.is_file()):
        try:
            with safe_open(file, "pt") as opened:
                made = {name: value for name, value in (opened.metadata() or {}).items() if hasattr(config.head, name)}
            # The weights do not tell whether there are residuals.
            if made.get("residual", str(config.head.residual)) != str(config.head.residual):
                raise RuntimeError(f"head.residual: found {config.head.residual}, expected {made['residual']}")
            model.head.load_state_dict(load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            told = "; made with:" + "".join(f" head.{name}={value}" for name, value in sorted(made.items())) if made else ""
            if asked:
                raise ConfigError(f"head.pretrained={config.head.pretrained}: {_first(error)}{told}") from error
            log.warning("%s: is not of this head, which starts at random%s (%s)", file, told, _first(error))
        else:
            log.info("head from %s", file)
    elif encoder and model.sparse:
        log.warning("encoder.pretrained=%s: has no %s, so the decoder starts at random", config.encoder.pretrained, HEAD)
    if encoder and (encoder / TEACHER).is_file():
        try:
            model.teacher.module.model.load_state_dict(load_file(encoder / TEACHER))
        except (RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"{encoder / TEACHER}: {_first(error)}; remove it, and the teacher starts as a copy of the student"
            ) from error
        log.info("teacher from %s; ema.start is where its decay goes on", encoder / TEACHER)
    elif asked or (encoder and model.sparse):
        log.warning("student and head go on from what they were; the teacher, not saved, is a copy of the student")


def _first(error: Exception) -> str:
    """An error in one line; of the weights that do not fit, it names the first."""
    return " ".join(line.strip().rstrip(".") for line in str(error).splitlines()[:2])


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW with vectors free of weight decay and learning rates scaled by name (spec 4.8); `fused` = one pass per tensor."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    unused = set(config.lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A vector with broadcast dimensions, such as a mask token of shape (1, 1, C), is still a vector.
        vector = sum(size > 1 for size in parameter.shape) < 2 or name.endswith(".bias")
        decay = 0.0 if vector and not config.decay_1d else config.weight_decay
        matching = [pattern for pattern in config.lr_scale if fnmatchcase(name, pattern)]
        unused -= set(matching)
        scale = math.prod(config.lr_scale[pattern] for pattern in matching)
        groups.setdefault((decay, scale), []).append(parameter)
    if unused:
        raise ConfigError(f"optimizer.lr_scale: {sorted(unused)} match no parameter, such as {name}")
    # The schedule of a run that goes on looks for the initial_lr.
    rates = {s: {"lr": config.lr * s, "initial_lr": config.lr * s} for _, s in groups}
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": d, **rates[s]} for (d, s), p in groups.items()],
        betas=tuple(config.betas),
        eps=config.eps,
        fused=fused or None,
    )


def warmup_steps(steps: int, config: ScheduleConfig) -> float:
    """Steps until the learning rate is at its peak."""
    return config.warmup if config.warmup >= 1 else config.warmup * steps


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate of step 0, 1, … as a share of the peak (spec 5.1)."""
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.initial + (1 - config.initial) * (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "tri_stage":
        begin = warmup + config.hold * steps
        progress = max(0.0, step - begin) / max(1.0, steps - begin)
        return config.final ** min(1.0, progress) if config.final > 0 else 1.0 - min(1.0, progress)
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    shape = 1 - progress if config.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final + (1 - config.final) * shape


class BrokenSamples:
    """Names each sample that could not be read once, and stops the run when they are too many."""

    def __init__(self, total: int, limit: float):
        self.total, self.limit = total, limit
        self.seen: dict[int, str] = {}

    def note(self, broken: list[tuple[int, str]]) -> None:
        for index, message in broken:
            if index not in self.seen:
                self.seen[index] = message
                log.warning("skipped an unreadable sample: %s", message)
        self.judge(self.seen)

    def judge(self, seen: dict[int, str]) -> None:
        """Raise DataError if those seen, here or on all ranks, are too many."""
        if len(seen) > self.limit * self.total or len(seen) == self.total:
            first = "\n  ".join(list(seen.values())[:5])
            raise DataError(
                f"{len(seen)} of {self.total} samples cannot be read, more than train.max_broken={self.limit}:\n  {first}"
            )


class RunLog:
    """log.jsonl and, if it is installed, TensorBoard; nothing without a folder.

    Args:
        folder: The run's.
        step: Last step of the checkpoint that the run goes on from; what was logged of later ones is cut.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self.folder, self.step, self.board = folder, step, None

    def __enter__(self) -> RunLog:
        if self.folder is not None:
            file = self.folder / "log.jsonl"
            if self.step:
                for each in (file, self.folder / "alarms.jsonl"):
                    if each.exists():
                        write_text(
                            each, "".join(f"{json.dumps(line)}\n" for line in read_lines(each) if line["step"] <= self.step)
                        )
            self.file = file.open("a", buffering=1, encoding="utf-8")
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1 if self.step else None)
            except Exception as error:  # it is optional, and has errors of its own, as for folders that are not UTF-8
                remedy = "; pip install tensorboard" if isinstance(error, ImportError) else ""
                log.info("curves are in log.jsonl alone: %s%s", error, remedy)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.folder is not None:
            with disk_may_fail("log.jsonl"):
                self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, record: dict[str, float]) -> None:
        if self.folder is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
            with disk_may_fail("log.jsonl"):  # what could not be written stays in the buffer and comes with the next line
                self.file.write(json.dumps(finite) + "\n")
        if self.board is not None:
            board, self.board = self.board, None  # one that failed once fails for ever
            with disk_may_fail("more for tensorboard"):
                for name in record.keys() - {"step", "time"}:
                    board.add_scalar(name, record[name], record["step"])
                self.board = board


@contextmanager
def disk_may_fail(what: str) -> Iterator[None]:
    """A disk that is full costs what is to be written and not the run."""
    try:
        yield
    except OSError as error:
        log.error("%s could not be written, training goes on: %s", what, error)


class Screen:
    """stderr for the progress bar: one that is gone or full costs the bar and not the run."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Window:
    """What happened since the last line of the log."""

    def __init__(
        self,
        device: torch.device,
        loss: float = 0.0,
        steps: int = 0,
        samples: int = 0,
        waited: float = 0.0,
        seconds: float = 0.0,
        cls_loss: float = 0.0,
    ):
        # Summed on the device, so that nobody waits for them.
        self.loss, self.cls_loss = (torch.full((), value, device=device) for value in (loss, cls_loss))
        self.steps, self.samples, self.seconds_waited = steps, samples, waited
        self.start = time.perf_counter() - seconds

    def state(self) -> dict[str, float]:
        """The arguments that make it again, in a run that goes on."""
        return {
            "loss": float(self.loss),
            "cls_loss": float(self.cls_loss),
            "steps": self.steps,
            "samples": self.samples,
            "waited": self.seconds_waited,
            "seconds": time.perf_counter() - self.start,
        }

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - begin

    def add(self, loss: Tensor | None, samples: int, cls_loss: Tensor | float = 0.0) -> None:
        """Count a step; its loss is None if it was skipped, and holds `cls_loss`."""
        if loss is not None:
            self.loss += loss
            self.cls_loss += cls_loss
            self.steps += 1
        self.samples += samples


def in_main_thread() -> bool:
    """Whether this thread may set signal handlers: that of a notebook server or of Ray may not."""
    return threading.current_thread() is threading.main_thread()


class StopRequest:
    """SIGTERM, Ctrl-C and a closed terminal end the run after the current step, with a checkpoint; the second one at once."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not known everywhere
    ECHO = 1.0  # seconds in which torchrun passes on to its ranks the Ctrl-C that the terminal has sent them already

    def __enter__(self) -> StopRequest:
        self.asked = False
        self.before = {}
        if not in_main_thread():
            log.warning("not in the main thread: SIGTERM and Ctrl-C do not save the run, only train.save_every does")
            return self
        for name in filter(signal.__dict__.get, self.SIGNALS):
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup lets it outlive its terminal
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.since = True, now
        elif now - self.since > self.ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def without_accelerate_variables() -> Iterator[dict[str, str]]:
    """Hide the variables that accelerate reads its settings from, so that a run depends on its config alone; yields them.

    Raises:
        ConfigError: One asks for FSDP, DeepSpeed or the like.
    """
    hidden = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    for name, value in hidden.items():
        off = value.lower() in ("", "0", "n", "no", "f", "false", "off")
        if name.startswith("ACCELERATE_USE_") and name != "ACCELERATE_USE_CPU" and not off:
            raise ConfigError(
                f"{name}={value}: d2v-train has data parallelism only; unset it and start the ranks with torchrun"
            )
    for name in hidden:
        del os.environ[name]
    try:
        yield hidden
    finally:
        os.environ.update(hidden)


def check_device(wanted: str) -> None:
    """Raise ConfigError unless torch finds the device that train.device asks for."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if wanted not in ("auto", "cpu", found and found.type):
        raise ConfigError(
            f"train.device={wanted}: torch {torch.__version__} finds {found.type if found else 'no GPU'}; d2v-doctor may say "
            "why, train.device=auto takes what there is"
        )


def new_folder(name: str) -> Path:
    """Make a folder in runs/ for a run without train.output. Several that start in the same second get one each."""
    base = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        folder = Path(base + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(folder, error) from error
        return folder


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"train.output={folder}: cannot be written, choose another folder: {error}")


def first_batch(data: PretrainingData) -> Batch | None:
    """Two samples, or the one that can be read, with something to score; None without, and the first step says why."""
    batches = (data.__getitems__([(0, i) for i in range(at, min(at + 2, len(data)))]) for at in range(0, len(data), 2))
    return next((batch for batch in itertools.islice(batches, EMPTY) if len(batch.get("index", ()))), None)


def freeze_unused(core: Data2Vec, data: PretrainingData) -> list[str]:
    """Freeze the parameters that no gradient reaches, which several ranks would not accept; returns their names.

    An example is the positional convolution of Wav2Vec2-Conformer, which has positions of another kind.
    """
    batch = first_batch(data)
    if batch is None:
        return []
    device = next(core.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    parameters = {name: p for name, p in core.named_parameters() if p.requires_grad}
    core.eval()  # layer-drop would skip some that are used
    gradients = torch.autograd.grad(core(**batch).loss, list(parameters.values()), allow_unused=True)
    core.train()
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    return unused


class Trainer:
    """A run from its config.

    Args:
        config: What to train, on what, how.
        fused: Put the fast parts in, `d2v_fast.fused`.

    Raises:
        ConfigError: Settings that do not fit each other.
        DataError: Data that cannot be used.
        CheckpointError: `config.resume`, and no checkpoint that this run could go on from.
    """

    def __init__(self, config: Config, fused: bool = False):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
        from filelock import FileLock

        self.config = config
        check_device(config.train.device)
        AcceleratorState._reset_state()  # else a second run in this process could not have another precision
        parallel = DistributedDataParallelKwargs()
        with without_accelerate_variables() as hidden:
            self.accelerator = Accelerator(
                mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
                # Without an accelerator too: only then it joins the ranks that torchrun starts.
                cpu=config.train.device == "cpu" or not torch.accelerator.is_available(),
                kwargs_handlers=[parallel],
            )
        if config.train.threads:  # after accelerate, which may set them too
            torch.set_num_threads(config.train.threads)
        self.world, self.device = self.accelerator.num_processes, self.accelerator.device
        if hidden and self.accelerator.is_main_process:
            names = ", ".join(f"{name}={value}" for name, value in hidden.items())
            log.warning("%s: ignored, a run takes its settings from its config alone", names)
        self.done = 0
        self.made = config.train.output is None and self.accelerator.is_main_process
        if self.made:
            config.train.output = str(new_folder(config.name))
        config.train.output = broadcast_object_list([config.train.output])[0]
        self.folder = Path(config.train.output)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.train.keep_last)
        settings = {"modality": config.modality, "fused": fused, "processes": self.world, **config.settings()}
        self.settings = json.loads(json.dumps(settings, default=str))
        # A process that is killed lets go of it. One for all trainers of a process: one never run would keep it from the next.
        self.lock = FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
        self._enter()
        try:
            self._make(fused, parallel)
        except BaseException:
            self._leave()
            raise

    def _enter(self) -> None:
        """Take the folder until the run ends, so that what is found there now stays."""
        if not self.accelerator.is_main_process or (self.config.resume and not self.folder.exists()):
            return
        from filelock import Timeout

        try:
            self.made = self.made or not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except Timeout:
            raise ConfigError(f"train.output={self.folder}: another d2v-train is at work there; wait for its end") from None
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        has_checkpoints = (self.folder / "checkpoints").exists()
        if not self.config.resume and (has_checkpoints or read_lines(self.folder / "log.jsonl")):
            self.lock.release()
            goes_on = "--resume goes on with it" if has_checkpoints else "it has no checkpoint to go on from; remove it"
            raise ConfigError(f"train.output={self.folder}: holds a run already; {goes_on}, another folder starts a new one")

    def _leave(self) -> None:
        """Give the folder back; one that was made for a run that did not come to a step is removed, unless alarms say why."""
        if self.made and not self.done and not (self.folder / "alarms.jsonl").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release(force=True)  # for trainers that were never run too

    def _make(self, fused: bool, parallel: Any) -> None:
        """Data, model and what trains it, new or as the newest checkpoint has them."""
        from accelerate.utils import set_seed

        config = self.config
        saved, start = self._newest() if config.resume else None, 0
        if saved:
            saved.compare("settings", self.settings, (*FREE, *config.resume_allow, *self._since(saved)))
            with saved.reading():
                start = int(saved.state["ranks"][self.accelerator.process_index]["batches"])
        self.done = self.saved = saved.step if saved else 0  # steps, now and at the newest checkpoint
        with self.accelerator.main_process_first():  # the others find what it has cached
            self.data = make_data(config)
        encoder = make_encoder(config, None if config.own_data else getattr(self.data, "tokens", None))
        own = config.data["class"]
        with blamed(own, type(self.data), "fit_to or contents fails"):
            self.data.fit_to(encoder)
            names, digests = self.data.contents()
        self.digests = torch.from_numpy(digests.copy())
        content = hashlib.sha256(digests.tobytes()).hexdigest()
        self.samples = {"samples": {"number": len(self.data), "content": content}}
        if saved:
            self._compare_samples(saved, names)
        shown = self._try_collate(own, encoder) if own else ""
        self.core = make_model(config, encoder, self.data.axes)
        if self.world > 1 or own:  # data of one's own are tried before the first step
            self.core.to(self.device)
            with self.accelerator.autocast(), blamed(own, type(self.data), f"the model does not take its batch, {shown}"):
                unused = freeze_unused(self.core, self.data)
            if unused and self.accelerator.is_main_process:
                log.info("frozen, as no gradient reaches them: %s", ", ".join(unused))
        self.fused = fuse(self.core, self.device) if fused else []
        batches = EpochBatches(
            len(self.data),
            config.train.batch_size,
            config.train.seed,
            self.accelerator.process_index,
            self.world,
            self.data.lengths,
            getattr(self.data, "max_batch_length", None),
            start=start,
        )
        self.batches = self.taken = batches.start  # trained on, and taken from the loader
        steps_per_epoch = len(batches.epoch(0)) / config.train.accumulate
        self.steps = config.train.steps
        if config.train.epochs is not None:
            self.steps = max(1, round(config.train.epochs * steps_per_epoch))
        self.loader = make_loader(self.data, batches, config.train.workers, pin_memory=self.device.type == "cuda")
        self.optimizer = make_optimizer(self.core, config.optimizer, fused)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, self.steps, config.schedule), last_epoch=self.done - 1
        )
        # A layer that layer-drop skips on one rank has no gradient there.
        parallel.find_unused_parameters = getattr(getattr(encoder.model, "config", None), "layerdrop", 0) > 0
        self.model, self.optimizer = self.accelerator.prepare(self.core, self.optimizer)
        self.graphs = self._make_graphs()
        # Dropout differs between ranks. What numpy takes has 32 bits.
        set_seed((config.train.seed + self.accelerator.process_index) % 2**32)
        self.broken = BrokenSamples(len(self.data), config.train.max_broken)
        self.window = Window(self.device)
        self.skipped = 0
        self.cls_loss = torch.zeros((), device=self.device)
        self.suspects: list[dict[str, Any]] = []  # the steps skipped last, one after the other
        folder = self.folder if self.accelerator.is_main_process else None
        warmup, optimizer = warmup_steps(self.steps, config.schedule), self.optimizer.optimizer
        self.monitor = Monitor(self.core, optimizer, config.collapse, self.steps, warmup, self.accelerator, folder)
        self.changed = bool(saved) and saved.state["settings"] != self.settings
        if saved:
            with saved.reading():
                self._restore(saved)

    def _try_collate(self, own: str, encoder: Encoder) -> str:
        """What a batch of a class of one's own holds, in words, once it is known to be one."""
        if self.data.grid is not None:
            self.data.check_mask()
        with blamed(own, type(self.data), "collate fails on its first samples"):
            batch = first_batch(self.data)
        if batch is None:  # the first step says why
            return ""
        check_batch(own, self.data, batch, encoder, self.config.head.kind == "conv")
        return ", ".join(f"{key} {each.dtype} {tuple(each.shape)}" for key, each in batch.items() if isinstance(each, Tensor))

    def run(self) -> int:
        """Train to the end or until asked to stop; returns the exit code."""
        try:
            return self._run()
        finally:
            self._leave()

    def _run(self) -> int:
        from tqdm import tqdm

        main, train = self.accelerator.is_main_process, self.config.train
        if main:
            if not self.changed:
                write_text(self.folder / "config.yaml", self.config.yaml)
            place = self.folder / TOKENIZER
            learns_tokens = self.config.data.get("tokenizer") == "train" and not self.config.own_data
            if learns_tokens and not (self.config.resume and place.exists()):
                beside = place.with_suffix(".tmp")
                for folder in (beside, place):  # of a run that ended before its first step
                    shutil.rmtree(folder, ignore_errors=True)
                self.data.processor(self.core.student).save_pretrained(beside)
                os.replace(beside, place)
            write_text(self.folder / "environment.json", json.dumps(environment(self.folder), indent=1))
            log.info("%s", describe(self.core.student))
            where = f"{train.precision} on {self.device}" + (f" × {self.world}" if self.world > 1 else "")
            log.info("%d samples, %d steps, %s, run in %s", len(self.data), self.steps, where, self.folder)
            if self.fused:
                log.info("fused: %s", ", ".join([*self.fused, "AdamW"]))
            if self.done:
                log.info("goes on after step %d%s", self.done, "; nothing is left to train" * (self.done >= self.steps))
        self.model.train()
        stream, record, stopped, begin = self._batches(), None, False, self.done
        shows_bar = main and sys.stderr.isatty()
        quiet = {} if shows_bar else {"disable": True}  # not False, which would overrule TQDM_DISABLE
        look = dict(unit="step", dynamic_ncols=True, smoothing=0.05, delay=0, file=Screen())
        start = time.perf_counter()
        progress = tqdm(total=self.steps, initial=begin, **look, **quiet)
        try:
            with StopRequest() as stop, RunLog(self.folder if main else None, begin) as run_log, progress as bar:
                self.monitor.judge({"step": begin, "distinct_samples": distinct_share(self.data)})
                while self.done < self.steps:
                    stopped, busy = self._agreed(stop.asked, self.checkpoints.busy)
                    if stopped:
                        break
                    if not busy and train.save_every and self.done // train.save_every > self.saved // train.save_every:
                        self.save()
                    micro_batches = self._take(stream)
                    self.monitor.due = (self.done + 1) % train.log_every == 0 or self.done + 1 in (1, self.steps)
                    loss, grad_norm = self.step(micro_batches)
                    self.done, self.batches = self.done + 1, self.taken
                    samples = sum(len(batch["samples"]) for batch in micro_batches)
                    self.window.add(None if self.suspects else loss, samples, self.cls_loss)
                    bar.update()
                    if self.monitor.due:
                        record = self._record(self.done, micro_batches[-1]["epoch"], self.window, grad_norm)
                        self.window = Window(self.device)
                        run_log.write(record)
                        if shows_bar:
                            bar.set_postfix_str(PROGRESS.format(**record))
                        elif main:  # the log of a batch job would keep every state of the bar
                            seconds = (time.perf_counter() - start) * (self.steps - self.done) / (self.done - begin)
                            left = tqdm.format_interval(seconds)
                            print(f"step {self.done}/{self.steps}, {left} left: {PROGRESS.format(**record)}", file=Screen())
                        self.monitor.judge(record)
                    if len(self.suspects) >= train.max_skipped:
                        self._give_up()
                    if train.export_every and self.done % train.export_every == 0:
                        with disk_may_fail("the export"):
                            self.export()
                    if main and train.save_every and self.done == begin + 1:
                        self.checkpoints.reserve(self._tensors())
                self.save()
                self.checkpoints.wait()
        except (CollapseError, NotFiniteError):  # all ranks at once, after a step
            self.save()
            raise
        except WorkerDied:
            stopped = stop.asked  # whoever asked may have told all processes of the run
            if not stopped:
                raise
        finally:
            stream.close()  # and with it the workers
            self.checkpoints.wait()
            if self.done:  # whatever ended the run, what was learned is kept
                self.export()
        if main and record:
            log.info(SUMMARY.format(folder=self.folder / "export", **record))
        if self.checkpoints.failed:
            raise CheckpointError(f"{self.checkpoints.failed}; the student is in {self.folder / 'export'}")
        if stopped and not self.done:
            log.warning("stopped before the first step; there is nothing to go on from")
        elif stopped:
            log.warning(
                "stopped at step %d of %d; the student so far is in %s; d2v-train --resume %s goes on",
                *(self.done, self.steps, self.folder / "export", self.folder),
            )
        return INTERRUPTED if stopped else 0

    def save(self) -> None:
        """A checkpoint of the steps done: on all ranks at once, and only between two steps."""
        from accelerate.utils import gather_object

        if self.done == self.saved:
            return
        self.saved = self.done
        name, keys, *rest = np.random.get_state()
        rank = {
            "batches": self.batches,  # a rank whose whole batch was unreadable took one more
            "python": random.getstate(),
            "numpy": [name, keys.tolist(), *rest],
            "broken": list(self.broken.seen.items()),
            "window": self.window.state(),
        }
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        ranks = gather_object([(rank, generators)])
        if self.accelerator.is_main_process:
            tensors = self._tensors()
            tensors["samples"] = {"digests": self.digests}
            tensors["rng"] = {f"{i}.{kind}": states[kind] for i, (_, states) in enumerate(ranks) for kind in states}
            scaler = self.accelerator.scaler
            state = {
                "skipped": self.skipped,
                "suspects": self.suspects,
                "monitor": self.monitor.state(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "settings": self.settings,
                "samples": self.samples,
                "ranks": [rank for rank, _ in ranks],
            }
            self.checkpoints.save(self.done, tensors, state)
            if self.changed:  # settings that were allowed to change are the run's once a checkpoint has them
                self.checkpoints.wait()
                if not self.checkpoints.failed:
                    write_text(self.folder / "config.yaml", self.config.yaml)
                    self.changed = False

    def _tensors(self) -> Tensors:
        """What a checkpoint holds of model and optimizer, by file and name."""
        weights, kept = self.core.state_dict(), self.optimizer.state
        return {
            "student": {name: value for name, value in weights.items() if not name.startswith("teacher.")},
            "teacher": {name: value for name, value in weights.items() if name.startswith("teacher.")},
            "optimizer": {
                f"{name}.{key}": value
                for name, parameter in self.core.named_parameters()
                for key, value in kept.get(parameter, {}).items()
            },
        }

    def _since(self, saved: Checkpoint) -> list[str]:
        """Settings that did not exist when the checkpoint was written, and that are as everything was then."""
        with saved.reading():
            known = saved.state["settings"]
        return [key for key, value in self.settings.items() if key not in known and DEFAULTS.get(key, ...) == value]

    def _compare_samples(self, saved: Checkpoint, names: Sequence[str]) -> None:
        """Raise CheckpointError, with the names of those that differ, unless the samples are those of the checkpoint."""
        try:
            saved.compare("samples", self.samples, self.config.resume_allow)
        except CheckpointError as error:
            was = saved.tensors("samples")["digests"]
            if len(was) != len(names):
                raise
            differ = (was != self.digests).nonzero().flatten().tolist()
            first = "".join(f"\n    {names[i]}" for i in differ[:5])
            raise CheckpointError(f"{error}\n  {len(differ)} of {len(names)} changed, among them{first}") from None

    def _newest(self) -> Checkpoint:
        """The checkpoint to go on from; the main process chooses for all."""
        from accelerate.utils import broadcast_object_list

        if self.accelerator.is_main_process:
            try:
                saved = self.checkpoints.newest()
            except CheckpointError as error:
                raise CheckpointError(f"{error}; another train.output without --resume starts a new run") from None
            broadcast_object_list([saved.folder])
            return saved
        return Checkpoint(broadcast_object_list([None])[0])

    def _restore(self, saved: Checkpoint) -> None:
        """Make everything as it was after the step of the checkpoint. The schedules are functions of the step."""
        weights = saved.tensors("student") | saved.tensors("teacher")
        moments = saved.tensors("optimizer")
        parameters = dict(self.core.named_parameters())
        saved.compare_shapes(weights, self.core.state_dict())
        numbers = {p: i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        kept: dict[int, dict[str, Tensor]] = {}
        for name, value in moments.items():
            name, _, key = name.rpartition(".")
            kept.setdefault(numbers[parameters[name]], {})[key] = value
        self.core.load_state_dict(weights)
        self.optimizer.load_state_dict({"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        self.skipped, self.suspects = int(saved.state["skipped"]), list(saved.state["suspects"])
        self.monitor.load_state(saved.state["monitor"])
        number = self.accelerator.process_index
        rank, generators = saved.state["ranks"][number], saved.tensors("rng")
        self.broken.seen = {index: message for index, message in rank["broken"]}
        self.window = Window(self.device, **rank["window"])
        version, keys, gauss = rank["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(rank["numpy"]))
        torch.set_rng_state(generators[f"{number}.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(generators[f"{number}.cuda"], self.device)

    def _record(self, step: int, epoch: int, window: Window, grad_norm: Tensor) -> dict[str, float]:
        """A line of the log; here the device is waited for."""
        from accelerate.utils import gather_object

        broken = {index: message for seen in gather_object([self.broken.seen]) for index, message in seen.items()}
        self.broken.judge(broken)
        losses = self.accelerator.reduce(torch.stack([window.loss, window.cls_loss]), "mean")
        loss, cls_loss = (losses / window.steps).tolist() if window.steps else (math.nan, math.nan)
        seconds = time.perf_counter() - window.start
        return {
            "step": step,
            "loss": loss,
            **({"cls_loss": cls_loss} if self.core.cls_weight else {}),
            **self.monitor.figures(loss - cls_loss),
            "grad_norm": float(grad_norm),
            "lr": self.scheduler.get_last_lr()[0],
            "ema_decay": self.core.teacher.decay(self.core.teacher.step),
            "samples_per_s": window.samples * self.world / seconds,
            "data_wait": window.seconds_waited / seconds,
            "epoch": epoch,
            "skipped_steps": self.skipped,
            "broken_samples": len(broken),
            "time": time.time(),
        }

    def step(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step; loss on this rank's share, and the gradient's norm before clipping.

        `cls_loss` is then the part of the loss that comes from CLS.
        """
        config, last = self.config, len(micro_batches) - 1
        num_targets = None
        if config.loss.reduction == "global":
            # Known on the host; only several ranks have to ask each other.
            num_targets = sum(len(batch["index"]) for batch in micro_batches)
            if self.world > 1:
                counts = torch.full((1,), float(num_targets), device=self.device)  # a copy from the host would wait
                num_targets = self.accelerator.reduce(counts, "sum")[0] / self.world
        loss, self.cls_loss = torch.zeros(2, device=self.device)
        for i, batch in enumerate(micro_batches):
            # Ranks exchange gradients with the last micro-batch only.
            with nullcontext() if i == last else self.accelerator.no_sync(self.model):
                parts = 1 if num_targets is not None else len(micro_batches)
                run = self._pass if self.graphs is None or self.monitor.due else self.graphs
                share, cls_share = run(self._inputs(batch), num_targets, parts)
            loss += share
            self.cls_loss += cls_share
        parameters = [p for p in self.core.parameters() if p.requires_grad]
        grad_norm = self.accelerator.clip_grad_norm_(parameters, config.train.clip_norm or math.inf)
        self.monitor.watch(grad_norm)
        finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        if self.world > 1:  # the gradient is everywhere the same, the loss is each rank's own
            finite = self.accelerator.reduce(finite.float(), "sum") == self.world
        if finite:
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:
                self.core.update_teacher()
            self.suspects = []
        else:
            # Neither weights nor teacher may see it: in an average a NaN stays for ever.
            self.skipped += 1
            self.suspects.append(self._suspect(micro_batches, loss, grad_norm))
            log.warning("step %d skipped: loss or gradient is not finite; %d so far", self.done + 1, self.skipped)
            if self.accelerator.scaler is not None:
                self.optimizer.step()  # lets the scaler lower its factor; it skips the update itself
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def _pass(self, inputs: dict[str, Tensor], num_targets: Tensor | float | None, parts: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of a micro-batch; what it adds to the loss of the step, and the part of it that is CLS."""
        output = self.model(**inputs, num_targets=num_targets)
        share = output.loss / parts
        self.accelerator.backward(share)
        return share.detach(), torch.zeros_like(share) if output.cls_loss is None else output.cls_loss / parts

    def _make_graphs(self) -> Graphs | None:
        """For one process on a GPU whose passes ask the host for nothing, as layer-drop and the model's own forward may."""
        train, student = self.config.train, self.core.student
        alone = self.fused and self.device.type == "cuda" and self.world == 1
        simple = train.accumulate == 1 and self.accelerator.scaler is None and student.halves is not None
        if not (train.graphs and alone and simple) or getattr(student.model.config, "layerdrop", 0) > 0:
            return None
        self.fused.append("CUDA graphs of passes whose shapes come again")
        return Graphs(self._pass, [p for p in self.core.parameters() if p.requires_grad])

    def export(self) -> None:
        """The student in Hugging Face format, with its tokenizer or processor; each file is replaced at once."""
        if self.accelerator.is_main_process:
            beside, place = self.folder / "export.tmp", self.folder / "export"
            shutil.rmtree(beside, ignore_errors=True)
            try:
                self.core.student.save(beside)
                if (processor := self.data.processor(self.core.student)) is not None:
                    processor.save_pretrained(beside)
                write_text(beside / STEP, json.dumps({"step": self.done}))
                place.mkdir(exist_ok=True)
                for file in beside.iterdir():
                    sync(file)
                    os.replace(file, place / file.name)
                beside.rmdir()
            except (OSError, SafetensorError) as error:  # safetensors has one of its own for a disk that is full
                raise OSError("; ".join(filter(None, (f"{place}: {error}", self.checkpoints.failed)))) from error

    def _take(self, stream: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of a step. If there are none to be had, the steps before are saved."""
        try:
            with self.window.waiting():
                return [next(stream) for _ in range(self.config.train.accumulate)]
        except Exception as error:
            if self.world == 1:  # others would not know of it and not come to save
                self.save()
            # What a worker raises says "Caught …"; one that died cannot hand over what it had ready.
            cut_off = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "Caught" not in str(error)
            if (cut_off and self.config.train.workers) or "DataLoader worker (pid" in str(error):
                raise WorkerDied(f"a process that loads data died: {first_line(error)}") from error
            raise

    def _batches(self) -> Iterator[Batch]:
        """Batches with something to score; unreadable samples are noted on the way."""
        try:
            loaded = iter(self.loader)
        except OSError as error:
            raise DataError(
                f"train.workers={self.config.train.workers}: cannot be started: {error}; fewer may do, or in a container more "
                "shared memory: docker run --shm-size=8g"
            ) from error
        # If a worker dies, torch raises from a signal handler, maybe in the midst of a step. Without it the loader raises when
        # the next batch does not come, between two steps, which can be saved.
        if in_main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        empty, piped = 0, False
        for batch in loaded:
            self.taken += 1
            arrays = {name: torch.from_numpy(value) for name, value in batch.items() if isinstance(value, np.ndarray)}
            if arrays and not piped:
                log.warning("/dev/shm is full, so that batches come through a pipe, which is slower: docker run --shm-size=8g")
            batch |= arrays
            piped |= bool(arrays)
            self.broken.note(batch["broken"])
            if not batch["samples"]:
                continue
            empty = 0 if len(batch["index"]) else empty + 1
            if empty == EMPTY:
                raise DataError(
                    f"the mask covers none of the positions of {EMPTY} batches in a row, the last of samples "
                    f"{batch['samples'][:8]}: raise mask.prob or shorten mask.length (mask: {self.config.mask})"
                )
            if not empty:
                yield batch

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}

    def _agreed(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.world == 1:
            return list(flags)
        return (self.accelerator.reduce(torch.tensor(flags, dtype=torch.float, device=self.device), "sum") > 0).tolist()

    def _suspect(self, micro_batches: list[Batch], loss: Tensor, grad_norm: Tensor) -> dict[str, Any]:
        """What to look at after a step that was not finite."""
        return {
            "step": self.done + 1,
            "loss": str(float(loss)),  # JSON has no NaN
            "grad_norm": str(float(grad_norm)),
            "epoch": micro_batches[-1]["epoch"],
            "samples": {i: self.data.sample_name(i) for batch in micro_batches for i in batch["samples"]},
        }

    def _give_up(self) -> None:
        number = f"-rank-{self.accelerator.process_index}" if self.world > 1 else ""
        file = self.folder / f"not-finite-step-{self.done}{number}.json"
        write_text(file, json.dumps({"skipped": self.suspects, "settings": self.settings}, indent=1))
        raise NotFiniteError(
            f"loss or gradient was not finite in {len(self.suspects)} steps in a row, up to step {self.done}: "
            f"{file} names their samples; try a lower optimizer.lr, train.clip_norm, or train.precision=fp32"
        )


class WorkerDied(DataError):
    """A process that loads data has ended."""


class NotFiniteError(RuntimeError):
    """Too many steps in a row were skipped, as loss or gradient was not finite."""


def train(config: Config, fused: bool = False) -> int:
    """Run `config`, with the fast parts or without; returns the exit code of the process."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the one to watch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return Trainer(config, fused).run()
