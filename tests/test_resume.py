"""Resuming a run that was stopped, killed or hit by a fault gives the same result as an uninterrupted run."""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v_fast.checkpoint import Checkpoint
from d2v_fast.data.text import train_tokenizer
from tests.runs import Run, arguments, ranks, traced, train

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("waves").mkdir()
    for i in range(9):
        wave = 0.1 * np.random.default_rng(i).normal(size=4000 + 800 * i)
        soundfile.write(f"waves/{i}.wav", wave, 16000)


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def logged(run):
    """The last step in the log so far."""
    file = Path(run, "log.jsonl")
    return max((json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]), default=0) if file.exists() else 0


def figures(run):
    """The log without timings."""
    clocks = {"time", "samples_per_s", "data_wait"}
    return [{key: value for key, value in record.items() if key not in clocks} for record in lines(f"{run}/log.jsonl")]


def last(run):
    return max(Path(run, "checkpoints").glob("step-*[0-9]"), key=lambda folder: int(folder.name[5:]))


def assert_same(one, other):
    """Two runs are bit-identical: weights, teacher, optimizer, generators, counters, log."""
    a, b = Checkpoint(last(one)), Checkpoint(last(other))
    for name in ("student", "teacher", "optimizer", "rng"):
        assert a.files[f"{name}.safetensors"] == b.files[f"{name}.safetensors"], name
    for state in (a.state, b.state):
        del state["settings"]["train.output"], state["settings"]["train.workers"]
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
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(modality, more):
    """12 steps, compared with 5 (or 3) saved steps, some more, SIGKILL and a resume; two threads, in mid-epoch."""
    more = ["train.steps=12", "train.save_every=5", *more]
    killed_and_resumed(lambda name: arguments(modality, name, *more), k=5 if "train.save_every=3" not in more else 3)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [[], ["--fused"]])
@pytest.mark.parametrize("modality", ["text", "vision", "audio"])
def test_a_killed_and_resumed_preset_equals_an_uninterrupted_one(modality, fused):
    """At full preset size, where two threads share the work of a step."""
    more = ["train.steps=12", "train.save_every=5", "train.log_every=4", *fused]
    killed_and_resumed(lambda name: ["--config", f"{modality}/tiny", *more, f"train.output={name}"], k=5)


def killed_and_resumed(args, k, threads=2):
    code, said = train(args("whole"), functools.partial(traced, "whole.jsonl"), threads=threads)
    assert code == 0, said
    kill = functools.partial(traced, "killed.jsonl", kill_at=k + 3, after=f"killed/checkpoints/step-{k}")
    assert train(args("killed"), kill, threads=threads)[0] == -signal.SIGKILL
    assert last("killed").name == f"step-{k}"
    code, said = train(["--resume", "killed"], functools.partial(traced, "resumed.jsonl"), threads=threads)
    assert code == 0 and f"resumes after step {k}" in said, said
    whole, killed, resumed = (lines(f"{name}.jsonl") for name in ("whole", "killed", "resumed"))
    assert killed == whole[: k + 2] and resumed == whole[k:] and len(whole) == 12
    assert_same("whole", "killed")


def test_the_same_seed_gives_the_same_bits_in_two_processes():
    for modality, more in (("text", ["--fused"]), ("vision", []), ("audio", [])):
        for name in ("one", "other"):
            code, said = train(arguments(modality, f"{modality}-{name}", "train.steps=4", *more), threads=2)
            assert code == 0, said
        assert_same(f"{modality}-one", f"{modality}-other")


def test_a_second_run_in_the_same_folder_is_refused():
    first = Run(arguments("vision", "run", "train.steps=1000000", "train.save_every=1"))
    try:
        first.until(lambda: any(Path("run/checkpoints").glob("step-*[0-9]")))
        code, said = train(["--resume", "run"])
    finally:
        first.process.kill()
        first.wait()
    assert (code, said) == (1, "d2v-train: train.output=run: another d2v-train is running there; wait until it ends\n")
    steps = last("run").name.removeprefix("step-")
    code, said = train(["--resume", "run", f"train.steps={steps}", "--resume-allow", "train.steps"])
    assert code == 0, said


SPOILED = """
import atexit, os, sys, torch
from contextlib import suppress
from glob import glob
from d2v_fast import Data2Vec, cli
forward, calls = Data2Vec.forward, 0

def spoiled(self, *args, **kwargs):
    global calls
    output = forward(self, *args, **kwargs)
    calls += 1
    # The first call finds the parameters without a gradient.
    if calls == 3 and os.environ["RANK"] == "1" and not os.path.exists("run/checkpoints"):
        output.loss = output.loss + torch.tensor(float("inf"))  # its gradient stays finite
    return output

Data2Vec.forward = spoiled

def last():
    gloo = 0
    for name in glob("/proc/self/task/*/comm"):
        with suppress(OSError):  # a thread that has just ended
            gloo += "gloo" in open(name).read()
    print(f"ends with {gloo} threads of gloo", file=sys.stderr, flush=True)

atexit.register(last)
cli.train()
"""


