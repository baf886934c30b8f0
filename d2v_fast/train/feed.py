"""Batches in their order, from the loader and its workers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from d2v_fast.data import Batch, DataError, EpochBatches, PretrainingData, first_line, make_loader
from d2v_fast.train.guards import BrokenSamples, WorkerDied, in_main_thread

log = logging.getLogger(__name__)

EMPTY = 100  # batches in a row without anything to score, after which the mask is to blame; of short samples one happens


class Feed:
    """Batches with something to score. Samples that cannot be read are noted on the way.

    Args:
        data: What they are of.
        order: Which samples, from the first batch to train on.
        workers: Processes that load them, which start with the first batch.
        pin_memory: Load into memory that a GPU copies from.
        broken: Told of samples that cannot be read.
    """

    def __init__(self, data: PretrainingData, order: EpochBatches, workers: int, pin_memory: bool, broken: BrokenSamples):
        self.data, self.workers, self.broken = data, workers, broken
        self.loader = make_loader(data, order, workers, pin_memory=pin_memory)
        self.taken = self.trained = order.start  # from the loader, and by steps that are done
        self.batches = self._batches()

    def take(self, number: int) -> list[Batch]:
        """The next batches.

        Raises:
            DataError: The data cannot be read, or there is nothing to score; a WorkerDied if a process that loads has ended.
        """
        try:
            return [next(self.batches) for _ in range(number)]
        except Exception as error:
            # What a worker raises says "Caught …"; one that died cannot hand over what it had ready.
            cut_off = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "Caught" not in str(error)
            if (cut_off and self.workers) or "DataLoader worker (pid" in str(error):
                raise WorkerDied(f"a process that loads data died: {first_line(error)}") from error
            raise

    def trained_on(self) -> None:
        """A step with all that was taken is done."""
        self.trained = self.taken

    def close(self) -> None:
        """End the workers."""
        self.batches.close()

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.trained}  # a rank whose whole batch was unreadable took one more than others

    def _batches(self) -> Iterator[Batch]:
        try:
            loaded = iter(self.loader)
        except OSError as error:
            raise DataError(
                f"train.workers={self.workers}: cannot be started: {error}; fewer may do, or in a container more "
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
                    f"{batch['samples'][:8]}: raise mask.prob or shorten mask.length (mask: {self.data.mask})"
                )
            if not empty:
                yield batch
