"""A run that is stopped, killed or hit by a fault, and goes on as if nothing had been."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v_fast.checkpoint import Checkpoint
from tests.runs import arguments, traced, train


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("waves").mkdir()
    for i in range(9):
        wave = 0.1 * np.random.default_rng(i).normal(size=4000 + 800 * i)
        soundfile.write(f"waves/{i}.wav", wave, 16000)


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def figures(run):
    """The log without what a clock says."""
    clocks = {"time", "samples_per_s", "data_wait"}
    return [{key: value for key, value in record.items() if key not in clocks} for record in lines(f"{run}/log.jsonl")]


def last(run):
    return max(Path(run, "checkpoints").glob("step-*[0-9]"), key=lambda folder: int(folder.name[5:]))


def assert_same(one, other):
    """Two runs came to the same bits: weights, teacher, optimizer, generators, counters, log."""
    a, b = Checkpoint(last(one)), Checkpoint(last(other))
    for name in ("student", "teacher", "optimizer", "rng"):
        assert a.files[f"{name}.safetensors"] == b.files[f"{name}.safetensors"], name
    for state in (a.state, b.state):
        del state["settings"]["train.output"]
        for rank in state["ranks"]:
            del rank["window"]["seconds"], rank["window"]["waited"]
    assert a.state == b.state
    assert figures(one) == figures(other)


@pytest.mark.parametrize(
    "modality, more",
    [
        ("text", ["train.workers=2"]),
        ("vision", ["train.workers=0", "train.accumulate=2", "train.save_every=3"]),
        ("audio", ["train.workers=2", "train.accumulate=2", "--fused"]),
        *(
            pytest.param(
                modality, [f"train.workers={workers}", f"train.accumulate={accumulate}", *fused], marks=pytest.mark.slow
            )
            for modality in ("text", "vision", "audio")
            for workers in (0, 2)
            for accumulate in (1, 2)
            for fused in ([], ["--fused"])
        ),
    ],
)
def test_killed_and_resumed_it_is_the_same_run(modality, more):
    """12 steps, beside 5 (or 3) that are saved, some more, SIGKILL, and the rest: on two threads, in the midst of an epoch."""
    more = ["train.steps=12", "train.save_every=5", *more]
    k = 5 if "train.save_every=3" not in more else 3
    code, said = train(arguments(modality, "whole", *more), functools.partial(traced, "whole.jsonl"), threads=2)
    assert code == 0, said
    kill = functools.partial(traced, "killed.jsonl", kill_at=k + 3, after=f"killed/checkpoints/step-{k}")
    assert train(arguments(modality, "killed", *more), kill, threads=2)[0] == -signal.SIGKILL
    assert last("killed").name == f"step-{k}"
    code, said = train(["--resume", "killed"], functools.partial(traced, "resumed.jsonl"), threads=2)
    assert code == 0 and f"goes on after step {k}" in said, said
    whole, killed, resumed = (lines(f"{name}.jsonl") for name in ("whole", "killed", "resumed"))
    assert killed == whole[: k + 2] and resumed == whole[k:] and len(whole) == 12
    assert_same("whole", "killed")


def test_the_same_seed_gives_the_same_bits_in_two_processes():
    for modality, more in (("text", ["--fused"]), ("vision", []), ("audio", [])):
        for name in ("one", "other"):
            code, said = train(arguments(modality, f"{modality}-{name}", "train.steps=4", *more), threads=2)
            assert code == 0, said
        assert_same(f"{modality}-one", f"{modality}-other")


def test_two_ranks_stop_together_and_go_on():
    """torchrun, SIGTERM to one rank alone; the other agrees. Then on, beside a run without a break."""

    def torchrun(*args):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "d2v_fast.cli"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen([*command, *args], stderr=subprocess.PIPE, text=True, env=env)

    more = ["train.steps=60", "train.save_every=0", "train.log_every=1", "train.device=cpu"]
    process = torchrun(*arguments("vision", "run", *more))
    deadline = time.monotonic() + 120
    while not Path("run/log.jsonl").exists() or len(lines("run/log.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert "exitcode  : 130" in said and "stopped at step" in said
    stopped = int(last("run").name[5:])
    assert 3 <= stopped < 60
    process = torchrun("--resume", "run")
    assert process.communicate(timeout=120)[1].count(f"goes on after step {stopped}") == 1 and process.returncode == 0
    process = torchrun(*arguments("vision", "whole", *more))
    process.communicate(timeout=120)
    assert_same("whole", "run")
    code, said = train(["--resume", "run"])
    assert code == 1 and "processes: was 2, is 1" in said
