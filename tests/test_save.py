"""The contents of a checkpoint besides weights, the settings that may differ on resume, and the files of an export."""

import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2v_fast.checkpoint import CheckpointError
from d2v_fast.train.build import build
from d2v_fast.train.save import compare_settings, export, generator_states, load_generator_states, restore, save
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


def test_an_export_holds_nothing_of_one_that_was_killed(tmp_path):
    run = build(config("vision", tmp_path / "run"))
    (run.folder.path / "export.tmp").mkdir()
    (run.folder.path / "export.tmp" / "half").touch()
    export(run)
    names = {file.name for file in (run.folder.path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "step.json"} <= names and "half" not in names
    assert not (run.folder.path / "export.tmp").exists()
