"""k-NN probe of the teacher on a small labelled set during training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2v_fast.config import Config, ConfigError
from d2v_fast.data import DataError
from d2v_fast.train.callbacks import Callback
from d2v_fast.train.save import generator_states, load_generator_states

if TYPE_CHECKING:
    from d2v_fast.train.build import Run

log = logging.getLogger(__name__)

SAMPLES = 1000  # maximum number of training samples, and of test samples


class OnlineProbe(Callback):
    """Adds `probe_knn` to the log: to the first line after every `interval` steps, and to the last line.

    The value is the test accuracy of a k-NN on the teacher's mean states, weighted as in DINO. The probe leaves the random
    number generators of training unchanged.

    Args:
        config: Config of the run, with `train.probe_every` and `train.probe_data`.

    Raises:
        ConfigError: The data are text, which has no labels, or `train.probe_data` is missing.
    """

    def __init__(self, config: Config):
        self.interval, self.data = config.train.probe_every, config.train.probe_data
        self.last: float = 0  # step
        if config.is_text:
            raise ConfigError("train.probe_every: text has no labels; d2v-probe RUN evaluates a run of text")
        if self.data is None and not config.own_data and config.data["path"] != "builtin":
            raise ConfigError(
                f"train.probe_data: missing; the run trains on {config.data['path']}, so name a labelled set to probe on, as "
                "for d2v-probe --data: a folder with train/ and test/, or a Hugging Face set"
            )

    def on_start(self, run: Run) -> None:
        from d2v_fast.probe import labelled_parts

        config, teacher = run.config, run.state.core.teacher.module
        data = self.data or (config.data["class"] if config.own_data else "builtin")
        with _generators_untouched(run.state.device), run.window.paused():
            try:
                *self.parts, self.collate = labelled_parts(config, teacher, data, None)
            except DataError as error:
                raise DataError(str(error).replace("--data ", "train.probe_data=", 1)) from error
            knn, chance = self._accuracy(run)
        log.info("probe on %s: k-NN of the teacher %.1f %%, by chance %.1f %%", data, 100 * knn, 100 * chance)

    def on_log(self, run: Run, record: dict[str, float]) -> None:
        if record["step"] - self.last < self.interval and record["step"] < run.steps:
            return
        self.last = record["step"]
        with _generators_untouched(run.state.device), run.window.paused():
            try:
                record["probe_knn"], _ = self._accuracy(run)
            except ConfigError as error:  # states that are not finite
                record["probe_knn"] = math.nan
                log.warning("probe at step %d: %s", record["step"], error)

    def _accuracy(self, run: Run) -> tuple[float, float]:
        """Accuracy of the k-NN, and of always choosing the most frequent label."""
        from d2v_fast.probe import States, knn_accuracy, pooled_states

        precision = "bf16" if run.config.train.precision == "bf16" else "fp32"
        states = States({"teacher": run.state.core.teacher.module}, run.state.device.type, precision)
        found = [pooled_states(states, part, self.collate, SAMPLES) for part in self.parts]
        (train, train_labels), (test, test_labels) = ((rows["teacher"], labels) for rows, labels in found)
        counts = np.unique(test_labels, return_counts=True)[1]
        return knn_accuracy(train, train_labels, test, test_labels), counts.max() / counts.sum()

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state["last"]


@contextmanager
def _generators_untouched(device: torch.device) -> Iterator[None]:
    """Restore all random number generators on exit."""
    states = generator_states(device)
    try:
        yield
    finally:
        load_generator_states(*states, device)
