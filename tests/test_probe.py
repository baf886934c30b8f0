import json
import logging
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v_fast import probe, trained
from d2v_fast import train as training
from d2v_fast.config import ConfigError, parse
from d2v_fast.data import DataError, Source, find_files
from d2v_fast.export import export_run
from d2v_fast.probe import States, pooled_states, score
from d2v_fast.report import read_probes
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from tests.models import make
from tests.test_training import arguments


def train(modality, folder, *more):
    training.train(parse(arguments(modality, folder, *more))[0])


def opened(run):
    return trained.load(trained.read_config(run), run)


def results(run):
    """Results of the last probe."""
    return json.loads((run / "probe.json").read_text())[-1]["results"]


def test_score_of_what_can_and_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600).astype(str)
    signal = np.eye(4)[labels.astype(int)] * 3
    features = np.concatenate([signal, rng.normal(size=(600, 6))], 1) + rng.normal(size=(600, 10)) * 0.3
    told = score(features[:400], labels[:400], features[400:], labels[400:])
    assert told["linear"] > 0.97 and told["knn"] > 0.9
    noise = score(features[:400, 4:], labels[:400], features[400:, 4:], labels[400:])
    assert all(abs(value - 0.25) < 0.1 for value in noise.values())


def test_pooling_leaves_padding_out():
    encoder = make("roberta").eval()
    ids = torch.randint(5, 60, (2, 12))
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 7:] = True

    def pooled(*inputs):
        source = Source(["one"], lambda i: i, ["label"])
        return pooled_states(States({"trained": encoder}), source, lambda _: inputs, 1, "test")[0]["trained"]

    assert np.allclose(pooled(ids, padding)[0], pooled(ids[:1, :7], None)[0], atol=1e-5)


def test_the_untrained_encoder_is_where_training_began(tmp_path):
    run = tmp_path / "run"
    config = parse(arguments("vision", run, "train.seed=3"))[0]
    trainer = build(config)
    before = {n: p.detach().clone() for n, p in trainer.state.core.student.named_parameters()}
    loop(trainer)
    found = opened(run)
    assert all(torch.equal(p, before[n]) for n, p in found.untrained().named_parameters())
    after = dict(trainer.state.core.student.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in found.encoder.named_parameters())
    assert any((before[n] != after[n]).any() for n in before)


@pytest.mark.parametrize("modality", ["text", "vision", "audio"])
def test_the_command_on_builtin_data(modality, tmp_path, capsys):
    run = tmp_path / "run"
    train(modality, run)
    probe.main([str(run), "--limit", "300"])
    printed, found = capsys.readouterr().out, results(run)
    for title in ("untrained", "trained"):
        assert title in printed
        assert all(0 <= found[title][column] <= 1 for column in found[title] if column != "nats")
    if modality != "text":
        assert found["chance"]["knn"] == pytest.approx(0.1, abs=0.05)


