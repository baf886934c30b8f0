import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock, Timeout
from transformers import AutoModel

from d2v_fast import checkpoint
from d2v_fast.checkpoint import CheckpointError
from d2v_fast.config import ConfigError, OptimizerConfig, ScheduleConfig, TrainConfig, parse
from d2v_fast.data import DataError
from d2v_fast.diagnostics import CollapseError
from d2v_fast.encoders import build_encoder
from d2v_fast.train import folder as folders
from d2v_fast.train import loop as loops
from d2v_fast.train import train
from d2v_fast.train.build import build, freeze_unused, make_encoder, make_model
from d2v_fast.train.callbacks import CallbackError
from d2v_fast.train.guards import BrokenSamples, NotFiniteError, SkippedSteps, StopRequest, WorkerDied
from d2v_fast.train.loop import loop
from d2v_fast.train.optim import lr_factor, make_optimizer
from d2v_fast.train.parallel import check_restarts, check_slurm, on_any, start
from d2v_fast.train.step import clip, step
from tests import models
from tests.runs import ranks

# torch warns because the schedule, a function of the step, advances even if the optimizer skips the first step.
FIRST_SKIPPED = "ignore:Detected call of .lr_scheduler.step"
SMALL = {
    "text": "encoder.config.hidden_size=32 encoder.config.num_hidden_layers=3 encoder.config.num_attention_heads=2 "
    "encoder.config.intermediate_size=48 data.vocab_size=400 data.block_size=32",
    "vision": "encoder.config.hidden_size=32 encoder.config.num_hidden_layers=3 encoder.config.num_attention_heads=2 "
    "encoder.config.intermediate_size=48",
    "audio": "encoder.config.hidden_size=32 encoder.config.num_hidden_layers=4 encoder.config.num_attention_heads=2 "
    "encoder.config.intermediate_size=48 encoder.config.conv_dim=[8,8,8,8,8,8,8] data.max_seconds=0.5 data.join_seconds=0.5",
}


def arguments(modality, folder, *more):
    settings = [*SMALL[modality].split(), "train.batch_size=4", "train.steps=4", "train.workers=0", "train.log_every=2"]
    settings.append("train.precision=fp32")
    return ["--config", f"{modality}/tiny", *settings, f"train.output={folder}", *more]


def config(modality, folder, *more):
    return parse(arguments(modality, folder, *more))[0]


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("modality", SMALL)
def test_a_run_writes_log_config_and_export(modality, tmp_path):
    run = tmp_path / "run"
    assert train(config(modality, run)) == 0
    log = records(run)
    assert [r["step"] for r in log] == [1, 2, 4]
    for r in log:
        assert all(math.isfinite(r[k]) for k in ("loss", "target_std", "prediction_std", "feature_std", "grad_norm"))
        assert 0 <= r["data_wait"] <= 1 and r["samples_per_s"] > 0
    assert parse(["--config", str(run / "config.yaml"), f"train.output={run}"])[0].train == config(modality, run).train
    _, loaded = AutoModel.from_pretrained(run / "export", output_loading_info=True)
    assert all("pooler" in name for name in loaded["missing_keys"]) and not loaded["mismatched_keys"]


def test_the_export_computes_the_students_states(tmp_path):
    trainer = build(config("vision", tmp_path / "run"))
    loop(trainer)
    model = AutoModel.from_pretrained(tmp_path / "run" / "export", add_pooling_layer=False).eval()
    student = trainer.state.core.student.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state[:, 1:], student(x))
    assert (tmp_path / "run" / "export" / "config.json").exists()


def test_equal_seeds_give_equal_losses_and_another_seed_does_not(tmp_path):
    for name in ("a", "b", "c"):
        more = ["train.seed=1"] if name == "c" else []
        train(config("text", tmp_path / name, *more))
    a, b, c = ([r["loss"] for r in records(tmp_path / name)] for name in "abc")
    assert a == b != c


def test_one_optimizer_step_by_hand(tmp_path):
    """Two micro-batches: divide by all their masked positions, clip, AdamW, then the teacher with τ(1)."""
    trainer = build(config("vision", tmp_path / "run", "train.accumulate=2", "train.clip_norm=0.5", "schedule.warmup=0"))
    core = trainer.state.core.train()
    stream = trainer.feed.batches
    batches = [next(stream) for _ in range(2)]
    before = {n: p.detach().clone() for n, p in core.named_parameters()}
    total = sum(int(batch["mask"].sum()) for batch in batches)
    for batch in batches:
        output = core(batch["source"], batch["mask"])
        (output.loss * batch["mask"].sum() / total).backward()
    grads = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
    core.zero_grad()
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    assert norm > 0.5, "nothing to clip"

    reported = step(trainer.state, batches).grad_norm
    assert float(reported) == pytest.approx(float(norm), rel=1e-4)
    cfg = trainer.config.optimizer
    for name, p in core.named_parameters():
        if name not in grads:
            continue
        g = grads[name] * 0.5 / norm
        decay = 0.0 if name.endswith(("bias", "token")) or sum(n > 1 for n in p.shape) < 2 else cfg.weight_decay
        # After one step of Adam the bias-corrected moments are g and g².
        expected = before[name] * (1 - cfg.lr * decay) - cfg.lr * g / (g.abs() + cfg.eps)
        close = (p.detach() - expected).abs() <= 1e-3 * cfg.lr + 1e-6 * expected.abs()
        assert close[g.abs() > 1e-7].all(), name
    tau = trainer.config.ema.start + (trainer.config.ema.end - trainer.config.ema.start) / trainer.config.ema.anneal_steps
    name = "student.model.layers.0.mlp.fc1.weight"
    teacher = dict(core.named_parameters())["teacher.module." + name.removeprefix("student.")]
    expected = tau * before[name] + (1 - tau) * dict(core.named_parameters())[name]
    assert torch.allclose(teacher, expected, atol=1e-7)
    assert core.teacher.step == 1
    assert all(p.grad is None for p in core.parameters())  # their memory is free for the next forward pass


