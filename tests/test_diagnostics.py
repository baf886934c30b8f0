import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from d2v_fast import diagnostics
from d2v_fast.config import CollapseConfig, parse
from d2v_fast.diagnostics import CollapseError, Monitor, constant_loss, effective_rank, environment
from d2v_fast.model import Data2Vec
from d2v_fast.ops.reference import Moments
from d2v_fast.training import Trainer
from tests.models import make
from tests.test_training import config, records


class TestEffectiveRank:
    def test_by_hand(self):
        assert float(effective_rank(torch.ones(100, 8))) == pytest.approx(1, abs=1e-3)
        assert float(effective_rank(torch.eye(8).repeat(5, 1))) == pytest.approx(8, rel=1e-4)
        # Shares 3/4 and 1/4: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)).
        assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(4 / 3**0.75, rel=1e-4)

    def test_of_many_rows_uses_some_of_all(self):
        rows = torch.cat([torch.eye(4)[:1].repeat(3000, 1), torch.eye(4)[1:2].repeat(3000, 1)])
        assert float(effective_rank(rows)) == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_loss_of_a_constant(beta):
    """Against numerical integration of the loss over a normal density."""
    std = np.array([0.2, 1.0])
    moments = Moments(torch.tensor(50.0), torch.tensor([3.0, -1.0]), torch.tensor(std**2 * 50, dtype=torch.float32))

    def value(e):
        return e**2 if beta == 0 else e**2 / (2 * beta) if abs(e) < beta else abs(e) - beta / 2

    expected = sum(
        integrate.quad(lambda e, s=s: value(e) * stats.norm.pdf(e, 0, s), -12 * s, 12 * s, limit=200)[0] for s in std
    )
    assert float(constant_loss(moments, beta, 0.7)) == pytest.approx(0.7 * expected, rel=1e-4)


@pytest.fixture
def due(tmp_path):
    """A trainer of two micro-batches after a step that was due, its batches, and its parameters from before."""
    trainer = Trainer(config("vision", tmp_path / "run", "train.accumulate=2", "schedule.warmup=0"))
    stream = trainer._batches()
    batches = [next(stream) for _ in range(2)]
    trainer.core.train()
    before = {name: p.detach().clone() for name, p in trainer.core.named_parameters()}
    trainer.monitor.due = True
    trainer.step(batches)
    return trainer, batches, before


