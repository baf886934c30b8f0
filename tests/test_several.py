"""Several modalities in one model: shared blocks, turns by shares, and the files of a run."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoModel

from d2v_fast import Callback, export, probe, report, trained
from d2v_fast.checkpoint import Checkpoint, CheckpointError
from d2v_fast.config import ConfigError, parse, read_yaml
from d2v_fast.nets import Data2Vec2AudioModel, Data2Vec2VisionModel
from d2v_fast.several import Several
from d2v_fast.train import loop, train
from d2v_fast.train.build import build, make_data, make_encoder, make_model, set_length_multiple
from d2v_fast.train.several import turns
from d2v_fast.train.step import step
from tests.test_late import train_all

SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
PART = [*(f"encoder.config.{key}={value}" for key, value in SIZES.items()), "targets.top_k=2", "data.views=2", "head.width=16"]
OWN = {
    "vision": ["encoder.config.hidden_dropout_prob=0.1", "data.path=images/train"],
    "audio": [f"encoder.config.conv_dim={[8] * 7}", "data.max_seconds=0.5", "data.join_seconds=0", "data.path=waves/train"],
    "text": ["data.vocab_size=300", "data.block_size=16"],
}
RUN = ["train.batch_size=2", "train.workers=0", "train.precision=fp32", "train.log_every=3", "train.steps=9"]
BLOCK = {  # the same maps and norms, as named in blocks of BERT and of wav2vec 2.0
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "layer_norm",
    "intermediate.dense": "feed_forward.intermediate_dense",
    "output.dense": "feed_forward.output_dense",
    "output.LayerNorm": "final_layer_norm",
}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """Images and waves of two classes in each test's working folder."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, i in itertools.product(("train", "test"), range(12)):
        for kind in ("images", "waves"):
            (folder / kind / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        image.save(folder / "images" / split / "ab"[i % 2] / f"{i}.png")
        soundfile.write(folder / "waves" / split / "ab"[i % 2] / f"{i}.wav", 0.1 * rng.normal(size=6000 + 500 * i), 16_000)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield


def arguments(folder, *more, parts=("vision", "audio")):
    inner = [f"several.parts.{part}.{setting}" for part in parts for setting in [*PART, *OWN[part]]]
    return ["--config", "several/tiny-2", *inner, *RUN, f"train.output={folder}", *more]


def config(folder, *more, **parts):
    return parse(arguments(folder, *more, **parts))[0]


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def figures(folder):
    """The log without time-dependent figures."""
    return [{k: v for k, v in line.items() if k not in ("time", "samples_per_s", "data_wait")} for line in records(folder)]


def refused(*args):
    with pytest.raises(ConfigError) as error:
        parse(["--config", "several/tiny-2", *args])
    return str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the model in the process that trained it."""
    folder = tmp_path_factory.mktemp("several") / "run"
    trainer = build(config(folder))
    assert loop.loop(trainer) == 0
    return folder, trainer


class TestTurns:
    @pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5), (0.618, 0.382)])
    def test_shares_are_met_at_every_step(self, shares):
        found = turns(dict(zip("abc", shares, strict=False)), 2000, seed=3)
        for number, share in enumerate(shares):
            taken = np.cumsum(found == number)
            assert np.abs(taken - share * np.arange(1, 2001)).max() < 4

    def test_a_pure_function_of_seed_and_step(self):
        shares = {"a": 0.5, "b": 0.5}
        assert (turns(shares, 50, 1) == turns(shares, 90, 1)[:50]).all()
        assert (turns(shares, 50, 1) != turns(shares, 50, 2)).any()

    def test_the_log_does_not_see_one_part_alone(self):
        found = turns({"a": 0.5, "b": 0.5}, 10_000, 0)
        for every in (2, 5, 8, 50):
            assert 0.4 < (found[::every] == 0).mean() < 0.6


class TestBlocks:
    def test_student_and_teacher_share_theirs(self, run):
        core = run[1].state.core
        for inside in (lambda model: model.student, lambda model: model.teacher.module):
            vision, audio = (inside(core[name]).model.encoder for name in ("vision", "audio"))
            for ours, theirs in zip(vision.layer, audio.layers, strict=True):
                for one, other in BLOCK.items():
                    for kind in ("weight", "bias"):
                        a, b = getattr(ours.get_submodule(one), kind), getattr(theirs.get_submodule(other), kind)
                        assert a.data_ptr() == b.data_ptr() and a is b
                assert {p.data_ptr() for p in theirs.parameters()} == {p.data_ptr() for p in ours.parameters()}
        students = {p.data_ptr() for p in core["vision"].student.parameters()}
        assert students.isdisjoint(p.data_ptr() for p in core["vision"].teacher.parameters())

    def test_both_classes_compute_the_same_with_them(self, run):
        vision, audio = (run[1].state.core[name].student.model.encoder for name in ("vision", "audio"))
        x = torch.randn(2, 7, 16)
        for ours, theirs in zip(vision.layer, audio.layers, strict=True):
            ours, theirs = ours.eval(), theirs.eval()
            expected = ours(x)
            expected = expected[0] if isinstance(expected, tuple) else expected
            found = theirs(x)
            found = found[0] if isinstance(found, tuple) else found
            assert torch.allclose(found, expected, atol=1e-4)  # their norms have different eps

    @pytest.mark.parametrize("part", ["vision", "audio"])
    def test_the_loss_is_that_of_a_model_of_one_modality(self, part, tmp_path):
        several = config(tmp_path / "run")
        made = {}
        for name, each in several.parts.items():
            data = make_data(each)
            encoder = make_encoder(each)
            data.fit_to(encoder)
            made[name] = data, make_model(each, encoder)
        alone = make_model(several.parts[part], make_encoder(several.parts[part])).double()
        core = Several({name: model for name, (_, model) in made.items()}).double()
        with torch.no_grad():
            for parameter in core.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        alone.load_state_dict(core[part].state_dict())
        batch = made[part][0].__getitems__([(0, 0), (0, 1)])
        batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        batch["source"] = batch["source"].double()
        losses = []
        for model, more in ((core, {"part": part}), (alone, {})):
            torch.manual_seed(1)
            losses.append(model(**batch, **more).loss)
            losses[-1].backward()
        assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-12)
        grads = dict(alone.named_parameters())
        for name, parameter in core[part].named_parameters():
            if parameter.requires_grad:
                assert torch.allclose(parameter.grad, grads[name].grad, rtol=1e-9, atol=1e-12), name
        other = core[({"vision", "audio"} - {part}).pop()]
        shared = {p.data_ptr() for p in core[part].parameters()}
        assert all(p.grad is None for p in other.parameters() if p.data_ptr() not in shared)


def test_a_step_trains_its_part_and_the_blocks(tmp_path):
    trainer = build(config(tmp_path / "run", "schedule.warmup=0", "train.clip_norm=0"))
    part, number, last = trainer.turn()
    (other,) = {"vision", "audio"} - {part.name}
    assert (number, last) == (1, int((trainer.turns == trainer.turns[0]).sum()))
    core = trainer.state.core.train()
    before = {name: value.clone() for name, value in core.state_dict().items() if isinstance(value, torch.Tensor)}
    step(part.state, part.feed.take(1))
    moved = {name for name, value in core.state_dict().items() if name in before and not torch.equal(value, before[name])}
    students = {name for name in moved if ".teacher." not in name}
    blocks = (f"{other}.student.model.encoder.layer.", f"{other}.student.model.encoder.layers.")
    assert any(name.startswith(f"{part.name}.student.") for name in students) and any(n.startswith(blocks) for n in students)
    assert all(name.startswith((f"{part.name}.", *blocks)) for name in students)
    ema, name = trainer.config.parts[part.name].ema, "encoder.layer.1.output.dense.weight"
    tau = ema.start + (ema.end - ema.start) / ema.anneal_steps
    after = core.state_dict()
    expected = tau * before[f"vision.teacher.module.model.{name}"] + (1 - tau) * after[f"vision.student.model.{name}"]
    assert torch.allclose(after[f"vision.teacher.module.model.{name}"], expected, atol=1e-7)
    assert [core[name].teacher.step for name in (part.name, other)] == [1, 0]


class TestRun:
    def test_each_part_has_a_folder_like_a_run_of_its_own(self, run):
        folder, trainer = run
        taken = Counter(np.array(["vision", "audio"])[trainer.turns])
        for name in ("vision", "audio"):
            steps = [line["step"] for line in records(folder / name)]
            own = [i + 1 for i, turn in enumerate(trainer.turns) if ["vision", "audio"][turn] == name]
            assert steps == sorted({own[0], *own[2::3], own[-1]}) and len(own) == taken[name]
            assert trained.read_config(folder / name).settings()["encoder.config"] == trainer.parts[name].config.encoder.config
        assert report.parts(folder) == [folder / "audio", folder / "vision"]
        again, _ = parse(["--config", str(folder / "config.yaml"), f"train.output={folder}"])
        assert set_length_multiple(again, torch.device("cpu")).settings() == trainer.config.settings()

    def test_the_log_says_that_it_is_an_experiment(self, tmp_path, caplog):
        with caplog.at_level("INFO"):
            trainer = build(config(tmp_path / "run", "several.shares={audio: 0.25, vision: 0.75}", "train.steps=40"))
        trainer.folder.leave(0)
        counts = re.search(r"experimental: .* one stack of blocks, vision (\d+) steps, audio (\d+) steps", caplog.text)
        assert abs(int(counts[1]) - 30) < 3 and int(counts[1]) + int(counts[2]) == 40
        drawn = Counter(trainer.each[number].name for number in trainer.turns)
        assert [drawn["vision"], drawn["audio"]] == [int(counts[1]), int(counts[2])]

    @pytest.mark.parametrize("name, cls", [("vision", Data2Vec2VisionModel), ("audio", Data2Vec2AudioModel)])
    @pytest.mark.parametrize("teacher", [False, True])
    def test_an_export_is_of_the_class_of_one_modality(self, run, name, cls, teacher, tmp_path):
        folder, trainer = run
        assert export.export_run(folder / name, tmp_path / "encoder", teacher=teacher) <= 1e-6
        model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
        assert type(model) is cls
        core = trainer.state.core[name]
        encoder = (core.teacher.module if teacher else core.student).eval()
        x = torch.randn(2, *((3, 32, 32) if name == "vision" else (6000,)))
        with torch.no_grad():
            assert torch.allclose(model(x).last_hidden_state[:, -encoder(x).shape[1] :], encoder(x), atol=1e-6)
        card = (tmp_path / "encoder" / "README.md").read_text()
        assert "an experiment: shared and trained jointly with " + ("audio" if name == "vision" else "vision") in card
        assert "| 9 of 2 × 1 samples per process, over all modalities |" in card

    @pytest.mark.parametrize("name, labelled", [("vision", "images"), ("audio", "waves")])
    def test_a_probe_of_each(self, run, name, labelled, capsys):
        probe.main([str(run[0] / name), "--data", labelled])
        assert "untrained" in capsys.readouterr().out
        assert json.loads((run[0] / name / "probe.json").read_text())[0]["step"] == 9

    def test_a_command_that_needs_one_part_names_them(self, run):
        with pytest.raises(ConfigError, match=r"a run of several modalities; name one: .*run/vision, .*run/audio"):
            probe.main([str(run[0])])

    def test_the_folder_is_not_taken_twice(self, run):
        with pytest.raises(ConfigError, match="already holds a run; --resume continues it"):
            build(config(run[0]))


class TestResume:
    def test_to_the_same_bits(self, tmp_path, monkeypatch):
        settings = ["train.log_every=1", "several.parts.audio.encoder.config.layerdrop=0.2", "train.accumulate=2"]
        assert train(config(tmp_path / "whole", *settings)) == 0

        def stopping(state, batches):
            if state.done == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, batches)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "step", stopping)
            assert train(config(tmp_path / "cut", *settings)) == 130
        assert train(parse(["--resume", str(tmp_path / "cut")])[0]) == 0
        one, other = (Checkpoint(tmp_path / name / "checkpoints" / "step-9") for name in ("whole", "cut"))
        for name in ("student", "teacher", "optimizer", "rng", "samples"):
            assert one.files[f"{name}.safetensors"] == other.files[f"{name}.safetensors"], name
        for part in ("vision", "audio"):
            assert figures(tmp_path / "whole" / part) == figures(tmp_path / "cut" / part)

    def test_other_shares_are_refused(self, run):
        more = ["several.shares.vision=0.25", "several.shares.audio=0.75"]
        with pytest.raises(CheckpointError, match="--resume-allow KEY") as error:
            build(parse(["--resume", str(run[0]), *more])[0])
        assert "several.shares.vision: was 0.5, is 0.25" in str(error.value)
        allowed = ["--resume-allow", "several.shares"]
        config, _ = parse(["--resume", str(run[0]), *more, *allowed])
        assert config.shares == {"vision": 0.25, "audio": 0.75}
        build(config).folder.leave(9)


def test_callbacks_get_the_part(tmp_path):
    seen = []

    class Ends(Callback):
        def on_step(self, run, outcome):
            seen.append((run.state.done, run.name))
            run.stop = run.state.done == 5

        def on_log(self, run, record):
            record["extra"] = 1.0

    trainer = build(config(tmp_path / "run", "train.log_every=1"), callbacks=[Ends()])
    assert loop.loop(trainer) == 130
    assert seen == [(i + 1, ["vision", "audio"][turn]) for i, turn in enumerate(trainer.turns[:5])]
    assert all(line["extra"] == 1 for part in ("vision", "audio") for line in records(tmp_path / "run" / part))
    with pytest.raises(ConfigError, match=r"train.probe_every: is for a run of one modality"):
        build(config(tmp_path / "other", "train.probe_every=3"))
    for name in ("shard", "checkpointing"):
        with pytest.raises(ConfigError, match=rf"train.{name}: is for a run of one modality; leave it out when several share"):
            build(config(tmp_path / "other", f"train.{name}=true"))


class TestSettings:
    @pytest.fixture
    def mine(self, tmp_path):
        """A file with two parts and nothing else, by name."""
        text = "modality: several\nseveral: {parts: {vision: vision/tiny-2, audio: audio/tiny-2}}"
        (tmp_path / "mine.yaml").write_text(text)
        return str(tmp_path / "mine.yaml")

    def test_those_of_the_run_and_of_its_parts(self):
        args = ["train.seed=5", "optimizer.lr_scale.head=0.5", "several.parts.audio.ema.start=0.5"]
        several, _ = parse(["--config", "several/tiny-2", *args])
        shared = ("optimizer", "schedule", "train", "collapse")
        keys = {part: set(parse(["--config", f"{part}/tiny-2"])[0].settings()) for part in ("vision", "audio")}
        whole = {key for key in keys["vision"] if key.startswith(shared)}
        parts = {f"several.parts.{part}.{key}" for part, each in keys.items() for key in each - whole}
        found, defaults = several.settings(), several.defaults()
        assert set(found) - {"several.shares.vision", "several.shares.audio"} == whole | parts <= set(defaults)
        assert (found["train.seed"], defaults["train.seed"], found["several.shares.audio"]) == (5, 0, 0.5)
        assert found["optimizer.lr_scale"] == {"head": 0.5} and found["several.parts.audio.ema.start"] == 0.5
        assert found["several.parts.vision.data.image_size"] == 32 and defaults["several.parts.vision.data.image_size"] == 224

    def test_shares_are_equal_and_the_precision_is_as_for_any_run(self, mine, monkeypatch):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
        for args, precision, fused in (
            ([], "fp32", False),
            (["--fused"], "bf16", True),
            (["--fused", "train.precision=fp32"], "fp32", True),
        ):
            several, found = parse(["--config", mine, *args])
            assert (several.train.precision, found) == (precision, fused)
            assert {part.train.precision for part in several.parts.values()} == {precision}
            assert several.shares == {"vision": 0.5, "audio": 0.5}
            assert several.name == "mine" and several.resume is False
        assert parse([], [read_yaml(mine)])[0].name == "several"

    def test_a_part_changes_a_preset(self, tmp_path):
        """Its own settings go before those of the preset, in a file of the part and in that of the run."""
        (tmp_path / "part.yaml").write_text("config: vision/tiny-2\ndata: {views: 3}")
        parts = f"{{vision: {tmp_path}/part.yaml, audio: {{config: audio/tiny-2, data: {{views: 5}}, ema: {{start: 0.25}}}}}}"
        (tmp_path / "mine.yaml").write_text(f"modality: several\nseveral: {{parts: {parts}}}")
        several, _ = parse(["--config", str(tmp_path / "mine.yaml"), "several.parts.audio.ema.start=0.5"])
        assert (several.parts["vision"].data["views"], several.parts["audio"].data["views"]) == (3, 5)
        assert several.parts["audio"].ema.start == 0.5
        for name, part in several.parts.items():
            assert part.encoder == parse(["--config", f"{name}/tiny-2"])[0].encoder

    def test_the_printed_config_is_that_of_the_run(self, tmp_path, capsys):
        args = ["train.seed=3", "several.parts.audio.ema.start=0.5"]
        with pytest.raises(SystemExit) as done:
            parse(["--config", "several/tiny-2", *args, "--print_config"])
        assert not done.value.code
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        printed, _ = parse(["--config", str(tmp_path / "printed.yaml")])
        assert printed.settings() == parse(["--config", "several/tiny-2", *args])[0].settings()

    def test_help_needs_no_parts(self, capsys):
        with pytest.raises(SystemExit) as done:
            parse(["modality=several", "--help"])
        assert not done.value.code and "--several.shares" in capsys.readouterr().out


def test_text_too(tmp_path):
    """Three parts; RoBERTa has the blocks of BERT. A tokenizer is trained for the text part."""
    more = ["several.parts.text=text/tiny-2", "several.shares={vision: 0.25, audio: 0.25, text: 0.5}"]
    assert train(config(tmp_path / "run", *more, parts=("vision", "audio", "text"))) == 0
    assert [line["step"] for line in records(tmp_path / "run/text")]
    assert export.export_run(tmp_path / "run/text", tmp_path / "encoder") <= 1e-6
    assert len(trained.load(trained.read_config(tmp_path / "run/text"), tmp_path / "run/text").tokenizer) == 300


class TestErrors:
    @pytest.mark.parametrize(
        "args, message",
        [
            (
                ["several.shares.vision=0.7"],
                "several.shares: found vision 0.7, audio 0.5, which sum to 1.2, expected 1; "
                "set several.shares.vision=0.5833 several.shares.audio=0.4167",
            ),
            (["several.shares={vision: 1.5, audio: -0.5}"], "found vision 1.5, audio -0.5, expected numbers above 0"),
            (["several.shares={vision: 1, audio: 0}"], "found vision 1, audio 0, expected numbers above 0"),
            (["several.shares={vision: .inf, audio: 1}"], "found vision inf, audio 1, expected numbers above 0"),
            (["several.shares={vision: 1}"], "found vision 1, but audio has no share; set several.shares.vision=0.5"),
            (["several.shares.text=0.1"], "but text is not a part of the run; leave it out, or add several.parts.text=PRESET"),
            (["several.shares={}"], "several.shares: found none, but audio has no share; set"),
            (["several.shares={vision: .nan, audio: 1}"], "found vision nan, audio 1, expected numbers above 0"),
            *[
                (
                    [f"several.shares={value}"],
                    f"several.shares: found {value}, expected a mapping to numbers; set several.shares.vision=0.5 several",
                )
                for value in ("null", "[0.5,0.5]", "1", "half", "{vision: half, audio: 0.5}", "{vision: [1], audio: 0.5}")
            ],
            (["several.parts=[vision/tiny-2]"], "several.parts: found [vision/tiny-2]; set each part, several.parts.NAME="),
            (
                ["several.parts.visoin=vision/tiny-2"],
                "visoin: no such part; expected text, vision, audio, spectrogram; did you",
            ),
            (["several.parts.text.data.path=x"], "several.parts.text.data.path: the run has no such part; found vision, audio"),
            (["several.parts.audio=vision/tiny-2"], "several.parts.audio: modality: found vision, expected audio"),
            (["several.parts.vision=vision/tiny"], "several.parts.vision: head.kind: found linear, expected conv"),
            (["several.parts.vision=vision/tinny-2"], "several.parts.vision: --config vision/tinny-2: no such file or preset"),
            (
                ["several.parts.vision.data.veiws=3"],
                "several.parts.vision: data.veiws: no such setting; did you mean data.views",
            ),
            (["several.parts.vision.optimizer.lr=1"], "vision.optimizer.lr: belongs to the whole run; set optimizer.lr=1"),
            (
                ["data.path=x"],
                "data.path: no such setting of a run of several modalities; it belongs to a part, several.parts.vision",
            ),
            (["train.stepz=1"], "train.stepz: no such setting of a run of several modalities; did you mean train.steps?"),
            (["train.epochs=2"], "train.epochs: several data sets have no epoch in common; expected train.steps"),
            (["train.steps=many"], "train.steps: found many, expected a whole number"),
            (["train.steps=0"], "train.steps: found 0, expected at least 1"),
        ],
    )
    def test_of_settings(self, args, message):
        assert message in refused(*args)

    def test_those_of_the_run_name_no_part(self):
        found = refused("optimizer.kind=lamb", "optimizer.weight_decay=0")
        assert found.startswith("optimizer.kind=lamb with optimizer.weight_decay=0: ")

    @pytest.mark.parametrize("text", ["parts: {vision: vision/tiny-2}", "shares: {vision: 1}"])
    def test_one_part_alone(self, text, tmp_path):
        (tmp_path / "mine.yaml").write_text(f"modality: several\nseveral: {{{text}}}")
        with pytest.raises(ConfigError, match="expected two or more of text, vision, audio, spectrogram; one modality is an "):
            parse(["--config", str(tmp_path / "mine.yaml")])

    @pytest.mark.parametrize("shares", ["[0.5, 0.5]", "3", "{vision: half, audio: 0.5}", "[]", "false"])
    def test_shares_of_another_type_in_a_file(self, shares, tmp_path):
        text = f"modality: several\nseveral: {{parts: {{vision: vision/tiny-2, audio: audio/tiny-2}}, shares: {shares}}}"
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"several.shares: found .*, expected a mapping to numbers; set several.sh"):
            parse(["--config", str(tmp_path / "mine.yaml")])

    def test_the_remedy_is_accepted(self):
        parts = ("vision", "audio", "text")
        for wrong in ("several.shares={vision: 1, audio: 1, text: 1}", "several.shares.text=0.9", "several.shares=1"):
            more = ["several.parts.text=text/tiny-2", wrong]
            with pytest.raises(ConfigError) as error:
                config("run", *more, parts=parts)
            remedy = str(error.value).partition("; set ")[2].split()
            assert sum(config("run", *more[:1], *remedy, parts=parts).shares.values()) == pytest.approx(1)
            if "vision: 1" in wrong:
                assert [setting.partition("=")[2] for setting in remedy] == ["0.3333", "0.3333", "0.3334"]

    @pytest.mark.parametrize("text", ["several: 3", "several: {part: {}}", "several: {parts: [vision/tiny-2]}"])
    def test_another_structure(self, text, tmp_path):
        (tmp_path / "mine.yaml").write_text(f"modality: several\n{text}")
        with pytest.raises(ConfigError, match=r"several: found .*, expected parts, a mapping of "):
            parse(["--config", str(tmp_path / "mine.yaml")])

    @pytest.mark.parametrize(
        "setting, message",
        [
            (
                "hidden_size=32",
                "several.parts.audio: encoder.config.hidden_size: found 32, expected 16, as in the first part",
            ),
            ("num_hidden_layers=2", "encoder.config.num_hidden_layers: found 2, expected 3"),
            ("num_attention_heads=4", "encoder.config.num_attention_heads: found 4, expected 2"),
            ("hidden_act=relu", "encoder.config.hidden_act: found relu, expected gelu"),
            ("do_stable_layer_norm=true", "encoder: the blocks of Wav2Vec2Model cannot be shared"),
        ],
    )
    def test_blocks_that_differ(self, setting, message, tmp_path):
        model = ["several.parts.audio.encoder.model=wav2vec2"] if "stable" in setting else []
        with pytest.raises(ConfigError) as error:
            build(config(tmp_path / "run", *model, f"several.parts.audio.encoder.config.{setting}"))
        assert message in str(error.value)

    def test_blocks_of_the_first_part_that_cannot_be_shared(self, tmp_path):
        with pytest.raises(ConfigError, match=r"several\.parts\.vision: encoder: the blocks of ViTModel cannot be shared"):
            build(config(tmp_path / "run", "several.parts.vision.encoder.model=vit"))


def test_parts_whose_steps_the_device_skips(tmp_path):
    found = []
    for late in (False, True):
        folder = tmp_path / str(late)
        run = build(config(folder, "train.steps=12", "train.log_every=3", "train.save_every=5"), fused=True)
        assert (train_all(run, late, (2, 5, 6, 9)) > 0) == late
        counts = [(part.state.skipped.count, part.state.core.teacher.step) for part in run.each]
        assert sum(skips for skips, _ in counts) == 4 and sum(moves for _, moves in counts) == 8
        files = {path.name: Checkpoint(path).files for path in folder.glob("checkpoints/step-*")}
        assert files and all(each.pop("state.json") for each in files.values())
        found.append((counts, files, [figures(folder / name) for name in run.parts]))
    assert found[0] == found[1]


@pytest.mark.slow
def test_two_ranks_draw_the_same_part(tmp_path):
    """The log of images has the same figures for each step as one process with twice the batch."""
    still = ["several.parts.vision.data.flip=0", "several.parts.vision.encoder.config.hidden_dropout_prob=0"]
    still += [f"several.parts.{part}.head.noise=0" for part in ("vision", "audio")]
    for ranks in (1, 2):
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"] if ranks == 2 else []
        args = arguments(tmp_path / str(ranks), *still, f"train.batch_size={4 // ranks}", "train.log_every=1", "train.steps=4")
        command = [sys.executable, "-m", *torchrun, "d2v_fast.cli", *args]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    one, two = (records(tmp_path / name / "vision") for name in ("1", "2"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)
    assert all(np.isfinite(line["loss"]) for part in ("vision", "audio") for line in records(tmp_path / "2" / part))