@pytest.mark.parametrize("clip_norm, written", [(0.0, False), (0.5, True)])
def test_gradients_are_written_only_to_clip_them(tmp_path, clip_norm, written):
    state = build(config("vision", tmp_path / "run", f"train.clip_norm={clip_norm}")).state
    for p in state.parameters:
        p.grad = torch.randn_like(p)
    expected = torch.cat([p.grad.flatten() for p in state.parameters]).norm()
    versions = [p.grad._version for p in state.parameters]
    torch.testing.assert_close(clip(state), expected)
    assert all((p.grad._version > version) is written for p, version in zip(state.parameters, versions, strict=True))


def test_statistics_are_computed_only_for_the_log(tmp_path):
    run = build(config("vision", tmp_path / "run", "train.steps=5", "train.log_every=2"))
    seen = []

    def note(core, inputs, output):
        seen.append((output.stats is not None, core.student.training))

    run.state.core.eval()  # as pretrained weights are loaded
    run.state.core.register_forward_hook(note)
    loop(run)
    assert seen == [(logged, True) for logged in (True, True, False, True, True)]


def test_accumulation_equals_a_larger_batch(tmp_path):
    """One batch of four or two of two: the same loss and gradient, also with unequal masks."""
    found = []
    for size, accumulate in ((4, 1), (2, 2)):
        run = config("audio", tmp_path / str(size), f"train.batch_size={size}", f"train.accumulate={accumulate}")
        trainer = build(run)
        trainer.state.core.double()
        batch = trainer.data.__getitems__([(0, i) for i in range(4)])
        halves = [trainer.data.__getitems__([(0, i) for i in pair]) for pair in ((0, 1), (2, 3))]
        for part in (batch, *halves):
            part["source"] = part["source"].double()
        outcome = step(trainer.state, [batch] if accumulate == 1 else halves)
        found.append((float(outcome.loss), float(outcome.grad_norm)))
    (loss, norm), (again, norm_again) = found
    assert norm == pytest.approx(norm_again, rel=1e-9) and loss == pytest.approx(again, rel=1e-6)  # losses are added in fp32


def test_local_reduction_weights_micro_batches_equally(tmp_path):
    trainer = build(config("vision", tmp_path / "run", "train.accumulate=2", "loss.reduction=local"))
    batches = list(itertools.islice(trainer.feed.batches, 2))
    batches[1]["mask"][0] = False  # unequal masks, which a global mean would weight by their positions
    batches[1]["index"] = batches[1]["mask"].flatten().nonzero().squeeze(1)
    losses = [trainer.state.core(batch["source"], batch["mask"]).loss for batch in batches]
    parameters = [p for p in trainer.state.core.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(losses) / 2, parameters, allow_unused=True)
    loss, norm, *_ = step(trainer.state, batches)
    assert float(loss) == pytest.approx(sum(each.item() for each in losses) / 2, rel=1e-5)
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in gradients if g is not None]).norm()), rel=1e-4)


@pytest.mark.filterwarnings(FIRST_SKIPPED)
def test_a_step_with_a_non_finite_gradient_is_skipped(tmp_path):
    trainer = build(config("vision", tmp_path / "run"))
    batch = trainer.feed.take(1)[0]
    batch["source"][0, 0, 0, 0] = float("nan")
    before = {n: p.clone() for n, p in trainer.state.core.named_parameters()}
    step(trainer.state, [batch])
    assert trainer.state.skipped.count == 1 and trainer.state.core.teacher.step == 0
    assert trainer.state.scheduler.last_epoch == 1  # the schedule is a function of the step
    assert all(torch.equal(p, before[n]) for n, p in trainer.state.core.named_parameters())
    step(trainer.state, [trainer.feed.take(1)[0]])
    assert trainer.state.core.teacher.step == 1 and all(p.isfinite().all() for p in trainer.state.core.parameters())
    assert trainer.state.skipped.count == 1 and not trainer.state.skipped.suspects  # the count in a row starts again


@pytest.mark.filterwarnings(FIRST_SKIPPED)
def test_a_step_with_an_infinite_loss_is_skipped(tmp_path, monkeypatch):
    """Also if the gradient is finite, for example because a factor of the loss is 0."""
    trainer = build(config("vision", tmp_path / "run"))
    monkeypatch.setattr("d2v_fast.train.step._accumulate", lambda *args: (torch.tensor(math.inf), torch.tensor(0.0)))
    outcome = step(trainer.state, [trainer.feed.take(1)[0]])
    assert not outcome.finite and outcome.grad_norm.isfinite() and trainer.state.core.teacher.step == 0


