import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v_fast import probe, training
from d2v_fast.config import ConfigError, parse
from d2v_fast.data import DataError, find_files
from d2v_fast.probe import load_run, pooled_states, score
from tests.models import make
from tests.test_training import arguments


def train(modality, folder, *more):
    training.train(parse(arguments(modality, folder, *more))[0])


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
    pooled = pooled_states(encoder, [0], lambda _: (ids, padding))
    alone = pooled_states(encoder, [0], lambda _: (ids[:1, :7], None))
    assert np.allclose(pooled[0], alone[0], atol=1e-5)


def test_the_untrained_encoder_is_where_training_began(tmp_path):
    run = tmp_path / "run"
    config = parse(arguments("vision", run, "train.seed=3"))[0]
    trainer = training.Trainer(config)
    before = {n: p.detach().clone() for n, p in trainer.core.student.named_parameters()}
    trainer.run()
    _, trained, untrained = load_run(run)
    assert all(torch.equal(p, before[n]) for n, p in untrained.named_parameters())
    after = dict(trainer.core.student.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in trained.named_parameters())
    assert any((before[n] != after[n]).any() for n in before)


@pytest.mark.parametrize("modality", ["text", "vision", "audio"])
def test_the_command_on_builtin_data(modality, tmp_path, capsys):
    run = tmp_path / "run"
    train(modality, run)
    probe.main([str(run), "--limit", "300"])
    results = json.loads((run / "probe.json").read_text())
    printed = capsys.readouterr().out
    for title in ("untrained", "trained"):
        assert title in printed
        assert all(0 <= results[title][column] <= 1 for column in results[title] if column != "nats")
    if modality != "text":
        assert results["chance"]["knn"] == pytest.approx(0.1, abs=0.05)


def test_the_unigram_floor_by_hand(tmp_path):
    """Two tokens, three to one: the floor's accuracy is 3/4, its cross-entropy the entropy of the shares."""
    words = (["aa"] * 3 + ["bb"]) * 700
    for split in ("train", "test"):
        rng = np.random.default_rng(len(split))
        lines = [" ".join(rng.permutation(words)[:20]) for _ in range(1000)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    run = tmp_path / "run"
    train("text", run, f"data.path={tmp_path / 'train.txt'}", "data.block_size=16")
    probe.main([str(run), "--data", str(tmp_path), "--limit", "3000"])
    floor = json.loads((run / "probe.json").read_text())["unigram"]
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
        results = json.loads((run / "probe.json").read_text())
        assert results["trained"]["linear"] == 1.0 and results["chance"]["linear"] <= 0.8


def test_what_cannot_be_probed_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        load_run(tmp_path)
    run = tmp_path / "run"
    train("vision", run)
    (tmp_path / "one").mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32)).save(tmp_path / "one" / f"{i}.png")
    with pytest.raises(DataError, match="labels of at least two classes"):
        probe.main([str(run), "--data", str(tmp_path / "one")])
    with pytest.raises(DataError, match="no such file or folder"):
        probe.main([str(run), "--data", str(tmp_path / "missing") + "/"])


def test_recordings_too_short_for_a_frame_are_left_out(runs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in "ab":
        for i, size in enumerate([4000] * 8 + [50] * 2):
            (tmp_path / label).mkdir(exist_ok=True)
            soundfile.write(tmp_path / label / f"{i}.wav", 0.1 * rng.normal(size=size), 16_000)
    probe.main([str(runs["audio"].folder), "--data", str(tmp_path)])
    assert f"left out {tmp_path}/a/9.wav: is too short: 50 samples" in capsys.readouterr().err
    for file in tmp_path.glob("?/*.wav"):
        soundfile.write(file, np.ones(50), 16_000)
    with pytest.raises(DataError, match="left to fit on are 0 samples of 0 classes, to test on 0"):
        probe.main([str(runs["audio"].folder), "--data", str(tmp_path)])


def test_states_that_are_not_finite(runs):
    for modality, name in (("vision", "probe_labels"), ("text", "probe_cloze")):
        config, trained, _ = load_run(runs[modality].folder)
        next(trained.parameters()).data.fill_(float("nan"))
        with pytest.raises(ConfigError, match="states of the encoder are not finite"):
            getattr(probe, name)(config, {"trained": trained}, "builtin", None, 50)


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_limit_is_at_least_one(limit, capsys):
    with pytest.raises(SystemExit):
        probe.main(["run", "--limit", limit])
    assert f"--limit {limit}: expected at least 1" in capsys.readouterr().err


def test_splits_in_a_folder_with_an_odd_name(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "train[2].txt").write_text("x")
    assert find_files(probe._split_path(str(tmp_path / "a[1]"), "train"), (".txt",)) == [str(tmp_path / "a[1]/train[2].txt")]


@pytest.mark.slow
@pytest.mark.parametrize("modality, steps, gain", [("text", 500, 0.05), ("vision", 400, 0.06), ("audio", 400, 0.25)])
def test_training_teaches(modality, steps, gain, tmp_path):
    """A minute or two of the tiny presets on builtin data beats the untrained encoder clearly, --fused no less than without."""
    column = "accuracy" if modality == "text" else "linear"
    found = []
    for fused in (False, True):
        run = tmp_path / str(fused)
        training.train(parse(["--config", f"{modality}/tiny", f"train.steps={steps}", f"train.output={run}"])[0], fused)
        probe.main([str(run)])
        results = json.loads((run / "probe.json").read_text())
        assert results["trained"][column] > results["untrained"][column] + gain
        found.append(results["trained"][column])
    plain, fast = found
    assert fast > plain - gain / 2
