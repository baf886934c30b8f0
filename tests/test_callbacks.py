"""Callbacks, trackers and the probe during training."""

import importlib.util
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from d2v_fast import Callback
from d2v_fast.config import ConfigError, parse
from d2v_fast.data import DataError
from d2v_fast.probe import knn_accuracy
from d2v_fast.train import loop as loops
from d2v_fast.train import train
from d2v_fast.train.build import build
from d2v_fast.train.callbacks import CallbackError, Callbacks, make_callback
from d2v_fast.train.log import Trackers
from d2v_fast.train.online_probe import OnlineProbe
from d2v_fast.train.step import step
from tests.test_training import config, records

MINE = """
import torch

from d2v_fast import Callback

class Notes(Callback):
    def __init__(self, file: str = "notes.txt"):
        self.file, self.steps = file, 0

    def write(self, *words):
        with open(self.file, "a") as out:
            print(*words, file=out)

    def on_start(self, run):
        self.write("start", run.state.done, self.steps)

    def on_step(self, run, outcome):
        self.steps += 1
        self.write("step", run.state.done, float(outcome.loss) > 0)

    def on_log(self, run, record):
        record["seen"] = self.steps
        self.write("log", record["step"])

    def on_checkpoint(self, run, folder):
        self.write("checkpoint", folder.name, (folder / "manifest.json").exists())

    def on_end(self, run, error):
        self.write("end", run.state.done, (run.folder.path / "export" / "config.json").exists(), repr(error))

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Broken(Callback):
    def on_step(self, run, outcome):
        if run.state.done == 2:
            raise KeyError("no such thing")


class Words(Callback):
    def on_log(self, run, record):
        record["mood"] = "fine"


class Freezes(Callback):
    # One parameter before the first step, another later. Both change all the same, so that averaging would differ from copying.

    def on_start(self, run):
        self.frozen = []
        self.freeze(run)

    def on_step(self, run, outcome):
        student, teacher = run.state.core.student, run.state.core.teacher.module
        copied = [torch.equal(*(dict(x.named_parameters())[name] for x in (student, teacher))) for name in self.frozen]
        assert copied == [True] * len(self.frozen), self.frozen
        if run.state.done == 2:
            self.freeze(run)
            del run.state.pairs
        with torch.no_grad():
            for name, x in student.named_parameters():
                x += name in self.frozen

    def freeze(self, run):
        name, x = next((name, x) for name, x in run.state.core.student.named_parameters() if x.requires_grad)
        x.requires_grad_(False)
        self.frozen.append(name)


class Stops(Callback):
    def on_step(self, run, outcome):
        run.stop = run.state.done == 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mine.py").write_text(MINE)
    yield
    sys.modules.pop("mine", None)


def resumed(*more):
    return parse(["--resume", "run", *more])[0]


def test_callbacks_are_called_and_their_state_is_resumed():
    given = "train.callbacks=[{class_path: mine:Notes, init_args: {file: mine.txt}}]"
    more = ["train.save_every=2", "train.log_every=3", given]
    assert train(config("vision", "run", *more)) == 0
    said = Path("mine.txt").read_text().splitlines()
    steps = [f"step {i} True" for i in (1, 2, 3, 4)]
    assert [line for line in said if line.startswith("step")] == steps
    assert said[:3] == ["start 0 0", "step 1 True", "log 1"] and said[-1] == "end 4 True None"
    assert [line for line in said if "checkpoint" in line] == ["checkpoint step-2 True", "checkpoint step-4 True"]
    assert [record["seen"] for record in records(Path("run"))] == [1, 3, 4]
    Path("mine.txt").unlink()
    assert train(replace(resumed("train.steps=5"), resume_allow=["train.steps"])) == 0
    assert Path("mine.txt").read_text().splitlines()[:2] == ["start 4 4", "step 5 True"]
    assert records(Path("run"))[-1]["seen"] == 5


def test_a_callback_may_freeze_parameters(monkeypatch):
    """The teacher copies them, although a run lists its pairs once."""
    run = build(config("vision", "run", "train.steps=4", "train.callbacks=[mine:Freezes]"))
    listed = []
    pairs = run.state.core.teacher.pairs
    monkeypatch.setattr(run.state.core.teacher, "pairs", lambda student: listed.append(run.state.done) or pairs(student))
    assert loops.loop(run) == 0
    assert listed == [0, 2]


def test_each_checkpoint_is_told_of_once_it_is_written(monkeypatch):
    """Between two steps; also of the one before the last, which the last follows at once."""
    run = build(config("vision", "run", "train.steps=7", "train.save_every=3", "train.callbacks=[mine:Notes]"))

    def waiting(state, batches):
        run.checkpoints.wait()
        return step(state, batches)

    monkeypatch.setattr(loops, "step", waiting)
    assert loops.loop(run) == 0
    said = [line.split()[:2] for line in Path("notes.txt").read_text().splitlines()]
    found = [word for kind, word in said if kind in ("step", "checkpoint")]
    assert found == ["1", "2", "3", "4", "step-3", "5", "6", "7", "step-6", "step-7"]


def test_a_resumed_run_may_add_or_drop_callbacks():
    """Callbacks are not compared on resume, and older settings did not have them."""
    assert train(config("vision", "run", "train.callbacks=[mine:Notes]")) == 0
    Path("notes.txt").unlink()
    on = replace(resumed("train.callbacks=[]", "train.steps=5"), resume_allow=["train.steps"])
    assert train(on) == 0 and not Path("notes.txt").exists()
    state = json.loads(Path("run/checkpoints/step-5/state.json").read_text())
    assert "callbacks" not in state


def test_a_failing_callback_is_named_and_the_run_is_saved():
    message = r"train\.callbacks: mine:Broken: on_step fails at step 2: KeyError: 'no such thing' \(mine\.py, line \d+\)"
    with pytest.raises(CallbackError, match=message) as caught:
        train(config("vision", "run", "train.callbacks=[mine:Notes,mine:Broken]"))
    line = int(str(caught.value).rpartition("line ")[2].rstrip(")"))
    assert "raise KeyError" in MINE.splitlines()[line - 1]
    assert [folder.name for folder in Path("run/checkpoints").iterdir()] == ["step-2"]
    assert Path("notes.txt").read_text().splitlines()[-1].startswith("end 2 True CallbackError(")
    on = replace(resumed("train.callbacks=[]"), resume_allow=["train.steps"])
    assert train(on) == 0
    with pytest.raises(CallbackError, match=r"mine:Words: on_log fails .*'mood': 'fine'.*expected numbers by name"):
        train(config("vision", "other", "train.callbacks=[mine:Words]"))


def test_it_may_stop_the_run(caplog):
    assert train(config("vision", "run", "train.callbacks=[mine:Stops]")) == 130
    assert "stopped at step 3 of 4" in caplog.text and records(Path("run"))[-1]["step"] == 2
    assert Path("run/checkpoints/step-3").exists()


@pytest.mark.parametrize(
    "entry, message",
    [
        ("os:system", "found <built-in function system>, expected a class that derives from d2v_fast.Callback"),
        ("subprocess:Popen", "expected a class that derives from d2v_fast.Callback"),
        ("nowhere:Class", "nowhere:Class: cannot be imported: No module named 'nowhere'; expected package.module:Class"),
        ("mine:Nothing", "has no attribute 'Nothing'"),
        ("mine", "cannot be imported"),
        ({"class_path": "mine:Notes", "init_args": {"files": 1}}, r"mine:Notes: __init__ fails: TypeError: .*'files'"),
        ({"class": "mine:Notes"}, r"found {'class': 'mine:Notes'}, expected package\.module:Class or, with arguments, "),
        ({"class_path": "mine:Notes", "init_args": [1]}, "expected package.module:Class or, with arguments, "),
    ],
)
def test_invalid_callbacks_are_refused(entry, message):
    with pytest.raises(CallbackError, match=rf"^train\.callbacks[:=].*{message}"):
        make_callback(entry)


def test_on_which_ranks():
    class Everywhere(Callback):
        every_rank = True

    both = [Callback(), Everywhere()]
    assert [callback for _, callback in Callbacks(both, main=True).local] == both
    assert [callback for _, callback in Callbacks(both, main=False).local] == both[1:]


class TestTrackers:
    def test_tensorboard_has_what_the_log_has(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert train(config("vision", "run", "train.trackers=[tensorboard]", "train.callbacks=[mine:Notes]")) == 0
        found = EventAccumulator("run/tensorboard").Reload()
        for name in ("loss", "target_std", "seen"):
            points = {event.step: event.value for event in found.Scalars(name)}
            assert points == {r["step"]: pytest.approx(r[name], rel=1e-6) for r in records(Path("run"))}
        assert len(list(Path("run/tensorboard").glob("events*"))) == 1  # and not another one of RunLog
        (settings,) = Path("run/tensorboard").rglob("hparams.yml")
        assert "optimizer.lr: 0.0" in settings.read_text() and "train.epochs: 'null'" in settings.read_text()

    @pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
    def test_a_package_that_is_missing(self, name, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=rf"train\.trackers={name}: is not installed; pip install {name}"):
            build(config("vision", "run", f"train.trackers=[{name}]"))
        assert not Path("run").exists()

    def test_an_unknown_tracker(self):
        with pytest.raises(ConfigError, match=r"train\.trackers"):
            config("vision", "run", "train.trackers=[tensorbored]")

    @pytest.mark.parametrize("at", ["start", "log", "finish"])
    @pytest.mark.parametrize(
        "which, opened",
        [("wandb", {"name": "run", "dir": "run"}), ("mlflow", {"run_name": "run"}), ("trackio", {"name": "run"})],
    )
    def test_one_that_fails(self, which, opened, at, monkeypatch, caplog):
        calls, real = [], inspect.signature(LOGGER_TYPE_TO_CLASS[which])

        class Tracker:
            def __init__(self, project, **arguments):
                real.bind(project, **arguments)
                calls.append((project, arguments))

            def __getattr__(self, name):
                def call(*args, **more):
                    calls.append((name, args, more))
                    if name == at:
                        raise RuntimeError("no network")

                return call

        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name == which or find(name))
        monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {which: Tracker})
        run = config("vision", "run", f"train.trackers=[{which}]")
        if at == "start":
            with pytest.raises(ConfigError, match=rf"train\.trackers={which}: cannot be started: no network"):
                train(run)
            return
        assert train(run) == 0
        assert calls[0] == ("d2v-fast", opened)
        assert calls[2][:2] == ("store_init_configuration", ({**calls[2][1][0], "train.steps": 4, "modality": "vision"},))
        logged = [call for call in calls if call[0] == "log"]
        assert len(logged) == (1 if at == "log" else 3) and logged[0][2] == {"step": 1} and "loss" in logged[0][1][0]
        assert ("dropped, the run continues: no network" in caplog.text) == (at == "log")
        assert ("may lack its last points" in caplog.text) == (at == "finish")


class TestProbe:
    def test_knn_by_hand(self):
        """Three neighbours at cosines 1, 0.6 and 0.6: the first outweighs the others at temperature 0.07, but not at 1."""
        train, labels = np.array([[2.0, 0], [3, 4], [3, -4]]), ["a", "b", "b"]
        test = np.array([[5.0, 0]])
        assert knn_accuracy(train, labels, test, ["a"]) == 1 and knn_accuracy(train, labels, test, ["b"]) == 0
        assert knn_accuracy(train, labels, test, ["b"], temperature=1.0) == 1

    def test_knn_against_a_loop(self):
        rng = np.random.default_rng(0)
        train, test = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
        labels, expected = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
        right = 0
        for row, label in zip(test, expected, strict=True):
            cosine = [row @ other / np.sqrt(row @ row) / np.sqrt(other @ other) for other in train]
            votes = [0.0] * 3
            for i in sorted(range(60), key=lambda i: -cosine[i])[:20]:
                votes[labels[i]] += np.exp(cosine[i] / 0.07)
            right += int(np.argmax(votes)) == label
        assert knn_accuracy(train, labels, test, expected) == right / 40

    @pytest.mark.parametrize("modality", ["vision", "audio"])
    def test_the_probe_does_not_change_training(self, modality, monkeypatch, caplog):
        """With dropout, losses and weights keep every bit although the probe draws random numbers."""
        caplog.set_level("INFO")
        monkeypatch.setattr("d2v_fast.train.online_probe.SAMPLES", 12)
        accuracy = OnlineProbe._accuracy

        def drawing(self, run):
            torch.rand(3), np.random.rand(3)
            return accuracy(self, run)

        monkeypatch.setattr(OnlineProbe, "_accuracy", drawing)
        name = "hidden_dropout_prob" if modality == "vision" else "hidden_dropout"
        more = ["train.log_every=1", "train.workers=0", f"encoder.config.{name}=0.2"]
        assert train(config(modality, "plain", *more)) == 0
        assert train(config(modality, "probed", *more, "train.probe_every=3")) == 0
        plain, probed = (records(Path(name)) for name in ("plain", "probed"))
        assert [r["step"] for r in probed if "probe_knn" in r] == [3, 4]  # after three, and at the end
        for key in ("loss", "grad_norm", "target_std"):
            assert [r[key] for r in plain] == [r[key] for r in probed], key
        assert "probe on builtin: k-NN of the teacher" in caplog.text
        assert all(0 <= r["probe_knn"] <= 1 for r in probed if "probe_knn" in r)

    def test_the_probe_separates_distinct_classes(self):
        """One class is dark and one is bright, which any encoder distinguishes."""
        rng = np.random.default_rng(0)
        for split, label, i in np.ndindex(2, 2, 6):
            file = Path("set", ("train", "test")[split], "ab"[label], f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(200 * label, 50 + 200 * label, (32, 32, 3), dtype=np.uint8)).save(file)
        more = ["data.path=set/train", "train.probe_every=2", "train.probe_data=set"]
        assert train(config("vision", "run", *more, "train.batch_size=2")) == 0
        assert records(Path("run"))[-1]["probe_knn"] == 1.0
        assert train(replace(resumed("train.steps=5"), resume_allow=["train.steps"])) == 0
        assert [r["step"] for r in records(Path("run")) if "probe_knn" in r] == [2, 4, 5]

    def test_what_cannot_be_probed(self):
        with pytest.raises(ConfigError, match=r"train\.probe_every: text has no labels; d2v-probe RUN"):
            build(config("text", "run", "train.probe_every=2"))
        Path("photos/a").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(f"photos/a/{i}.png")
        own = ["data.path=photos", "train.probe_every=2", "train.batch_size=2"]
        with pytest.raises(ConfigError, match=r"train\.probe_data: missing; the run trains on photos"):
            build(config("vision", "run", *own))
        with pytest.raises(DataError, match=r"train\.probe_data=photos: a probe needs labels of at least two classes"):
            train(config("vision", "run", *own, "train.probe_data=photos"))
        assert not Path("run").exists()


def test_trackers_get_figures_alone():
    tracker = Trackers([])
    tracker.trackers["x"] = type("X", (), {"log": lambda self, values, step: seen.append((step, values))})()
    seen = []
    for name in ("", "vision"):
        tracker.on_log(SimpleNamespace(name=name), {"step": 3, "time": 1.0, "loss": 2.0})
    assert seen == [(3, {"loss": 2.0}), (3, {"vision.loss": 2.0})]


@pytest.mark.parametrize("done, purged", [(0, None), (4, 5)])
def test_a_resumed_run_replaces_the_points_after_its_checkpoint(done, purged, monkeypatch):
    opened = []

    class Tracker(SimpleNamespace):
        def __init__(self, *args, **more):
            opened.append((args, more))
            super().__init__(start=lambda: None, store_init_configuration=opened.append)

    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Tracker})
    state, settings = SimpleNamespace(done=done), {"a": 1, "b": None, "c": [2]}
    run = SimpleNamespace(folder=SimpleNamespace(path=Path("run")), state=state, settings=settings)
    Trackers(["tensorboard"]).on_start(run)
    assert opened == [(("tensorboard", Path("run")), {"purge_step": purged}), {"a": 1, "b": "null", "c": "[2]"}]
