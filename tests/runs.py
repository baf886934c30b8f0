"""d2v-train in processes that may be killed, forked from a server with all imports done, so that they start quickly."""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"d2v_fast.{name}" for name in ("cli", "train", "data.text", "data.vision", "data.audio")]
    + ["accelerate", "datasets", "jsonargparse", "soundfile", "soxr", "tqdm", "torch.utils.tensorboard"]
    + [f"transformers.models.{name}" for name in ("roberta.modeling_roberta", "vit.modeling_vit")]
    + ["transformers.models.data2vec.modeling_data2vec_audio", "tests.runs"]
)

SMALL = {
    "text": "encoder.config.num_attention_heads=2 data.vocab_size=400 encoder.config.hidden_dropout_prob=0.1 "
    "encoder.config.attention_probs_dropout_prob=0.1",
    "vision": "encoder.config.num_attention_heads=2 encoder.config.hidden_dropout_prob=0.1",
    "audio": "encoder.config.num_attention_heads=2 encoder.config.conv_dim=[8,8,8,8,8,8,8] data.max_seconds=0.5 "
    "data.join_seconds=0.5 encoder.config.hidden_dropout=0.1 encoder.config.layerdrop=0.2 data.path=waves",
}


def arguments(modality, folder, *more):
    """A run of a few milliseconds per step, with dropout, so that random number state matters."""
    settings = ["encoder.config.hidden_size=16", "encoder.config.num_hidden_layers=3", "encoder.config.intermediate_size=32"]
    settings += ["targets.top_k=2", "train.batch_size=2", "train.workers=0", "train.precision=fp32", "train.log_every=4"]
    settings += [*SMALL[modality].split(), f"train.output={folder}"]
    return ["--config", f"{modality}/tiny", *settings, *more]


class Run:
    """One d2v-train process; it calls `before` first, and starts its own process group with `own_group`."""

    def __init__(self, args, before=None, threads=1, own_group=False):
        self.file = Path(f"stderr-{time.monotonic_ns()}")
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # so that the server imports the code under test
        os.environ["TQDM_DISABLE"] = "1"
        args = (os.getcwd(), str(self.file), list(args), before, threads, own_group)
        self.process = CONTEXT.Process(target=_train, args=args)
        self.process.start()

    def wait(self, timeout=60):
        """Return (exit code, negative if a signal ended it; output)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.said())
        return self.process.exitcode, self.said()

    def said(self):
        return self.file.read_text() if self.file.exists() else ""

    def send(self, number):
        os.kill(self.process.pid, number)

    def says(self, words, timeout=60):
        """Wait until the output contains `words` or the process has ended."""
        deadline = time.monotonic() + timeout
        while words not in self.said() and self.process.is_alive():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def until(self, condition, timeout=60):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.01)


def train(*args, **settings):
    return Run(*args, **settings).wait()


def ranks(args, count=2, before=None):
    """Train on `count` ranks, with the variables that torchrun sets; return exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [Run(args, functools.partial(_as_rank, rank, count, port, before)) for rank in range(count)]
    return [run.wait(120) for run in started]


def _as_rank(rank, count, port, before):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if before is not None:
        before()


def _train(folder, stderr, args, before, threads, own_group):
    import faulthandler

    import torch

    from d2v_fast import cli

    os.chdir(folder)
    if own_group:
        os.setsid()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    faulthandler.dump_traceback_later(50)  # before the timeout of the test
    torch.set_num_threads(threads)
    if before is not None:
        before()
    sys.argv = ["d2v-train", *args]
    cli.train()


def traced(file, kill_at=None, after=None):
    """Write each step's batches to a file; die at the start of step `kill_at`, once the folder `after` exists."""
    from d2v_fast.train import loop

    step = loop.step

    def traced_step(state, micro_batches):
        if state.done + 1 == kill_at:
            while not Path(after).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        batches = [
            {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() if hasattr(v, "numpy") else v for k, v in batch.items()}
            for batch in micro_batches
        ]
        with open(file, "a") as out:
            out.write(json.dumps({"step": state.done + 1, "batches": batches}) + "\n")
        return step(state, micro_batches)

    loop.step = traced_step
