"""`d2v-train`: from a config to a student in Hugging Face format.

    build.py          data, encoder, model and what trains them, from a config
    loop.py           the loop over steps
    several.py        a run of several modalities, whose parts take turns in the loop
    step.py           one optimizer step, and the state that it changes
    feed.py           batches in their order, from the loader
    optim.py          optimizer and learning rate
    guards.py         what stops a run: broken samples, steps that are not finite, signals
    log.py            log.jsonl, TensorBoard and other trackers, progress
    callbacks.py      objects of your own that a run calls
    online_probe.py   a k-NN on the teacher while it trains
    save.py           checkpoints of all these objects, and the export
    folder.py         the folder of a run
    parallel.py       devices and ranks, through accelerate

One optimizer step = `accumulate` micro-batches on each of R ranks. Their loss is divided by the masked positions of all of
them together, so that each counts the same wherever it was (method 1.4). Then clip, optimizer, schedule, teacher, in this
order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from d2v_fast.config import Config
from d2v_fast.train import build, loop
from d2v_fast.train.callbacks import Callback


def train(config: Config, fused: bool = False, callbacks: Sequence[Callback] = ()) -> int:
    """Run `config`, with the fast parts or without; returns the exit code of the process.

    Args:
        config: What to train, on what, how.
        fused: Put the fast parts in, `d2v_fast.fused`.
        callbacks: Objects that are called beside those of `train.callbacks`.

    Raises:
        CallbackError: A callback cannot be made, or has failed.
        ConfigError: Settings that do not fit each other.
        DataError: Data that cannot be used.
        CheckpointError: `config.resume` without a usable checkpoint, or the last checkpoint could not be written.
        CollapseError: A rule of `collapse` is broken and its action is to stop.
        NotFiniteError: Loss or gradient was not finite in `train.max_skipped` steps in a row.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is the one to watch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return loop.loop(build.build(config, fused, callbacks))