class TestFigures:
    def test_are_those_of_the_step(self, due):
        trainer, batches, before = due
        after = dict(trainer.core.named_parameters())
        found = trainer.monitor.figures(loss=3.0)
        moved = [(p - before[n]).flatten() for n, p in after.items() if p.requires_grad]
        assert found["update_norm"] == pytest.approx(float(torch.cat(moved).detach().norm()), rel=1e-4)
        pairs = [
            (p, after["teacher.module." + n[8:]]) for n, p in after.items() if n.startswith("student.") and p.requires_grad
        ]
        apart, size = (torch.cat([f(*pair).detach().flatten() for pair in pairs]).norm() for f in (torch.sub, lambda a, b: a))
        assert found["teacher_distance"] == pytest.approx(float(apart / size), rel=1e-4)

        # The forward again, with the weights of then: no dropout in this model.
        with torch.no_grad():
            for name, p in after.items():
                p.copy_(before[name])
            core, targets, states = trainer.core, [], []
            for batch in batches:
                mask = batch["mask"]
                layers = core.teacher_layers(batch["source"], None, mask.shape[1], None)
                normal = [(x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for x in layers]
                mean = torch.stack(normal).mean(0)
                mean = (mean - mean.mean(2, True)) / (mean.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
                targets.append(mean[mask])
                features = core.student.embed(batch["source"])
                states.append(core.student.contextualize(core.student.mask_features(features, mask))[mask])
        rows = torch.cat(targets).double().numpy()
        assert found["target_std"] == pytest.approx(np.sqrt(rows.var(0, ddof=1) + 1e-6).mean(), rel=1e-3)
        worst = (rows.var(0).sum()) * core.loss_settings["scale"]
        assert found["relative_loss"] == pytest.approx(3.0 / worst, rel=1e-3)
        # The rest is of the last micro-batch.
        flat = features.flatten(0, 1).double().numpy()
        assert found["feature_std"] == pytest.approx(flat.std(0, ddof=1).mean(), rel=1e-3)
        variation = (flat.std(0) / np.sqrt((flat**2).mean(0))).mean()
        assert found["feature_variation"] == pytest.approx(variation, rel=1e-2)
        for name, rows in (("student_rank", states[-1]), ("teacher_rank", layers[-1][mask])):
            values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
            share = values / values.sum()
            assert found[name] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)

    def test_of_a_skipped_step(self, due):
        trainer, (batch, _), _ = due
        trainer.monitor.figures(1.0)
        batch["source"][0, 0, 0, 0] = float("nan")
        trainer.monitor.due = True
        trainer.step([batch])
        assert trainer.monitor.figures(1.0)["update_norm"] == 0

    def test_nothing_is_done_where_nothing_is_logged(self, tmp_path, monkeypatch):
        calls = []
        measure = effective_rank
        monkeypatch.setattr(diagnostics, "effective_rank", lambda rows: calls.append(1) or measure(rows))
        trainer = Trainer(config("vision", tmp_path / "run", "train.steps=9", "train.log_every=4"))
        kept = []
        step = trainer.step
        monkeypatch.setattr(trainer, "step", lambda batches: (step(batches), kept.append(trainer.monitor.weights))[0])
        trainer.run()
        assert [r["step"] for r in records(tmp_path / "run")] == [1, 4, 8, 9]
        assert len(calls) == 2 * 4
        assert [i for i, weights in enumerate(kept, 1) if weights is not None] == [1, 4, 8, 9]
        assert trainer.monitor.weights is None and trainer.monitor.last is None


FINE = {
    "step": 200, "target_std": 0.6, "prediction_std": 0.4, "teacher_rank": 50.0, "student_rank": 40.0, "feature_variation": 0.8,
    "relative_loss": 0.5, "teacher_distance": 0.1, "ema_decay": 0.999,
}  # fmt: skip


@pytest.fixture
def monitor(tmp_path):
    model = Data2Vec(make("vit"), top_k=1)
    optimizer = torch.optim.SGD(model.head.parameters())
    return lambda steps=1000, warmup=0, **settings: Monitor(
        model, optimizer, CollapseConfig(**settings), steps, warmup, None, tmp_path
    )


class TestRules:
    @pytest.mark.parametrize(
        "broken, message",
        [
            ({"target_std": 0.09}, "targets are becoming constant: target_std 0.09 is below collapse.target_std=0.1; try"),
            ({"prediction_std": 0.002}, "predictions are becoming constant: prediction_std 0.002 is below"),
            ({"teacher_rank": 2.0}, "the teacher's states shrink to a few directions: teacher_rank 2 is below collapse.rank=4"),
            ({"student_rank": 1.5}, "the student's states shrink to a few directions"),
            ({"feature_variation": 0.01}, "the local features hardly differ, the stem is dead or dying"),
            ({"relative_loss": 3.0}, "the run diverges: relative_loss 3 is above collapse.divergence=2"),
            ({"relative_loss": math.nan}, "the run diverges: relative_loss nan is above"),
            ({"relative_loss": 0.001}, "the loss is suspiciously low, as if the student saw what it predicts"),
            ({"teacher_distance": 0.0}, "the teacher is a copy of the student"),
            ({"ema_decay": 1.0}, "the teacher stands still: ema_decay 1 is above collapse.decay"),
        ],
    )
    def test_each_has_its_message(self, broken, message, monitor, caplog, tmp_path):
        judge = monitor().judge
        assert judge(FINE) == []
        (alarm,) = judge(FINE | broken | {"step": 250})
        assert message in alarm and re.search("; (try|check) ", alarm)
        assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [f"step 250: {alarm}"]
        assert json.loads((tmp_path / "alarms.jsonl").read_text()) == {"step": 250, "alarms": [alarm]}
        with pytest.raises(CollapseError, match="step 200: "):
            monitor(action="stop").judge(FINE | broken)
        assert monitor(action="off").judge(FINE | broken) == []

    def test_warn_once_an_event(self, monitor):
        judge = monitor(after=0, prediction_std=0.1).judge
        values = (0.5, 0.09, 0.05, 0.11, 0.09, 0.2, 0.05)  # 0.11 is not clear of 0.1 yet
        alarms = [len(judge(FINE | {"step": i + 1, "prediction_std": value})) for i, value in enumerate(values)]
        assert alarms == [0, 1, 0, 0, 0, 0, 1]

    def test_are_switched_off_by_zero(self, monitor):
        bounds = ("target_std", "prediction_std", "rank", "variation", "divergence", "leak", "distance", "decay")
        worst = dict.fromkeys(FINE, 0.0) | {"step": 200, "ema_decay": 1.0}
        assert len(monitor().judge(worst)) > 5
        assert monitor(**dict.fromkeys(bounds, 0.0)).judge(worst) == []

    def test_loss_says_nothing_about_constant_targets(self, monitor):
        (alarm,) = monitor().judge(FINE | {"target_std": 0.001, "relative_loss": 1e6})
        assert "targets" in alarm

    def test_begin_with_the_run_under_way(self, monitor):
        assert [monitor(steps).after for steps in (50, 1000, 2000, 400_000)] == [100, 100, 200, 5000]
        assert monitor(400_000, warmup=12_000).after == 12_000 and monitor(400_000, warmup=12_000, after=7).after == 7
        judge = monitor(2000).judge
        assert judge(FINE | {"prediction_std": 0.0, "step": 200}) == []
        assert len(judge(FINE | {"prediction_std": 0.0, "step": 201})) == 1
        assert len(monitor(after=0).judge(FINE | {"prediction_std": 0.0, "step": 1})) == 1


def alarms(folder):
    file = folder / "alarms.jsonl"
    return [alarm for line in file.read_text().splitlines() for alarm in json.loads(line)["alarms"]] if file.exists() else []


def tiny(preset, folder, *more):
    """A trainer of a tiny preset as it is shipped, one thread."""
    settings = ["train.threads=1", "train.workers=0", "train.log_every=20", "train.precision=fp32", "data.split=train"]
    return Trainer(parse(["--config", preset, *settings, f"train.output={folder}", *more])[0])


class TestBrokenRuns:
    """What the monitor is for: each run is broken in one way, trained, and must be named."""

    def test_constant_encoder(self, tmp_path):
        trainer = tiny("text/tiny", tmp_path / "run", "train.steps=40", "collapse.after=10", "train.batch_size=8")
        for encoder in (trainer.core.student, trainer.core.teacher.module):
            contextualize = encoder.contextualize
            encoder.contextualize = lambda features, padding_mask=None, f=contextualize: f(features * 0, padding_mask)
        trainer.run()
        found = " ".join(alarms(tmp_path / "run"))
        assert "targets are becoming constant" in found and "predictions are becoming constant" in found

    def test_dead_conv_stem(self, tmp_path):
        small = ["encoder.config.num_hidden_layers=2", "targets.top_k=2", "data.max_seconds=0.5", "data.join_seconds=0.5"]
        trainer = tiny("audio/tiny", tmp_path / "run", "train.steps=40", "collapse.after=10", *small)
        for encoder in (trainer.core.student, trainer.core.teacher.module):
            for layer in encoder.model.feature_extractor.conv_layers:
                torch.nn.init.zeros_(layer.layer_norm.weight)
                layer.requires_grad_(False)
        trainer.run()
        assert any("the local features hardly differ" in alarm for alarm in alarms(tmp_path / "run"))

    def test_decay_too_low(self, tmp_path):
        trainer = tiny("text/tiny", tmp_path / "run", "train.steps=60", "collapse.after=10", "ema.start=0.5", "ema.end=0.5")
        trainer.run()
        assert any("targets are becoming constant" in alarm for alarm in alarms(tmp_path / "run"))
        assert any("the teacher's states shrink" in alarm for alarm in alarms(tmp_path / "run"))

    @pytest.mark.parametrize("decay, message", [(0, "the teacher is a copy of the student"), (1, "the teacher stands still")])
    def test_decay_at_an_end(self, decay, message, tmp_path):
        more = [f"ema.start={decay}", f"ema.end={decay}", "collapse.after=10", "train.batch_size=8", "train.steps=20"]
        tiny("vision/tiny", tmp_path / "run", *more).run()
        assert len(alarms(tmp_path / "run")) == 1 and message in alarms(tmp_path / "run")[0]

    def test_unmasked_student(self, tmp_path):
        more = ["train.steps=400", "train.batch_size=16", "collapse.after=20"]
        trainer = tiny("text/tiny", tmp_path / "run", *more)
        forward = trainer.core.forward
        trainer.core.forward = lambda source, mask, target, **inputs: forward(target, mask, target, **inputs)
        trainer.run()
        (alarm,) = alarms(tmp_path / "run")
        assert "the loss is suspiciously low" in alarm

    def test_far_too_high_a_rate(self, tmp_path):
        trainer = tiny("text/tiny", tmp_path / "run", "train.steps=40", "collapse.after=10", "optimizer.lr=0.1")
        trainer.run()
        assert any("predictions are becoming constant" in alarm for alarm in alarms(tmp_path / "run"))

    def test_stopped_through_the_command(self, tmp_path):
        run = tmp_path / "run"
        settings = ["ema.start=0", "ema.end=0", "train.steps=100", "train.log_every=10", "train.batch_size=16"]
        command = [sys.executable, "-m", "d2v_fast.cli", "--config", "text/tiny", *settings, f"train.output={run}"]
        done = subprocess.run(
            [*command, "collapse.after=30", "collapse.action=stop", "train.workers=0"],
            capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "d2v-train: step 40: targets are becoming constant: target_std" in done.stderr
        assert records(run)[-1]["step"] == 40 and (run / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["text/tiny", "vision/tiny", "audio/tiny"])
def test_a_healthy_run_raises_no_alarm(preset, tmp_path):
    """The first 2,000 steps of each tiny preset on its builtin data."""
    trainer = Trainer(parse(["--config", preset, "train.steps=2000", f"train.output={tmp_path / 'run'}"])[0])
    assert trainer.run() == 0
    assert alarms(tmp_path / "run") == [] and trainer.monitor.after == 200


class TestEnvironment:
    def test_says_what_a_bug_report_needs(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
        monkeypatch.setenv("HF_TOKEN", "secret")
        found = environment(tmp_path)
        assert f"torch {torch.__version__}" in found["packages"] and "transformers 5" in found["packages"]
        assert "OMP_WAIT_POLICY=active" in found["variables"] and "secret" not in json.dumps(found)
        assert found["threads"] == str(torch.get_num_threads()) and str(os.cpu_count()) in found["processor"]
        assert str(tmp_path) in found["free"]

    @pytest.mark.parametrize(
        "patch, warning",
        [
            (("d2v_fast.diagnostics.torch.get_num_threads", lambda: 10_000), "10000 threads share"),
            (("joblib.cpu_count", lambda: 64), "of 64 usable cores: OMP_NUM_THREADS=64"),
            (("torch.cpu.get_capabilities", lambda: {"avx2": True}), "no instructions for bf16"),
            (("d2v_fast.diagnostics.native.library", lambda: "it is not built"), "plain PyTorch on cpu: it is not built"),
            (("torch.utils.collect_env.get_nvidia_driver_version", lambda run: "550.1"), "driver 550.1 is there, but torch"),
        ],
    )
    def test_warns_of_what_is_slow_or_wrong(self, patch, warning, monkeypatch):
        assert not any(warning in w for w in environment()["warnings"])
        monkeypatch.setattr(*patch)
        assert any(warning in w for w in environment()["warnings"])

    def test_warns_of_full_disks(self, monkeypatch):
        monkeypatch.setattr("d2v_fast.diagnostics.shutil.disk_usage", lambda _: SimpleNamespace(free=2**29))
        found = environment()["warnings"]
        assert any("0.5 GiB are free in ." in w for w in found) and any("--shm-size" in w for w in found)

    def test_warns_of_places_that_cannot_be_written(self, monkeypatch, tmp_path):
        """The tests may run as root, who may write everywhere but on a read-only disk."""
        monkeypatch.setattr("d2v_fast.diagnostics.os.access", lambda path, mode: False)
        found = environment(tmp_path / "run")["warnings"]
        assert f"{tmp_path / 'run'} cannot be written: train.output=elsewhere" in found
        assert any("cannot be written: set HF_HOME" in warning for warning in found)

    def test_a_folder_that_is_not_there_yet(self, tmp_path):
        found = environment(tmp_path / "a" / "b")
        assert f"GiB in {tmp_path / 'a' / 'b'}" in found["free"] and not (tmp_path / "a").exists()

    @pytest.mark.parametrize("value", ["abc", "0", "-1", ""])
    def test_a_number_of_ranks_that_is_none(self, value, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        assert f"LOCAL_WORLD_SIZE={value!r}: no number of processes: unset it" in environment()["warnings"]

    def test_a_machine_without_shared_memory(self, monkeypatch):
        exists = os.path.exists
        monkeypatch.setattr("d2v_fast.diagnostics.os.path.exists", lambda path: path != "/dev/shm" and exists(path))
        assert any("there is no /dev/shm" in warning for warning in environment()["warnings"])

    def test_warns_of_variables_and_of_modules_in_the_way(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        for name in ("kernels", "apex"):
            monkeypatch.delitem(sys.modules, name, raising=False)  # the folder here, once something tried to import it
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
        found = " ".join(environment()["warnings"])
        assert "TRITON_INTERPRET=1" in found and f"{tmp_path}/kernels" in found and "pip uninstall apex" in found

    def test_the_command(self, tmp_path):
        code = "from d2v_fast.cli import doctor; doctor()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == ""
        assert f"torch {torch.__version__}" in done.stdout and "loss on cpu" in done.stdout

    def test_a_run_records_it(self, tmp_path):
        trainer = Trainer(config("vision", tmp_path / "run", "train.steps=1"))
        trainer.run()
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"] == environment()["packages"]
