"""Checkpoints of a run, resuming from one, and the export of the student."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from d2v_fast.checkpoint import Checkpoint, CheckpointError, Checkpoints, Tensors, sync, write_text
from d2v_fast.config import FREE, PART, Config
from d2v_fast.diagnostics import environment
from d2v_fast.files import CONFIG, ENVIRONMENT, EXPORT, STEP, TOKENIZER
from d2v_fast.sharding import gathered, parts
from d2v_fast.train.parallel import from_main

if TYPE_CHECKING:
    from d2v_fast.several import SeveralConfig
    from d2v_fast.train.build import Run


class Samples:
    """Identity of the samples of a run, compared on resume.

    Args:
        number: Number of samples.
        names: Names of the sources that samples are read from.
        digests: Digest of each source.
    """

    def __init__(self, number: int, names: Sequence[str], digests: np.ndarray):
        self.names, self.digests = names, torch.from_numpy(digests.copy())
        content = hashlib.sha256(digests.tobytes()).hexdigest()
        self.identity: dict[str, dict[str, Any]] = {"samples": {"number": number, "content": content}}

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """The samples of all parts as one."""
        number = sum(part.identity["samples"]["number"] for part in parts)
        names = [name for part in parts for name in part.names]
        return cls(number, names, torch.cat([part.digests for part in parts]).numpy())

    def compare(self, saved: Checkpoint, allowed: Sequence[str]) -> None:
        """Raise CheckpointError, with the names of those that differ, if the checkpoint has other samples."""
        try:
            saved.compare("samples", self.identity, allowed)
        except CheckpointError as error:
            was = saved.tensors("samples")["digests"]
            if len(was) != len(self.names):
                raise
            differ = (was != self.digests).nonzero().flatten().tolist()
            first = "".join(f"\n    {self.names[i]}" for i in differ[:5])
            raise CheckpointError(f"{error}\n  {len(differ)} of {len(self.names)} changed, among them{first}") from None


def newest(checkpoints: Checkpoints, main: bool, shared: bool) -> Checkpoint:
    """The checkpoint to resume from. The main process chooses it for all, and verifies it for all if they share a disk."""
    if main:
        try:
            saved = checkpoints.newest()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; another train.output without --resume starts a new run") from None
        from_main(saved.folder)
        return saved
    return Checkpoint(from_main(None), checksums=not shared)


def compare_settings(saved: Checkpoint, settings: dict[str, Any], config: Config | SeveralConfig) -> None:
    """Raise CheckpointError if settings that must not differ do.

    Settings that did not exist when the checkpoint was written are ignored if they have their default. A different number of
    processes is allowed if train.accumulate changes such that a step has as many micro-batches as before.
    """
    with saved.reading():
        known = saved.state["settings"]
        was, now = known["processes"], settings["processes"]
        step = was * known["train.accumulate"]
    elastic = was != now and step == now * settings["train.accumulate"]
    if was != now and not elastic and "processes" not in config.resume_allow:
        even = "" if step % now else f" or train.accumulate={step // now}, for as many batches per step,"
        raise CheckpointError(
            f"{saved.folder}: its run had {was} process{'es' * (was != 1)}, this one has {now}; start {was}, with "
            f"torchrun --nproc-per-node={was} on one machine, or plain d2v-train for one;{even} or --resume-allow processes"
        )
    defaults = json.loads(json.dumps(config.defaults(), default=str))
    new = [key for key, value in settings.items() if key not in known and defaults.get(key, ...) == value]
    free = [key for key in (*known, *settings) if PART.sub("", key) in FREE]
    kept = ("processes", "train.accumulate") if elastic else ()
    saved.compare("settings", settings, (*FREE, *free, *kept, *config.resume_allow, *new))


def share(ranks: list[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The saved state for one rank. If the number of ranks has changed, the total work done is divided equally.

    Args:
        ranks: Rank states of a checkpoint, as `save` writes them.
        rank: Rank of this process.
        world: Number of ranks.

    Returns:
        A state as in `Run.rank_state_dict`.
    """
    if world == len(ranks):
        return ranks[rank]
    if "parts" in ranks[0]:
        parts = {name: [each["parts"][name] for each in ranks] for name in ranks[0]["parts"]}
        return {"parts": {name: share(part, rank, world) for name, part in parts.items()}}
    windows = [each["window"] for each in ranks]
    window = {key: sum(each[key] for each in windows) / len(windows) for key in windows[0]}
    return {
        "batches": sum(each["batches"] for each in ranks) // world,
        "broken": list({index: [index, why] for each in ranks for index, why in each["broken"]}.values()),
        "window": window | {"steps": windows[0]["steps"], "samples": sum(each["samples"] for each in windows) / world},
    }


