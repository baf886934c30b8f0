"""The contents of a checkpoint besides weights, the settings that may differ on resume, and the files of an export."""

import json
import os
import random
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from d2v_fast import checkpoint
from d2v_fast.checkpoint import CheckpointError, Checkpoints
from d2v_fast.train import save as saving
from d2v_fast.train.build import build
from d2v_fast.train.save import (
    Samples,
    compare_settings,
    export,
    finish,
    generator_states,
    load_generator_states,
    newest,
    reserve,
    restore,
    save,
    save_description,
)
from d2v_fast.train.step import step
from tests.test_training import config


def test_every_generator_continues():
    """Including Python's and numpy's, which callbacks and custom encoders may use."""

    def draw():
        return random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    draw()  # numpy caches the second of each pair of normal deviates
    cpu = torch.device("cpu")
    numbers, tensors = generator_states(cpu)
    expected = [draw(), draw()]
    load_generator_states(json.loads(json.dumps(numbers)), tensors, cpu)
    assert [draw(), draw()] == expected


def test_the_factor_of_loss_scaling_continues(tmp_path):
    run, loaded = build(config("vision", tmp_path / "run")), []
    factor = SimpleNamespace(state_dict=lambda: {"scale": 7.0}, load_state_dict=loaded.append)
    step(run.state, run.feed.take(1))
    run.accelerator.scaler = factor
    save(run)
    run.checkpoints.wait()
    restore(run, run.checkpoints.newest())
    assert loaded == [{"scale": 7.0}]


@pytest.mark.parametrize(
    "was, now, accumulate, message",
    [
        (4, 2, 3, "start 4, with torchrun --nproc-per-node=4 .*; or train.accumulate=6, for as many batches per step, or --"),
        (4, 5, 3, "start 4, with torchrun --nproc-per-node=4 on one machine, or plain d2v-train for one; or --resume-allow"),
        (1, 2, 3, "its run had 1 process, this one has 2; start 1"),
        (4, 2, 6, ""),  # the same number of micro-batches per step
        (4, 4, 6, ""),
    ],
)
def test_another_number_of_processes(was, now, accumulate, message):
    """Each process of the run had three micro-batches per step."""
    compared = []
    saved = SimpleNamespace(
        folder="x",
        reading=nullcontext,
        state={"settings": {"processes": was, "train.accumulate": 3}},
        compare=lambda kind, settings, allowed: compared.append(set(allowed)),
    )
    settings, kept = {"processes": now, "train.accumulate": accumulate}, {"processes", "train.accumulate"}
    with pytest.raises(CheckpointError, match=message) if message else nullcontext():
        compare_settings(saved, settings, SimpleNamespace(resume_allow=[], defaults=dict))
    if not message:
        assert compared[0] & kept == (kept if was != now else set())
    compare_settings(saved, settings, SimpleNamespace(resume_allow=["processes"], defaults=dict))
    assert "processes" in compared[-1]


def test_only_settings_unknown_to_the_checkpoint_may_have_their_default():
    """A setting that was changed back to its default is still a difference."""
    compared, known = [], {"processes": 1, "train.accumulate": 1}
    saved = SimpleNamespace(
        reading=nullcontext,
        state={"settings": known | {"changed": 5}},
        compare=lambda kind, settings, allowed: compared.extend(allowed),
    )
    settings = known | {"changed": 1, "new": 2, "new and set": 9}
    defaults = {"changed": 1, "new": 2, "new and set": 3}
    compare_settings(saved, settings, SimpleNamespace(resume_allow=["asked"], defaults=lambda: defaults))
    assert {"new", "asked"} <= set(compared) and not {"changed", "new and set", *known} & set(compared)