def torchrun(*args, script=("-m", "d2v_fast.cli"), options=("--standalone", "--nproc_per_node=2"), **variables):
    command = [sys.executable, "-m", "torch.distributed.run", *options, *script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **variables}
    return subprocess.Popen([*command, *args], stderr=subprocess.PIPE, text=True, env=env)


def until_logged(process, step=1):
    """Wait until the run, which `process` has started, logs this step."""
    deadline = time.monotonic() + 240
    while logged("run") < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_resume_from_different_batch_counts():
    """Unreadable batches make ranks diverge. Each resumes from its own position; broken samples are counted over both."""
    images(12)
    for i in (3, 7):
        Path(f"images/{i:02}.png").write_text("no image")
    more = ["data.path=images", "train.max_broken=0.5", "train.batch_size=1", "train.steps=16", "train.log_every=1"]
    for name, steps in (("whole", 16), ("run", 8)):
        args = vision(name, *more, f"train.steps={steps}", "schedule.kind=constant", "schedule.warmup=0")
        for code, said in ranks(args):
            assert code == 0, said
            assert "unreadable" in said
    (code, said), (other, _) = ranks(["--resume", "run", "train.steps=16", "--resume-allow", "train.steps"])
    assert "resumes after step 8" in said and code == other == 0, said
    positions = [rank["batches"] for rank in Checkpoint(last("whole")).state["ranks"]]
    assert positions[0] != positions[1]
    assert_same("whole", "run")
    assert lines("run/log.jsonl")[-1]["broken_samples"] == 2


