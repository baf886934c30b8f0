"""Logging of a run: log.jsonl, TensorBoard and other trackers, and progress on the terminal."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2v_fast.checkpoint import CheckpointError, write_text
from d2v_fast.config import ConfigError
from d2v_fast.data import Batch, first_line
from d2v_fast.diagnostics import distinct_share
from d2v_fast.encoders import describe
from d2v_fast.files import ALARMS, EXPORT, LOG
from d2v_fast.report import read_lines
from d2v_fast.train.callbacks import Callback
from d2v_fast.train.guards import BrokenSamples, disk_may_fail
from d2v_fast.train.step import Outcome, State

if TYPE_CHECKING:
    from d2v_fast.train.build import Run

log = logging.getLogger(__name__)

PROJECT = "d2v-fast"  # project name of runs in trackers
PROGRESS = (
    "loss {loss:.4f}  target std {target_std:.3f}  prediction std {prediction_std:.3f}  "
    "{samples_per_s:.1f} samples/s  data wait {data_wait:.0%}"
)
SUMMARY = (
    "step {step}: loss {loss:.4f}, target std {target_std:.3f}, prediction std {prediction_std:.3f}, "
    "feature std {feature_std:.3f}; student in {folder}"
)


class RunLog:
    """log.jsonl and, if it is installed, TensorBoard. Without a folder, nothing is logged.

    Args:
        folder: Folder of the run.
        step: Step of the checkpoint that the run resumes from; entries of later steps are removed.
        board: Whether to use TensorBoard.
    """

    def __init__(self, folder: Path | None, step: int = 0, board: bool = True):
        self.folder, self.step, self.wants_board = folder, step, board
        self.board: Any = None

    def __enter__(self) -> RunLog:
        if self.folder is not None:
            file = self.folder / LOG
            if self.step:
                for each in (file, self.folder / ALARMS):
                    if each.exists():
                        write_text(
                            each, "".join(f"{json.dumps(line)}\n" for line in read_lines(each) if line["step"] <= self.step)
                        )
            self.file = file.open("a", buffering=1, encoding="utf-8")
            if not self.wants_board:
                return self
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1 if self.step else None)
            except Exception as error:  # optional; may raise anything, such as for folders that are not UTF-8
                remedy = "; pip install tensorboard" if isinstance(error, ImportError) else ""
                log.info("curves are only in %s: %s%s", LOG, error, remedy)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.folder is not None:
            with disk_may_fail(LOG):
                self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, record: dict[str, float]) -> None:
        if self.folder is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
            with disk_may_fail(LOG):  # unwritten lines stay in the buffer until the next write
                self.file.write(json.dumps(finite) + "\n")
        if self.board is not None:
            board, self.board = self.board, None  # once it has failed, it keeps failing
            with disk_may_fail("the TensorBoard log"):
                for name in record.keys() - {"step", "time"}:
                    board.add_scalar(name, record[name], record["step"])
                self.board = board


class Trackers(Callback):
    """Logs metrics and settings to other trackers through accelerate. A tracker that fails is dropped; the run continues.

    Args:
        names: Names as in `train.trackers`.

    Raises:
        ConfigError: A package is missing.
    """

    def __init__(self, names: Sequence[str]):
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ConfigError(f"train.trackers={name}: is not installed; pip install {name}, or leave it out")
        self.names = names
        self.trackers: dict[str, Any] = {}

    def on_start(self, run: Run) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder, name, done = run.folder.path, run.folder.path.resolve().name, run.state.done
        arguments: dict[str, tuple[Any, ...]] = {
            # On resume, remove points after the checkpoint.
            "tensorboard": ("tensorboard", folder, {"purge_step": done + 1 if done else None}),
            "wandb": (PROJECT, {"name": name, "dir": str(folder)}),
            "mlflow": (PROJECT, {"run_name": name}),
            "trackio": (PROJECT, {"name": name}),
        }
        simple = (int, float, str, bool)
        settings = {k: v if isinstance(v, simple) else json.dumps(v) for k, v in run.settings.items()}
        for tracker in self.names:
            *args, kwargs = arguments[tracker]
            try:
                opened = LOGGER_TYPE_TO_CLASS[tracker](*args, **kwargs)
                opened.start()
                opened.store_init_configuration(settings)
            except Exception as error:  # third-party packages may raise anything
                raise ConfigError(f"train.trackers={tracker}: cannot be started: {first_line(error)}") from error
            self.trackers[tracker] = opened

    def on_log(self, run: Run, record: dict[str, float]) -> None:
        part = f"{run.name}." if run.name else ""
        figures = {f"{part}{name}": value for name, value in record.items() if name not in ("step", "time")}
        for name in list(self.trackers):
            try:
                self.trackers[name].log(figures, step=record["step"])
            except Exception as error:
                del self.trackers[name]
                log.error("train.trackers=%s: dropped, the run continues: %s", name, first_line(error))

    def on_end(self, run: Run, error: BaseException | None) -> None:
        for name, tracker in self.trackers.items():
            try:
                tracker.finish()
            except Exception as failure:
                log.error("train.trackers=%s: may lack its last points: %s", name, first_line(failure))


class Screen:
    """stderr for the progress bar. Write errors, as for a closed terminal or a full disk, do not end the run."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Progress:
    """A bar on a terminal, lines of text elsewhere. Only the first rank shows progress.

    Args:
        steps: Total number of steps.
        done: Steps done before the run was resumed.
        main: Whether this is the first rank.
    """

    def __init__(self, steps: int, done: int, main: bool):
        from tqdm import tqdm

        self.steps, self.begin, self.main, self.start = steps, done, main, time.perf_counter()
        self.shows_bar = main and sys.stderr.isatty()
        disable = {} if self.shows_bar else {"disable": True}  # not False, which would override TQDM_DISABLE
        self.bar = tqdm(
            total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.05, delay=0, file=Screen(), **disable
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def step(self) -> None:
        self.bar.update()

    def show(self, record: dict[str, float], part: str = "") -> None:
        """Show a line of the log, for a part with its name."""
        figures = f"{part}{': ' * bool(part)}{PROGRESS.format(**record)}"
        if self.shows_bar:
            self.bar.set_postfix_str(figures)
        elif self.main:  # in the log of a batch job, a bar would leave a line per update
            done = record["step"]
            seconds = (time.perf_counter() - self.start) * (self.steps - done) / (done - self.begin)
            left = self.bar.format_interval(seconds)
            print(f"step {done}/{self.steps}, {left} left: {figures}", file=Screen())


class Window:
    """Statistics since the last line of the log. Losses and steps are summed on the device to avoid synchronization."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.load_state_dict({"loss": 0.0, "cls_loss": 0.0, "steps": 0, "samples": 0, "waited": 0.0, "seconds": 0.0})

    def state_dict(self) -> dict[str, float]:
        return {
            "loss": float(self.loss),
            "cls_loss": float(self.cls_loss),
            "steps": int(self.steps),
            "samples": self.samples,
            "waited": self.seconds_waited,
            "seconds": time.perf_counter() - self.start,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        losses = state["loss"], state.get("cls_loss", 0.0)  # missing in checkpoints older than data2vec 2.0 support
        self.loss, self.cls_loss = (torch.full((), loss, device=self.device) for loss in losses)
        self.steps = torch.full((), state["steps"], dtype=torch.int64, device=self.device)
        self.samples, self.seconds_waited = state["samples"], state["waited"]
        self.start = time.perf_counter() - state["seconds"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - begin

    def add(self, outcome: Outcome, samples: int) -> None:
        """Count a step. The loss of a skipped step is left out."""
        skipped = ~outcome.finite
        self.loss += outcome.loss.masked_fill(skipped, 0)
        self.cls_loss += outcome.cls_loss.masked_fill(skipped, 0)
        self.steps += outcome.finite
        self.samples += samples


def make_record(state: State, window: Window, broken: BrokenSamples, epoch: int, grad_norm: Tensor) -> dict[str, float]:
    """A line of the log over all ranks. This synchronizes with the device.

    Raises:
        DataError: Over all ranks, too many samples cannot be read.
    """
    from accelerate.utils import gather_object

    # A copy, because a thread of the feed may add to it.
    everywhere = {index: message for seen in gather_object([broken.seen.copy()]) for index, message in seen.items()}
    broken.judge(everywhere)
    losses = state.accelerator.reduce(torch.stack([window.loss, window.cls_loss]), "mean")
    steps = int(window.steps)
    loss, cls_loss = (losses / steps).tolist() if steps else (math.nan, math.nan)
    seconds = time.perf_counter() - window.start
    return {
        "step": state.done,
        "loss": loss,
        **({"cls_loss": cls_loss} if state.core.cls_weight else {}),
        **state.monitor.figures(loss - cls_loss),
        "grad_norm": float(grad_norm),
        "lr": float(state.scheduler.get_last_lr()[0]),
        "ema_decay": state.core.teacher.decay(state.core.teacher.step),
        "samples_per_s": window.samples * state.world / seconds,
        "data_wait": window.seconds_waited / seconds,
        "epoch": epoch,
        "skipped_steps": state.skipped.count,
        "broken_samples": len(everywhere),
        "time": time.time(),
    }


class Logs:
    """The logs of the parts and the progress of a run while it trains.

    Args:
        files: log.jsonl of each part by its name.
        progress: Progress of the run.
    """

    def __init__(self, files: dict[str, RunLog], progress: Progress):
        self.files, self.progress = files, progress

    def add(self, part: Run, outcome: Outcome, batches: list[Batch]) -> None:
        """Count a step of a part."""
        part.window.add(outcome, sum(len(batch["samples"]) for batch in batches))
        self.progress.step()

    def write(self, part: Run, outcome: Outcome, epoch: int) -> None:
        """Write a log line for a part's steps since the previous one. The monitor checks it and may raise CollapseError."""
        part.record = record = make_record(part.state, part.window, part.broken, epoch, outcome.grad_norm)
        part.window.clear()
        part.callbacks.call("on_log", part, record)
        self.files[part.name].write(record)
        self.progress.show(record, part.name)
        part.state.monitor.judge(record)


@contextmanager
def open_logs(run: Run) -> Iterator[Logs]:
    """Open the log of each part and show progress. The monitor checks that samples are distinct."""
    main, begin, board = run.accelerator.is_main_process, run.state.done, "tensorboard" not in run.config.train.trackers
    files = {}
    with ExitStack() as opened, Progress(run.steps, begin, main) as progress:
        for part in run.each:
            files[part.name] = opened.enter_context(RunLog(part.folder.path if main else None, begin, board))
            part.state.monitor.judge({"step": begin, "distinct_samples": distinct_share(part.data)})
        yield Logs(files, progress)


def log_start(run: Run) -> None:
    """Log what is trained, where and from which step."""
    config, world = run.config, run.state.world
    for part in run.each:
        log.info("%s%s", part.name and f"{part.name}: ", describe(part.state.core.student))
    where = f"{config.train.precision} on {run.state.device}" + (f" × {world}" if world > 1 else "")
    samples = " + ".join("streamed" if part.data.stream else f"{len(part.data)}" for part in run.each)
    log.info("%s samples, %d steps, %s, run in %s", samples, run.steps, where, run.folder.path)
    if run.fused:
        log.info("fused: %s", ", ".join([*run.fused, *(["AdamW"] if config.optimizer.kind == "adamw" else [])]))
    if done := run.state.done:
        log.info("resumes after step %d%s", done, "; nothing is left to train" * (done >= run.steps))


def log_end(run: Run, stopped: bool) -> None:
    """Log how the run ended.

    Args:
        run: The run.
        stopped: Whether it was asked to stop.

    Raises:
        CheckpointError: The last checkpoint could not be written.
    """
    done, folder = run.state.done, run.folder.path
    students = " and ".join(str(part.folder.path / EXPORT) for part in run.each)
    for part in run.each:
        if run.accelerator.is_main_process and part.record:
            title = f"{part.name}, " if part.name else ""
            log.info(title + SUMMARY.format(folder=part.folder.path / EXPORT, **part.record))
    if run.checkpoints.failed:
        raise CheckpointError(f"{run.checkpoints.failed}; the student is in {students}")
    if stopped and not done:
        log.warning("stopped before the first step; there is nothing to resume")
    elif stopped:
        log.warning(
            "stopped at step %d of %d; the student so far is in %s; d2v-train --resume %s continues",
            *(done, run.steps, students, folder),
        )
