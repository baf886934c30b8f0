"""Batches in order, from the loader and its workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch

from d2v_fast.data import Batch, DataError, EpochBatches, PretrainingData, Unfinished, first_line, make_loader, to_device
from d2v_fast.data.streaming import StreamBatches
from d2v_fast.train.guards import BrokenSamples, WorkerDied, in_main_thread

log = logging.getLogger(__name__)

LEAST = 1000  # samples of a stream, whose number is unknown, of which a share may be unreadable
EMPTY = 100  # consecutive batches without masked positions that are an error; with short samples a single one may occur


class Feed:
    """Batches with at least one masked position. Unreadable samples are recorded in `broken`.

    Args:
        data: The data set.
        order: The samples of each batch, starting with the first batch to train on.
        workers: Number of loading processes; they start with the first batch.
        device: Where batches are needed. For a GPU, the next batch is copied while the step runs.
        broken: Records samples that cannot be read.
    """

    def __init__(
        self,
        data: PretrainingData,
        order: EpochBatches | StreamBatches,
        workers: int,
        device: torch.device,
        broken: BrokenSamples,
    ):
        self.data, self.workers, self.device, self.broken = data, workers, device, broken
        loaded = data if device.type == "cpu" else Unfinished(data)
        if isinstance(order, StreamBatches):
            order.finishes = device.type == "cpu"
        self.loader = make_loader(loaded, order, workers, pin_memory=device.type == "cuda")
        self.taken = self.trained = order.start  # batches handed over or skipped, and those used by finished steps
        self.position = self.trained_position = getattr(order, "state", None)  # likewise for a stream
        self.batches = self._prefetched() if device.type == "cuda" else self._synchronous()

    def take(self, number: int) -> list[Batch]:
        """The next batches.

        Raises:
            DataError: The data cannot be read, or nothing is masked; WorkerDied if a loading process has died.
        """
        try:
            return [next(self.batches) for _ in range(number)]
        except Exception as error:
            # The message of an error raised in a worker starts with "Caught". Otherwise these errors mean a broken connection.
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

    def _synchronous(self) -> Generator[Batch, None, None]:
        with closing(self._batches()) as batches:
            for self.taken, self.position, batch in batches:
                yield batch if self.device.type == "cpu" else self._move(batch)

    def _prefetched(self) -> Generator[Batch, None, None]:
        """Load and copy each batch in a thread, on a second stream, while the previous step runs.

        A batch counts as taken only once it is yielded.
        """
        stream = torch.cuda.Stream(self.device)

        def load() -> tuple[int, Any, Batch, torch.cuda.Event]:
            number, position, batch = next(batches)
            with torch.cuda.stream(stream):
                return number, position, self._move(batch), stream.record_event()

        with closing(self._batches()) as batches:
            loaded = load()  # starts the workers, from the main thread
            # The current device is a property of a thread; that of a new thread is the first GPU.
            with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(stream.device,)) as thread:
                while True:
                    coming = thread.submit(load)
                    self.taken, self.position, batch, copied = loaded
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(copied)
                    for value in batch.values():
                        if isinstance(value, torch.Tensor):
                            value.record_stream(current)  # otherwise its memory may be reused while the step reads it
                    yield batch
                    loaded = coming.result()

    def _move(self, batch: Batch) -> Batch:
        return self.data.finish(batch | to_device(batch, self.device))

    def _batches(self) -> Generator[tuple[int, Any, Batch], None, None]:
        """Batches with their numbers, counted from 1, and the position after them in a stream."""
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
        position = self.position
        for number, batch in enumerate(loaded, self.taken + 1):
            if self.data.stream:
                if "failed" in batch:
                    raise DataError(batch["failed"])
                position = batch.pop("stream")
                self.broken.total = max(LEAST, number * len(batch["samples"] + batch["broken"]))
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
                yield number, position, batch