def save(run: Run, wait: bool = True) -> None:
    """Save a checkpoint unless this step has one. Called on all ranks together, between two steps.

    Args:
        run: The run.
        wait: Return only once it is on disk. Otherwise a sharded run needs `finish` after later steps.
    """
    for part in run.each:
        part.state.settle()
    if run.state.done != run.saved:
        complete(run)  # the previous one
        run.saved = run.state.done
        _save(run)
    if wait:
        complete(run)


def complete(run: Run) -> None:
    """Wait until the last checkpoint is on disk. In a sharded run, called on all ranks together."""
    run.checkpoints.wait()
    if finish(run):
        run.checkpoints.wait()


def finish(run: Run) -> bool:
    """Finish the checkpoint of a sharded run once all ranks have written their parts; returns whether there is one.

    Called on all ranks together. Only rank 0 has work left, which runs in its thread.
    """
    from accelerate.utils import gather_object

    part = run.checkpoints.part()
    if part is None:
        return False
    every = gather_object([part])
    if run.accelerator.is_main_process:
        run.checkpoints.finish(every)
        _await(run, part[0])
    return True


def reserve(run: Run) -> None:
    """Allocate memory for the copies that checkpoints are written from."""
    if run.config.train.shard:
        run.checkpoints.reserve(_parts(run, run.state.tensors())[0])
    elif run.accelerator.is_main_process:
        run.checkpoints.reserve(run.state.tensors())


def _save(run: Run) -> None:
    from accelerate.utils import gather_object

    state, main, sharded = run.state, run.accelerator.is_main_process, run.config.train.shard
    if main and sharded:
        run.checkpoints.begin(state.done)  # before any rank comes out of the next collective
    numbers, generators = generator_states(state.device)
    ranks = gather_object([({**run.rank_state_dict(), **numbers}, generators)])
    if main:
        run.callbacks.written(run)  # for the previous checkpoint
    elif not sharded:
        return
    tensors = {
        **state.tensors(),
        "samples": {"digests": run.samples.digests},
        "rng": {f"{i}.{kind}": states[kind] for i, (_, states) in enumerate(ranks) for kind in states},
    }
    written = _state(run, [rank for rank, _ in ranks]) if main else None
    if sharded:
        run.checkpoints.save_part(state.done, run.accelerator.process_index, *_parts(run, tensors), written)
    elif written is not None:
        run.checkpoints.save(state.done, tensors, written)
        _await(run, state.done)


