"""`d2v-train`: from a config to a student in Hugging Face format.

    build.py          data, encoder, model, optimizer and schedule from a config
    loop.py           the loop over steps
    several.py        a run of several modalities, whose parts take turns in the loop
    step.py           one optimizer step, and the state that it changes
    feed.py           batches in order, from the loader
    optim.py          optimizer and learning rate
    guards.py         reasons to stop: broken samples, steps that are not finite, signals
    log.py            log.jsonl, TensorBoard and other trackers, progress
    callbacks.py      user-defined hooks
    online_probe.py   k-NN probe of the teacher during training
    save.py           checkpoints, resuming and the export
    folder.py         the folder of a run
    parallel.py       devices and ranks, through accelerate

One optimizer step = `accumulate` micro-batches on each of R ranks. Their loss is divided by the total number of masked
positions, so each position has the same weight on every rank (method 1.4). Then follow clipping, optimizer, schedule and
teacher, in this order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from d2v_fast.config import Config
from d2v_fast.train import build, loop
from d2v_fast.train.callbacks import Callback


def train(config: Config, fused: bool = False, callbacks: Sequence[Callback] = ()) -> int:
    """Train `config`; returns the exit code of the process.

    Args:
        config: The config.
        fused: Whether to use the fast parts of `d2v_fast.fused`.
        callbacks: Callbacks in addition to those of `train.callbacks`.

    Raises:
        CallbackError: A callback cannot be created, or has failed.
        ConfigError: Inconsistent settings.
        DataError: Unusable data.
        CheckpointError: `config.resume` without a usable checkpoint, or the last checkpoint could not be written.
        CollapseError: A rule of `collapse` is broken and `collapse.action` is stop.
        NotFiniteError: Loss or gradient was not finite in `train.max_skipped` steps in a row.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # we show our own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return loop.loop(build.build(config, fused, callbacks))