def test_ranks_exchange_gradients_with_the_last_micro_batch_alone(tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run", "train.accumulate=3"))
    events = []

    @contextmanager
    def no_sync(model):
        assert model is run.state.model
        events.append("apart")
        yield
        events.append("together")

    monkeypatch.setattr(run.accelerator, "no_sync", no_sync)
    monkeypatch.setattr("d2v_fast.train.step.forward_backward", lambda *args: events.append("pass") or torch.zeros(2))
    monkeypatch.setattr("d2v_fast.train.step.clip", lambda state: torch.tensor(1.0))
    step(run.state, run.feed.take(3))
    assert events == ["apart", "pass", "together"] * 2 + ["pass"]


@pytest.mark.filterwarnings(FIRST_SKIPPED)
def test_loss_scaling_sees_each_step_and_may_skip_it(tmp_path, monkeypatch):
    """The scaler lowers its factor in `step`, also if the gradient is not finite; the teacher moves only with the weights."""
    run = build(config("vision", tmp_path / "run"))
    state, asked = run.state, []
    state.accelerator.scaler = SimpleNamespace(scale=lambda loss: loss)
    monkeypatch.setattr(state.optimizer, "step", lambda: asked.append(state.done))
    batch = run.feed.take(1)[0]
    batch["source"][0, 0, 0, 0] = float("nan")
    step(state, [batch])
    assert asked == [0] and state.skipped.count == 1 and state.core.teacher.step == 0
    for by_scaler, moves in ((True, 0), (False, 1)):
        monkeypatch.setattr(type(state.accelerator), "optimizer_step_was_skipped", by_scaler)
        step(state, run.feed.take(1))
        assert state.core.teacher.step == moves
    assert asked == [0, 1, 2] and state.skipped.count == 1


def test_the_norm_is_that_of_unscaled_gradients(tmp_path, monkeypatch):
    """Even without clipping, which would unscale them."""
    state = build(config("vision", tmp_path / "run", "train.clip_norm=0")).state
    for p in state.parameters:
        p.grad = torch.randn_like(p)
    expected = torch.cat([p.grad.flatten() for p in state.parameters]).norm() / 1024
    monkeypatch.setattr(state.accelerator, "unscale_gradients", lambda: [p.grad.div_(1024) for p in state.parameters])
    torch.testing.assert_close(clip(state), expected)


def test_learning_rate_schedules():
    cosine = ScheduleConfig("cosine", warmup=10, final=0.1)
    values = [lr_factor(step, 100, cosine) for step in range(101)]
    assert [values[i] for i in (0, 10, 55, 100)] == pytest.approx([1 / 11, 1, 0.55, 0.1])
    assert lr_factor(40, 100, cosine) == pytest.approx(0.1 + 0.9 * 0.75)  # a third of the way, (1 + cos 60°) / 2
    assert lr_factor(55, 100, ScheduleConfig("linear", warmup=10)) == pytest.approx(0.5)
    assert [lr_factor(i, 100, ScheduleConfig("linear", 10, final=0.2)) for i in (55, 100)] == pytest.approx([0.6, 0.2])
    assert lr_factor(99, 100, ScheduleConfig("constant", warmup=0.1)) == 1
    assert lr_factor(4, 100, ScheduleConfig("constant", warmup=0.1)) == pytest.approx(5 / 11)  # below 1 a share
    assert [lr_factor(i, 100, ScheduleConfig("constant", warmup=1)) for i in (0, 1)] == [0.5, 1]  # from 1 on a number
    # Method 5.1: 3 % up from .01, 90 % at the peak, exponentially to .01 over the last 7 %.
    tri = ScheduleConfig("tri_stage", warmup=0.03, hold=0.9, initial=0.01, final=0.01)
    assert lr_factor(0, 1000, tri) == pytest.approx(0.01 + 0.99 / 31)
    assert lr_factor(500, 1000, tri) == 1 and lr_factor(930, 1000, tri) == 1
    assert lr_factor(965, 1000, tri) == pytest.approx(0.1) and lr_factor(1000, 1000, tri) == pytest.approx(0.01)
    to_zero = ScheduleConfig("tri_stage", warmup=0.1, hold=0.5)  # no exponential reaches 0, so the decay is linear
    assert [lr_factor(i, 100, to_zero) for i in (60, 80, 100, 120)] == pytest.approx([1, 0.5, 0, 0])


def test_weight_decay_and_lr_scale_of_parameter_groups():
    model = torch.nn.ModuleDict({"stem": torch.nn.Linear(3, 4), "norm": torch.nn.LayerNorm(4)})
    model["token"] = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1, 1, 4))])
    groups = make_optimizer(model, OptimizerConfig(lr=1.0, weight_decay=0.5, lr_scale={"stem.*": 0.1})).param_groups
    found = {(g["lr"], g["weight_decay"]): {tuple(p.shape) for p in g["params"]} for g in groups}
    assert found == {(0.1, 0.5): {(4, 3)}, (0.1, 0.0): {(4,)}, (1.0, 0.0): {(4,), (1, 1, 4)}}
    decayed = make_optimizer(model, OptimizerConfig(weight_decay=0.5, decay_1d=True)).param_groups
    assert [g["weight_decay"] for g in decayed] == [0.5]
    both = make_optimizer(model, OptimizerConfig(lr=1.0, lr_scale={"stem.*": 0.1, "*.weight": 0.5})).param_groups
    assert {tuple(p.shape): round(g["lr"], 6) for g in both for p in g["params"]}[4, 3] == 0.05
    for done in (0, 5):  # a resumed run starts its schedule at `done`
        schedule = torch.optim.lr_scheduler.LambdaLR(
            make_optimizer(model, OptimizerConfig(lr=1.0, lr_scale={"stem.*": 0.1})), lambda step: 1 / (step + 1), done - 1
        )
        assert sorted({round(rate * (done + 1), 6) for rate in schedule.get_last_lr()}) == [0.1, 1.0]
    with pytest.raises(ConfigError, match="nothing"):
        make_optimizer(model, OptimizerConfig(lr_scale={"nothing": 2.0}))


def test_biases_and_factors_of_alibi_do_not_decay():
    """Not even those with several dimensions, such as factors per layer (method 4.8)."""
    encoder = build_encoder("data2vec2-audio", config=models.CONFIGS["data2vec-audio"] | {"alibi_per_layer": True})
    encoder.register_module("own", torch.nn.Module())
    encoder.own.bias = torch.nn.Parameter(torch.zeros(3, 4))
    groups = make_optimizer(encoder, OptimizerConfig(weight_decay=0.5)).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: (p.shape, decay[p]) for name, p in encoder.named_parameters() if p in decay}
    ((shape, of_factors),) = (each for name, each in found.items() if name.endswith("alibi_scale"))
    assert shape == (3, 1, 2, 1, 1) and of_factors == 0 and found["own.bias"] == ((3, 4), 0)
    assert {each[1] for name, each in found.items() if name.endswith("proj.weight")} == {0.5}


