import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from scipy import integrate, stats

from d2v_fast import diagnostics
from d2v_fast.config import CollapseConfig, TargetsConfig, parse
from d2v_fast.data.builtin import builtin_images, builtin_speech
from d2v_fast.diagnostics import (
    CollapseError,
    Monitor,
    constant_loss,
    distinct_share,
    effective_rank,
    environment,
    position_share,
    position_table,
)
from d2v_fast.figures import FIGURES
from d2v_fast.model import Data2Vec
from d2v_fast.ops.reference import Moments
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from d2v_fast.train.step import step
from tests.models import make
from tests.test_training import config, records


class TestEffectiveRank:
    def test_by_hand(self):
        assert float(effective_rank(torch.ones(100, 8))) == pytest.approx(1, abs=1e-3)
        assert float(effective_rank(torch.eye(8).repeat(5, 1))) == pytest.approx(8, rel=1e-4)
        # Singular value shares 3/4 and 1/4: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)).
        assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(4 / 3**0.75, rel=1e-4)

    def test_subsamples_evenly_from_many_rows(self):
        rows = torch.cat([torch.eye(4)[:1].repeat(3000, 1), torch.eye(4)[1:2].repeat(3000, 1)])
        assert float(effective_rank(rows)) == pytest.approx(2, rel=1e-2)


class TestPositionShare:
    def test_by_hand(self):
        # Two positions with means -1 and 1, each ±1: half of the total sum of squares 2 · 128 lies between positions.
        rows = torch.tensor([-2.0, 0.0, 0.0, 2.0]).repeat(32)[:, None]
        places = torch.tensor([0, 0, 1, 1]).repeat(32)
        expected = 1 - (128 / (128 - 2)) / (256 / (128 - 1))
        assert position_share(position_table(rows, places, 5)) == pytest.approx(expected, rel=1e-6)

    def test_is_1_for_pure_position_and_0_for_pure_noise(self):
        torch.manual_seed(0)
        places = torch.arange(20).repeat(7)
        assert position_share(position_table(torch.randn(20, 8)[places], places, 20)) == pytest.approx(1, abs=1e-5)
        assert abs(position_share(position_table(torch.randn(140, 500), places, 20))) < 0.02

    def test_tables_of_batches_add_up(self):
        torch.manual_seed(0)
        rows, places = torch.randn(200, 4) + 3, torch.randint(9, (200,))
        parts = sum(position_table(rows[a:b], places[a:b], 9) for a, b in ((0, 50), (50, 200)))
        assert position_share(parts) == pytest.approx(position_share(position_table(rows, places, 9)), rel=1e-4)

    def test_a_large_mean_does_not_matter(self):
        torch.manual_seed(0)
        rows, places = torch.randn(200, 4), torch.randint(9, (200,))
        shares = [position_share(position_table(rows + mean, places, 9)) for mean in (0, 1000)]
        assert shares[1] == pytest.approx(shares[0], abs=1e-3)

    def test_is_nan_for_too_few_or_constant_rows(self):
        places = torch.arange(70)
        assert math.isnan(position_share(position_table(torch.randn(70, 3), places, 70)))  # one sample
        assert math.isnan(position_share(position_table(torch.randn(70, 3), places % 7, 7)))
        assert not math.isnan(position_share(position_table(torch.randn(71, 3), torch.arange(71) % 7, 7)))
        assert math.isnan(position_share(position_table(torch.ones(100, 3), torch.arange(100) % 7, 7)))


