"""Skipped steps whose flag the host reads one step later, compared to the bit with steps whose flag it reads at once."""

import itertools
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from d2v_fast.checkpoint import Checkpoint
from d2v_fast.config import parse
from d2v_fast.ops import triton_adam, triton_loss
from d2v_fast.train.build import build
from d2v_fast.train.guards import NotFiniteError
from d2v_fast.train.loop import loop
from d2v_fast.train.step import Pending, _to_host, can_be_late, step
from tests.test_training import FIRST_SKIPPED, arguments, records

pytestmark = pytest.mark.filterwarnings(FIRST_SKIPPED)
SETTINGS = ["train.steps=9", "train.save_every=3", "train.keep_last=9", "train.log_every=4"]
SETTINGS.append("encoder.config.hidden_dropout_prob=0.1")


def train(folder, late, spoiled, *more, resume=False):
    """A run with an infinite pixel in these steps; returns how many flags were read a step later."""
    args = ["--resume", str(folder)] if resume else arguments("vision", folder, *SETTINGS, *more)
    return train_all(build(parse(args)[0], fused=True), late, spoiled)


def train_all(run, late, spoiled):
    for part in run.each:
        part.state.late = late

    def spoiling(state, micro_batches):
        run.checkpoints.wait()  # a checkpoint that is due while another is being written is delayed
        if state.done + 1 in spoiled:
            micro_batches[0]["source"].view(-1)[0] = float("inf")
        return step(state, micro_batches)

    with mock.patch("d2v_fast.train.loop.step", spoiling), mock.patch.object(Pending, "wait", autospec=True) as asked:
        asked.side_effect = lambda pending: bool(pending.finite)
        assert loop(run) == 0
    return asked.call_count


def left(folder):
    """The files of a run, without times."""
    found = {}
    for path in sorted(folder.glob("checkpoints/step-*")):
        checkpoint = Checkpoint(path)
        state = checkpoint.state
        del state["settings"]["train.output"]
        for rank in state["ranks"]:
            del rank["window"]["seconds"], rank["window"]["waited"]
        found[path.name] = ({name: file for name, file in checkpoint.files.items() if name != "state.json"}, state)
        assert len(found[path.name][0]) >= 4  # student, teacher, optimizer and random numbers
        assert all(x.isfinite().all() for x in checkpoint.tensors("optimizer").values())
    times = ("time", "samples_per_s", "data_wait")
    found["log"] = [{key: value for key, value in line.items() if key not in times} for line in records(folder)]
    for path in folder.glob("not-finite-*"):
        found[path.name] = json.loads(path.read_text())["skipped"]
    return found


# The log has steps 1, 4, 8 and 9; checkpoints come after 3, 6 and 9.
@pytest.mark.parametrize("spoiled", [(1, 5, 6, 9), (3, 4, 8), (2, 3, 7)], ids=str)
def test_a_run_is_the_same(tmp_path, spoiled, caplog):
    assert train(tmp_path / "at once", False, spoiled) == 0
    warned, expected = caplog.messages, left(tmp_path / "at once")
    caplog.clear()
    assert train(tmp_path / "late", True, spoiled) == 5  # all steps that are not logged
    skips = [message for message in warned if "skipped" in message]
    assert len(skips) == len(spoiled) and skips == [message for message in caplog.messages if "skipped" in message]
    assert left(tmp_path / "late") == expected and len(expected) == 4
    assert expected["log"][-1]["skipped_steps"] == len(spoiled)
    for saved in (3, 6):
        part = tmp_path / f"resumed-{saved}"
        shutil.copytree(tmp_path / "late", part)
        for later in range(saved + 3, 10, 3):
            shutil.rmtree(part / f"checkpoints/step-{later}")
        train(part, True, spoiled, resume=True)
        assert left(part) == expected


@pytest.mark.parametrize("limit", [1, 3])
def test_the_limit_stops_the_run_at_the_same_step(tmp_path, limit):
    found, more = [], (f"train.max_skipped={limit}", "train.log_every=100")
    for late in (False, True):
        folder = tmp_path / str(late)
        with pytest.raises(NotFiniteError, match=f"in {limit} steps in a row, up to step {4 + limit}:"):
            train(folder, late, range(5, 10), *more)
        found.append(left(folder))
        assert f"not-finite-step-{4 + limit}.json" in found[-1]
    assert found[0] == found[1]


def test_what_the_host_knows_between_two_steps(tmp_path):
    run = build(parse(arguments("vision", tmp_path / "run"))[0], fused=True)
    state = run.state
    assert not state.late  # on a CPU
    state.late = True
    batches = list(itertools.islice(run.feed.batches, 3))
    batches[1]["source"][0, 0, 0, 0] = float("nan")
    taken, skipped = step(state, batches[:1]), step(state, batches[1:2])
    assert taken.finite.dtype == torch.bool and bool(taken.finite) and not bool(skipped.finite)
    assert state.pending.step == 2 and state.skipped.count == 0
    assert state.pending.micro_batches[0].keys() <= {"epoch", "samples"}  # no tensor is kept alive
    state.settle()
    assert state.pending is None and state.skipped.count == 1 and state.core.teacher.step == 1
    assert state.skipped.suspects[0]["step"] == 2 and state.skipped.suspects[0]["loss"] == "nan"
    state.settle()
    assert state.skipped.count == 1
    step(state, batches[2:])
    state.settle()
    assert state.skipped.suspects == [] and state.core.teacher.step == 2


@pytest.mark.parametrize(
    "obstacle", ["", "not fused", "lamb", "ranks", "scaler", "cpu", "no triton", "not fp32", "one pass", "copied"]
)
def test_where_the_device_can_skip(tmp_path, obstacle, monkeypatch):
    lamb = ["optimizer.kind=lamb"] if obstacle == "lamb" else []
    state = build(parse(arguments("vision", tmp_path / "run", *lamb))[0], fused=obstacle != "not fused").state
    state.core.teacher.moved_by_optimizer = obstacle == "one pass"
    if obstacle == "copied":
        state.core.teacher.copied = frozenset(name for name, _ in state.core.student.named_parameters())
    state.device = torch.device("cpu" if obstacle == "cpu" else "cuda")
    state.world = 2 if obstacle == "ranks" else 1
    if obstacle == "scaler":
        state.accelerator = SimpleNamespace(scaler=object())
    monkeypatch.setattr(triton_loss, "obstacle", lambda device: "no" if obstacle == "no triton" else None)
    prepared = mock.Mock(side_effect=ValueError if obstacle == "not fp32" else None)
    monkeypatch.setattr(triton_adam, "LerpUnless", prepared)
    assert can_be_late(state) == (obstacle in ("", "one pass", "copied"))  # the last two have nothing to average here
    assert (state.core.teacher.lerp_unless is prepared.return_value) == (obstacle == "")


def test_a_flag_of_a_gpu_is_read_once_its_copy_is_there(monkeypatch):
    events = []

    class Event:
        def record(self):
            events.append("recorded")

        def synchronize(self):
            events.append("awaited")

    def copying(where, non_blocking):
        assert where == "cpu" and non_blocking
        events.append("copied")
        return torch.tensor(True)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    flag = SimpleNamespace(device=torch.device("cuda"), to=copying)
    pending = Pending(1, [], torch.tensor(0.0), torch.tensor(0.0), *_to_host(flag))
    assert pending.wait() and events == ["copied", "recorded", "awaited"]
