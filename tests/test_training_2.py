"""data2vec 2.0 with d2v-train: runs, their output, resuming, several ranks, and invalid settings."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from d2v_fast import ConvDecoder, Data2Vec, Encoder, TargetsConfig, cli
from d2v_fast import train as training
from d2v_fast.config import parse
from d2v_fast.diagnostics import CollapseError, constant_loss
from d2v_fast.graphs import Graphs
from d2v_fast.ops import attention
from d2v_fast.train.build import build, freeze_unused
from d2v_fast.train.loop import loop
from d2v_fast.train.step import forward_backward, make_graphs, step, to_device
from tests.models import Handwritten
from tests.runs import Run, ranks, train
from tests.test_graphs import Again
from tests.test_resume import assert_same, killed_and_resumed, last

pytestmark = pytest.mark.usefixtures("here")

COMMON = "encoder.config.hidden_size=32 encoder.config.num_hidden_layers=3 encoder.config.num_attention_heads=2 "
COMMON += "encoder.config.intermediate_size=48 targets.top_k=2 head.width=32 head.layers=2 data.views=3 train.steps=4 "
COMMON += "train.batch_size=4 train.workers=0 train.log_every=2 train.precision=fp32"
# With head.zero_init the first predictions would not depend on the student.
SMALL = {
    "text": "data.vocab_size=400",
    "vision": "",
    "audio": "encoder.config.conv_dim=[8,8,8,8,8,8,8] data.max_seconds=0.5 data.join_seconds=0.5 head.zero_init=false",
}
OURS = {"vision": "encoder.model=data2vec2-vision loss.cls_weight=2", "audio": "encoder.model=data2vec2-audio"}
DROPOUT = {
    "text": "encoder.config.hidden_dropout_prob=0.1 encoder.config.attention_probs_dropout_prob=0.1",
    "vision": "encoder.config.hidden_dropout_prob=0.1 loss.cls_weight=2",
    "audio": "encoder.config.hidden_dropout=0.1 encoder.config.layerdrop=0.3 data.path=waves data.crop=false "
    "data.join_seconds=0",
}


def arguments(modality, folder, *more):
    settings = [*COMMON.split(), *SMALL[modality].split(), f"train.output={folder}"]
    return ["--config", f"{modality}/tiny-2", *settings, *more]


def config(modality, folder="run", *more):
    return parse(arguments(modality, folder, *more))[0]


def records(folder="run"):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


@pytest.fixture
def waves(here):
    Path("waves").mkdir()
    for i in range(9):
        soundfile.write(f"waves/{i}.wav", 0.1 * np.random.default_rng(i).normal(size=4000 + 800 * i), 16_000)


def command(monkeypatch, name, *args):
    """Exit code or message."""
    monkeypatch.setattr(sys, "argv", [f"d2v-{name}", *args])
    with pytest.raises(SystemExit) as exit:
        getattr(cli, name)()
    return exit.value.code


@pytest.mark.parametrize("modality, ours", [*((name, False) for name in SMALL), *((name, True) for name in OURS)])
def test_a_run_writes_log_export_card_and_report(modality, ours, monkeypatch):
    trainer = build(config(modality, "run", *(OURS[modality].split() if ours else [])))
    assert loop(trainer) == 0
    log = records()
    assert [record["step"] for record in log] == [1, 2, 4]
    for record in log:
        assert all(math.isfinite(record[k]) for k in ("loss", "target_std", "prediction_std", "relative_loss", "grad_norm"))
        assert ("cls_loss" in record) == (trainer.state.core.cls_weight > 0)
    for trust in (False, True):
        exported = AutoModel.from_pretrained("run/export", trust_remote_code=trust).eval()
        batch = trainer.data.__getitems__([(0, 0), (0, 1)])
        with torch.no_grad():
            states = trainer.state.core.student.eval()(batch["source"])
            whole = exported(batch["source"]).last_hidden_state[:, -states.shape[1] :]
        torch.testing.assert_close(whole, states, rtol=0, atol=1e-6)
    for weights in ([], ["--teacher"]):
        assert command(monkeypatch, "export", "run", "--to", f"to{len(weights)}", *weights) is None
        card = Path(f"to{len(weights)}/README.md").read_text()
        assert f"data2vec 2.0 on {modality}" in card and "in 3 views, decoder of 2 convolutions" in card
    assert command(monkeypatch, "report", "run") is None and Path("run/report.html").stat().st_size > 1000


PADDED = {
    "audio": "data.crop=false data.path=waves data.join_seconds=0 encoder.model=data2vec2-audio",
    "text": "data.cross_documents=false",
}


@pytest.mark.parametrize("modality", PADDED)
def test_padding_is_neither_seen_nor_scored(modality, waves):
    """In float64: the loss of a padded batch is the sum over its unpadded samples, for any content of the padding."""
    trainer = build(config(modality, "run", "head.noise=0", *PADDED[modality].split()))
    core = trainer.state.core.double().eval()

    def loss(*samples, padded=None):
        batch = trainer.data.__getitems__([(0, i) for i in samples])
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in to_device(batch, trainer.state.device).items()}
        if padded is not None:
            inputs["source"] = inputs["source"].masked_fill(batch["padding_mask"], padded)
        with torch.no_grad():
            return float(core(**inputs, num_targets=1).loss), batch

    together, batch = loss(*range(4))
    padding, masked = batch["padding_mask"], batch["mask"].sum(2)
    assert padding.any() and not (batch["mask"] & padding[:, None]).any()
    assert (masked == masked[:, :1]).all() and len(masked[:, 0].unique()) > 1
    assert together == pytest.approx(sum(loss(i)[0] for i in range(4)), rel=1e-7)
    if modality == "text":
        assert loss(*range(4), padded=17)[0] == pytest.approx(together, rel=1e-9)


@pytest.mark.parametrize(
    "modality, more",
    [
        ("text", ["train.workers=1"]),
        ("vision", ["train.workers=0", "train.accumulate=2"]),
        ("audio", ["train.workers=1"]),
        pytest.param("audio", ["train.workers=0", "--fused"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(modality, more, waves):
    """With dropout in encoder and decoder, noise at masked positions, LayerDrop, CLS and padding."""
    more = ["train.steps=12", "train.save_every=5", "head.dropout=0.1", *DROPOUT[modality].split(), *more]
    killed_and_resumed(lambda name: arguments(modality, name, *more), k=5, threads=1)


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one():
    more = ["train.workers=1", "train.log_every=1", "head.dropout=0.1", *DROPOUT["vision"].split()]
    more += ["schedule.kind=constant", "schedule.warmup=0", "collapse.action=off"]  # defaults depend on the number of steps
    run = Run(arguments("vision", "run", *more, "train.steps=100000"))
    run.until(lambda: Path("run/log.jsonl").exists() and len(records()) > 3)
    run.send(signal.SIGINT)
    code, said = run.wait()
    steps = int(last("run").name[5:]) + 4
    assert code == 130 and f"stopped at step {steps - 4} of 100000" in said
    assert train(["--resume", "run", f"train.steps={steps}", "--resume-allow", "train.steps"])[0] == 0
    assert train(arguments("vision", "whole", *more, f"train.steps={steps}"))[0] == 0
    assert_same("whole", "run")


@pytest.mark.parametrize("modality", SMALL)
def test_accumulation_equals_a_larger_batch(modality, waves):
    """One batch of four or two of two, in float64: the same loss, gradient norm and CLS loss."""
    found = []
    more = [*OURS.get(modality, "").split(), "head.noise=0"]
    if modality == "audio":  # unequal masks
        more += ["data.path=waves", "data.crop=false", "data.join_seconds=0"]
    for size, accumulate in ((4, 1), (2, 2)):
        trainer = build(config(modality, str(size), f"train.accumulate={accumulate}", *more))
        trainer.state.core.double()
        keys = [(0, i) for i in range(4)]
        batches = [trainer.data.__getitems__(keys[i : i + size]) for i in range(0, 4, size)]
        for batch in batches:
            if batch["source"].is_floating_point():
                batch["source"] = batch["source"].double()
        found.append([float(x) for x in step(trainer.state, batches)[:3]])
    assert len({len(batch["index"]) for batch in batches}) == (2 if modality == "audio" else 1)
    assert found[0] == pytest.approx(found[1], rel=1e-6) and (found[0][2] > 0) == (modality == "vision")


@pytest.mark.parametrize("reduction", ["global", "local"])
def test_relative_loss_excludes_the_cls_loss(reduction):
    """Means over a window of two steps with two micro-batches each."""
    more = [*OURS["vision"].split(), "train.accumulate=2", f"loss.reduction={reduction}", "loss.cls_weight=50", "head.noise=0"]
    trainer = build(config("vision", "run", *more))
    seen = []

    def note(core, args, inputs, output):
        error = output.loss.detach() - output.cls_loss
        seen.append((float(error), float(output.cls_loss), output.stats and output.stats.target))

    trainer.state.core.register_forward_hook(note, with_kwargs=True)
    loop(trainer)
    record, share = records()[-1], 1 if reduction == "global" else 2
    error, cls = (sum(each[i] for each in seen[-4:]) / 2 / share for i in (0, 1))
    assert cls > 2 * error
    assert (record["loss"], record["cls_loss"]) == pytest.approx((error + cls, cls), rel=1e-4)
    target = type(seen[-1][2]).pooled([each[2] for each in seen[-2:]])
    settings = trainer.state.core.loss_settings
    constant = float(constant_loss(target, settings["beta"], settings["scale"]))
    assert record["relative_loss"] == pytest.approx(error / constant, rel=1e-4)


def test_position_share_counts_each_position_once_for_any_number_of_views():
    """The reference is the adjusted R² of the targets on their positions, over the distinct rows."""
    trainer = build(config("vision", "run", "data.views=6", "mask.prob=0.5", "mask.adjust=0", "train.steps=1"))
    seen = []

    def note(core, args, inputs, output):
        last = output.teacher_states.double()
        normed = (last - last.mean(1, keepdim=True)) / (last.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normed = (normed - normed.mean(2, keepdim=True)) / (normed.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        seen.append((inputs["mask"], normed))

    trainer.state.core.register_forward_hook(note, with_kwargs=True)
    loop(trainer)
    ((mask, last),) = seen
    sample, position = mask.any(1).nonzero(as_tuple=True)
    rows, within = last[sample, position], 0.0
    assert len(rows) < mask.sum() / 2
    for each in position.unique():
        group = rows[position == each]
        within += float((group - group.mean(0)).pow(2).sum())
    free, around = len(rows) - len(position.unique()), float((rows - rows.mean(0)).pow(2).sum())
    assert records()[-1]["position_share"] == pytest.approx(1 - within / free / (around / (len(rows) - 1)), rel=1e-4)


def test_two_processes_match_one_with_twice_the_batch():
    """The logged figures of each step agree."""
    found = {}
    for n, size in ((1, 4), (2, 2)):
        settings = [*OURS["vision"].split(), f"train.batch_size={size}", "train.steps=3", "train.log_every=1", "head.noise=0"]
        args = arguments("vision", str(n), *settings, "data.flip=0", "data.jitter=0")
        for code, said in ranks(args, n):
            assert code == 0, said
            assert "frozen" not in said  # the mask vector does not require a gradient
        pooled = ("loss", "cls_loss", "relative_loss", "target_std", "grad_norm", "position_share", "content_loss")
        pooled += ("feature_std", "student_rank", "teacher_rank", "teacher_decay", "update_share")
        found[n] = [[r[name] for name in pooled] for r in records(str(n))]
    assert len(found[2]) == 3
    np.testing.assert_allclose(found[2], found[1], rtol=1e-3)


@pytest.mark.parametrize("modality", SMALL)
def test_freeze_unused_finds_nothing_to_freeze(modality):
    trainer = build(config(modality, "run", *OURS.get(modality, "").split()))
    assert freeze_unused(trainer.state.core, trainer.data) == []


@pytest.mark.parametrize("modality", SMALL)
def test_fused_and_plain_losses_agree(modality, monkeypatch):
    curves, attended, ours = [], set(), attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args, **kwargs: attended.add(name) or ours(*args, **kwargs))
    for name, fused in (("plain", False), ("fused", True)):
        run = build(config(modality, name, *OURS.get(modality, "").split(), "train.log_every=1"), fused)
        loop(run)
        curves.append([record["loss"] for record in records(name)])
    for part, there in (("loss native", True), ("attention", True), ("last block", False)):
        assert any(part in done for done in run.fused) == there
    assert attended == {"fused"}
    np.testing.assert_allclose(*curves, rtol=1e-3)


def test_bf16_losses_are_close_to_fp32():
    curves = []
    for precision in ("fp32", "bf16"):
        more = [*OURS["vision"].split(), f"train.precision={precision}", "train.log_every=1", "head.noise=0"]
        training.train(config("vision", precision, *more))
        curves.append([record["loss"] for record in records(precision)])
    np.testing.assert_allclose(*curves, rtol=0.03)
    assert curves[0] != curves[1]


@pytest.mark.parametrize("modality", SMALL)
def test_replayed_graphs_give_the_same_run(modality):
    found = []
    for name in ("plain", "replayed"):
        run = build(config(modality, name, *OURS.get(modality, "").split(), "train.steps=9", "train.log_every=3"))
        if name == "replayed":
            run.state.graphs = Again(functools.partial(forward_backward, run.state), run.state.parameters, after=1)
        loop(run)
        found.append((records(name), run.state.core.state_dict()))
    (plain, weights), (replayed, again) = found
    for key in ("loss", "cls_loss", "grad_norm", "target_std", "teacher_rank"):
        assert [record.get(key) for record in replayed] == [record.get(key) for record in plain], key
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert run.state.graphs.recorded


def test_graphs_are_used_only_on_one_gpu_without_accumulation(monkeypatch):
    run = build(config("vision", "run"), fused=True)
    state, settings = run.state, run.config.train
    assert state.graphs is None  # on a CPU
    state.device = torch.device("cuda")
    assert isinstance(make_graphs(state, settings), Graphs)
    for change in ({"graphs": False}, {"accumulate": 2}, {"checkpointing": True}):
        assert make_graphs(state, replace(settings, **change)) is None
    student = state.core.student
    for place, name, value in (
        (state, "world", 2),
        (state.accelerator, "scaler", object()),
        (student, "halves", None),  # the forward of a model of your own may depend on the host
        (student.model.config, "layerdrop", 0.1),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, value, raising=False)
            assert make_graphs(state, settings) is None


class TestMonitor:
    def test_detects_a_diverging_run(self):
        more = ["train.steps=60", "collapse.after=10", "optimizer.lr=5", "schedule.kind=constant", "schedule.warmup=0"]
        with pytest.raises(CollapseError, match="collapse"):
            training.train(config("text", "run", *more, "collapse.action=stop", "train.log_every=10", "train.clip_norm=0"))

    def test_detects_a_student_that_does_not_learn(self):
        more = ["train.steps=20", "collapse.after=5", "optimizer.lr=1e-12", "collapse.action=stop"]
        with pytest.raises(CollapseError, match="the student hardly moves"):
            training.train(config("vision", "run", *more))

    @pytest.mark.parametrize("bound, alarmed", [("1.0", False), ("0.999999", True)])
    def test_a_constant_teacher_is_allowed_by_a_decay_bound_of_1(self, bound, alarmed):
        """Some published recipes end with a decay of 1."""
        more = ["ema.start=1", "ema.end=1", "train.steps=12", "collapse.after=5", f"collapse.decay={bound}"]
        training.train(config("vision", "run", *more))
        found = Path("run/alarms.jsonl").read_text() if Path("run/alarms.jsonl").exists() else ""
        assert ("the teacher does not move" in found) == alarmed and (alarmed or not found)


@pytest.mark.parametrize(
    "preset, model, layers, heads",
    [
        ("audio/tiny-2", "data2vec-audio", 5, 4),
        ("audio/v2-base", "data2vec-audio", 5, 12),
        ("audio/v2-base", "wav2vec2", None, 12),  # there it is the kernel width of a single convolution
    ],
)
def test_changing_the_encoder_keeps_only_fields_with_the_same_meaning(preset, model, layers, heads):
    fields = parse(["--config", preset, f"encoder.model={model}"])[0].encoder.config
    assert fields.get("num_conv_pos_embeddings") == layers and fields["num_attention_heads"] == heads


@pytest.mark.parametrize(
    "name, modality",
    [
        ("finetune_images", "vision"),
        pytest.param("finetune_speech", "audio", marks=pytest.mark.slow),
        pytest.param("finetune_ctc", "audio", marks=pytest.mark.slow),
    ],
)
def test_the_fine_tuning_examples_load_the_export(name, modality, monkeypatch):
    """In a process that has not imported the data2vec 2.0 models."""
    training.train(config(modality, "run", *OURS[modality].split()))
    assert command(monkeypatch, "export", "run", "--to", "encoder") is None
    code = (
        "import torch, transformers; torch.set_num_threads(1); load = transformers.PreTrainedModel.from_pretrained.__func__; "
        "transformers.PreTrainedModel.from_pretrained = classmethod("
        "lambda cls, path, **more: print('loads', path) or load(cls, path, **more)); "
        f"import {name}; print({name}.main('encoder', count=32, epochs=1))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'examples'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'pretrained':" in done.stdout and done.stdout.count("loads encoder") == 1


class Placed(Handwritten):
    """A custom encoder with a method `place` that adds positions."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(12, self.hidden_size))

    def place(self, features):
        return features + self.table

    def positions(self, size):
        return 12


