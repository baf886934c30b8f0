"""The loop: data → step → log, until a student in Hugging Face format is left.

One optimizer step = `accumulate` micro-batches on each of R ranks. Their loss is divided by the masked positions of all of
them together, so that each counts the same wherever it was (spec 1.4); then clip, optimizer, schedule, teacher, in this order.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.config import Config, ConfigError, OptimizerConfig, ScheduleConfig, data_class
from d2v_fast.data import Batch, DataError, EpochBatches, PretrainingData, make_loader
from d2v_fast.encoders import Encoder, build_encoder, describe
from d2v_fast.fused import fuse
from d2v_fast.model import Data2Vec, Data2VecOutput
from d2v_fast.ops.reference import Moments

log = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code of a run that was asked to stop
PROGRESS = (
    "loss {loss:.4f}  target std {target_std:.3f}  prediction std {prediction_std:.3f}  "
    "{samples_per_s:.1f} samples/s  data wait {data_wait:.0%}"
)
SUMMARY = (
    "step {step}: loss {loss:.4f}, target std {target_std:.3f}, prediction std {prediction_std:.3f}, "
    "feature std {feature_std:.3f}; student in {folder}"
)


def make_data(config: Config) -> PretrainingData:
    """The data set that the config describes."""
    return data_class(config.modality)(mask=config.mask, seed=config.train.seed, **config.data)


def make_encoder(config: Config, vocab_size: int | None = None) -> Encoder:
    """The student's encoder; the same weights for the same train.seed."""
    fields = dict(config.encoder.config)
    if vocab_size is not None and config.encoder.pretrained is None and ":" not in config.encoder.model:
        fields.setdefault("vocab_size", vocab_size)
    torch.manual_seed(config.train.seed)
    settings = {k: v for k, v in vars(config.encoder).items() if k != "config"}
    return build_encoder(config=fields, **settings)


def make_model(config: Config, encoder: Encoder) -> Data2Vec:
    """Student, teacher and head."""
    return Data2Vec(
        encoder,
        **vars(config.targets),
        beta=config.loss.beta,
        scale=config.loss.scale,
        impl=config.loss.impl,
        head_layers=config.head.layers,
        head_zero_init=config.head.zero_init,
        **{f"ema_{name}": value for name, value in vars(config.ema).items()},
    )


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
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": d, "lr": config.lr * s} for (d, s), p in groups.items()],
        betas=tuple(config.betas),
        eps=config.eps,
        fused=fused or None,
    )


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate of step 0, 1, … as a share of the peak (spec 5.1)."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
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
    """Counts the samples that could not be read, names each once and stops the run when they are too many."""

    def __init__(self, total: int, limit: float):
        self.total, self.limit = total, limit
        self.seen: dict[int, str] = {}

    def note(self, broken: list[tuple[int, str]]) -> None:
        for index, message in broken:
            if index not in self.seen:
                self.seen[index] = message
                log.warning("skipped an unreadable sample: %s", message)
        if len(self.seen) > self.limit * self.total or len(self.seen) == self.total:
            first = "\n  ".join(list(self.seen.values())[:5])
            raise DataError(
                f"{len(self.seen)} of {self.total} samples cannot be read, more than train.max_broken={self.limit}:\n  {first}"
            )


class RunLog:
    """log.jsonl and, if it is installed, TensorBoard; nothing without a folder."""

    def __init__(self, folder: Path | None):
        self.folder, self.board = folder, None

    def __enter__(self) -> RunLog:
        if self.folder is not None:
            self.file = (self.folder / "log.jsonl").open("a", buffering=1)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard"))
            except ImportError:
                pass
        return self

    def __exit__(self, *error: Any) -> None:
        if self.folder is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, record: dict[str, float]) -> None:
        if self.folder is not None:
            self.file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name in record.keys() - {"step", "time"}:
                self.board.add_scalar(name, record[name], record["step"])


class Window:
    """What happened since the last line of the log."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)  # summed on the device, so that nobody waits for it
        self.steps, self.samples, self.seconds_waited = 0, 0, 0.0
        self.start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - begin

    def add(self, loss: Tensor, samples: int) -> None:
        self.loss += loss
        self.steps += 1
        self.samples += samples


class StopRequest:
    """SIGTERM and Ctrl-C end the run at the next step, with its student exported; the second one ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        self.asked = False
        self.before = [signal.signal(number, self._ask) for number in self.SIGNALS]
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)


