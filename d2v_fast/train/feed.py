"""Batches in order, from the loader and its workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from d2v_fast.data import Batch, DataError, EpochBatches, PretrainingData, first_line, make_loader
from d2v_fast.data.streaming import StreamBatches
from d2v_fast.train.guards import BrokenSamples, WorkerDied, in_main_thread

log = logging.getLogger(__name__)

LEAST = 1000  # samples of a stream, whose number is unknown, of which a share may be unreadable
EMPTY = 100  # batches in a row without masked positions before the mask is blamed; with short samples, one may occur


class Feed:
    """Batches with at least one masked position. Unreadable samples are recorded in `broken`.

    Args:
        data: The data set.
        order: The samples of each batch, starting with the first batch to train on.
        workers: Number of loading processes; they start with the first batch.
        pin_memory: Load into pinned memory.
        broken: Records samples that cannot be read.
    """

    def __init__(
        self,
        data: PretrainingData,
        order: EpochBatches | StreamBatches,
        workers: int,
        pin_memory: bool,
        broken: BrokenSamples,
    ):
        self.data, self.workers, self.broken = data, workers, broken
        self.loader = make_loader(data, order, workers, pin_memory=pin_memory)
        self.taken = self.trained = order.start  # batches taken from the loader, and used by finished steps
        self.position = self.trained_position = getattr(order, "state", None)  # the same of a stream
        self.batches = self._batches()

    def take(self, number: int) -> list[Batch]:
        """The next batches.

        Raises:
            DataError: The data cannot be read, or nothing is masked; a WorkerDied if a loading process has died.
        """
        try:
            return [next(self.batches) for _ in range(number)]
        except Exception as error:
            # An error raised in a worker says "Caught …". These errors without it mean that the connection broke.
            disconnected = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "Caught" not in str(error)
            if (disconnected and self.workers) or "DataLoader worker (pid" in str(error):
                raise WorkerDied(f"a data loading process died: {first_line(error)}") from error
            raise

    def trained_on(self) -> None:
        """Record that a step has used everything taken so far."""
        self.trained, self.trained_position = self.taken, self.position

    def close(self) -> None:
        """Stop the workers."""
        self.batches.close()

    def state_dict(self) -> dict[str, Any]:
        stream = {"stream": self.trained_position} if self.data.stream else {}
        return {"batches": self.trained, **stream}  # may differ between ranks: one that skips an unreadable batch takes another

    def _batches(self) -> Generator[Batch, None, None]:
        try:
            loaded = iter(self.loader)
        except OSError as error:
            raise DataError(
                f"train.workers={self.workers}: cannot be started: {error}; try fewer, or in a container more "
                "shared memory: docker run --shm-size=8g"
            ) from error
        # If a worker dies, torch raises from a signal handler, possibly in the middle of a step. Without the handler, the
        # loader raises when the next batch does not arrive. That is between two steps, where the run can be saved.
        if in_main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        empty, piped = 0, False
        for batch in loaded:
            self.taken += 1
            if self.data.stream:
                if "failed" in batch:
                    raise DataError(batch["failed"])
                self.position = batch.pop("stream")
                self.broken.total = max(LEAST, self.taken * len(batch["samples"] + batch["broken"]))
            arrays = {name: torch.from_numpy(value) for name, value in batch.items() if isinstance(value, np.ndarray)}
            if arrays and not piped:
                log.warning("/dev/shm is full, so batches come through a slower pipe; for more: docker run --shm-size=8g")
            batch |= arrays
            piped |= bool(arrays)
            self.broken.note(batch["broken"])
            if not batch["samples"]:
                continue
            empty = 0 if len(batch["index"]) else empty + 1
            if empty == EMPTY:
                raise DataError(
                    f"the mask covers no position in {EMPTY} batches in a row, the last one of samples "
                    f"{batch['samples'][:8]}: raise mask.prob or shorten mask.length (mask: {self.data.mask})"
                )
            if not empty:
                yield batch