class Samples:
    """A data set of the given values, each with random augmentation; None is unreadable."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def load(self, index, rng):
        if self.values[index] is None:
            raise OSError
        return [self.values[index], rng.random()]


class TestDistinctShare:
    @pytest.mark.parametrize(
        "values, share",
        [(range(50), 1), ([7] * 64, 1 / 16), ([1, 1, 2, 2], 0.5), ([None, 3, 3, 3], 1 / 3), ([1], None), ([None] * 9, None)],
    )
    def test_by_hand(self, values, share):
        found = distinct_share(Samples(*values))
        assert math.isnan(found) if share is None else found == pytest.approx(share)

    @pytest.mark.parametrize("modality", ["text", "vision", "audio"])
    def test_builtin_samples_are_distinct(self, modality, tmp_path):
        assert distinct_share(build(config(modality, tmp_path / "run")).data) == 1


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_constant_loss_against_numerical_integration(beta):
    """The reference integrates the loss over a normal density."""
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
    """A trainer after a logged step of two micro-batches, the batches, and the parameters before the step."""
    trainer = build(config("vision", tmp_path / "run", "train.accumulate=2", "schedule.warmup=0"))
    stream = trainer.feed.batches
    batches = [next(stream) for _ in range(2)]
    trainer.state.core.train()
    before = {name: p.detach().clone() for name, p in trainer.state.core.named_parameters()}
    trainer.state.monitor.due = True
    step(trainer.state, batches)
    return trainer, batches, before


class TestFigures:
    def test_figures_of_a_step_match_a_recomputation(self, due):
        trainer, batches, before = due
        after = dict(trainer.state.core.named_parameters())
        found = trainer.state.monitor.figures(loss=3.0)
        assert found.keys() < FIGURES.keys()
        moved = [(p - before[n]).flatten() for n, p in after.items() if p.requires_grad]
        assert found["update_norm"] == pytest.approx(float(torch.cat(moved).detach().norm()), rel=1e-4)
        pairs = [
            (p, after["teacher.module." + n[8:]]) for n, p in after.items() if n.startswith("student.") and p.requires_grad
        ]
        distance, size = (
            torch.cat([f(*pair).detach().flatten() for pair in pairs]).norm() for f in (torch.sub, lambda a, b: a)
        )
        assert found["teacher_distance"] == pytest.approx(float(distance / size), rel=1e-4)

        # Repeat the forward pass with the weights before the step; this model has no dropout.
        with torch.no_grad():
            for name, p in after.items():
                p.copy_(before[name])
            core, targets, states, teacher, features, positions = trainer.state.core, [], [], [], [], []
            for batch in batches:
                mask = batch["mask"]
                layers = core.teacher_layers(batch["source"], None, None)
                normal = [(x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for x in layers]
                mean = torch.stack(normal).mean(0)
                mean = (mean - mean.mean(2, True)) / (mean.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
                targets.append(mean[mask])
                teacher.append(layers[-1][mask])
                features.append(core.student.embed(batch["source"]))
                states.append(core.student.contextualize(core.student.mask_features(features[-1], mask))[mask])
                last = normal[-1]
                last = (last - last.mean(2, True)) / (last.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
                positions += zip(mask.nonzero()[:, 1].tolist(), last[mask].double().numpy(), strict=True)
        rows = torch.cat(targets).double().numpy()
        assert found["target_std"] == pytest.approx(np.sqrt(rows.var(0, ddof=1) + 1e-6).mean(), rel=1e-3)
        worst = (rows.var(0).sum()) * core.loss_settings["scale"]
        assert found["relative_loss"] == pytest.approx(3.0 / worst, rel=1e-3)
        # Over both micro-batches.
        flat = torch.cat(features).flatten(0, 1).double().numpy()
        assert found["feature_std"] == pytest.approx(flat.std(0, ddof=1).mean(), rel=1e-3)
        variation = (flat.std(0) / np.sqrt((flat**2).mean(0))).mean()
        assert found["feature_variation"] == pytest.approx(variation, rel=1e-3)
        for name, rows in (("student_rank", states), ("teacher_rank", teacher)):
            values = np.linalg.svd(torch.cat(rows).double().numpy(), compute_uv=False)
            share = values / values.sum()
            assert found[name] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
        # Adjusted R² of the regression on indicators of the positions.
        places, rows = (np.array(column) for column in zip(*positions, strict=True))
        design = np.eye(places.max() + 1)[places][:, np.unique(places)]
        left = rows - design @ np.linalg.lstsq(design, rows)[0]
        free = len(rows) - design.shape[1]
        share = 1 - (left**2).sum() / free / (rows.var(0, ddof=1).sum())
        assert found["position_share"] == pytest.approx(share, rel=1e-3)
        assert found["content_loss"] == pytest.approx(3.0 / worst / (1 - share), rel=1e-3)

    def test_teacher_decay_and_update_share(self, due):
        trainer, batches, before = due
        found = trainer.state.monitor.figures(loss=3.0)
        assert found["teacher_decay"] == pytest.approx(trainer.state.core.teacher.decay(1), abs=1e-4)
        trained = [name for name, p in trainer.state.core.named_parameters() if p.requires_grad]
        size = torch.cat([before[name].flatten() for name in trained]).norm()
        assert found["update_share"] == pytest.approx(found["update_norm"] / float(size), rel=1e-4)
        # Late steps are small, but update_share is scaled to the peak learning rate.
        for group in trainer.state.optimizer.param_groups:
            group["lr"] = 1e-4 * group["initial_lr"]
        now = {name: p.detach().clone() for name, p in trainer.state.core.named_parameters()}
        trainer.state.core.update_teacher = lambda **_: None
        trainer.state.monitor.due = True
        step(trainer.state, batches)
        late = trainer.state.monitor.figures(loss=3.0)
        assert late["update_norm"] < 1e-3 * found["update_norm"]
        moved = torch.cat(
            [(p - now[name]).detach().flatten() for name, p in trainer.state.core.named_parameters() if name in trained]
        )
        size = torch.cat([now[name].flatten() for name in trained]).norm()
        assert late["update_share"] == pytest.approx(float(moved.norm() / size) / 1e-4, rel=1e-3)
        assert late["teacher_decay"] == 1

    def test_ranks_are_nan_with_too_few_rows(self, due, monkeypatch):
        trainer, batches, _ = due
        monkeypatch.setattr(diagnostics, "MIN_ROWS", sum(len(batch["index"]) for batch in batches) + 1)
        found = trainer.state.monitor.figures(loss=3.0)
        assert all(math.isnan(found[name]) for name in ("student_rank", "teacher_rank", "position_share", "content_loss"))

    def test_a_nan_loss_counts_as_infinite(self, due):
        assert due[0].state.monitor.figures(loss=math.nan)["relative_loss"] == math.inf

    def test_zero_loss_scale_gives_relative_loss_1(self, due):
        trainer, _, _ = due
        trainer.state.core.loss_settings["scale"] = 0.0
        assert trainer.state.monitor.figures(loss=0.0)["relative_loss"] == 1

    def test_a_skipped_step_has_no_update_figures(self, due):
        trainer, (batch, _), _ = due
        trainer.state.monitor.figures(1.0)
        batch["source"][0, 0, 0, 0] = float("nan")
        trainer.state.monitor.due = True
        step(trainer.state, [batch])
        found = trainer.state.monitor.figures(1.0)
        assert found["update_norm"] == 0
        assert math.isnan(found["update_share"]) and math.isnan(found["teacher_decay"])

    def test_steps_that_are_not_logged_cost_nothing(self, tmp_path, monkeypatch):
        calls = []
        measure = effective_rank
        monkeypatch.setattr(diagnostics, "effective_rank", lambda rows: calls.append(1) or measure(rows))
        trainer = build(config("vision", tmp_path / "run", "train.steps=9", "train.log_every=4"))
        kept = []

        def recording_step(state, batches):
            outcome = step(state, batches)
            kept.append(state.monitor.before)
            return outcome

        monkeypatch.setattr("d2v_fast.train.loop.step", recording_step)
        loop(trainer)
        assert [r["step"] for r in records(tmp_path / "run")] == [1, 4, 8, 9]
        assert len(calls) == 2 * 4
        assert [i for i, weights in enumerate(kept, 1) if weights is not None] == [1, 4, 8, 9]
        assert trainer.state.monitor.before is None and trainer.state.monitor.batches == []


FINE = {
    "step": 200, "target_std": 0.6, "prediction_std": 0.4, "teacher_rank": 50.0, "student_rank": 40.0, "feature_variation": 0.8,
    "relative_loss": 0.5, "content_loss": 0.8, "teacher_distance": 0.1, "teacher_decay": 0.999, "update_share": 0.01,
    "gradient_peak": 3.0, "distinct_samples": 1.0,
}  # fmt: skip


@pytest.fixture
def monitor(tmp_path):
    model = Data2Vec(make("vit"), targets=TargetsConfig(top_k=1))
    optimizer = torch.optim.SGD(model.head.parameters())
    accelerator = SimpleNamespace(device="cpu")
    return lambda steps=1000, warmup=0, **settings: Monitor(
        model, optimizer, CollapseConfig(**settings), steps, warmup, accelerator, tmp_path
    )


class TestGradientPeak:
    """Each logged interval is compared with the intervals before it."""

    def line(self, monitor, *norms):
        for norm in norms:
            monitor.watch(torch.tensor(norm))
        peak = monitor._gradient()["gradient_peak"]
        monitor._reset()
        return peak

    def test_is_relative_to_the_median_of_earlier_intervals(self, monitor):
        one = monitor()
        assert self.line(one, 2.0) == 1
        assert self.line(one, 3.0, 5.0, 4.0) == 5 / 2
        assert self.line(one, 6.0, 30.0, 6.0) == 30 / 3  # the median of 2 and 4
        # A high level becomes the reference only after many intervals.
        assert [self.line(one, 1e12, 1e12) > 1e11 for _ in range(3)] == [True] * 3

    def test_non_finite_norms_are_ignored(self, monitor):
        one = monitor()
        assert self.line(one, 2.0) == 1
        assert self.line(one, math.inf, 4.0, math.nan) == 2
        assert math.isnan(self.line(one, math.nan)) and math.isnan(self.line(monitor(), 0.0, 0.0))

    def test_state_survives_resuming(self, monitor):
        one, other = monitor(), monitor()
        self.line(one, 2.0)
        one.watch(torch.tensor(8.0))
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert self.line(one, 1.0) == self.line(other, 1.0) == 4
        assert other.state_dict() == one.state_dict()


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
            ({"relative_loss": math.inf}, "the run diverges: relative_loss inf is above"),
            (
                {"content_loss": 0.03},
                "the loss is suspiciously low, as if the student saw what it predicts: content_loss 0.03 is",
            ),
            ({"teacher_distance": 0.0}, "the teacher is a copy of the student"),
            ({"teacher_decay": 1.0}, "the teacher does not move: teacher_decay 1 is above collapse.decay"),
            (
                {"update_share": 1e-8},
                "the student hardly moves: update_share 1e-08 is below collapse.update=1e-05;",
            ),
            (
                {"gradient_peak": 2e14},
                "the gradient explodes: gradient_peak 2e+14 is above collapse.gradient=1000; check",
            ),
            ({"distinct_samples": 1 / 16}, "many samples are the same: distinct_samples 0.0625 is below collapse.distinct=0.5"),
        ],
    )
    def test_each_rule_has_its_message(self, broken, message, monitor, caplog, tmp_path):
        judge = monitor().judge
        assert judge(FINE) == []
        (alarm,) = judge(FINE | broken | {"step": 250})
        assert message in alarm and re.search("; (try|check) ", alarm)
        assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [f"step 250: {alarm}"]
        assert json.loads((tmp_path / "alarms.jsonl").read_text()) == {"step": 250, "alarms": [alarm]}
        with pytest.raises(CollapseError, match="step 200: "):
            monitor(action="stop").judge(FINE | broken)
        assert monitor(action="off").judge(FINE | broken) == []

    def test_rules_have_hysteresis(self, monitor):
        judge = monitor(after=0, prediction_std=0.1).judge
        values = (0.5, 0.09, 0.05, 0.11, 0.09, 0.2, 0.05)  # 0.11 does not re-arm the rule at 0.1
        alarms = [len(judge(FINE | {"step": i + 1, "prediction_std": value})) for i, value in enumerate(values)]
        assert alarms == [0, 1, 0, 0, 0, 0, 1]

    def test_a_bound_of_zero_switches_a_rule_off(self, monitor):
        bounds = ("target_std", "prediction_std", "rank", "variation", "divergence", "leak", "distance", "decay")
        bounds += ("distinct", "update", "gradient")
        worst = dict.fromkeys(FINE, 0.0) | {"step": 200, "teacher_decay": 1.0, "gradient_peak": 1e9}
        assert len(monitor().judge(worst)) > 7
        assert monitor(**dict.fromkeys(bounds, 0.0)).judge(worst) == []

    def test_constant_targets_suppress_alarms_about_the_loss(self, monitor):
        (alarm,) = monitor().judge(FINE | {"target_std": 0.001, "relative_loss": 1e6, "content_loss": 1e-6})
        assert "targets" in alarm

    def test_nan_or_missing_figures_raise_no_alarm(self, monitor):
        assert monitor().judge(dict.fromkeys(FINE, math.nan) | {"step": 200}) == []
        assert monitor().judge({"step": 200}) == []

    def test_only_the_cause_is_reported_not_its_consequences(self, monitor):
        (alarm,) = monitor().judge(
            FINE | {"update_share": 1e-8, "relative_loss": 2.7, "teacher_distance": 0.0, "teacher_decay": 1.0}
        )
        assert "the student hardly moves" in alarm
        (alarm,) = monitor(update=0).judge(FINE | {"update_share": 1e-8, "relative_loss": 2.7})
        assert "diverges" in alarm

    def test_rules_start_after_warmup(self, monitor):
        assert [monitor(steps).after for steps in (50, 1000, 2000, 400_000)] == [100, 100, 200, 5000]
        assert monitor(400_000, warmup=12_000).after == 12_000 and monitor(400_000, warmup=12_000, after=7).after == 7
        judge = monitor(2000).judge
        assert judge(FINE | {"prediction_std": 0.0, "step": 200}) == []
        assert len(judge(FINE | {"prediction_std": 0.0, "step": 201})) == 1
        assert len(monitor(after=0).judge(FINE | {"prediction_std": 0.0, "step": 1})) == 1
        # Rules without a waiting period.
        alarms = monitor(2000).judge({"step": 0, "distinct_samples": 0.1}) + monitor(2000).judge(FINE | {"gradient_peak": 1e6})
        assert len(alarms) == 2


def alarms(folder):
    file = folder / "alarms.jsonl"
    return [alarm for line in file.read_text().splitlines() for alarm in json.loads(line)["alarms"]] if file.exists() else []


def tiny(preset, folder, *more):
    """A trainer of an unchanged tiny preset, one thread."""
    settings = ["train.threads=1", "train.workers=0", "train.log_every=20", "train.precision=fp32", "data.split=train"]
    return build(parse(["--config", preset, *settings, f"train.output={folder}", *more])[0])


class TestBrokenRuns:
    """Each run is broken in one way and trained; the monitor must name the fault."""

    def test_constant_encoder(self, tmp_path):
        trainer = tiny("text/tiny", tmp_path / "run", "train.steps=40", "collapse.after=10", "train.batch_size=8")
        for encoder in (trainer.state.core.student, trainer.state.core.teacher.module):
            place = encoder.place
            encoder.place = lambda features, padding_mask=None, place=place: place(features * 0, padding_mask)
        loop(trainer)
        found = " ".join(alarms(tmp_path / "run"))
        assert "targets are becoming constant" in found and "predictions are becoming constant" in found

    def test_dead_conv_stem(self, tmp_path):
        small = ["encoder.config.num_hidden_layers=2", "targets.top_k=2", "data.max_seconds=0.5", "data.join_seconds=0.5"]
        trainer = tiny("audio/tiny", tmp_path / "run", "train.steps=40", "collapse.after=10", *small)
        for encoder in (trainer.state.core.student, trainer.state.core.teacher.module):
            for layer in encoder.model.feature_extractor.conv_layers:
                torch.nn.init.zeros_(layer.layer_norm.weight)
                layer.requires_grad_(False)
        loop(trainer)
        assert any("the local features hardly differ" in alarm for alarm in alarms(tmp_path / "run"))

    def test_decay_too_low(self, tmp_path):
        trainer = tiny("text/tiny", tmp_path / "run", "train.steps=60", "collapse.after=10", "ema.start=0.5", "ema.end=0.5")
        loop(trainer)
        assert any("targets are becoming constant" in alarm for alarm in alarms(tmp_path / "run"))
        assert any("the teacher's states shrink" in alarm for alarm in alarms(tmp_path / "run"))

    @pytest.mark.parametrize("decay, message", [(0, "the teacher is a copy of the student"), (1, "the teacher does not move")])
    def test_decay_of_0_or_1(self, decay, message, tmp_path):
        more = [f"ema.start={decay}", f"ema.end={decay}", "collapse.after=10", "train.batch_size=8", "train.steps=20"]
        loop(tiny("vision/tiny", tmp_path / "run", *more))
        assert len(alarms(tmp_path / "run")) == 1 and message in alarms(tmp_path / "run")[0]

    def test_teacher_that_is_never_updated(self, tmp_path):
        trainer = tiny("vision/tiny", tmp_path / "run", "collapse.after=10", "train.batch_size=8", "train.steps=20")
        trainer.state.core.update_teacher = lambda **_: None
        loop(trainer)
        (alarm,) = alarms(tmp_path / "run")
        assert "the teacher does not move: teacher_decay 1 is above" in alarm

    def test_learning_rate_far_too_low(self, tmp_path):
        more = ["collapse.after=10", "train.batch_size=8", "train.steps=20", "optimizer.lr=1e-9"]
        loop(tiny("text/tiny", tmp_path / "run", *more))
        (alarm,) = alarms(tmp_path / "run")
        assert "the student hardly moves" in alarm

    def test_gradient_that_explodes_once(self, tmp_path):
        trainer = build(config("vision", tmp_path / "run", "train.steps=9", "train.log_every=4"))
        backward = trainer.accelerator.backward
        factor = iter([1, 1, 1e12])
        trainer.accelerator.backward = lambda loss: backward(loss * next(factor, 1))
        loop(trainer)
        (alarm,) = alarms(tmp_path / "run")
        assert "the gradient explodes" in alarm

    @pytest.mark.parametrize("preset", ["vision/tiny", "audio/tiny"])
    def test_one_sample_repeated(self, preset, tmp_path):
        (tmp_path / "data").mkdir()
        for i in range(8):
            if preset == "vision/tiny":
                builtin_images("train").read(3).save(tmp_path / f"data/{i}.png")
            else:
                soundfile.write(tmp_path / f"data/{i}.wav", builtin_speech("train").read(3), 16_000)
        more = ["train.steps=1", "train.batch_size=2", f"data.path={tmp_path / 'data'}"]
        loop(tiny(preset, tmp_path / "run", *more))
        with pytest.raises(CollapseError, match="many samples are the same"):
            loop(tiny(preset, tmp_path / "stopped", *more, "collapse.action=stop"))
        for folder in ("run", "stopped"):  # a run stopped before its first step keeps its alarms
            (alarm,) = alarms(tmp_path / folder)
            assert "many samples are the same: distinct_samples 0.125 is below" in alarm

    @pytest.mark.parametrize(
        "preset", ["text/tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vision/tiny", "audio/tiny"))]
    )
    def test_unmasked_student(self, preset, tmp_path):
        more = ["train.steps=200", "collapse.after=20", *(["train.batch_size=16"] if preset == "text/tiny" else [])]
        trainer = tiny(preset, tmp_path / "run", *more)
        forward = trainer.state.core.forward
        if preset == "text/tiny":
            trainer.state.core.forward = lambda source, mask, target, **inputs: forward(target, mask, target, **inputs)
        else:
            trainer.state.core.student.mask_features = lambda features, mask: features
        loop(trainer)
        (alarm,) = alarms(tmp_path / "run")
        assert "the loss is suspiciously low" in alarm

    def test_learning_rate_far_too_high(self, tmp_path):
        trainer = tiny("text/tiny", tmp_path / "run", "train.steps=40", "collapse.after=10", "optimizer.lr=0.1")
        loop(trainer)
        assert any("predictions are becoming constant" in alarm for alarm in alarms(tmp_path / "run"))

    def test_the_command_stops_on_collapse(self, tmp_path):
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
@pytest.mark.parametrize(
    "more, fused",
    [
        (["train.steps=2000"], False),
        (["train.steps=300", "train.seed=2", "train.batch_size=4"], False),
        (["train.steps=300"], True),
    ],
)
def test_a_healthy_run_raises_no_alarm(preset, more, fused, tmp_path):
    """The first steps of each tiny preset on its builtin data."""
    trainer = build(parse(["--config", preset, *more, "train.log_every=20", f"train.output={tmp_path / 'run'}"])[0], fused)
    assert loop(trainer) == 0
    assert alarms(tmp_path / "run") == [] and trainer.state.monitor.after == max(100, trainer.steps // 10)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["data.cross_documents=false train.batch_size=1 train.accumulate=32", "mask.prob=.01"])
def test_few_scored_positions_raise_no_alarm(more, tmp_path):
    loop(tiny("text/tiny", tmp_path / "run", "train.steps=400", *more.split()))
    assert alarms(tmp_path / "run") == []


class TestEnvironment:
    def test_reports_versions_variables_threads_and_disk(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
        monkeypatch.setenv("HF_TOKEN", "secret")
        found = environment(tmp_path)
        assert f"torch {version('torch')}" in found["packages"] and "transformers 5" in found["packages"]
        assert "OMP_WAIT_POLICY=active" in found["variables"] and "secret" not in json.dumps(found)
        assert found["threads"] == str(torch.get_num_threads()) and str(os.cpu_count()) in found["processor"]
        assert str(tmp_path) in found["free"]

    @pytest.mark.parametrize(
        "patch, warning",
        [
            (("d2v_fast.diagnostics.torch.get_num_threads", lambda: 10_000), "10000 threads share"),
            (("joblib.cpu_count", lambda: 64), "of 64 usable cores: OMP_NUM_THREADS=64"),
            (("d2v_fast.diagnostics.native.library", lambda: "it is not built"), "plain PyTorch on cpu: it is not built"),
            (("torch.utils.collect_env.get_nvidia_driver_version", lambda run: "550.1"), "driver 550.1 is installed"),
        ],
    )
    def test_warns_of_slow_or_wrong_setups(self, patch, warning, monkeypatch):
        assert not any(warning in w for w in environment()["warnings"])
        monkeypatch.setattr(*patch)
        assert any(warning in w for w in environment()["warnings"])

    def test_warns_of_full_disks(self, monkeypatch):
        monkeypatch.setattr("d2v_fast.diagnostics.shutil.disk_usage", lambda _: SimpleNamespace(free=2**29))
        found = environment()["warnings"]
        assert any("0.5 GiB are free in ." in w for w in found) and any("--shm-size" in w for w in found)

    def test_warns_of_places_that_cannot_be_written(self, monkeypatch, tmp_path):
        """os.access is patched, because root may write everywhere."""
        monkeypatch.setattr("d2v_fast.diagnostics.os.access", lambda path, mode: False)
        found = environment(tmp_path / "run")["warnings"]
        assert f"{tmp_path / 'run'} cannot be written: train.output=elsewhere" in found
        assert any("cannot be written: set HF_HOME" in warning for warning in found)

    def test_a_folder_that_does_not_exist_yet_is_not_created(self, tmp_path):
        found = environment(tmp_path / "a" / "b")
        assert f"GiB in {tmp_path / 'a' / 'b'}" in found["free"] and not (tmp_path / "a").exists()

    @pytest.mark.parametrize("value", ["abc", "0", "-1", ""])
    def test_warns_of_an_invalid_local_world_size(self, value, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
        assert f"LOCAL_WORLD_SIZE={value!r}: not a number of processes: unset it" in environment()["warnings"]

    def test_warns_of_missing_shared_memory(self, monkeypatch):
        exists = os.path.exists
        monkeypatch.setattr("d2v_fast.diagnostics.os.path.exists", lambda path: path != "/dev/shm" and exists(path))
        assert any("there is no /dev/shm" in warning for warning in environment()["warnings"])

    def test_warns_of_variables_and_shadowing_modules(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        for name in ("kernels", "apex"):
            monkeypatch.delitem(sys.modules, name, raising=False)  # may be cached from an earlier import
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
        found = " ".join(environment()["warnings"])
        assert "TRITON_INTERPRET=1" in found and f"{tmp_path}/kernels" in found and "pip uninstall apex" in found

    def test_names_a_package_that_is_broken(self, tmp_path, monkeypatch):
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        found = [w for w in environment()["warnings"] if "cannot be imported: operator torchvision::nms does not exist" in w]
        assert len(found) == 1 and found[0].startswith("torchvision") and "pip uninstall torchvision" in found[0]

    def test_the_command(self, tmp_path):
        code = "from d2v_fast.cli import doctor; doctor()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == ""
        assert f"torch {version('torch')}" in done.stdout and "loss on cpu" in done.stdout

    def test_a_run_records_it(self, tmp_path):
        trainer = build(config("vision", tmp_path / "run", "train.steps=1"))
        loop(trainer)
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"] == environment()["packages"]