def _state(run: Run, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a run's state that is not tensors."""
    scaler = run.accelerator.scaler
    written: dict[str, Any] = {
        **run.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "settings": run.settings,
        "samples": run.samples.identity,
        "ranks": ranks,
    }
    if callbacks := run.callbacks.state_dict():
        written["callbacks"] = callbacks
    return written


def _parts(run: Run, tensors: Tensors) -> tuple[Tensors, dict[str, dict[str, str]]]:
    """The tensors of a sharded run that this rank writes, by file, and the metadata of the files."""
    rank = run.accelerator.process_index
    found = {f"{file}-{rank}": parts(values, rank) for file, values in tensors.items()}
    return {file: own for file, (own, _) in found.items() if own}, {file: each for file, (_, each) in found.items()}


def _await(run: Run, step: int) -> None:
    """Arrange for callbacks, and for config.yaml to adopt allowed changes, once the checkpoint is written."""
    run.callbacks.awaited = step
    if run.changed:
        run.checkpoints.wait()
        if not run.checkpoints.failed:
            write_settings(run)
            run.changed = False


def write_settings(run: Run) -> None:
    """Write config.yaml. In the folder of a part, it holds the settings of the equivalent single-modality run."""
    for each in (run, *(part for part in run.each if part is not run)):
        each.folder.path.mkdir(exist_ok=True)
        write_text(each.folder.path / CONFIG, each.config.yaml)


def save_description(run: Run) -> None:
    """Write the settings, the environment and the tokenizers that were trained for the run."""
    folder = run.folder.path
    if not run.changed:
        write_settings(run)
    write_text(folder / ENVIRONMENT, json.dumps(environment(folder), indent=1))
    for part in run.each:
        target = part.folder.path / TOKENIZER
        if part.config.trains_tokenizer and not (part.config.resume and target.exists()):
            temporary = target.with_suffix(".tmp")
            for unfinished in (temporary, target):  # of a run that ended before its first step
                shutil.rmtree(unfinished, ignore_errors=True)
            part.data.processor(part.state.core.student).save_pretrained(temporary)
            os.replace(temporary, target)


def restore(run: Run, saved: Checkpoint) -> None:
    """Restore the state after the step of the checkpoint."""
    from accelerate.utils import set_seed

    state = run.state
    weights, parameters = state.core.state_dict(), dict(state.core.named_parameters())

    def like(name: str) -> Tensor | None:  # a moment is sharded like its parameter
        return weights.get(name, parameters.get(name.rpartition(".")[0]))

    tensors = {name: saved.tensors(name, like) for name in ("student", "teacher", "optimizer", "rng")}
    saved.compare_shapes(tensors["student"] | tensors["teacher"], weights)
    state.load_tensors(tensors)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(saved.state["scaler"])
    run.load_state_dict(saved.state)
    number, world, ranks = run.accelerator.process_index, run.accelerator.num_processes, saved.state["ranks"]
    rank = share(ranks, number, world)
    run.load_rank_state_dict(rank)
    run.callbacks.load_state_dict(saved.state.get("callbacks", []))
    if world == len(ranks):
        load_generator_states(rank, {kind: tensors["rng"].get(f"{number}.{kind}") for kind in ("cpu", "cuda")}, state.device)
    else:  # with another number of ranks, new seeds: each rank must have different dropout
        set_seed(int(np.random.SeedSequence([run.config.train.seed, saved.step, number]).generate_state(1)[0]))


def generator_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of this process's random number generators: Python's and numpy's as JSON values, torch's as tensors."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}, tensors


def load_generator_states(numbers: dict[str, Any], tensors: dict[str, Any], device: torch.device) -> None:
    """Restore the result of `generator_states`."""
    version, keys, gauss = numbers["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(numbers["numpy"]))
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def export(run: Run) -> None:
    """Save the student in Hugging Face format with its tokenizer or processor. Each file is replaced atomically.

    Raises:
        OSError: The disk is full or fails. The message includes the failure of the last checkpoint, if any.
    """
    main = run.accelerator.is_main_process
    with gathered(run.state.core.student, keep=main):
        if main:
            _export(run)


def _export(run: Run) -> None:
    student, target = run.state.core.student, run.folder.path / EXPORT
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        student.save(temporary)
        if (processor := run.data.processor(student)) is not None:
            processor.save_pretrained(temporary)
        write_text(temporary / STEP, json.dumps({"step": run.state.done}))
        target.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            sync(file)
            os.replace(file, target / file.name)
        temporary.rmdir()
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError when weights are written
        raise OSError("; ".join(filter(None, (f"{target}: {error}", run.checkpoints.failed)))) from error