class Table(Handwritten):
    """A custom encoder whose attribute `place` is a table that `contextualize` adds."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.randn(12, self.hidden_size))

    def contextualize(self, features, padding_mask=None):
        return super().contextualize(features + self.place, padding_mask)


def test_a_custom_encoder_needs_the_method_place_for_views():
    encoder, source = Encoder(Placed(), "blocks", "mlp.2"), torch.randn(2, 12, 6)
    mask = torch.rand(2, 3, 12).argsort(-1) < 7
    model = Data2Vec(encoder, ConvDecoder(32, width=32, layers=1), targets=TargetsConfig(top_k=2))
    output = model(source, mask)
    output.loss.backward()
    placed = encoder.model.place(encoder.model.embed(source))
    views = torch.stack([placed[b][~mask[b, m]] for b in range(2) for m in range(3)])  # 5 of 12 in each
    torch.testing.assert_close(output.states, encoder.model.contextualize(views).flatten(0, 1))
    assert encoder.model.table.grad.abs().sum() > 0

    other = Encoder(Table(), "blocks", "mlp.2")
    assert math.isfinite(Data2Vec(other, targets=TargetsConfig(top_k=2))(source, mask[:, 0]).loss.item())
    with pytest.raises(ValueError, match=r"Table cannot encode .* give a module of your own the method place\(features\)"):
        Data2Vec(other, ConvDecoder(32, width=32, layers=1), targets=TargetsConfig(top_k=2))


def test_rectangular_patches():
    more = ["encoder.config.patch_size=[4,8]", "encoder.init=hf", *OURS["vision"].split()]
    trainer = build(config("vision", "run", *more))
    assert trainer.data.grid == (8, 4) and loop(trainer) == 0


@pytest.mark.parametrize("views", range(1, 17, 3))
def test_1_to_16_views(views):
    trainer = build(config("vision", "run", f"data.views={views}"))
    batch = trainer.feed.take(1)[0]
    assert batch["mask"].shape[:2] == (4, views)
    assert len({mask.numpy().tobytes() for mask in batch["mask"].flatten(0, 1)}) == 4 * views
    assert math.isfinite(step(trainer.state, [batch])[0])


@pytest.mark.parametrize(
    "modality, more, message",
    [
        ("vision", "data.views=0", "data.views: found 0, expected at least 1"),
        ("vision", "data.views=-1", "data.views: found -1, expected at least 1"),
        ("vision", "data.views=null", "head.kind=conv with data.views=null: data2vec 2.0 takes head.kind=conv and a number"),
        ("vision", "head.kind=linear", "head.kind=linear with data.views=3: data2vec 2.0 takes head.kind=conv and"),
        ("vision", "mask.kind=block", "BlockMask leaves a different number of positions visible in each view"),
        ("audio", "mask.kind=span", "SpanMask leaves a different number of positions visible in each view"),
        ("text", "mask.kind=token", "TokenMask leaves a different number of positions visible in each view"),
        ("vision", "mask.prob=0.001 mask.inverse=false", "the mask covers no position in 100 batches in a row"),
        ("vision", "head.groups=5", "head.groups: found 5, expected a divisor of width=32 and hidden_size=32"),
        ("vision", "head.kernel=0", "head.kernel: found 0, expected at least 1"),
        ("vision", "head.width=0", "head.width: found 0, expected at least 1"),
        ("vision", "targets.top_k=4", "top_k: found 4, but Data2Vec2VisionModel has 3 layers"),
        ("vision", "head.kind=linear data.views=null loss.cls_weight=1", "loss.cls_weight: found 1.0, which is for head.kind="),
        (
            "text",
            "loss.cls_weight=1",
            "cls_weight: found 1.0, but RobertaModel has no CLS token to train; expected 0",
        ),
        ("audio", "loss.cls_weight=1", "cls_weight: found 1.0, but Data2Vec2AudioModel has no CLS token"),
        ("audio", "encoder.model=wavlm", "WavLMModel cannot encode the visible positions alone"),
        ("audio", "encoder.model=wav2vec2-conformer", "Wav2Vec2ConformerModel cannot encode the visible positions alone"),
        (
            "text",
            "encoder.model=roformer encoder.config.max_position_embeddings=64",
            "or leave the decoder out for data2vec 1.0",
        ),
        (
            "vision",
            "encoder.model=roberta encoder.init=hf",
            "encoder.model=roberta: RobertaModel does not read inputs of modality=vis",
        ),
        ("text", "data.teacher_input=masked_only", "data.teacher_input=masked_only: needs a single mask per sample"),
        ("vision", "head.pretrained=none", "head.pretrained=none: No such file or directory: none/head.safetensors"),
    ],
)
def test_invalid_settings_give_a_one_line_message(modality, more, message, monkeypatch):
    found = command(monkeypatch, "train", *arguments(modality, "run", *more.split()))
    assert found.startswith("d2v-train: ") and message in found and len(found.splitlines()) == 1
    assert not Path("run").exists()


@dataclass(frozen=True)
class MasksAll:
    """A custom mask that hides every position."""

    def __call__(self, draws, size, lengths=None):
        return np.ones((len(draws), math.prod(size)), dtype=bool)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_that_hides_every_position_is_refused(workers, monkeypatch):
    monkeypatch.setattr("d2v_fast.masking.ExactBlockMask.__call__", MasksAll.__call__)
    found = command(monkeypatch, "train", *arguments("vision", "run", f"train.workers={workers}"))
    assert found == "d2v-train: mask: found a view without visible positions, expected at least one in each"


class TestPretrained:
    """A folder as d2v-export writes it for a released checkpoint: encoder, decoder and teacher."""

    @pytest.fixture
    def folder(self, here):
        trainer = build(config("vision", "before", *OURS["vision"].split()))
        loop(trainer)
        folder, core = Path("before/export"), trainer.state.core
        save_file({k: v.contiguous() for k, v in core.head.state_dict().items()}, folder / "head.safetensors", {"width": "32"})
        save_file(core.teacher.module.model.state_dict(), folder / "teacher.safetensors")
        return folder, core

    def arguments(self, modality="vision", *more):
        settings = [setting for setting in arguments(modality, "run") if not setting.startswith("encoder.config.")]
        return [*settings, "encoder.pretrained=before/export", *more]

    def test_encoder_decoder_and_teacher_are_loaded(self, folder):
        trainer = build(parse(self.arguments())[0])
        for name, value in folder[1].state_dict().items():
            if isinstance(value, torch.Tensor) and not name.endswith(("mask_embedding", "_extra_state")):
                assert torch.equal(trainer.state.core.state_dict()[name], value), name

    def test_another_modality_is_refused(self, folder, monkeypatch):
        found = command(monkeypatch, "train", *self.arguments("audio"))
        assert "encoder.pretrained=before/export: Data2Vec2VisionModel does not read inputs of modality=audio" in found

    @pytest.mark.parametrize(
        "spoil, more, message",
        [
            ("", "head.kernel=5", "does not fit this head, which starts untrained; made with: head.width=32 (Error(s) in"),
            ("head", "", "does not fit this head, which starts untrained (Error while deserializing header"),
            ("-head", "", "has no head.safetensors, so the decoder starts untrained"),
            ("-teacher", "", "the teacher was not saved and starts as a copy of the student"),
        ],
    )
    def test_a_missing_or_unusable_part_is_reported(self, spoil, more, message, folder, caplog):
        file = folder[0] / f"{spoil.lstrip('-')}.safetensors"
        if spoil.startswith("-"):
            file.unlink()
        elif spoil:
            file.write_bytes(b"nonsense" * 9)
        build(parse(self.arguments("vision", *more.split()))[0])
        assert message in caplog.text

    def test_parts_with_other_shapes_are_refused(self, folder, monkeypatch):
        found = command(monkeypatch, "train", *self.arguments("vision", "head.pretrained=before/export", "head.kernel=5"))
        assert "head.pretrained=before/export: Error(s) in loading state_dict for ConvDecoder: size mismatch" in found
        assert found.endswith("; made with: head.width=32") and len(found) < 400
        save_file({"embeddings.cls_token": torch.zeros(1)}, folder[0] / "teacher.safetensors")
        found = command(monkeypatch, "train", *self.arguments())
        assert "remove it to start the teacher as a copy of the student" in found and len(found.splitlines()) == 1
