"""A run of several modalities. Its parts are runs that share blocks, optimizer and checkpoints, and take turns.

A step draws all its micro-batches, on all ranks, from one part. So a loss covers positions of one kind, any shares are
possible, a step costs the same as in a single-modality run, and ranks need no coordination.

    RUN/config.yaml, checkpoints/, environment.json     for all parts
    RUN/vision/config.yaml, log.jsonl, export/, …       as in a run of images alone, for d2v-probe, d2v-export and d2v-report
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from d2v_fast.config import ConfigError
from d2v_fast.fused import fuse
from d2v_fast.several import Several, SeveralConfig
from d2v_fast.train.build import (
    Run,
    begin,
    make_core,
    make_feed,
    make_order,
    make_run,
    make_updates,
    read,
    seed_or_restore,
    trained_batches,
)
from d2v_fast.train.callbacks import Callback, Callbacks
from d2v_fast.train.folder import RunFolder
from d2v_fast.train.save import Samples

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

GOLDEN = (5**0.5 - 1) / 2


def turns(shares: Mapping[str, float], steps: int, seed: int) -> np.ndarray:
    """The index of the part that trains in each step: (steps,) int64.

    A pure function of (seed, step). The fractional parts of multiples of the golden ratio fill the unit interval evenly (Weyl),
    and the shares divide that interval. After any number of steps, each part has had its share to within a few steps, and no
    period can coincide with that of the log.
    """
    points = (np.random.default_rng(seed % 2**64).random() + GOLDEN * np.arange(steps)) % 1
    return np.searchsorted(np.cumsum(list(shares.values()))[:-1], points, side="right")


@dataclass
class SeveralRun(Run):
    """A run whose parts take turns.

    Attributes:
        parts: The parts by name. Each has its own data, feed, window, broken samples, monitor and skipped steps. The run's own
            attributes of these names are those of the first part and are not used.
    """

    parts: dict[str, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.turns = turns(cast(Any, self.config).shares, self.steps, self.config.train.seed)
        each = self.turns[:, None] == np.arange(len(self.parts))
        self.numbers = np.cumsum(each, axis=0)[np.arange(self.steps), self.turns]  # number of each step among those of its part
        self.last = each.sum(axis=0)

    @property
    def each(self) -> list[Run]:
        return list(self.parts.values())

    def turn(self) -> tuple[Run, int, int]:
        step = self.state.done
        number = self.turns[step]
        part = self.each[number]
        part.state.done = step
        return part, int(self.numbers[step]), int(self.last[number])

    def state_dict(self) -> dict[str, Any]:
        return {"parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])

    def rank_state_dict(self) -> dict[str, Any]:
        return {"parts": {name: part.rank_state_dict() for name, part in self.parts.items()}}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_rank_state_dict(state["parts"][name])


def build_parts(
    config: SeveralConfig, fused: bool, accelerator: Accelerator, folder: RunFolder, callbacks: Sequence[Callback]
) -> SeveralRun:
    """`build` for a run of several modalities.

    Raises:
        ConfigError: Inconsistent settings, or parts whose blocks cannot be shared.
    """
    settings, checkpoints, saved = begin(config, fused, accelerator, folder)
    config = replace(config, parts={name: replace(part, resume=config.resume) for name, part in config.parts.items()})
    called = Callbacks(callbacks, accelerator.is_main_process)
    found = {name: read(part, folder.inside(name).path) for name, part in config.parts.items()}
    if streamed := [name for name, (data, _, _) in found.items() if data.stream]:
        raise ConfigError(
            f"several.parts.{streamed[0]}.data: is streamed, which only works in a run of one modality; use local data"
        )
    samples = Samples.joined([samples for _, _, samples in found.values()])
    if saved:
        samples.compare(saved, config.resume_allow)
    cores = {name: make_core(config.parts[name], data, encoder, accelerator) for name, (data, encoder, _) in found.items()}
    core = Several(cores)
    words = [f"{name}: {word}" for name in cores for word in (fuse(cores[name], accelerator.device) if fused else [])]

    # No step gives gradients to all parts.
    accelerator.ddp_handler.find_unused_parameters = True
    steps = config.train.steps
    optimizer, scheduler = make_updates(core, config, steps, saved.step if saved else 0, fused)
    model, optimizer = accelerator.prepare(core, optimizer)
    shared: dict[str, Any] = dict(settings=settings, checkpoints=checkpoints, model=model, optimizer=optimizer)
    shared |= dict(scheduler=scheduler, accelerator=accelerator, steps=steps, fused=words, callbacks=called)
    parts = {}
    for name, part in config.parts.items():
        data, _, own = found[name]
        feed = make_feed(
            part, data, make_order(part, data, accelerator, trained_batches(saved, accelerator, name)), accelerator
        )
        parts[name] = make_run(part, folder.inside(name), own, feed, cores[name], name, **shared)
    first = next(iter(parts.values()))
    state = replace(first.state, core=cast(Any, core))
    whole = {"config": config, "folder": folder, "samples": samples, "state": state, "name": ""}
    run = SeveralRun(**vars(first) | whole, parts=parts)
    seed_or_restore(run, saved)
    if accelerator.is_main_process:
        counts = ", ".join(f"{name} {count} steps" for name, count in zip(parts, run.last, strict=True))
        log.info("experimental: several modalities share one stack of blocks, %s", counts)
    return run