def test_settings_reach_the_model(tmp_path):
    settings = [
        *("targets.top_k=1", "targets.norm=instance", "targets.target_norm=layer", "targets.teacher_fp32=true"),
        *("loss.beta=0.5", "loss.scale=0.25", "loss.impl=eager", "head.layers=2", "head.zero_init=true"),
        *("ema.start=0.5", "ema.end=0.75", "ema.anneal_steps=10", "ema.scope=layers", 'ema.copied=["*.bias"]'),
    ]
    run = config("vision", tmp_path / "run", *settings)
    model = make_model(run, make_encoder(run))
    assert model.loss_settings == dict(norm="instance", target_norm="layer", beta=0.5, scale=0.25, impl="eager")
    linears = [module for module in model.head if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 2 and not linears[-1].weight.any() and linears[0].weight.any()
    assert [model.teacher.decay(step) for step in (0, 5, 10)] == [0.5, 0.625, 0.75]
    assert (model.top_k, model.source) == (1, "block_output") and model.teacher_fp32 and model.shares_features
    assert {name for name in model.teacher.copied if "layers.0" in name} == {
        name for name, _ in model.student.named_parameters() if "layers.0" in name and name.endswith(".bias")
    }


def test_the_optimizer_is_adamw_with_its_settings():
    """Three steps against the formula of Loshchilov and Hutter 2019, algorithm 2, in float64."""
    model = torch.nn.Linear(5, 4, bias=False).double()
    settings = OptimizerConfig(lr=0.02, betas=(0.6, 0.7), eps=1e-2, weight_decay=0.3)
    optimizer = make_optimizer(model, settings)
    w, m, v = model.weight.detach().clone(), 0, 0
    for number in range(1, 4):
        g = model.weight.grad = torch.randn(4, 5, dtype=torch.float64)
        optimizer.step()
        m, v = 0.6 * m + 0.4 * g, 0.7 * v + 0.3 * g**2
        w = w - 0.02 * (m / (1 - 0.6**number) / ((v / (1 - 0.7**number)).sqrt() + 1e-2) + 0.3 * w)
    assert torch.allclose(model.weight, w, rtol=1e-12)


def test_broken_samples_are_named_once_and_limited(caplog):
    broken = BrokenSamples(total=200, limit=0.01)
    broken.note([(3, "a.jpg: truncated"), (4, "b.jpg: empty")])
    state = json.loads(json.dumps(broken.state_dict()))
    broken = BrokenSamples(total=200, limit=0.01)
    broken.load_state_dict(state)
    broken.note([(3, "a.jpg: truncated")])
    named = [f"skipped an unreadable sample: {x}" for x in ("a.jpg: truncated", "b.jpg: empty")]
    assert [r.message for r in caplog.records] == named
    with pytest.raises(DataError, match=r"3 of 200 .*(?s:.*)c\.jpg"):
        broken.note([(5, "c.jpg: empty")])
    with pytest.raises(DataError, match="4 of 200"):  # counted over all ranks
        BrokenSamples(total=200, limit=0.01).judge(dict.fromkeys(range(4), "x.jpg: empty"))
    with pytest.raises(DataError, match=r"7 of 200 .*:\n  0\n  1\n  2\n  3\n  4$"):  # the first five are named
        broken.judge({i: str(i) for i in range(7)})


def test_a_run_without_a_readable_sample_stops():
    broken = BrokenSamples(total=2, limit=1.0)
    broken.note([(0, "a.jpg: empty")])
    with pytest.raises(DataError, match="2 of 2 samples cannot be read"):
        broken.note([(1, "b.jpg: empty")])


def test_each_rank_names_the_samples_of_its_skipped_steps(tmp_path, caplog):
    skipped = SkippedSteps(2, "{}.png".format, tmp_path, 3, {"train.seed": 1})
    batches = [{"epoch": 4, "samples": [7]}, {"epoch": 4, "samples": [8]}, {"epoch": 5, "samples": [9]}]
    for number, loss in ((11, math.nan), (12, 2.0)):
        assert skipped.at_limit == (number == 12)
        skipped.judge(number - 1)
        skipped.add(number, batches, torch.tensor(loss), torch.tensor(math.inf))
    assert [message.rpartition("; ")[2] for message in caplog.messages] == ["1 so far", "2 so far"]
    with pytest.raises(NotFiniteError, match="not finite in 2 steps in a row, up to step 12"):
        skipped.judge(12)
    samples = {"7": "7.png", "8": "8.png", "9": "9.png"}
    assert json.loads((tmp_path / "not-finite-step-12-rank-3.json").read_text()) == {
        "skipped": [
            {"step": number, "loss": loss, "grad_norm": "inf", "epoch": 5, "samples": samples}
            for number, loss in ((11, "nan"), (12, "2.0"))
        ],
        "settings": {"train.seed": 1},
    }
    resumed = SkippedSteps(2, "{}.png".format, tmp_path, None, {})
    resumed.load_state_dict(json.loads(json.dumps(skipped.state_dict())))
    with pytest.raises(NotFiniteError, match=r"up to step 13: .*not-finite-step-13\.json names"):
        resumed.judge(13)
    resumed.forget()
    resumed.judge(14)
    assert resumed.count == 2 and not resumed.at_limit


def test_threads_of_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    start(TrainConfig(threads=3))
    assert asked[-1] == 3
    asked.clear()
    start(TrainConfig())
    assert not asked


def test_the_encoder_knows_the_tokenizers_special_tokens(tmp_path):
    trainer = build(config("text", tmp_path / "run", "encoder.model=bert", "encoder.config.max_position_embeddings=40"))
    model, tokenizer = trainer.state.core.student.model, trainer.data.tokenizer
    assert model.config.pad_token_id == model.embeddings.word_embeddings.padding_idx == tokenizer.pad_token_id == 1
    assert model.embeddings.word_embeddings.weight[tokenizer.cls_token_id].norm() > 0
    with pytest.raises(ConfigError, match=r"encoder\.model=vit: has no vocabulary"):
        build(config("text", tmp_path / "other", "encoder.model=vit"))


def test_batches_without_masked_positions_are_replaced(tmp_path):
    (tmp_path / "short.txt").write_text("\n".join("a b" if i % 2 else "a few words more than that" for i in range(400)))
    settings = [f"data.path={tmp_path / 'short.txt'}", "data.cross_documents=false", "train.batch_size=1", "train.steps=60"]
    assert train(config("text", tmp_path / "run", *settings)) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-60" / "state.json").read_text())
    assert state["ranks"][0]["batches"] > 60


def test_environment_variables_of_accelerate_have_no_effect(tmp_path, monkeypatch, caplog):
    """Gradient accumulation would divide each gradient; the others would change precision, compilation or device."""
    plain = build(config("vision", tmp_path / "plain"))
    variables = {"GRADIENT_ACCUMULATION_STEPS": "4", "MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "EAGER", "USE_CPU": "yes"}
    variables["USE_FSDP"] = "False"
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    other = build(config("vision", tmp_path / "other"))
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in caplog.text and os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert type(other.state.model) is type(plain.state.model)
    norms = [[float(step(trainer.state, [batch])[1]) for batch in (trainer.feed.take(1)[0],)] for trainer in (plain, other)]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"])
@pytest.mark.parametrize("value", ["true", "maybe"])
def test_other_parallelism_of_accelerate_is_refused(name, value, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
    with pytest.raises(ConfigError, match=f"ACCELERATE_USE_{name}={value}: d2v-train has data parallelism only; unset it"):
        build(config("vision", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_workers_send_batches_through_a_pipe_if_shared_memory_is_full(tmp_path, monkeypatch, caplog):
    """Docker's default is 64 MB. The losses are the same."""
    train(config("vision", tmp_path / "a", "train.workers=1"))
    assert "/dev/shm" not in caplog.text

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # also in the workers, which are forks
    train(config("vision", tmp_path / "b", "train.workers=1"))
    assert caplog.text.count("/dev/shm is full, so batches come through a slower pipe") == 1
    a, b = ([r["loss"] for r in records(tmp_path / name)] for name in "ab")
    assert a == b


def test_workers_that_cannot_start_raise_an_error(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Queue", full)
    message = r"train\.workers=1: cannot be started: .*No space left on device; try fewer, .* docker run --shm-size=8g"
    with pytest.raises(DataError, match=message):
        train(config("vision", tmp_path / "run", "train.workers=1"))
    assert not (tmp_path / "run").exists()


def test_training_outside_the_main_thread_runs_with_a_warning(tmp_path, caplog):
    """As in a notebook server or in Ray; only the main thread receives signals."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, config("vision", tmp_path / "run", "train.workers=1")).result() == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 4]
    assert "not in the main thread: SIGTERM and Ctrl-C do not save the run" in caplog.text


def test_training_without_fork_and_posix_signals(tmp_path, monkeypatch, caplog):
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert train(config("vision", tmp_path / "run", "train.workers=2")) == 0
    assert "train.workers=2: this system cannot fork processes; the training process loads the data" in caplog.text


def test_runs_started_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda format: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(folders.new_folder, ["text-tiny"] * 8))
    assert sorted(map(str, made)) == sorted(
        f"runs/text-tiny-20260101-000000{end}" for end in ("", *(f"-{n}" for n in range(2, 9)))
    )
    (tmp_path / "file").touch()
    monkeypatch.setattr(folders, "Path", lambda name: tmp_path / "file" / name)
    with pytest.raises(ConfigError, match="cannot be written, choose another folder"):
        folders.new_folder("x")


def test_progress_is_plain_lines_if_stderr_is_not_a_terminal(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    caplog.set_level("INFO")
    train(config("vision", tmp_path / "run"))
    lines = capsys.readouterr().err.splitlines()
    progress = [line for line in lines if line.startswith("step ")]
    assert [line.partition(",")[0] for line in progress] == ["step 1/4", "step 2/4", "step 4/4"]
    assert progress[-1].startswith("step 4/4, 00:00 left: loss ") and "\r" not in "".join(lines)
    assert "curves are only in log.jsonl: " in caplog.text and "pip install tensorboard" in caplog.text


def test_parameters_without_a_gradient_are_frozen(tmp_path):
    """Otherwise two ranks fail at their second step. Wav2Vec2-Conformer has an unused positional convolution."""
    fields = ["encoder.model=wav2vec2-conformer", "encoder.config.layerdrop=0.5"]
    trainer = build(config("audio", tmp_path / "run", *fields))
    core, batch = trainer.state.core.train(), trainer.data.__getitems__([(0, 0), (0, 1)])
    trainer.state.core.student.model.config.layerdrop = 0  # so that one pass reaches every used parameter
    core(batch["source"], batch["mask"], padding_mask=batch.get("padding_mask")).loss.backward()
    without = [name for name, p in core.named_parameters() if p.requires_grad and p.grad is None]
    assert without and all("pos_conv_embed" in name for name in without)
    assert freeze_unused(core, trainer.data) == without
    assert not any(dict(core.named_parameters())[name].requires_grad for name in without)
    assert freeze_unused(core, trainer.data) == [] and core.student.training


def test_seeds_beyond_32_bits(tmp_path):
    """Samples, their order and masks follow the whole seed; torch's generator gets its last 32 bits."""
    found = []
    for name, seed in (("small", 5), ("large", 2**32 + 5), ("largest", 2**63 - 1)):
        trainer = build(config("vision", tmp_path / name, f"train.seed={seed}"))
        assert torch.initial_seed() == seed % 2**32
        found.append(trainer.feed.take(1)[0])
    for first, second in itertools.combinations(found, 2):
        assert first["samples"] != second["samples"] and not torch.equal(first["mask"], second["mask"])


def test_collapse_rules(tmp_path, caplog):
    run = config("vision", tmp_path / "run", "collapse.after=0", "collapse.target_std=2.0", "collapse.action=stop")
    with pytest.raises(CollapseError, match=r"target_std .* is below collapse\.target_std=2;"):
        train(run)
    train(config("vision", tmp_path / "warn", "collapse.after=2", "collapse.target_std=2.0"))
    assert [r.message.split(":")[0] for r in caplog.records if "target_std" in r.message] == ["step 4"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    train(config("vision", tmp_path / "run"))
    with pytest.raises(ConfigError, match="already holds a run"):
        build(config("vision", tmp_path / "run"))


def test_batches_have_as_many_recordings_as_the_settings_say(tmp_path):
    """Eight recordings of a quarter and four of half a second: batches have the given number, or the given seconds."""
    (tmp_path / "waves").mkdir()
    for i in range(12):
        wave = 0.1 * np.random.default_rng(i).normal(size=4000 if i < 8 else 8000)
        soundfile.write(tmp_path / "waves" / f"{i:02}.wav", wave, 16_000)
    common = [f"data.path={tmp_path}/waves", "data.join_seconds=0", "data.min_seconds=0"]
    for name, more, counts in (("a", [], [(4, 4000), (4, 4000), (4, 8000)]), ("b", ["data.batch_seconds=1"], [(2, 8000)] * 2)):
        batches = build(config("audio", tmp_path / name, *common, *more)).feed.take(4 if more else 3)
        found = [tuple(batch["source"].shape) for batch in batches]
        assert sorted(found) == sorted(counts + [(4, 4000)] * 2 * bool(more))
        assert sorted(i for batch in batches for i in batch["samples"]) == list(range(12))


def test_a_folder_that_was_there_before_a_run_that_fails_stays(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"data\.path=nowhere"):
        build(config("vision", tmp_path / "run", "data.path=nowhere/"))
    assert (tmp_path / "run").exists()
    for steps, alarms, stays in ((0, False, False), (0, True, True), (3, False, True)):
        made = folders.RunFolder(config("vision", tmp_path / f"{steps} {alarms}"), main=True)
        if alarms:
            (made.path / "alarms.jsonl").touch()
        made.leave(steps)
        assert made.path.exists() == stays


def test_runs_in_one_process_may_use_different_precisions(tmp_path):
    kept = []
    for precision in ("fp32", "bf16", "fp32"):
        kept.append(trainer := build(config("vision", tmp_path / precision, f"train.precision={precision}")))
        assert trainer.accelerator.mixed_precision == {"fp32": "no"}.get(precision, precision)
        computed = set()
        for module in (trainer.state.core.student, trainer.state.core.teacher.module):
            for linear in (each for each in module.blocks[0].modules() if isinstance(each, torch.nn.Linear)):
                linear.register_forward_hook(lambda module, args, output, dtypes=computed: dtypes.add(output.dtype))
        step(trainer.state, [trainer.feed.take(1)[0]])
        assert computed == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(p.dtype == torch.float32 for p in trainer.state.core.parameters())


def test_epochs_replace_steps(tmp_path):
    trainer = build(config("vision", tmp_path / "run", "train.epochs=0.5", "train.batch_size=100", "train.accumulate=2"))
    assert trainer.steps == 10  # 4000 images


@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_a_stopped_run_exports_its_student(how, code, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "d2v_fast.cli", *arguments("vision", run, "train.steps=100000", "train.log_every=1")],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 120
    while not ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") > 2):
        assert process.poll() is None and time.time() < deadline, process.stderr.read().decode()
        time.sleep(0.2)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error.decode()
    assert b"stopped at step" in error and b"Traceback" not in error
    AutoModel.from_pretrained(run / "export")


def test_two_processes_match_one_with_twice_the_batch(here, tmp_path):
    """Loss, statistics and gradient norm of each step agree."""
    losses = {}
    for n, size in ((1, 4), (2, 2)):
        run = tmp_path / str(n)
        settings = [f"train.batch_size={size}", "train.log_every=1", "data.flip=0", "data.jitter=0"]
        args = arguments("vision", run, *settings)
        for code, said in ranks(args, n):
            assert code == 0, said
        pooled = ("loss", "target_std", "grad_norm", "position_share", "content_loss", "feature_std", "feature_variation")
        pooled += ("student_rank", "teacher_rank", "teacher_decay", "gradient_peak", "update_share")
        losses[n] = [[r[name] for name in pooled] for r in records(run)]
    assert len(losses[2]) == 4
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-3)


def test_resume_auto_starts_or_resumes(tmp_path, caplog):
    """As in a requeued job; also if the run died before its first checkpoint and left only a log."""
    caplog.set_level("INFO")
    (tmp_path / "run" / "checkpoints" / "step-1.tmp").mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 7777}\n')
    (tmp_path / "run" / "alarms.jsonl").write_text('{"step": 1, "alarms": ["of before"]}\n')
    assert train(config("vision", tmp_path / "run", "--resume=auto")) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 4] and "7777" not in str(records(tmp_path / "run"))
    assert not (tmp_path / "run" / "alarms.jsonl").exists() and "goes on after" not in caplog.text
    assert train(config("vision", tmp_path / "run", "--resume=auto")) == 0
    assert "resumes after step 4; nothing is left to train" in caplog.text
    assert train(config("vision", tmp_path / "other", "--resume=auto")) == 0
    for file in (tmp_path / "run" / "checkpoints" / "step-4").glob("student*"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is intact"):  # does not start a new run instead
        train(config("vision", tmp_path / "run", "--resume=auto"))
    with pytest.raises(ConfigError, match=r"--resume: which run\?"):
        parse(["--config", "vision/tiny", "--resume=auto"])


class TestStopRequest:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_ends_the_run_unless_it_is_an_echo(self, number, monkeypatch):
        """torchrun repeats a Ctrl-C within a second."""
        clock, sent, kill = iter((10.0, 11.0, 11.5)), [], os.kill
        end = lambda process, number: sent.append((process, number, signal.getsignal(number)))  # noqa: E731
        monkeypatch.setattr("d2v_fast.train.guards.time", SimpleNamespace(monotonic=lambda: next(clock)))
        monkeypatch.setattr("d2v_fast.train.guards.os", SimpleNamespace(getpid=os.getpid, kill=end))
        before = signal.getsignal(number)
        with StopRequest() as stop:
            assert not stop.asked
            for expected in ([], [], [(os.getpid(), number, signal.SIG_DFL)]):
                kill(os.getpid(), number)
                assert stop.asked and sent == expected
        assert signal.getsignal(number) == before

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
    def test_a_warning_signal_does_not_count_as_the_first_of_two(self, number, monkeypatch):
        monkeypatch.setattr(StopRequest, "ECHO", -1.0)  # any second signal counts
        before = signal.getsignal(number), signal.getsignal(signal.SIGTERM)
        with StopRequest() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # this would end the process if it counted as the second signal
            assert stop.asked
        assert (signal.getsignal(number), signal.getsignal(signal.SIGTERM)) == before

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_an_immediate_repeat_is_no_second_signal(self, number):
        """torchrun forwards a Ctrl-C that its ranks already have from the terminal."""
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        before = signal.signal(number, default)
        try:
            with StopRequest() as stop:
                for _ in range(3):
                    os.kill(os.getpid(), number)
                assert stop.asked
            assert signal.getsignal(number) is default
        finally:
            signal.signal(number, before)

    def test_an_existing_signal_handler_is_kept(self):
        heard = []
        before = signal.signal(signal.SIGUSR1, lambda *args: heard.append(1))
        try:
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert heard == [1] and not stop.asked
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_nohup_keeps_a_run_alive_without_its_terminal(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert not stop.asked
        finally:
            signal.signal(signal.SIGHUP, before)


def test_srun_without_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match=r"srun has started 4 processes, which would be 4 runs; .* torchrun once per node"):
        build(config("vision", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")  # as torchrun sets it
    check_slurm()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    build(config("vision", tmp_path / "run"))


def test_restarts_that_would_not_connect_are_warned_of(monkeypatch, caplog):
    for restarts, shared in (("0", "True"), ("3", "False")):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        check_restarts()
    assert not caplog.records
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    check_restarts()
    assert "torchrun --max-restarts=3: restarted processes may fail" in caplog.text


@pytest.mark.parametrize(
    "device, found, cpu",
    [("auto", False, True), ("auto", True, False), ("cpu", True, True), ("cuda", True, False), ("cuda", False, None)],
)
def test_a_run_is_on_the_cpu_if_asked_or_without_a_gpu(device, found, cpu, monkeypatch):
    """With a torch that was built for GPUs, on a machine with one and without one."""

    def current(check_available=False):
        return torch.device("cuda") if found or not check_available else None

    asked = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found)
    monkeypatch.setattr(
        accelerate, "Accelerator", lambda **kwargs: asked.append(kwargs["cpu"]) or SimpleNamespace(is_main_process=True)
    )
    with pytest.raises(ConfigError, match="finds no GPU") if cpu is None else nullcontext():
        start(TrainConfig(device=device))
    assert asked == ([] if cpu is None else [cpu])


@pytest.mark.parametrize("main", [True, False])
def test_one_rank_warns_of_what_the_environment_says(main, monkeypatch, caplog):
    monkeypatch.setattr(accelerate, "Accelerator", lambda **kwargs: SimpleNamespace(is_main_process=main))
    start(TrainConfig())
    assert not caplog.messages
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    start(TrainConfig())
    said = [message.partition(":")[0] for message in caplog.messages]
    assert said == (["torchrun --max-restarts=3", "ACCELERATE_DYNAMO_BACKEND=EAGER"] if main else [])


def test_a_flag_of_any_rank_is_set_on_all():
    def reduce(flags, how):
        assert how == "sum"
        return flags + torch.tensor([0.0, 0, 1, 2])  # of the other three

    ranks = SimpleNamespace(num_processes=4, device=torch.device("cpu"), reduce=reduce)
    assert on_any(ranks, True, False, False, True) == [True, False, True, True]
    assert on_any(SimpleNamespace(num_processes=1), True, False) == [True, False]  # without waiting for a device


def run_folder(output, main=True, **more):
    settings = dict(train=SimpleNamespace(output=output and str(output)), name="text-tiny", resume=False, parts={})
    return folders.RunFolder(SimpleNamespace(**settings | more), main)


def locked(folder):
    """As another process finds it."""
    other = FileLock(folder / ".lock", timeout=0)
    try:
        other.acquire()
    except Timeout:
        return True
    other.release()
    return False


def test_a_folder_is_locked_until_its_run_leaves(tmp_path):
    """Also a run that was built before in this process and never started."""
    path = tmp_path / "a" / "run"
    runs = [run_folder(path), run_folder(path)]
    assert locked(path)
    runs[1].leave(1)
    assert not locked(path)
    (path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="already holds a run; it has no checkpoint"):
        run_folder(path)
    assert not locked(path)
    (path / "log.jsonl").rename(path / "checkpoints")
    with pytest.raises(ConfigError, match="already holds a run; --resume continues it"):
        run_folder(path)
    assert not locked(path)


def test_other_ranks_neither_create_nor_lock_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "from_main", lambda value: "runs/of-rank-0" if value is None else value)
    assert run_folder(None, main=False).path == folders.Path("runs/of-rank-0") and not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    other = run_folder("run", main=False)
    assert not locked(other.path)


def test_a_run_without_an_output_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = run_folder(None)
    assert made.path.parent == folders.Path("runs") and locked(made.path)
    for _ in range(2):  # by the loop and by its caller
        made.leave(0)
    assert not list((tmp_path / "runs").iterdir())
    run_folder("missing", resume=True).leave(0)
    assert not (tmp_path / "missing").exists()  # the checkpoint is missed elsewhere


def test_what_parts_logged_before_the_first_checkpoint_is_removed(tmp_path):
    logs = [tmp_path / part / name for part in ("", "vision") for name in ("log.jsonl", "alarms.jsonl")]
    (tmp_path / "vision").mkdir()
    for checkpoint_exists in (True, False):
        for log in logs:
            log.write_text('{"step": 1}\n')
        (tmp_path / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        if not checkpoint_exists:
            (tmp_path / "checkpoints" / "step-1").rename(tmp_path / "checkpoints" / "step-1.tmp")
        folder = run_folder(tmp_path, resume="auto", parts={"vision": None})
        assert folder.resume is checkpoint_exists
        assert [log.exists() for log in logs] == [checkpoint_exists] * 4
        folder.leave(1)


@pytest.mark.parametrize(
    "main, there, seen, blind",
    [
        (True, True, [None, True], ""),
        (True, True, [None, False, True, False], "ranks 1, 3 do"),
        (True, False, [None, False], ""),  # --resume of a folder that is missing everywhere
        (False, True, [True, None], "ranks 1 do"),
    ],
)
def test_all_ranks_see_a_new_file_in_the_folder_or_stop(main, there, seen, blind, tmp_path, monkeypatch):
    """None stands for this rank."""
    path = tmp_path / "run"
    if there:
        path.mkdir()
    folder = run_folder(path, main=False)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [own[0] if found is None else found for found in seen])
    with pytest.raises(ConfigError, match=f"{blind} not see this folder of rank 0") if blind else nullcontext():
        folder.check_shared(SimpleNamespace(is_main_process=main))
    assert path.exists() == there and not list(tmp_path.glob("run/.shared*"))


SAVED = "save close written export together"


@pytest.mark.parametrize(
    "error, done, world, shard, events",
    [
        (None, 3, 2, True, SAVED),
        (CollapseError("x"), 3, 2, True, SAVED),  # raised on all ranks
        (NotFiniteError("x"), 3, 2, False, SAVED),
        (CallbackError("x"), 3, 1, False, "save close written export"),
        (CallbackError("x"), 3, 2, False, "close written export"),  # other ranks train on
        (CallbackError("x"), 3, 2, True, "close written"),  # nor do they join the export
        (WorkerDied("x"), 3, 2, False, "close written export"),
        (DataError("x"), 3, 2, True, "close written"),
        (KeyError("x"), 0, 1, False, "close written"),  # nothing is learned
    ],
)
def test_what_is_kept_when_the_steps_end(error, done, world, shard, events, monkeypatch):
    found = []

    def note(event):
        return lambda *args, **kwargs: found.append(event)

    run = SimpleNamespace(
        each=[SimpleNamespace(feed=SimpleNamespace(close=note("close")))],
        checkpoints=SimpleNamespace(wait=note("written")),
        state=SimpleNamespace(done=done, world=world),
        config=SimpleNamespace(train=SimpleNamespace(shard=shard)),
        accelerator=SimpleNamespace(wait_for_everyone=note("together")),
    )
    monkeypatch.setattr(loops, "save", note("save"))
    monkeypatch.setattr(loops, "_export", note("export"))
    with pytest.raises(type(error)) if error else nullcontext():
        with loops._ending(run, SimpleNamespace(asked=False)) as end:
            if error:
                raise error
            end.save()
    assert found == events.split() and not end.stopped
    if isinstance(error, WorkerDied):  # the signal that asked the run to stop went to its workers too
        with loops._ending(run, SimpleNamespace(asked=True)) as end:
            raise error
        assert end.stopped


def test_a_run_whose_data_fail_saves_what_it_has_learned(tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run", "train.save_every=0"))
    take = run.feed.take

    def failing(number):
        if run.state.done == 2:
            raise DataError("the disk is gone")
        return take(number)

    monkeypatch.setattr(run.feed, "take", failing)
    with pytest.raises(DataError, match="the disk is gone"):
        loop(run)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert json.loads((tmp_path / "run" / "export" / "step.json").read_text()) == {"step": 2}
    assert not locked(tmp_path / "run")


def test_a_signal_while_batches_are_loaded_ends_the_run_before_their_step(tmp_path, monkeypatch, caplog):
    run = build(config("vision", tmp_path / "run"))
    take = run.feed.take

    def interrupted(number):
        if run.state.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(number)

    monkeypatch.setattr(run.feed, "take", interrupted)
    assert loop(run) == 130
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert "stopped at step 2 of 4" in caplog.text


def test_when_a_run_exports_and_prepares_for_checkpoints(tmp_path, monkeypatch, caplog):
    """The first of its exports does not fit on the disk."""
    run = build(config("vision", tmp_path / "run", "train.steps=5", "train.export_every=2", "train.save_every=4"))
    file, export, found, reserved = tmp_path / "run" / "export" / "step.json", loops.export, [], []

    def exporting(part):
        if part.state.done == 2:
            raise OSError(28, "No space left on device")
        export(part)

    def noting(state, batches):
        found.append(json.loads(file.read_text())["step"] if file.exists() else 0)
        return step(state, batches)

    monkeypatch.setattr(loops, "export", exporting)
    monkeypatch.setattr(loops, "step", noting)
    monkeypatch.setattr(loops, "reserve", lambda run: reserved.append(run.state.done))
    assert loop(run) == 0
    assert found == [0, 0, 0, 0, 4] and json.loads(file.read_text()) == {"step": 5} and reserved == [1]
    assert caplog.text.count("the export could not be written, training continues: [Errno 28] No space left") == 1


def test_a_checkpoint_that_is_due_while_another_is_written_comes_later(tmp_path, monkeypatch):
    """Training does not wait for the disk."""
    run = build(config("vision", tmp_path / "run", "train.steps=5", "train.save_every=1", "train.keep_last=9"))
    allowed, write = threading.Event(), checkpoint.save_file

    def slow(*args):
        assert allowed.wait(5)
        write(*args)

    def stepping(state, batches):
        if state.done == 3:
            allowed.set()
            run.checkpoints.wait()
        return step(state, batches)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(loops, "reserve", lambda run: None)  # which may take until the second step
    monkeypatch.setattr(loops, "step", stepping)
    assert loop(run) == 0
    found = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-1", "step-4", "step-5"]


@pytest.mark.filterwarnings(FIRST_SKIPPED)
@pytest.mark.parametrize("other_is_finite", [True, False])
def test_two_ranks_divide_by_the_positions_of_both_and_skip_together(other_is_finite, tmp_path, monkeypatch):
    run = build(config("vision", tmp_path / "run", "train.accumulate=2"))
    state, seen, others = run.state, [], [10, float(other_is_finite)]
    batches = run.feed.take(2)
    total = sum(int(batch["mask"].sum()) for batch in batches)

    def reduce(value, how):
        assert how == "sum"
        return value + others.pop(0)

    def passing(state, inputs, num_targets, parts):
        seen.append((float(num_targets), parts))
        return torch.ones(2)

    state.world = 2
    monkeypatch.setattr(state.accelerator, "reduce", reduce)
    monkeypatch.setattr("d2v_fast.train.step.forward_backward", passing)
    monkeypatch.setattr("d2v_fast.train.step.clip", lambda state: torch.tensor(1.0))
    outcome = step(state, batches)
    assert seen == [((total + 10) / 2, 1)] * 2 and (float(outcome.loss), float(outcome.cls_loss)) == (2, 2)
    assert bool(outcome.finite) is other_is_finite and state.skipped.count == 1 - other_is_finite
    assert state.core.teacher.step == other_is_finite