class Trainer:
    """A run from its config.

    Args:
        config: What to train, on what, how.
        fused: Put the fast parts in, `d2v_fast.fused`.

    Raises:
        ConfigError: Settings that do not fit each other.
        DataError: Data that cannot be used.
    """

    def __init__(self, config: Config, fused: bool = False):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, set_seed

        self.config = config
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.folder = Path(config.train.output)
        if (self.folder / "log.jsonl").exists():
            raise ConfigError(f"train.output={self.folder}: holds a run already; choose another folder")
        AcceleratorState._reset_state()  # else a second run in this process could not have another precision
        parallel = DistributedDataParallelKwargs()
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(config.train.precision, config.train.precision),
            cpu=config.train.device == "cpu",
            kwargs_handlers=[parallel],
        )
        self.world, self.device = self.accelerator.num_processes, self.accelerator.device
        with self.accelerator.main_process_first():  # the others find what it has cached
            self.data = make_data(config)
        vocabulary = getattr(self.data, "vocabulary", None)
        encoder = make_encoder(config, vocabulary and vocabulary.size)
        self.data.fit_to(encoder)
        self.core = make_model(config, encoder)
        self.fused = fuse(self.core, self.device) if fused else []
        batches = EpochBatches(
            len(self.data),
            config.train.batch_size,
            config.train.seed,
            self.accelerator.process_index,
            self.world,
            self.data.lengths,
            getattr(self.data, "max_batch_length", None),
        )
        steps_per_epoch = len(batches.epoch(0)) / config.train.accumulate
        self.steps = config.train.steps
        if config.train.epochs is not None:
            self.steps = max(1, round(config.train.epochs * steps_per_epoch))
        self.loader = make_loader(self.data, batches, config.train.workers, pin_memory=self.device.type == "cuda")
        self.optimizer = make_optimizer(self.core, config.optimizer, fused)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, self.steps, config.schedule)
        )
        # A layer that layer-drop skips on one rank has no gradient there.
        parallel.find_unused_parameters = getattr(getattr(encoder.model, "config", None), "layerdrop", 0) > 0
        self.model, self.optimizer = self.accelerator.prepare(self.core, self.optimizer)
        set_seed(config.train.seed, device_specific=True)  # dropout differs between ranks
        self.broken = BrokenSamples(len(self.data), config.train.max_broken)
        self.skipped = 0

    def run(self) -> int:
        """Train to the end or until asked to stop; returns the exit code."""
        from tqdm import tqdm

        main, train = self.accelerator.is_main_process, self.config.train
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(self.config.yaml)
            log.info("%s", describe(self.core.student))
            place = f"{train.precision} on {self.device}" + (f" × {self.world}" if self.world > 1 else "")
            log.info("%d samples, %d steps, %s, run in %s", len(self.data), self.steps, place, self.folder)
            if self.fused:
                log.info("fused: %s", ", ".join([*self.fused, "AdamW"]))
        self.model.train()
        stream, window, step, record = self._batches(), Window(self.device), 0, None
        quiet = {} if main else {"disable": True}  # not False, which would overrule TQDM_DISABLE
        progress = tqdm(total=self.steps, unit="step", dynamic_ncols=True, smoothing=0.05, delay=0, **quiet)
        try:
            with StopRequest() as stop, RunLog(self.folder if main else None) as run_log, progress as bar:
                while step < self.steps and not self._agreed(stop.asked):
                    with window.waiting():
                        micro_batches = [next(stream) for _ in range(train.accumulate)]
                    loss, outputs, grad_norm = self.step(micro_batches)
                    step += 1
                    window.add(loss, sum(len(batch["samples"]) for batch in micro_batches))
                    bar.update()
                    if step % train.log_every == 0 or step in (1, self.steps):
                        record = self._record(step, micro_batches[-1]["epoch"], window, outputs, grad_norm)
                        window = Window(self.device)
                        run_log.write(record)
                        bar.set_postfix_str(PROGRESS.format(**record))
                        self._judge(record)
                    if train.export_every and step % train.export_every == 0:
                        self.export()
        finally:
            if step:  # whatever ended the run, what was learned is kept
                self.export()
        if main and record:
            log.info(SUMMARY.format(folder=self.folder / "export", **record))
        if step < self.steps:
            log.warning("stopped at step %d of %d; the student so far is in %s", step, self.steps, self.folder / "export")
            return INTERRUPTED
        return 0

    def _record(
        self, step: int, epoch: int, window: Window, outputs: list[Data2VecOutput], grad_norm: Tensor
    ) -> dict[str, float]:
        """A line of the log; here the device is waited for."""
        loss = float(self.accelerator.reduce(window.loss, "mean")) / window.steps
        seconds = time.perf_counter() - window.start
        return {
            "step": step,
            "loss": loss,
            **self._collapse_figures(outputs),
            "grad_norm": float(grad_norm),
            "lr": self.scheduler.get_last_lr()[0],
            "ema_decay": self.core.teacher.decay(self.core.teacher.step),
            "samples_per_s": window.samples * self.world / seconds,
            "data_wait": window.seconds_waited / seconds,
            "epoch": epoch,
            "skipped_steps": self.skipped,
            "broken_samples": len(self.broken.seen),
            "time": time.time(),
        }

    def step(self, micro_batches: list[Batch]) -> tuple[Tensor, list[Data2VecOutput], Tensor]:
        """One optimizer step; loss on this rank's share, the outputs, and the gradient's norm before clipping."""
        config, last = self.config, len(micro_batches) - 1
        num_targets = None
        if config.loss.reduction == "global":
            # Known on the host; only several ranks have to ask each other.
            num_targets = sum(len(batch["index"]) for batch in micro_batches)
            if self.world > 1:
                counts = torch.tensor([float(num_targets)], device=self.device)
                num_targets = self.accelerator.reduce(counts, "sum")[0] / self.world
        loss = torch.zeros((), device=self.device)
        outputs = []
        for i, batch in enumerate(micro_batches):
            # Ranks exchange gradients with the last micro-batch only.
            with nullcontext() if i == last else self.accelerator.no_sync(self.model):
                output = self.model(**self._inputs(batch), num_targets=num_targets)
                share = output.loss if num_targets is not None else output.loss / len(micro_batches)
                self.accelerator.backward(share)
            loss += share.detach()
            outputs.append(output)
        parameters = [p for p in self.core.parameters() if p.requires_grad]
        grad_norm = self.accelerator.clip_grad_norm_(parameters, config.train.clip_norm or math.inf)
        if torch.isfinite(grad_norm):
            self.optimizer.step()
            if not self.accelerator.optimizer_step_was_skipped:
                self.core.update_teacher()
        else:
            # Neither weights nor teacher may see it: in an average a NaN stays for ever.
            self.skipped += 1
            log.warning("gradient is not finite: step skipped, %d so far", self.skipped)
            if self.accelerator.scaler is not None:
                self.optimizer.step()  # lets the scaler lower its factor; it skips the update itself
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, outputs, grad_norm

    def export(self) -> None:
        """The student in Hugging Face format, with its tokenizer."""
        if self.accelerator.is_main_process:
            self.core.student.save(self.folder / "export")
            if (tokenizer := getattr(self.data, "tokenizer", None)) is not None:
                tokenizer.save_pretrained(self.folder / "export")
        self.accelerator.wait_for_everyone()

    def _batches(self) -> Iterator[Batch]:
        """Batches with something to score; unreadable samples are noted on the way."""
        for batch in self.loader:
            self.broken.note(batch["broken"])
            if not batch["samples"]:
                continue
            if len(batch["index"]) == 0:
                raise DataError(
                    f"the mask covers none of the {batch['mask'].numel()} positions of samples {batch['samples'][:8]}: "
                    f"raise mask.prob or shorten mask.length (mask: {self.config.mask})"
                )
            yield batch

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}

    @torch.no_grad()
    def _collapse_figures(self, outputs: list[Data2VecOutput]) -> dict[str, float]:
        """Std of targets and predictions, pooled over micro-batches and ranks, and of the local features."""
        figures = {}
        for name in ("target", "prediction"):
            moments = Moments.pooled([getattr(output.stats, name) for output in outputs])
            if self.world > 1:
                gathered = self.accelerator.gather(torch.cat([moments.count[None], moments.mean, moments.m2])[None])
                half = moments.mean.numel() + 1
                moments = Moments.pooled([Moments(row[0], row[1:half], row[half:]) for row in gathered])
            figures[f"{name}_std"] = float(moments.std)
        features = outputs[-1].features.float().flatten(0, 1)
        figures["feature_std"] = float(features.std(dim=0).mean())
        return figures

    def _judge(self, record: dict[str, Any]) -> None:
        rule = self.config.collapse
        if rule.action == "off" or record["step"] <= rule.after:
            return
        for name, least in (("target_std", rule.target_std), ("prediction_std", rule.prediction_std)):
            if record[name] < least:
                message = (
                    f"step {record['step']}: {name} is {record[name]:.4f}, below collapse.{name}={least}: "
                    "the representation is becoming constant; try a lower optimizer.lr, a higher ema.start or a larger batch"
                )
                if rule.action == "stop":
                    raise CollapseError(message)
                log.warning(message)

    def _agreed(self, asked: bool) -> bool:
        """Whether any rank was asked to stop."""
        if self.world == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor([float(asked)], device=self.device), "sum")[0] > 0)


class CollapseError(RuntimeError):
    """Targets or predictions have become constant."""


def train(config: Config, fused: bool = False) -> int:
    """Run `config`, with the fast parts or without; returns the exit code of the process."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the one to watch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return Trainer(config, fused).run()