def test_an_export_holds_nothing_of_one_that_was_killed(tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run"))
    (run.folder.path / "export.tmp").mkdir()
    (run.folder.path / "export.tmp" / "half").touch()
    synced = []
    monkeypatch.setattr(saving, "sync", lambda file: synced.append(file.name))
    for number in (0, 3):
        run.state.done = number
        export(run)
        assert json.loads((run.folder.path / "export" / "step.json").read_text()) == {"step": number}
    names = {file.name for file in (run.folder.path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "step.json"} <= names and "half" not in names
    assert not (run.folder.path / "export.tmp").exists() and sorted(synced) == sorted([*names, *names])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_an_export_that_fails_names_the_last_checkpoint_that_failed_too(error, tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run"))

    def full(student, folder):
        raise error

    monkeypatch.setattr(type(run.state.core.student), "save", full)
    for failed in (None, "the checkpoint of step 2 could not be written"):
        run.checkpoints.failed = failed
        with pytest.raises(OSError) as caught:
            export(run)
        assert str(caught.value) == f"{tmp_path}/run/export: {error}" + (f"; {failed}" if failed else "")


def test_the_generator_of_a_gpu_continues(monkeypatch):
    device, state, put = torch.device("cuda", 1), torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state if device.index == 1 else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: put.append(args))
    load_generator_states(*generator_states(device), device)
    ((found, where),) = put
    assert found is state and where == device


def test_of_changed_samples_the_first_five_are_named():
    def differing(kind, identity, allowed):
        assert identity["samples"]["number"] == 8
        raise CheckpointError("differs")

    for was, said in (
        ([0] * 8, "differs\n  6 of 8 changed, among them\n    b\n    c\n    d\n    e\n    f"),
        ([0] * 7, "differs"),  # other samples
    ):
        saved = SimpleNamespace(compare=differing, tensors=lambda name, was=was: {"digests": torch.tensor(was)})
        halves = [Samples(4, names, np.array(digests)) for names, digests in (("abcd", [0, 1, 1, 1]), ("efgh", [1, 1, 1, 0]))]
        with pytest.raises(CheckpointError) as caught:
            Samples.joined(halves).compare(saved, [])
        assert str(caught.value) == said


def test_the_first_rank_chooses_a_checkpoint_and_checks_a_shared_disk_for_all(tmp_path, monkeypatch):
    checkpoints, said = Checkpoints(tmp_path, 2), []
    for number in (1, 2):
        checkpoints.save(number, {"student": {"a": torch.ones(3)}}, {})
        checkpoints.wait()
    monkeypatch.setattr(saving, "from_main", lambda value: said.append(value) or tmp_path / "step-1")
    assert newest(checkpoints, main=True, shared=False).step == 2 and said == [tmp_path / "step-2"]
    file = tmp_path / "step-1" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert newest(checkpoints, main=False, shared=True).step == 1
    with pytest.raises(CheckpointError, match=r"student\.safetensors is damaged"):
        newest(checkpoints, main=False, shared=False)


def names(run):
    return sorted(folder.name for folder in run.checkpoints.folder.glob("*"))


def as_sharded(run):
    """A run that saves as sharded ones do, with all shards on this rank."""
    run.config = replace(run.config, train=replace(run.config.train, shard=True))
    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_sharded_run_completes_its_checkpoint_after_a_later_step(tmp_path):
    run = as_sharded(build(config("vision", tmp_path / "run", "train.keep_last=9")))
    (run.checkpoints.folder / "step-9.tmp").mkdir(parents=True)  # of one that was killed

    def advance():
        step(run.state, run.feed.take(1))

    advance()
    save(run, wait=False)
    run.checkpoints.wait()
    assert names(run) == ["step-1.tmp"] and run.callbacks.awaited is None
    assert finish(run) and run.callbacks.awaited == 1
    run.checkpoints.wait()
    assert names(run) == ["step-1"] and not finish(run)
    advance()
    save(run)
    assert names(run) == ["step-1", "step-2"]
    advance()
    save(run, wait=False)
    advance()
    save(run)
    assert names(run) == ["step-1", "step-2", "step-3", "step-4"]
    found, expected = run.checkpoints.newest(), run.state.tensors()
    assert {"student-0.safetensors", "rng-0.safetensors", "state.json"} < set(found.files)
    assert all(same(found.tensors(name), expected[name]) for name in ("student", "teacher", "optimizer"))


@pytest.mark.parametrize("sharded", [False, True])
def test_other_ranks_write_at_most_their_shards(sharded, tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run"))
    run = as_sharded(run) if sharded else run
    (run.checkpoints.folder / "step-9.tmp").mkdir(parents=True)  # which the first rank removes before others write
    step(run.state, run.feed.take(1))
    monkeypatch.setattr(type(run.accelerator), "is_main_process", False)
    reserve(run)
    assert (run.checkpoints._job is not None) is sharded
    save(run)
    assert names(run) == ["step-1.tmp"] * sharded + ["step-9.tmp"]
    assert not list(run.checkpoints.folder.rglob("state.json")) and run.callbacks.awaited is None


@pytest.mark.parametrize("sharded", [False, True])
def test_the_memory_of_copies_is_allocated_before_the_first_checkpoint(sharded, tmp_path):
    run = build(config("vision", tmp_path / "run"))
    run = as_sharded(run) if sharded else run
    step(run.state, run.feed.take(1))

    def addresses():
        run.checkpoints.wait()
        copies = run.checkpoints._copies
        return {(file, name): x.data_ptr() for file, values in copies.items() for name, x in values.items()}

    reserve(run)
    before = addresses()
    save(run)
    assert len(before) == sum(map(len, run.state.tensors().values())) and before.items() <= addresses().items()


def test_a_restored_run_is_as_it_was(tmp_path):
    run = build(config("vision", tmp_path / "run"))
    state = run.state
    step(state, run.feed.take(1))
    state.skipped.count, run.broken.seen, run.window.samples = 5, {3: "3.png"}, 7
    save(run)
    expected = {part: {name: x.clone() for name, x in values.items()} for part, values in state.tensors().items()}
    step(state, run.feed.take(1))
    state.skipped.count, run.broken.seen, run.window.samples = 6, {}, 8
    assert not any(same(values, expected[part]) for part, values in state.tensors().items())
    restore(run, run.checkpoints.newest())
    assert all(same(values, expected[part]) for part, values in state.tensors().items())
    assert (state.skipped.count, run.broken.seen, run.window.samples) == (5, {3: "3.png"}, 7)
    other = build(config("vision", tmp_path / "other", "encoder.config.intermediate_size=40"))
    with pytest.raises(CheckpointError, match=r"is from another model:\n.*: was \[48\] torch.float32, is \[40\] torch.float32"):
        restore(other, run.checkpoints.newest())


def test_with_another_number_of_ranks_each_draws_numbers_of_its_own(tmp_path, monkeypatch):
    """Which depend on the step: else all of dropout would be repeated."""
    run, drawn = build(config("vision", tmp_path / "run")), []
    step(run.state, run.feed.take(1))
    save(run)
    saved = run.checkpoints.newest()
    saved.state["ranks"] *= 2
    for rank, number in ((0, 1), (1, 1), (0, 2), (0, 1)):
        saved.state["step"] = number
        monkeypatch.setattr(type(run.accelerator), "process_index", rank)
        restore(run, saved)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[3] and all(len(set(each)) == 3 for each in zip(*drawn, strict=True))


def test_config_yaml_has_changed_settings_once_a_checkpoint_has_them(tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run"))
    run.changed, file = True, tmp_path / "run" / "config.yaml"
    save_description(run)
    assert not file.exists() and json.loads((tmp_path / "run" / "environment.json").read_text())

    def full(*args):
        time.sleep(0.2)
        raise OSError(28, "No space left on device")

    file.write_text("before")
    for write, expected in ((full, "before"), (checkpoint.save_file, run.config.yaml), (checkpoint.save_file, "later")):
        if expected == "later":
            file.write_text("later")  # nothing has changed since
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save_file", write)
            step(run.state, run.feed.take(1))
            save(run)
        assert file.read_text() == expected and run.changed == (expected == "before")


def test_the_tokenizer_of_a_run_is_saved_once(tmp_path):
    run = build(config("text", tmp_path / "run"))
    folder = tmp_path / "run" / "tokenizer"
    for unfinished in (folder, folder.with_suffix(".tmp")):  # of a run that was killed before its first step
        unfinished.mkdir()
        (unfinished / "half").touch()
    save_description(run)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == run.data.tokenizer.get_vocab()
    assert not (folder / "half").exists() and not folder.with_suffix(".tmp").exists()
    run.config = replace(run.config, resume=True)
    os.utime(folder, (0, 0))
    save_description(run)
    assert folder.stat().st_mtime == 0
    folder.rename(tmp_path / "lost")
    save_description(run)
    assert folder.exists()
    vision = build(config("vision", tmp_path / "vision"))
    save_description(vision)
    assert not (tmp_path / "vision" / "tokenizer").exists()
    assert (tmp_path / "vision" / "config.yaml").read_text() == vision.config.yaml
