"""Cost of the collapse monitor as a share of the step: time inside its methods relative to that of whole runs."""

import time
from collections import defaultdict

import pytest

from d2v_fast import diagnostics
from d2v_fast.config import parse
from d2v_fast.train import loop
from d2v_fast.train.build import build

LOGGED = ("_after_forward", "_before_update", "figures", "judge")
BASE = ["data.path=builtin", "data.name=null", "data.split=train", "train.workers=0"]
SPEECH = ["data.min_seconds=0.1", "data.join_seconds=5", "data.max_seconds=5", "data.batch_seconds=20"]
# At base size a run has few steps and logs every second one; the cost is then scaled to one log line per 50 steps.
CASES = {
    "text/tiny": ["train.steps=201"],
    "vision/tiny": ["train.steps=101"],
    "audio/tiny": ["train.steps=61"],
    "text/roberta-base": [*BASE, "data.tokenizer=train", "data.cross_documents=true", "train.batch_size=4"],
    "vision/beit-base": [*BASE, "train.epochs=null", "train.batch_size=8"],
    "audio/data2vec-base": [*BASE, *SPEECH],
}


@pytest.mark.parametrize("preset", CASES)
def test_monitor(preset, device, benchmark, monkeypatch, tmp_path):
    more = CASES[preset]
    if "tiny" not in preset:
        more = [*more, "train.steps=7", "train.log_every=2"]
    config, _ = parse(["--config", preset, *more, f"train.output={tmp_path / 'run'}", "train.save_every=0", "collapse.after=0"])
    spent, calls = defaultdict(float), []

    def watch(owner, name, into):
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            spent[into] += time.perf_counter() - start
            if name == "figures":
                calls.append(1)
            return result

        monkeypatch.setattr(owner, name, timed)

    for name in LOGGED:
        watch(diagnostics.Monitor, name, "monitor")
    watch(loop, "step", "step")
    benchmark.pedantic(loop.loop, args=(build(config, fused=True),), rounds=1)
    line, step = spent["monitor"] / len(calls), spent["step"] / config.train.steps
    every = config.train.log_every if "tiny" in preset else 50
    benchmark.extra_info.update(case=preset, log_every=every, seconds_a_line=line, seconds_a_step=step)