def test_two_ranks_skip_stop_and_resume_together():
    """One rank has an infinite loss, later one gets SIGTERM; both skip and stop. Compared with an uninterrupted run."""
    Path("spoiled.py").write_text(SPOILED)

    more = ["train.steps=60", "train.save_every=7", "train.keep_last=9", "train.log_every=1", "train.device=cpu"]
    spoil = functools.partial(exec, SPOILED.removesuffix("cli.train()\n"), {})
    (code, said), (other, _) = ranks(arguments("vision", "whole", *more), before=spoil)
    assert "step 2 skipped: loss or gradient is not finite" in said and code == other == 0, said
    both = functools.partial(torchrun, script=("spoiled.py",))
    process = both(*arguments("vision", "run", *more))
    until_logged(process, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert "exitcode  : 130" in said and "stopped at step" in said
    stopped = int(last("run").name[5:])
    assert 3 <= stopped < 60
    process = both("--resume", "run")
    resumed = process.communicate(timeout=120)[1]
    assert resumed.count(f"resumes after step {stopped}") == 1 and process.returncode == 0, resumed
    for each in (said, resumed):  # a leftover gloo thread may abort its rank at exit
        assert each.count("ends with 0 threads of gloo") == 2, each
    assert_same("whole", "run")
    assert lines("run/log.jsonl")[-1]["skipped_steps"] == 1
    code, said = train(["--resume", "run"])
    assert code == 1 and "its run had 2 processes, this one has 1; start 2" in said


FAILING = """
import os
from d2v_fast import cli
from d2v_fast.data import DataError
from d2v_fast.train.feed import Feed

take = Feed.take

def failing(self, number):
    if os.environ["RANK"] == "1" and self.trained == 5:
        raise DataError("the disk of rank 1 is gone")
    return take(self, number)

Feed.take = failing
cli.train()
"""


def test_if_one_of_two_ranks_cannot_load_both_save_and_one_process_resumes():
    """Rank 1 fails in step 6 of 20. Both ranks have trained on five batches, so one process resumes after ten."""
    Path("failing.py").write_text(FAILING)
    process = torchrun(*arguments("vision", "run", "train.steps=20", "train.save_every=1000"), script=("failing.py",))
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert "the disk of rank 1 is gone" in said and "another rank could not load its batches" in said, said
    assert last("run").name == "step-5" and Path("run/export/model.safetensors").exists()
    assert [rank["batches"] for rank in Checkpoint(last("run")).state["ranks"]] == [5, 5]
    more = ["train.steps=8", "--resume-allow", "train.steps", "--resume-allow", "processes"]
    code, said = train(["--resume", "run", *more], functools.partial(traced, "resumed.jsonl"))
    assert code == 0 and "resumes after step 5" in said, said
    assert [rank["batches"] for rank in Checkpoint(last("run")).state["ranks"]] == [13]
    code, said = train(arguments("vision", "whole", "train.steps=13"), functools.partial(traced, "whole.jsonl"))
    assert code == 0, said
    assert [each["batches"] for each in lines("resumed.jsonl")] == [each["batches"] for each in lines("whole.jsonl")[10:]]


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_the_ranks_with_a_checkpoint():
    """A container's first process receives it in this way."""
    process = torchrun(*arguments("vision", "run", "train.steps=100000", "train.save_every=100000"))
    until_logged(process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    stopped = int(last("run").name[5:])
    assert process.returncode == 1 and f"stopped at step {stopped} of 100000" in said, said
    resumed = torchrun("--resume", "run", f"train.steps={stopped + 2}", "--resume-allow", "train.steps")
    said = resumed.communicate(timeout=120)[1]
    assert resumed.returncode == 0 and f"resumes after step {stopped}" in said, said
    assert last("run").name == f"step-{stopped + 2}"


KILLED = """
import os
from d2v_fast import cli
from tests.runs import traced

first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"]
traced(f"rank-{rank}.jsonl", kill_at=8 if first and rank == "1" else None, after="run/checkpoints/step-5")
cli.train()
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed():
    """SIGKILL of rank 1 in step 8, three steps after a checkpoint; compared with an uninterrupted run, bit for bit."""
    Path("killed.py").write_text(KILLED)
    more = ["train.steps=12", "train.save_every=5", "--resume=auto"]
    whole = torchrun(*arguments("vision", "whole", *more))
    assert whole.communicate(timeout=120)[1] and whole.returncode == 0
    restarting = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
    args = arguments("vision", "run", *more)
    process = torchrun(*args, script=("killed.py",), options=restarting, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert "(exitcode: -9)" in said and said.count("resumes after step 5") == 1, said
    assert "restarted processes may fail" not in said
    steps = [line["step"] for line in lines("rank-1.jsonl")]
    assert steps == [*range(1, 8), *range(6, 13)]
    assert_same("whole", "run")


def write_stream(modality, files):
    """Arguments of a stream of `files` parquet files of 12 rows each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    words = np.array("alpha beta gamma delta dog runs over under".split())
    images(12 * files)
    for i in range(files):
        if modality == "text":
            column = {"text": [" ".join(rng.choice(words, n)) for n in rng.integers(5, 60, 12)]}
        else:
            column = {"image": [Path(f"images/{12 * i + j:02}.png").read_bytes() for j in range(12)]}
        pq.write_table(pa.table(column), f"{i}.parquet", row_group_size=4)
    more = [f"data.path=file://{Path.cwd()}/{{0..{files - 1}}}.parquet", "data.shuffle_buffer=5", "train.max_broken=0"]
    if modality == "text":
        train_tokenizer(iter([" ".join(words)]), 300, 512).save_pretrained("tokenizer")
        more += ["data.tokenizer=tokenizer", "data.block_size=16"]
    return more


@pytest.mark.slow
@pytest.mark.parametrize("modality, files", [("text", 2), ("text", 3), ("vision", 3)])
def test_a_stream_on_two_ranks_resumes_after_a_kill(modality, files):
    """SIGKILL of rank 1. Each rank reads one of two files, or half the rows of three."""
    Path("killed.py").write_text(KILLED)
    more = [*write_stream(modality, files), "train.steps=12", "train.save_every=5", "train.log_every=1"]
    whole = torchrun(*arguments(modality, "whole", *more))
    said = whole.communicate(timeout=120)[1]
    assert whole.returncode == 0 and "depends on the number of ranks, here 2" in said, said
    process = torchrun(*arguments(modality, "run", *more), script=("killed.py",))
    assert "(exitcode: -9)" in process.communicate(timeout=120)[1] and process.returncode != 0
    process = torchrun("--resume", "run")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and said.count("resumes after step 5") == 1, said
    assert_same("whole", "run")
    code, said = train(["--resume", "run", "--resume-allow", "processes"])
    assert code == 1 and "its run had 2 processes, this one has 1; each reads its part of the stream; start 2" in said, said


STAND_INS = {
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else printf "127.0.0.1\\n127.0.0.1\\n"; fi',
    # Two nodes; the stand-in passes the signal to both.
    "srun": """
        "$@" & one=$!
        "$@" & other=$!
        trap 'kill -USR1 $one $other' USR1
        while kill -0 $one || kill -0 $other; do wait; done 2> /dev/null
    """,
}


@pytest.mark.slow
def test_the_slurm_job_of_the_guide_is_queued_again_and_resumes(monkeypatch):
    """Two torchruns of one rank each; SIGUSR1 to the script, as SLURM sends it before the time limit."""
    job = re.search(r"^```sh\n(#!/bin/bash\n# job.sh\n.*?)^```$", (ROOT / "docs/many-machines.md").read_text(), re.M | re.S)[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = job.replace(":29500", f":{free.getsockname()[1]}")
    Path("bin").mkdir()
    for name, body in STAND_INS.items():
        Path("bin", name).write_text(f"#!/bin/bash\n{body}\n")
        Path("bin", name).chmod(0o755)
    for name, value in dict(GPUS="1", SLURM_JOB_ID="77", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="ab").items():
        monkeypatch.setenv(name, value)
    for name, value in dict(PYTHON=sys.executable, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TQDM_DISABLE="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")

    def start(*more):
        args = shlex.join([*arguments("vision", "run", "train.save_every=1000"), *more])
        text, count = re.subn(r"--config .*\n.*(?= --resume=auto)", args.replace("\\", r"\\\\"), job)
        assert count == 1
        Path("job.sh").write_text(text)
        return subprocess.Popen(["bash", "job.sh"], stderr=subprocess.PIPE, text=True)

    process = start("train.steps=100000")
    until_logged(process)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0 and Path("requeued").read_text() == "77\n" and "stopped at step" in said, said
    stopped = int(last("run").name[5:])
    process = start(f"train.steps={stopped + 2}", "--resume-allow", "train.steps")
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0 and f"resumes after step {stopped}" in said, said
    assert last("run").name == f"step-{stopped + 2}"


@pytest.mark.slow
def test_accelerate_launch_starts_the_ranks():
    """As in the guide: two ranks with --multi_gpu; other settings are named and ignored."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        f"--main_process_port={port}",
    ]
    args = arguments("vision", "run", "train.steps=2", "train.device=cpu", "--resume=auto")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "--mixed_precision=bf16", "-m", "d2v_fast.cli", *args], capture_output=True, text=True, timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "ACCELERATE_MIXED_PRECISION=bf16" in done.stderr and "takes its settings only from its config" in done.stderr
    assert len(Checkpoint(last("run")).state["ranks"]) == 2


SLOW_START = """
import time
from d2v_fast import cli
from d2v_fast.data.text import TextData

tokenize = TextData._tokenize

def slow(*args):  # only the process that holds the lock of the cache comes here
    time.sleep(60)
    return tokenize(*args)

TextData._tokenize = slow
cli.train()
"""


@pytest.mark.slow
def test_preparing_the_data_may_take_longer_than_the_ranks_wait_for_each_other():
    """Preparation takes 60 s, while collectives fail after 15 s."""
    Path("slow.py").write_text(SLOW_START)
    begin = time.monotonic()
    more = ["train.steps=2", "train.timeout_minutes=0.25", "data.cache=cache"]
    process = torchrun(*arguments("text", "run", *more), script=("slow.py",))
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "waiting for another process to build" in said and time.monotonic() - begin > 60
    assert lines("run/log.jsonl")[-1]["step"] == 2


def vision(folder, *more):
    return arguments("vision", folder, "train.save_every=2", *more)


class TestStopSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_the_first_signal_saves_after_the_step(self, number):
        """Loader workers get the signal too, as from a terminal or scheduler."""
        more = ["train.steps=2000", "train.workers=2", "train.save_every=0"]
        run = Run(
            arguments("vision", "run", *more), before=functools.partial(signal.signal, number, signal.SIG_DFL), own_group=True
        )
        run.until(lambda: logged("run") >= 8)
        os.killpg(run.process.pid, number)
        code, said = run.wait()
        stopped = int(last("run").name[5:])
        assert code == 130 and f"stopped at step {stopped} of 2000" in said and "--resume run continues" in said, said
        assert stopped >= 8 and "Traceback" not in said
        code, said = train(["--resume", "run", f"train.steps={stopped + 4}", "--resume-allow", "train.steps"])
        assert code == 0 and f"resumes after step {stopped}" in said
        assert [record["step"] for record in lines("run/log.jsonl")] == sorted({1, *range(4, stopped + 5, 4), stopped + 4})

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_second_signal_kills_at_once(self, number):
        run = Run(vision("run"), before=_endless_save)
        run.says("saving")
        run.send(number)
        time.sleep(1.2)
        assert run.process.is_alive()
        run.send(number)
        assert run.wait(10)[0] == -number

    def test_an_immediate_repeat_is_not_a_second_signal(self):
        """torchrun forwards Ctrl-C to ranks that already got it from the terminal."""
        run = Run(vision("run", "train.steps=2000"))
        run.until(lambda: logged("run"))
        for _ in range(3):
            run.send(signal.SIGINT)
            time.sleep(0.01)  # several pending signals would be delivered as one
        assert run.wait()[0] == 130


def _endless_save():
    from d2v_fast import checkpoint

    checkpoint.save_file = lambda *args: print("saving", file=sys.stderr, flush=True) or time.sleep(60)


def check_after_a_kill(run):
    """Every file is readable; the newest finished checkpoint is found. Returns its step."""
    from safetensors.torch import load_file

    finished = [int(folder.name[5:]) for folder in Path(run, "checkpoints").glob("step-*[0-9]")]
    for file in Path(run).rglob("*.safetensors"):
        if not any(part.endswith(".tmp") for part in file.parts):
            assert load_file(file)
    *whole, _ = Path(run, "log.jsonl").read_text().split("\n")
    assert all(json.loads(line) for line in whole)
    for step in finished:
        assert Checkpoint(Path(run, "checkpoints", f"step-{step}")).step == step
    return max(finished, default=0)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_random_kills_lose_no_finished_checkpoint(kills):
    """Repeated SIGKILL; the run resumes from its last finished checkpoint and ends bit-identical to an uninterrupted one.

    About half of the kills hit a save; up to 30 more follow if none did.
    """
    more = ["train.save_every=1", "train.export_every=3", "train.log_every=1", "schedule.kind=constant", "schedule.warmup=0"]
    rng = np.random.default_rng(kills)
    done = inside = kill_count = 0
    while kill_count < kills or not inside:
        assert kill_count < kills + 30, "no kill hit a save"
        kill_count += 1
        run = Run(["--resume", "run"] if done else arguments("vision", "run", "train.steps=1000000", *more))
        if done:
            run.says(f"resumes after step {done}")
        # The first step may take longer than all others.
        run.until(lambda done=done: any(int(x.name[5:]) > done for x in Path("run/checkpoints").glob("step-*[0-9]")))
        time.sleep(rng.uniform(0, 0.6))
        run.process.kill()
        code, said = run.wait()
        assert code == -signal.SIGKILL and "skipped a checkpoint" not in said, said
        inside += any(Path("run/checkpoints").glob("*.tmp"))
        done, before = check_after_a_kill("run"), done
        assert done >= max(1, before)
    code, said = train(["--resume", "run", f"train.steps={done + 5}", "--resume-allow", "train.steps"])
    assert code == 0 and f"resumes after step {done}" in said, said
    assert train(arguments("vision", "whole", f"train.steps={done + 5}", *more))[0] == 0
    assert_same("whole", "run")
    print(f"{kill_count} kills, {inside} during a save, {done} steps")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a 2 MB disk and yield True; without the permission to mount, yield False: tests then limit file sizes."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "disk"], capture_output=True).returncode == 0
    yield mounted
    if mounted:
        subprocess.run(["umount", "-l", "disk"], check=True)


def _full_from_step_5_to_8(mounted):
    import resource

    from d2v_fast.train import loop

    take, hard = loop._next_batches, resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def taking(run, part):
        run.checkpoints.wait()
        done = run.state.done
        if done == 4 and mounted:
            with open("disk/ballast", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"0" * 4096)
                except OSError:
                    pass
        elif done == 8 and mounted:
            os.unlink("disk/ballast")
        elif not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 if 4 <= done < 8 else hard, hard))
        return take(run, part)

    loop._next_batches = taking


def test_a_full_disk_does_not_end_the_training(small_disk):
    more = ["train.steps=12", "train.export_every=6", "train.log_every=1"]
    code, said = train(vision("disk/run", *more), functools.partial(_full_from_step_5_to_8, small_disk))
    assert code == 0, said
    reason = "No space left on device" if small_disk else "File too large"
    for what in ("the checkpoint of step 6 could not be written", "the export could not be written, training continues"):
        assert [line for line in said.splitlines() if what in line and reason in line], said
    assert train(vision("whole", *more))[0] == 0
    assert_same("whole", "disk/run")


def test_a_disk_that_stays_full_gives_exit_code_1():
    code, said = train(vision("run", "train.steps=4"), _no_checkpoint_fits)
    assert code == 1 and said.splitlines()[-1].startswith("d2v-train: the checkpoint of step 4 could not be written")
    assert Path("run/export/model.safetensors").exists()


def test_an_export_that_does_not_fit_on_disk_gives_exit_code_1():
    code, said = train(vision("run", "train.steps=4", "train.export_every=2", "train.save_every=0"), _small_files_fit)
    assert code == 1 and "Traceback" not in said and said.count("the export could not be written, training continues") == 2
    assert said.splitlines()[-1].startswith("d2v-train: run/export: ") and logged("run") == 4, said


def _small_files_fit():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _no_checkpoint_fits():
    from d2v_fast import checkpoint

    def full(*args):
        raise OSError(28, "No space left on device")

    checkpoint.save_file = full


def test_a_dead_loader_worker_saves_and_stops_the_run():
    """One message; the steps before are saved and the run can be resumed."""
    more = ["schedule.kind=constant", "schedule.warmup=0"]
    run = Run(arguments("vision", "run", "train.steps=5000", "train.workers=2", "train.save_every=0", *more))
    run.until(lambda: logged("run") >= 8)
    worker = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    code, said = run.wait()
    assert code == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("d2v-train: a data loading process died: ")
    saved = int(last("run").name[5:])
    assert saved >= logged("run") > saved - 4
    code, said = train(["--resume", "run", f"train.steps={saved + 4}", "--resume-allow", "train.steps"])
    assert code == 0
    assert train(arguments("vision", "whole", f"train.steps={saved + 4}", "train.save_every=0", *more))[0] == 0
    assert_same("whole", "run")


def images(count, folder="images"):
    from PIL import Image

    Path(folder).mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{i:02}.png")


def test_counts_of_broken_samples_and_skipped_steps_survive():
    images(12)
    Path("images/03.png").write_text("no image")
    more = ["data.path=images", "train.max_broken=0.5", "train.steps=12"]
    assert train(vision("whole", *more), _infinite_at_step_2)[0] == 0
    code, said = train(vision("run", *more, "train.steps=8"), _infinite_at_step_2)
    assert code == 0 and said.count("skipped an unreadable sample: images/03.png") == 1
    code, said = train(["--resume", "run", "train.steps=12", "--resume-allow", "train.steps"])
    assert code == 0 and "unreadable" not in said
    a, b = lines("whole/log.jsonl")[-1], lines("run/log.jsonl")[-1]
    assert (b["broken_samples"], b["skipped_steps"]) == (a["broken_samples"], a["skipped_steps"]) == (1, 1)


def _infinite_at_step_2(until=2):
    from d2v_fast.train import loop

    step = loop.step

    def spoiled(state, micro_batches):
        if 2 <= state.done + 1 <= until:
            micro_batches[0]["source"][0, 0, 0, 0] = float("inf")
        return step(state, micro_batches)

    loop.step = spoiled


def test_repeated_non_finite_steps_stop_the_run_and_dump_the_samples():
    code, said = train(vision("run", "train.max_skipped=3"), functools.partial(_infinite_at_step_2, 99))
    assert code == 1 and "Traceback" not in said
    assert "not finite in 3 steps in a row, up to step 4: run/not-finite-step-4.json" in said.splitlines()[-1]
    dump = json.loads(Path("run/not-finite-step-4.json").read_text())
    assert [entry["step"] for entry in dump["skipped"]] == [2, 3, 4] and dump["settings"]["train.max_skipped"] == 3
    assert all(len(entry["samples"]) == 2 and entry["loss"] in ("nan", "inf") for entry in dump["skipped"])
    assert next(iter(dump["skipped"][0]["samples"].values())).startswith("builtin")
    # The log stays valid JSON and the weights stay finite.
    assert lines("run/log.jsonl")[-1]["step"] == 4 and "NaN" not in Path("run/log.jsonl").read_text()
    student = Checkpoint(last("run")).tensors("student")
    assert all(value.isfinite().all() for value in student.values() if value.is_floating_point())


def test_a_file_removed_between_epochs_is_skipped_and_blocks_resuming():
    """The run names and counts it and continues, but does not resume with fewer samples, whose order would differ."""
    images(12)
    more = ["data.path=images", "train.steps=14", "train.max_broken=0.2"]
    code, said = train(vision("run", *more), _vanishing)
    assert code == 0 and said.count("skipped an unreadable sample: images/05.png: [Errno 2] No such file") == 1
    assert lines("run/log.jsonl")[-1]["broken_samples"] == 1
    code, said = train(["--resume", "run", "train.steps=16", "--resume-allow", "train.steps"])
    assert code == 1 and "samples.number: was 12, is 11" in said
    code, said = train(["--resume", "run", "train.steps=16", "--resume-allow", "train.steps", "--resume-allow", "samples"])
    assert code == 0 and "resumes after step 14" in said


def test_changed_file_content_blocks_resuming():
    """Name and size stay the same. Data moved to another folder count as the same data."""
    images(6)
    assert train(vision("run", "data.path=images", "train.steps=2"))[0] == 0
    on = ["--resume", "run", "train.steps=4", "--resume-allow", "train.steps"]
    os.rename("images", "pictures")
    moved = ["data.path=pictures"]
    assert train([*on, *moved])[0] == 0
    Path("pictures/03.png").write_bytes(Path("pictures/02.png").read_bytes())
    code, said = train([*on, *moved])
    changed = "\n  1 of 6 changed, among them\n    pictures/03.png\n"
    assert code == 1 and "samples.content: was " in said and changed in said, said
    assert train([*on, *moved, "--resume-allow", "data"])[0] == 1  # `data` allows changed settings, not changed samples
    assert train([*on, *moved, "--resume-allow", "samples.content"])[0] == 0


def _vanishing():
    from d2v_fast.train import loop

    step = loop.step

    def stepping(state, micro_batches):
        if state.done == 6:  # after 6 steps of 2 images: the first epoch of 12
            os.unlink("images/05.png")
        return step(state, micro_batches)

    loop.step = stepping


def test_clock_jumps_do_not_change_the_run():
    """A day back, then a year ahead: no figure is negative, checkpoints keep their order, the run is bit-identical."""
    more = ["train.steps=12", "train.log_every=1"]
    assert train(vision("whole", *more))[0] == 0
    code, said = train(vision("run", *more), _jumping_clock)
    assert code == 0, said
    assert_same("whole", "run")
    log = lines("run/log.jsonl")
    assert min(later["time"] - before["time"] for before, later in itertools.pairwise(log)) < -80_000
    assert all(record["samples_per_s"] > 0 and 0 <= record["data_wait"] <= 1 for record in log)
    code, said = train(["--resume", "run"], _jumping_clock)
    assert code == 0 and "resumes after step 12; nothing is left to train" in said


def _jumping_clock():
    from d2v_fast.train import loop

    step, real = loop.step, time.time

    def stepping(state, micro_batches):
        shift = 0 if state.done < 4 else -86_400 if state.done < 8 else 3e7
        time.time = lambda: real() + shift
        return step(state, micro_batches)

    loop.step = stepping


class TestResumeChecks:
    """Differences from the saved run are printed, and no new run starts instead."""

    @pytest.fixture(autouse=True)
    def run(self, here):
        assert train(vision("run", "train.steps=4"))[0] == 0

    @pytest.mark.parametrize(
        "more, message",
        [
            (["train.seed=3"], "train.seed: was 0, is 3"),
            (["optimizer.lr=0.1", "mask.prob=0.5"], "optimizer.lr: was 0.002, is 0.1\n  mask.prob: was 0.6, is 0.5"),
            (["--fused"], "fused: was False, is True"),
            (["encoder.config.intermediate_size=48"], "encoder.config.intermediate_size: was 32, is 48"),
            (
                ["encoder.config.intermediate_size=48", "--resume-allow", "encoder"],
                "is from another model:\n  student.model.layers.0.mlp.fc1.bias: was [32] torch.float32, is [48] torch.float32",
            ),
            (["head.layers=2", "--resume-allow", "head.layers"], "head.2.weight: was nothing, is [16, 32]"),
            (["--resume-allow", "train.sed"], "--resume-allow train.sed: no such setting; did you mean train.seed?"),
        ],
    )
    def test_changed_settings_are_refused(self, more, message):
        before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
        code, said = train(["--resume", "run", *more])
        assert code == 1 and message in said and "Traceback" not in said, said
        assert {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()} == before

    def test_settings_that_do_not_affect_weights_may_change(self):
        more = ["train.workers=1", "train.log_every=1", "train.save_every=1", "train.keep_last=1", "collapse.action=off"]
        code, said = train(["--resume", "run", *more, "train.steps=6", "--resume-allow", "train.steps"])
        assert code == 0 and [folder.name for folder in Path("run/checkpoints").iterdir()] == ["step-6"], said

    def test_resume_allow_permits_changes(self):
        code, _ = train(
            ["--resume", "run", "train.steps=5", "optimizer.lr=0.5", "schedule.kind=constant", "schedule.warmup=0"]
            + [part for key in ("train.steps", "optimizer.lr", "schedule") for part in ("--resume-allow", key)]
        )
        assert code == 0 and lines("run/log.jsonl")[-1]["lr"] == 0.5

    def test_a_checkpoint_without_a_teacher_is_refused(self):
        folder = last("run")
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["teacher.safetensors"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        code, said = train(["--resume", "run"])
        assert code == 1 and f"{folder}: holds no teacher" in said

    def test_the_newest_intact_checkpoint_is_used(self):
        (Path("run/checkpoints/step-4") / "optimizer.safetensors").unlink()
        code, said = train(["--resume", "run"])
        assert code == 0 and "resumes after step 2" in said
        assert "skipped a checkpoint: run/checkpoints/step-4/optimizer.safetensors is missing" in said

    def test_a_run_may_be_given_by_folder_config_or_output(self):
        on = ["train.steps=6", "--resume-allow", "train.steps"]
        for args in (
            ["--resume", *vision("run")],
            ["--config", "run/config.yaml", "--resume"],
        ):
            code, said = train([*args, *on])
            assert code == 0 and "resumes after step" in said, said
        os.rename("run", "moved")
        code, said = train(["--resume=moved/", *on])
        assert code == 0 and Path("moved/checkpoints/step-6").exists() and not Path("run").exists(), said

    @pytest.mark.parametrize(
        "args, message",
        [
            (["--resume", "nowhere"], "--resume nowhere: holds no config.yaml, so it is not the folder of a run"),
            (["--resume", "--config", "vision/tiny"], "--resume: which run? --resume RUN, or train.output=RUN"),
            (["--resume", "old.pt"], "old.pt: is a pickle, which can run any code when it is loaded"),
            (["--resume"], "--resume: which run? --resume RUN, or train.output=RUN"),
            (["--config", "run"], "--config run: is a folder; its settings are in run/config.yaml"),
            (vision("run"), "already holds a run; --resume continues it"),
        ],
    )
    def test_invalid_resume_arguments_give_a_one_line_message(self, args, message):
        code, said = train(args)
        assert code == 1 and message in said and len(said.strip().splitlines()) == 1

    def test_a_run_without_a_checkpoint_is_refused(self):
        subprocess.run(["rm", "-r", "run/checkpoints"], check=True)
        code, said = train(["--resume", "run"])
        assert code == 1 and "run/checkpoints: no checkpoint; another train.output without" in said
        code, said = train(vision("run"))
        assert code == 1 and "already holds a run; it has no checkpoint to resume from; remove it, or choose" in said

    def test_a_copied_run_resumes_without_touching_the_original(self):
        subprocess.run(["cp", "-r", "run", "copy"], check=True)
        code, said = train(["--config", "copy/config.yaml", "--resume", "train.steps=6", "--resume-allow", "train.steps"])
        assert code == 0 and last("copy").name == "step-6" and last("run").name == "step-4", said

    def test_the_saved_config_starts_an_identical_new_run(self):
        code, said = train(["--config", "run/config.yaml"])
        (other,) = Path("runs").iterdir()
        assert code == 0 and other.name.startswith("run-2"), said
        assert_same("run", other)

    def test_allowed_changes_are_kept_only_after_a_checkpoint(self):
        longer = ["--resume", "run", "train.steps=100000", "train.save_every=0", "--resume-allow", "train.steps"]
        run = Run([*longer, "train.log_every=1"])
        run.until(lambda: logged("run") > 5)
        run.process.kill()
        run.wait()
        code, said = train(["--resume", "run"])
        assert code == 0 and "nothing is left to train" in said, said
        code, said = train(["--resume", "run", "train.steps=6", "--resume-allow", "train.steps"])
        assert code == 0 and "steps: 6" in Path("run/config.yaml").read_text(), said
        assert train(["--resume", "run"])[0] == 0

    def test_an_invalid_state_json_is_refused(self):
        folder = last("run")
        whole = json.loads((folder / "state.json").read_text())
        for part, value in [(part, None) for part in whole if part not in ("step", "scaler")] + [
            ("ranks", []),
            ("skipped", "x"),
        ]:
            spoiled = {key: kept for key, kept in whole.items() if key != part} | ({} if value is None else {part: value})
            (folder / "state.json").write_text(json.dumps(spoiled))
            manifest = json.loads((folder / "manifest.json").read_text())
            content = (folder / "state.json").read_bytes()
            manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            code, said = train(["--resume", "run"])
            assert code == 1 and f"d2v-train: {folder}: not a valid version 3 checkpoint: " in said, (part, said)

    def test_corrupt_log_lines_are_dropped(self):
        with open("run/log.jsonl", "a") as log:
            log.write('{"step": 1e999}\n{"step": null}\n' + "[" * 100_000 + '\n\0\0{}\n"step"\n{"step": 5')
        code, said = train(["--resume", "run", "train.steps=6", "--resume-allow", "train.steps"])
        assert code == 0 and [line["step"] for line in lines("run/log.jsonl")] == [1, 4, 6], said


def test_the_folder_is_locked_from_the_start_and_failed_starts_leave_nothing(monkeypatch):
    """Also while the data are read; a run that fails to start leaves no folder."""
    from d2v_fast.config import parse
    from d2v_fast.train import build, loop

    def another(*args):
        code, said = train(vision("run", "train.seed=5"))
        assert code == 1 and "another d2v-train is running there" in said, said
        return make_data(*args)

    make_data = build.make_data
    monkeypatch.setattr(build, "make_data", another)
    assert loop.loop(build.build(parse(vision("run", "train.steps=2"))[0])) == 0
    assert train(["--resume", "run"])[0] == 0
    code, said = train(vision("other", "data.path=nowhere"))
    assert code == 1 and not Path("other").exists(), said
    Path("file").touch()
    code, said = train(vision("file"))
    assert code == 1 and said.startswith("d2v-train: train.output=file: cannot be written, choose another folder"), said


def test_added_text_keeps_the_tokenizer_of_the_run():
    Path("few.txt").write_text("\n".join(f"the cat number {i} sat on the mat" for i in range(300)))
    Path("more.txt").write_text(Path("few.txt").read_text() + "\n".join(f"zebras zoom {i} times" for i in range(300)))
    Path("run/tokenizer").mkdir(parents=True)
    Path("run/tokenizer/tokenizer.json").write_text("of a run that was killed before its first step")
    assert train(arguments("text", "run", "train.steps=2", "data.path=few.txt"))[0] == 0
    tokenizer = Path("run/export/tokenizer.json").read_bytes()
    more = ["data.path=more.txt", "train.steps=4", "--resume-allow", "samples", "--resume-allow", "train.steps"]
    code, said = train(["--resume", "run", *more])
    assert code == 0 and Path("run/export/tokenizer.json").read_bytes() == tokenizer, said


def test_a_resumed_run_does_not_repeat_an_alarm():
    more = ["train.steps=12", "train.log_every=1", "train.keep_last=9", "collapse.after=2", "collapse.target_std=9"]
    assert train(vision("run", *more, "train.save_every=5"))[0] == 0
    alarms = lines("run/alarms.jsonl")
    subprocess.run(["rm", "-r", *(str(last("run").with_name(f"step-{n}")) for n in (10, 12))], check=True)
    code, said = train(["--resume", "run"])
    assert code == 0 and "resumes after step 5" in said and "target_std" not in said, said
    assert lines("run/alarms.jsonl") == alarms


def test_a_run_stopped_by_collapse_leaves_a_checkpoint():
    more = ["train.save_every=0", "collapse.after=2", "collapse.target_std=9", "collapse.action=stop"]
    code, said = train(arguments("vision", "run", *more, "train.log_every=1"))
    assert code == 1 and "target_std" in said and last("run").name == "step-3", said
    code, said = train(["--resume", "run", "collapse.action=off", "train.steps=5", "--resume-allow", "train.steps"])
    assert code == 0 and "resumes after step 3" in said, said


def test_training_continues_if_stderr_is_closed():
    """As in `d2v-train 2>&1 | tee log`, where Ctrl-C ends tee first."""
    command = [sys.executable, "-m", "d2v_fast.cli", *arguments("vision", "run", "train.steps=100000", "train.log_every=1")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    env.pop("TQDM_DISABLE", None)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    deadline = time.monotonic() + 120
    while logged("run") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.stderr.close()
    before = logged("run")
    while logged("run") < before + 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and int(last("run").name[5:]) >= before


def test_no_worker_process_outlives_the_loop():
    """Matters if the trainer runs inside another program."""
    from d2v_fast.config import parse
    from d2v_fast.train.build import build
    from d2v_fast.train.loop import loop

    trainer = build(parse(arguments("vision", "run", "train.steps=3", "train.workers=2"))[0])
    before = set(multiprocessing.active_children())
    assert loop(trainer) == 0
    assert set(multiprocessing.active_children()) == before
