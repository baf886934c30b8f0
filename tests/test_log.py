"""What a run logs: figures over a window of steps, lines of log.jsonl, TensorBoard, and progress on the terminal."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from d2v_fast.data import DataError
from d2v_fast.train.build import build
from d2v_fast.train.log import Progress, RunLog, Window, make_record
from d2v_fast.train.step import Outcome, step
from tests.test_training import config

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """The clock that the log reads; a test sets `now`."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr("d2v_fast.train.log.time", SimpleNamespace(perf_counter=lambda: found.now, time=lambda: 5.0))
    return found


def outcome(loss, cls_loss, finite=True):
    return Outcome(torch.tensor(loss), torch.tensor(1.0), torch.tensor(cls_loss), torch.tensor(finite))


def test_a_window_adds_up_steps_and_seconds(clock):
    """A skipped step's loss is left out, but its samples and time count."""
    window = Window(CPU)
    window.add(outcome(2.0, 0.5), 4)
    window.add(outcome(math.nan, math.inf, False), 4)
    window.add(outcome(4.0, 1.5), 3)
    clock.now = 103
    with window.waiting():
        clock.now = 105
    with window.paused():
        clock.now = 125
    expected = {"loss": 6.0, "cls_loss": 2.0, "steps": 2, "samples": 11, "waited": 2.0, "seconds": 5.0}
    assert window.state_dict() == expected
    resumed = Window(CPU)
    clock.now = 1000
    resumed.load_state_dict(expected)
    clock.now = 1001
    assert resumed.state_dict() == expected | {"seconds": 6.0}
    del expected["cls_loss"]  # a checkpoint older than data2vec 2.0
    resumed.load_state_dict(expected)
    assert resumed.state_dict() == expected | {"cls_loss": 0.0}
    resumed.clear()
    assert not any(resumed.state_dict().values())


def test_a_line_has_means_over_the_window(tmp_path, clock):
    run = build(config("vision", tmp_path / "run", "ema.start=0.5", "ema.end=0.75", "ema.anneal_steps=10"))
    run.state.monitor.due = True
    step(run.state, run.feed.take(1))
    run.window.load_state_dict({"loss": 6.0, "cls_loss": 0.0, "steps": 2, "samples": 12, "waited": 1.0, "seconds": 4.0})
    run.broken.seen[3] = "a.png: empty"
    run.state.skipped.count = 7
    run.state.world = 2  # each has read as many samples
    record = make_record(run.state, run.window, run.broken, 9, torch.tensor(0.5))
    expected = {"step": 1, "loss": 3.0, "samples_per_s": 6.0, "data_wait": 0.25, "epoch": 9, "grad_norm": 0.5, "time": 5.0}
    expected |= {"broken_samples": 1, "skipped_steps": 7, "ema_decay": 0.525, "gradient_peak": 1.0}
    assert {name: record[name] for name in expected} == pytest.approx(expected)


class Board:
    """Stands in for TensorBoard's writer."""

    full = False

    def __init__(self, folder, purge_step):
        Board.opened, Board.points, Board.closed = (folder, purge_step), [], False

    def add_scalar(self, name, value, step):
        if self.full:
            raise OSError(28, "No space left on device")
        Board.points.append((name, value, step))

    def close(self):
        Board.closed = True


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Board)
    return Board


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_resumed_log_drops_what_is_after_its_checkpoint(tmp_path, board):
    for name in ("log.jsonl", "alarms.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {number}}}\n' for number in (3, 4, 5)))
    with RunLog(tmp_path, 4) as log:
        log.write({"step": 6, "time": 1.0, "loss": 2.0, "grad_norm": math.inf})
    new = {"step": 6, "time": 1.0, "loss": 2.0, "grad_norm": None}  # JSON has no infinity
    assert lines(tmp_path / "log.jsonl") == [{"step": 3}, {"step": 4}, new]
    assert lines(tmp_path / "alarms.jsonl") == [{"step": 3}, {"step": 4}]
    assert board.opened == (str(tmp_path / "tensorboard"), 5) and board.closed
    assert sorted(board.points) == [("grad_norm", math.inf, 6), ("loss", 2.0, 6)]


def test_a_new_log_purges_nothing(tmp_path, board):
    with RunLog(tmp_path):
        pass
    assert board.opened == (str(tmp_path / "tensorboard"), None)
    board.opened = None
    with RunLog(tmp_path, board=False) as log, RunLog(None) as nothing:
        log.write({"step": 1, "loss": 1.0})
        nothing.write({"step": 1, "loss": 1.0})
    assert board.opened is None and len(lines(tmp_path / "log.jsonl")) == 1


def test_a_full_disk_ends_tensorboard_alone(tmp_path, board, monkeypatch, caplog):
    monkeypatch.setattr(board, "full", True)
    with RunLog(tmp_path) as log:
        for number in (1, 2):
            log.write({"step": number, "loss": 1.0})
    assert len(lines(tmp_path / "log.jsonl")) == 2
    assert caplog.text.count("the TensorBoard log could not be written, training continues") == 1


def test_the_time_left(clock, capsys):
    """Twenty steps since the resume took 10 s, and sixty are left."""
    record = dict(step=40, loss=2.0, target_std=0.5, prediction_std=0.25, samples_per_s=8.0, data_wait=0.25)
    figures = "loss 2.0000  target std 0.500  prediction std 0.250  8.0 samples/s  data wait 25%\n"
    for main, part, expected in (
        (True, "", f"step 40/100, 00:30 left: {figures}"),
        (True, "audio", f"step 40/100, 00:30 left: audio: {figures}"),
        (False, "", ""),
    ):
        clock.now = 100.0
        with Progress(100, 20, main) as progress:
            clock.now = 110.0
            progress.step()
            progress.show(record, part)
        assert capsys.readouterr().err == expected


def test_unreadable_samples_are_counted_over_all_ranks(tmp_path, monkeypatch):
    """40 of 4000 images may be unreadable; each rank has seen 21."""
    run = build(config("vision", tmp_path / "run"))
    run.broken.note([(i, f"{i}.png: empty") for i in range(21)])
    others = {i: f"{i}.png: empty" for i in range(100, 121)}
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, others])
    with pytest.raises(DataError, match="42 of 4000 samples cannot be read"):
        make_record(run.state, run.window, run.broken, 0, torch.tensor(1.0))
