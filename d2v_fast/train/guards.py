"""How a run handles broken samples, steps that are not finite, full disks and signals."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.checkpoint import write_text
from d2v_fast.data import Batch, DataError

log = logging.getLogger(__name__)


class WorkerDied(DataError):
    """A data loading process has died."""


class NotFiniteError(RuntimeError):
    """Too many steps in a row were skipped because loss or gradient was not finite."""


class BrokenSamples:
    """Logs each unreadable sample once, and stops the run when there are too many.

    Args:
        total: Number of samples.
        limit: Maximum share of unreadable samples.
    """

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
        """Raise DataError if `seen`, from this rank or from all ranks, holds too many samples."""
        if len(seen) > self.limit * self.total or len(seen) == self.total:
            first = "\n  ".join(list(seen.values())[:5])
            raise DataError(
                f"{len(seen)} of {self.total} samples cannot be read, more than train.max_broken={self.limit}:\n  {first}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"broken": list(self.seen.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = {index: message for index, message in state["broken"]}


class SkippedSteps:
    """Counts the steps whose loss or gradient is not finite, and stops the run after too many in a row.

    Args:
        limit: Maximum number of steps in a row.
        sample_name: Maps the index of a sample to its source.
        folder: Folder of the run, for the file that names the samples of the skipped steps.
        rank: Rank of this process; None if there is only one.
        settings: Settings of the run, for that file.
    """

    def __init__(self, limit: int, sample_name: Callable[[int], str], folder: Path, rank: int | None, settings: dict[str, Any]):
        self.limit, self.sample_name, self.folder, self.rank, self.settings = limit, sample_name, folder, rank, settings
        self.count = 0
        self.suspects: list[dict[str, Any]] = []  # the last steps skipped in a row

    def add(self, step: int, micro_batches: list[Batch], loss: Tensor, grad_norm: Tensor) -> None:
        self.count += 1
        self.suspects.append(
            {
                "step": step,
                "loss": str(float(loss)),  # JSON has no NaN
                "grad_norm": str(float(grad_norm)),
                "epoch": micro_batches[-1]["epoch"],
                "samples": {i: self.sample_name(i) for batch in micro_batches for i in batch["samples"]},
            }
        )
        log.warning("step %d skipped: loss or gradient is not finite; %d so far", step, self.count)

    def forget(self) -> None:
        """Reset after a finite step."""
        self.suspects = []

    @property
    def at_limit(self) -> bool:
        """Whether one more skipped step would stop the run."""
        return len(self.suspects) + 1 >= self.limit

    def judge(self, step: int) -> None:
        """Write the file and raise NotFiniteError if too many steps in a row, up to this one, were skipped."""
        if len(self.suspects) < self.limit:
            return
        file = self.folder / f"not-finite-step-{step}{'' if self.rank is None else f'-rank-{self.rank}'}.json"
        write_text(file, json.dumps({"skipped": self.suspects, "settings": self.settings}, indent=1))
        raise NotFiniteError(
            f"loss or gradient was not finite in {len(self.suspects)} steps in a row, up to step {step}: "
            f"{file} names their samples; try a lower optimizer.lr, train.clip_norm, or train.precision=fp32"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.count, "suspects": self.suspects}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.suspects = int(state["skipped"]), list(state["suspects"])


@contextmanager
def disk_may_fail(what: str) -> Iterator[None]:
    """Log an OSError instead of raising it: a full disk must not end the run."""
    try:
        yield
    except OSError as error:
        log.error("%s could not be written, training continues: %s", what, error)


def in_main_thread() -> bool:
    """Whether this thread may set signal handlers. Threads of a notebook server or of Ray may not."""
    return threading.current_thread() is threading.main_thread()


class StopRequest:
    """SIGTERM, Ctrl-C and SIGHUP end the run after the current step, with a checkpoint; a second one ends it at once.

    So do SIGUSR1 and SIGUSR2, which SLURM can send before a job's time limit, unless they already have a handler. They never
    count as the second signal, because SIGTERM follows them.
    """

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # the last three do not exist on every platform
    WARNINGS = ("SIGUSR1", "SIGUSR2")
    ECHO = 1.0  # seconds; torchrun forwards a Ctrl-C that the terminal has already sent to its ranks

    def __enter__(self) -> StopRequest:
        self.asked = False
        self.since: float | None = None
        self.before: dict[int, Any] = {}
        if not in_main_thread():
            log.warning("not in the main thread: SIGTERM and Ctrl-C do not save the run, only train.save_every does")
            return self
        for name in filter(signal.__dict__.get, self.SIGNALS):
            number = getattr(signal, name)
            handler = signal.getsignal(number)
            kept = handler == signal.SIG_IGN if name == "SIGHUP" else name in self.WARNINGS and handler != signal.SIG_DFL
            if not kept:  # nohup lets a run outlive its terminal
                self.before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.asked, now = True, time.monotonic()
        if signal.Signals(number).name in self.WARNINGS:
            return
        if self.since is None:
            self.since = now
        elif now - self.since > self.ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