def test_the_unigram_floor_by_hand(tmp_path):
    """With two tokens, three to one, the floor's accuracy is 3/4 and its cross-entropy the entropy of the shares."""
    words = (["aa"] * 3 + ["bb"]) * 700
    for split in ("train", "test"):
        rng = np.random.default_rng(len(split))
        lines = [" ".join(rng.permutation(words)[:20]) for _ in range(1000)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    run = tmp_path / "run"
    train("text", run, f"data.path={tmp_path / 'train.txt'}", "data.block_size=16")
    probe.main([str(run), "--data", str(tmp_path), "--limit", "3000"])
    floor = results(run)["unigram"]
    assert floor["accuracy"] == pytest.approx(0.75, abs=0.04)
    assert floor["nats"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=0.04)


def test_folders_of_images_with_and_without_a_test_split(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, value in (("dark", 40), ("light", 200)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = (value + rng.normal(0, 10, (32, 32, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    run = tmp_path / "run"
    train("vision", run)
    for data in (tmp_path, tmp_path / "train"):
        probe.main([str(run), "--data", str(data)])
        assert results(run)["trained"]["linear"] == 1.0 and results(run)["chance"]["linear"] <= 0.8


def test_what_cannot_be_probed_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        opened(tmp_path)
    run = tmp_path / "run"
    train("vision", run)
    (tmp_path / "one").mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32)).save(tmp_path / "one" / f"{i}.png")
    with pytest.raises(DataError, match="labels of at least two classes"):
        probe.main([str(run), "--data", str(tmp_path / "one")])
    with pytest.raises(DataError, match="no such file or folder"):
        probe.main([str(run), "--data", str(tmp_path / "missing") + "/"])


def test_recordings_too_short_for_a_frame_are_left_out(runs, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for label in "ab":
        for i, size in enumerate([4000] * 8 + [50] * 2):
            (tmp_path / label).mkdir(exist_ok=True)
            soundfile.write(tmp_path / label / f"{i}.wav", 0.1 * rng.normal(size=size), 16_000)
    probe.main([str(runs["audio"].folder), "--data", str(tmp_path)])
    assert f"left out {tmp_path}/a/9.wav: is too short: 50 samples" in caplog.text
    for file in tmp_path.glob("?/*.wav"):
        soundfile.write(file, np.ones(50), 16_000)
    with pytest.raises(DataError, match="0 samples of 0 classes are left to fit and 0 to test"):
        probe.main([str(runs["audio"].folder), "--data", str(tmp_path)])


def test_states_that_are_not_finite(runs):
    for modality, name in (("vision", "probe_labels"), ("text", "probe_cloze")):
        found = opened(runs[modality].folder)
        next(found.encoder.parameters()).data.fill_(float("nan"))
        with pytest.raises(ConfigError, match="the encoder's states are not finite"):
            getattr(probe, name)(found.config, States({"trained": found.encoder}), "builtin", None, 50)


@pytest.mark.parametrize("option, least", [("--limit", 1), ("--batch-size", 1), ("--threads", 0)])
def test_numbers_are_not_too_small(option, least, capsys):
    with pytest.raises(SystemExit):
        probe.main(["run", option, str(least - 1)])
    assert f"{option} {least - 1}: expected at least {least}" in capsys.readouterr().err


class TestWhichData:
    """Results record their data, and those for other data are kept."""

    def test_a_run_on_other_data_is_not_probed_on_builtin_ones_unasked(self, runs, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(runs["vision"].folder, run)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("path: builtin", "path: photos/"))
        with pytest.raises(ConfigError, match=r"--data: missing; the run was trained on photos/, .* or builtin"):
            probe.main([str(run)])
        probe.main([str(run), "--data", "builtin", "--limit", "40"])
        assert [each["data"] for each in read_probes(run / "probe.json")] == ["builtin"]

    def test_results_of_other_data_stay(self, runs, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        run, set_ = tmp_path / "run", tmp_path / "set"
        shutil.copytree(runs["vision"].folder, run, ignore=shutil.ignore_patterns("probe.json"))
        for i in range(30):
            (set_ / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (8 * i, 0, 200 * (i % 2))).save(set_ / "ab"[i % 2] / f"{i}.png")
        for data, limit in ((str(set_), "20"), ("builtin", "40"), ("builtin", "60"), (str(set_), "20")):
            probe.main([str(run), "--data", data, "--limit", limit])
            assert f"probing on {data}, fp32 on cpu" in caplog.text
        found = [(each["data"], each["limit"], each["step"]) for each in read_probes(run / "probe.json")]
        assert found == [("builtin", 40, 2), ("builtin", 60, 2), (str(set_), 20, 2)]

    def test_names_that_are_not_utf8(self, runs, tmp_path):
        run, set_ = tmp_path / "run", os.fsencode(tmp_path) + b"/caf\xe9"
        shutil.copytree(runs["vision"].folder, run, ignore=shutil.ignore_patterns("probe.json"))
        for i in range(30):
            os.makedirs(set_ + b"/\xe9%d" % (i % 2), exist_ok=True)
            Image.new("RGB", (32, 32), (8 * i, 0, 200 * (i % 2))).save(tmp_path / "image.png")
            os.rename(tmp_path / "image.png", set_ + b"/\xe9%d/\xe9%d.png" % (i % 2, i))
        with open(set_ + b"/\xe91/broken\xe9.png", "w"):
            pass
        probe.main([str(run), "--data", os.fsdecode(set_)])
        (found,) = read_probes(run / "probe.json")
        assert os.fsencode(found["data"]) == set_ and found["results"]["trained"]["linear"] == 1.0
        export_run(run, tmp_path / "out")
        assert "On caf?, at most 20000 samples" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    def test_a_file_of_something_else_is_not_overwritten(self, runs, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(runs["vision"].folder, run)
        (run / "probe.json").write_text('{"mine": 1}')
        with pytest.raises(ConfigError, match=r"probe\.json: holds no results of d2v-probe.*move or delete it"):
            probe.main([str(run)])
        assert (run / "probe.json").read_text() == '{"mine": 1}'

    def test_results_are_shown_where_they_cannot_be_written(self, runs, tmp_path, monkeypatch, capsys):
        def full(file, text):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(probe, "write_text", full)
        with pytest.raises(ConfigError, match=r"probe\.json: these results could not be written .*No space left"):
            probe.main([str(runs["vision"].folder), "--limit", "40"])
        assert "untrained" in capsys.readouterr().out


class TestWhichWeights:
    def test_of_a_run_that_was_killed(self, runs, tmp_path):
        """Without export/."""
        for modality, run in runs.items():
            shutil.copytree(run.folder, tmp_path / modality, ignore=shutil.ignore_patterns("export"))
            weights = run.trainer.state.core.student.state_dict()
            found = opened(tmp_path / modality)
            assert all(torch.equal(value, weights[name]) for name, value in found.encoder.state_dict().items())
            assert found.step == 2 and not found.encoder.training
        probe.main([str(tmp_path / "vision"), "--limit", "40", "--checkpoint", "step-2"])
        assert [each["step"] for each in read_probes(tmp_path / "vision" / "probe.json")] == [2]

    def test_are_those_of_the_checkpoint(self, tmp_path):
        run = tmp_path / "run"
        train("text", run, "train.save_every=2")
        end = opened(run).encoder.state_dict()
        shutil.rmtree(run / "export")
        config = trained.read_config(run)
        newest, older = (trained.load(config, run, name).encoder.state_dict() for name in (None, "step-2"))
        assert all(torch.equal(newest[name], end[name]) for name in end)
        assert any((older[name] != end[name]).any() for name in end)
        (run / "checkpoints" / "step-4" / "student.safetensors").write_bytes(b"")
        skipped = trained.load(config, run)
        assert skipped.step == 2 and all(torch.equal(value, older[n]) for n, value in skipped.encoder.state_dict().items())

    def test_are_the_newer_ones(self, tmp_path):
        """Either export/ or a checkpoint may be newer, if the run was killed or its disk was full."""
        run = tmp_path / "run"
        train("vision", run, "train.save_every=2")

        def step():
            return opened(run).step

        assert step() == 4
        (run / "export" / "step.json").write_text('{"step": 3}')
        assert step() == 4
        shutil.rmtree(run / "checkpoints" / "step-4")
        assert step() == 3
        (run / "export" / "step.json").unlink()
        assert step() == 2
        shutil.rmtree(run / "checkpoints")
        assert step() is None
        shutil.rmtree(run / "export")
        with pytest.raises(ConfigError, match="it has no checkpoint and no export/, so there are no trained weights"):
            step()

    def test_a_checkpoint_that_is_not_there(self, runs):
        with pytest.raises(ConfigError, match=r"--checkpoint step-9: not in .*checkpoints; available: step-2$"):
            probe.main([str(runs["vision"].folder), "--checkpoint", "step-9"])


class TestHow:
    def test_a_gpu_that_is_not_there(self, runs, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU"):
            probe.main([str(runs["vision"].folder), "--device", "cuda"])

    def test_bf16_computes_in_it_and_scores_in_fp32(self):
        encoder, kinds = make("roberta").eval(), set()
        for layer in encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
        ids = torch.randint(5, 60, (2, 12))
        half = States({"trained": encoder}, precision="bf16")(ids, None)["trained"]
        assert kinds == {torch.bfloat16} and half.dtype == torch.float32
        assert torch.allclose(half, States({"trained": encoder})(ids, None)["trained"], atol=0.1)

    def test_more_than_the_memory_of_a_gpu(self):
        encoder = make("roberta")
        encoder.model.embeddings.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(ConfigError, match="--batch-size 7: does not fit in GPU memory; lower it"):
            States({"trained": encoder}, batch_size=7)(torch.zeros(1, 4, dtype=torch.long), None)

    def test_results_do_not_depend_on_the_batch_size(self, runs, tmp_path):
        found = []
        for size in ("3", "64"):
            probe.main([str(runs["vision"].folder), "--limit", "50", "--batch-size", size])
            found.append(results(runs["vision"].folder)["trained"])
        assert found[0] == found[1]


def test_splits_in_a_folder_with_an_odd_name(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "train[2].txt").write_text("x")
    assert find_files(probe._split_path(str(tmp_path / "a[1]"), "train"), (".txt",)) == [str(tmp_path / "a[1]/train[2].txt")]


@pytest.mark.slow
@pytest.mark.parametrize("modality, steps, gain", [("text", 500, 0.05), ("vision", 400, 0.06), ("audio", 400, 0.25)])
def test_training_teaches(modality, steps, gain, tmp_path):
    """A minute or two of the tiny presets on builtin data clearly beats the untrained encoder, with and without --fused."""
    column = "accuracy" if modality == "text" else "linear"
    found = []
    for fused in (False, True):
        run = tmp_path / str(fused)
        training.train(parse(["--config", f"{modality}/tiny", f"train.steps={steps}", f"train.output={run}"])[0], fused)
        probe.main([str(run)])
        scores = results(run)
        assert scores["trained"][column] > scores["untrained"][column] + gain
        found.append(scores["trained"][column])
    plain, fast = found
    assert fast > plain - gain / 2
