"""Sounds as spectrograms: the filter banks, batches of them, runs, and what these leave."""

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor

from d2v_fast import probe, trained, wrap
from d2v_fast.config import ConfigError, parse
from d2v_fast.data import DataError
from d2v_fast.data.spectrograms import SpectrogramData, frames, log_mel, spectrogram, spectrogram_extractor
from d2v_fast.encoders import build_encoder
from d2v_fast.export import export_run
from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, RandomMask
from d2v_fast.train.build import build, make_encoder
from d2v_fast.train.loop import loop
from tests.models import Handwritten

AST = "audio-spectrogram-transformer"
COMMON = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
FIELDS = {
    "data2vec2-vision": COMMON | dict(num_channels=1, image_size=[32, 64], patch_size=8),
    "vit": COMMON | dict(num_channels=1, image_size=[32, 64], patch_size=8, hidden_dropout_prob=0.0),
    AST: COMMON | dict(max_length=32, num_mel_bins=64, patch_size=8, time_stride=8, frequency_stride=8),
}
DATA = dict(target_length=32, mel_bins=64, min_seconds=0.1)


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


def chirp(seconds=1.0):
    time = np.arange(int(16_000 * seconds)) / 16_000
    return (0.3 * np.sin(2 * np.pi * (200 + 1500 * time) * time) * np.exp(-3 * time)).astype(np.float32)


def data(path="sounds/train", mask=None, **settings):
    return SpectrogramData(mask=mask or ExactBlockMask(0.75, 3, 0.1), path=path, **DATA | settings)


def encoder(model):
    torch.manual_seed(0)
    return build_encoder(model, config=FIELDS[model]).eval()


@pytest.fixture(autouse=True)
def sounds(here):
    """Eight recordings of two classes, .3 to .5 s long, at a rate other than 16 kHz; and two for testing."""
    for i in range(10):
        file = Path("sounds", "train" if i < 8 else "test", "ab"[i % 2], f"{i}.wav")
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, noise(2400 + 200 * i, i) * (1 + i % 2), 8000)


class TestFilterBanks:
    @pytest.mark.parametrize("bins", [128, 40])
    @pytest.mark.parametrize("wave", [noise(7000), chirp(), noise(401)], ids=["noise", "chirp", "one window"])
    def test_kaldis_formulas_in_float64(self, wave, bins):
        """Window by window and filter by filter: mean, pre-emphasis, Hann, |DFT|², triangles in mel, logarithm."""

        def mel(hertz):
            return 1127 * math.log(1 + hertz / 700)

        edges = np.linspace(mel(20), mel(8000), bins + 2)
        centres = np.array([mel(k * 16_000 / 512) for k in range(257)])
        rising = (centres[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - centres[:, None]) / (edges[2:] - edges[1:-1])
        triangles = np.maximum(0, np.minimum(rising, falling))
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
        dft = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
        expected = []
        for begin in range(0, len(wave) - 399, 160):
            window = wave[begin : begin + 400].astype(np.float64)
            window = window - window.mean()
            window = np.array([window[i] - 0.97 * window[max(0, i - 1)] for i in range(400)])
            energy = np.abs(dft @ (window * hann)) ** 2 @ triangles
            expected.append(np.log(np.maximum(energy, 2.0**-23)))
        found = log_mel(wave, bins)
        assert found.shape == (frames(len(wave)), bins) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("samples", [9000, 16_000], ids=["padded", "cut"])
    @pytest.mark.parametrize("bins", [128, 64])
    def test_as_the_extractor_that_is_exported(self, samples, bins):
        wave = noise(samples)
        extractor = spectrogram_extractor(64, bins, -3.0, 2.0)
        expected = extractor(wave, sampling_rate=16_000, return_tensors="np").input_values[0]
        found = spectrogram(wave, 64, bins, -3.0, 2.0)
        assert isinstance(extractor, ASTFeatureExtractor)
        assert found.dtype == np.float32 and found.shape == (64, bins)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("samples, count", [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)])
    def test_windows_are_whole(self, samples, count):
        assert frames(samples) == count


class TestData:
    @pytest.mark.parametrize("model, grid", [("data2vec2-vision", (4, 8)), ("vit", (4, 8)), (AST, (8, 4))])
    def test_positions_are_where_the_sound_is(self, model, grid):
        """A patch of a batch that changes is one feature that changes, the one at its place of the grid."""
        made, student = data(views=2), encoder(model)
        made.fit_to(student)
        assert made.grid == grid
        batch = made.__getitems__([(0, 3), (0, 7)])
        source = batch["source"]
        assert source.shape == ((2, 32, 64) if grid == (8, 4) else (2, 1, 32, 64)) and source.dtype == torch.float32
        assert batch["mask"].shape == (2, 2, 32) and (batch["mask"].sum(-1) == 24).all()
        first = made.load(3, np.random.default_rng([0, 0, 3]))
        np.testing.assert_array_equal(source[0].view(32, 64), first)
        changed = source.clone()
        changed[..., 16:24, 8:16] += 1  # frames 16 to 23, bins 8 to 15: third patch of time, second of mel
        with torch.no_grad():
            moved = (student.embed(changed) - student.embed(source)).abs().amax((0, 2)) > 1e-6
        time_mel = moved.view(grid) if grid == (4, 8) else moved.view(grid).T
        assert time_mel.nonzero().tolist() == [[2, 1]]

    def test_a_sample_is_a_crop_of_its_recording(self):
        made = data()
        made.fit_to(encoder("vit"))
        last, samples = len(made) - 1, 31 * 160 + 400
        wave = made.source.read(made.kept[last])
        assert len(wave) > samples + 1000
        for seed in range(5):
            start = np.random.default_rng(seed).integers(0, len(wave) - samples + 1)
            expected = spectrogram(wave[start : start + samples], 32, 64, -4.268, 4.569)
            np.testing.assert_array_equal(made.load(last, np.random.default_rng(seed)), expected)

    def test_what_is_short_is_padded_at_its_end(self):
        soundfile.write("short.wav", noise(1600), 16_000)
        made = data("short.wav")
        sample = made.load(0, np.random.default_rng(0))
        np.testing.assert_allclose(sample[8:], 4.268 / (2 * 4.569), rtol=1e-6)
        assert np.ptp(sample[:8]) > 0.1

    def test_short_ones_are_joined(self):
        made = data(target_length=96, join_seconds=1.0)
        assert np.ptp(made.load(0, np.random.default_rng(0)), axis=1).min() > 0.1  # no padding

    def test_the_same_sample_in_any_batch(self):
        made = data(views=2)
        made.fit_to(encoder("vit"))
        alone, together = made.__getitems__([(1, 5)]), made.__getitems__([(1, 2), (1, 5)])
        for name in ("source", "mask"):
            assert torch.equal(alone[name][0], together[name][1])

    def test_batches_are_not_sorted_by_length(self):
        assert data().lengths is None

    def test_mostly_padding_is_told(self, caplog):
        with caplog.at_level(logging.WARNING):
            data(target_length=200)
        assert "data.target_length=200: is 2.02 s, but half of the recordings have at most 0.39 s" in caplog.text
        caplog.clear()
        data()
        data(target_length=200, join_seconds=2.0)
        assert not caplog.text

    def test_half_padding_is_not_told(self, caplog):
        """A recording of half of 199 * 160 + 400 samples; those of unknown length do not count."""
        Path("half").mkdir()
        for name in "abc":
            Path("half", f"{name}.wav").write_bytes(b"rubbish")
        data("half", target_length=200)
        for samples, told in ((16_120, False), (16_119, True)):
            soundfile.write("half/d.wav", noise(samples), 16_000)
            data("half", target_length=200)
            assert ("data.target_length=200" in caplog.text) == told


class TestRefused:
    @pytest.mark.parametrize(
        "model, changed, settings, mask, found",
        [
            ("vit", {}, dict(target_length=40), None, r"config\.image_size=\[32, 64\]: .* set .*image_size=\[40, 64\] or"),
            ("vit", dict(num_channels=3), {}, None, r"config\.num_channels=3: .* set encoder\.config\.num_channels=1$"),
            (AST, {}, dict(mel_bins=80), None, r"num_mel_bins=64: .* data\.mel_bins=80 needs 80"),
            (AST, {}, dict(target_length=64), None, r"max_length=32: data\.target_length=64"),
            ("vit", dict(image_size=[36, 64]), dict(target_length=36), None, r"patch_size=8, .* last 4 .* use 32 or 40, and"),
            (AST, dict(num_mel_bins=60), dict(mel_bins=60), None, r"data\.mel_bins=60: not a multiple of .*patch_size=8"),
            ("vit", {}, {}, BlockMask(32), r"mask\.count=32: a sample has 32 positions"),
            ("vit", {}, {}, ExactBlockMask(0.5, 9), r"mask\.length=9: .*\(4, 8\).* at most 8"),
        ],
    )
    def test_sizes_that_do_not_fit(self, model, changed, settings, mask, found):
        student = build_encoder(model, config=FIELDS[model] | changed)
        with pytest.raises(DataError, match=found):
            data(mask=mask, **settings).fit_to(student)

    def test_patches_that_overlap_need_no_multiple(self):
        made = data(target_length=33)
        made.fit_to(build_encoder(AST, config=FIELDS[AST] | dict(max_length=33, time_stride=5, frequency_stride=5)))
        assert made.grid == (12, 6)

    def test_an_encoder_of_frames(self):
        class Frames(Handwritten):
            def positions(self, size):
                return size // 4

        with pytest.raises(DataError, match="Frames has positions 8, expected a grid of patches: use audio-spectrogram"):
            data(target_length=33).fit_to(wrap(Frames(), layers="blocks"))  # without a config, so without a patch_size

    def test_another_rate(self):
        with pytest.raises(DataError, match=r"data\.sample_rate=32000: spectrograms are made at 16000 Hz.*; leave it at 16000"):
            data(sample_rate=32_000)

    def test_a_clip_of_less_than_two_windows(self):
        soundfile.write("click.wav", noise(500), 16_000)
        made = data("click.wav", min_seconds=0)
        made.fit_to(encoder("vit"))
        assert made.__getitems__([(0, 0)])["broken"] == [(0, "click.wav: is too short: 500 samples")]
        with pytest.raises(DataError, match=r"data\.min_seconds=0\.1; the longest has 0\.03 s\. Lower it, or join"):
            data("click.wav")

    @pytest.mark.parametrize("model, shape", [("vit", (1, 1, 32, 64)), (AST, (1, 32, 64))])
    def test_a_clip_of_a_probe_without_a_window(self, model, shape):
        """One of a single window is read as by the extractor of transformers."""
        Path("clips").mkdir()
        for samples in (399, 400):
            soundfile.write(f"clips/{samples}.wav", noise(samples), 16_000, subtype="FLOAT")
        settings = dict(sample_rate=16_000, target_length=32, mel_bins=64, mean=-3.0, std=2.0)
        opened, stack = SpectrogramData.for_probe(encoder(model), settings)
        source = opened("clips")
        with pytest.raises(ValueError, match="is too short: 399 samples"):
            source.read(0)
        found, padding = stack([source.read(1)])
        extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=32, mean=-3.0, std=2.0)
        expected = extractor(noise(400), sampling_rate=16_000, return_tensors="np").input_values
        assert found.shape == shape and padding is None
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=1e-5)

    def test_an_encoder_of_waveforms(self):
        config, _ = parse(["--config", "spectrogram/tiny-2", "encoder.model=wav2vec2"])
        with pytest.raises(ConfigError, match="Wav2Vec2Model does not read inputs of modality=spectrogram"):
            make_encoder(config)

    def test_spans(self):
        with pytest.raises(ConfigError, match="found 'span', expected for spectrogram one of exact, random, block"):
            parse(["--config", "spectrogram/tiny-2", "mask.kind=span"])


RUN = "targets.top_k=2 train.steps=2 train.batch_size=4 train.workers=0 train.log_every=1 train.precision=fp32"
RUN += " data.target_length=32 data.mel_bins=64"
ONE = "head.kind=linear head.layers=1 data.views=null mask.prob=0.5"
TWO = "head.width=32 head.layers=2 data.views=2"


def train(model, *more):
    fields = [f"encoder.config.{name}={value}" for name, value in FIELDS[model].items()]
    args = ["--config", "spectrogram/tiny-2", f"encoder.model={model}", *fields, *RUN.split(), "train.output=run", *more]
    trainer = build(parse(args)[0])
    loop(trainer)
    return trainer


def wave_and_states(folder, student):
    """States of a recording by the exported model after the exported extractor, and by the student after `spectrogram`."""
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    wave = chirp(0.2)
    inputs = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values
    image = model.main_input_name == "pixel_values"
    source = torch.from_numpy(spectrogram(wave, 32, 64, -4.268, 4.569))[None]
    with torch.no_grad():
        found = model(inputs.unsqueeze(1) if image else inputs).last_hidden_state
        expected = student(source.unsqueeze(1) if image else source)
    return found[:, -expected.shape[1] :], expected


class TestRuns:
    @pytest.mark.parametrize("model, recipe", [("data2vec2-vision", TWO), ("vit", ONE), (AST, ONE), (AST, TWO)])
    def test_from_sounds_to_an_export(self, model, recipe):
        cls = ["loss.cls_weight=1"] if recipe == TWO else []
        trainer = train(model, *recipe.split(), *cls, "data.path=sounds/train", "encoder.init=hf")
        losses = [json.loads(line)["loss"] for line in Path("run/log.jsonl").read_text().splitlines()]
        assert np.isfinite(losses).all()
        student = trainer.state.core.student.eval()
        assert export_run("run", "out") < 1e-6
        for folder in ("out", "run/export"):
            found, expected = wave_and_states(folder, student)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        card = Path("out/README.md").read_text()
        assert "pipeline_tag: feature-extraction" in card and "on spectrogram" in card and "AutoFeatureExtractor" in card
        probe.main(["run", "--data", "sounds"])
        results = json.loads(Path("run/probe.json").read_text())[-1]["results"]
        assert {"untrained", "trained", "chance"} <= results.keys()

    def test_a_probe_sees_what_an_export_would(self, monkeypatch):
        trainer = train("vit", *TWO.split(), "data.path=sounds/train", "encoder.init=sincos")
        seen = []  # of the patches, then of CLS
        monkeypatch.setattr(probe, "score", lambda train, *rest: {"samples": seen.append(train)})
        config = trained.read_config(Path("run"))
        probe.probe_labels(config, probe.States({"trained": trainer.state.core.student.eval()}), "sounds", None, 100)
        extractor = AutoFeatureExtractor.from_pretrained("run/export")
        model = AutoModel.from_pretrained("run/export", add_pooling_layer=False).eval()
        source = trainer.data.source
        waves = [source.read(i) for i in range(len(source))]
        inputs = extractor(waves, sampling_rate=16_000, return_tensors="pt").input_values.unsqueeze(1)
        with torch.no_grad():
            pooled = model(inputs).last_hidden_state[:, 1:].mean(1)
        order = np.random.default_rng(0).permutation(8)
        np.testing.assert_allclose(seen[0], pooled[order], rtol=0, atol=1e-4)

    def test_positions_of_ast_by_sines_and_cosines(self):
        made = build_encoder(AST, config=FIELDS[AST], init="sincos")
        table = made.model.embeddings.position_embeddings
        assert not table.requires_grad and not table[0, :2].any()
        assert table[0, 2].tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 8 + [1.0] * 8
        # Patches are row by row of mel, eight rows of four columns of time: the first half tells the column.
        assert torch.equal(table[0, 2, :16], table[0, 2 + 4, :16]) and not torch.equal(table[0, 2, 16:], table[0, 2 + 4, 16:])
        with pytest.raises(ValueError, match=r"encoder\.init='sincos': only for ViT"):
            build_encoder("wav2vec2", config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), init="sincos")

    def test_pretrained_ast_brings_its_spectrograms(self):
        fields = FIELDS[AST]
        ASTModel(ASTConfig(**fields)).save_pretrained("ast")
        ASTFeatureExtractor(num_mel_bins=64, max_length=32, mean=-1.0, std=3.0).save_pretrained("ast")
        config, _ = parse(["--config", "spectrogram/tiny-2", "encoder.pretrained=ast"])
        assert [config.data[name] for name in ("target_length", "mel_bins", "mean", "std")] == [32, 64, -1.0, 3.0]
        config, _ = parse(["--config", "spectrogram/tiny-2", "encoder.pretrained=ast", "data.mean=0"])
        assert config.data["mean"] == 0
        ASTFeatureExtractor(num_mel_bins=64, max_length=32, do_normalize=False).save_pretrained("ast")
        config, _ = parse(["--config", "spectrogram/tiny-2", "encoder.pretrained=ast"])
        assert (config.data["mean"], config.data["std"]) == (0, 0.5)
        said = json.loads(Path("ast/preprocessor_config.json").read_text())
        del said["do_normalize"]  # which is true by default
        Path("ast/preprocessor_config.json").write_text(json.dumps(said | {"mean": -1.0}))
        config, _ = parse(["--config", "spectrogram/tiny-2", "encoder.pretrained=ast"])
        assert config.data["mean"] == -1.0
        shutil.rmtree("ast")
        ASTModel(ASTConfig(**fields)).save_pretrained("ast")
        Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained("ast")
        config, _ = parse(["--config", "spectrogram/tiny-2", "encoder.pretrained=ast"])
        assert config.data["sample_rate"] == 8000 and config.data["mean"] == -4.268

    def test_a_random_mask_of_views(self):
        made = data(mask=RandomMask(0.75), views=3)
        made.fit_to(encoder("data2vec2-vision"))
        assert made.make_mask(Draws(0, 0, [0]), made.grid).shape == (1, 3, 32)


@pytest.mark.slow
def test_training_teaches():
    """The tiny preset on builtin words, some minutes: the untrained encoder is far from its k-NN."""
    loop(build(parse(["--config", "spectrogram/tiny-2", "train.output=run"])[0]))
    probe.main(["run"])
    results = json.loads(Path("run/probe.json").read_text())[-1]["results"]
    assert results["trained"]["knn"] > results["untrained"]["knn"] + 0.15
    assert results["trained"]["linear"] > results["untrained"]["linear"] + 0.06


def test_published_numbers_of_eat():
    """Chen et al. 2024 and its authors' settings: 64 × 8 patches, 102 visible, 4 × 12 recordings in 16 views."""
    config, _ = parse(["--config", "spectrogram/eat-base"])
    assert config.mask.count(512) == 512 - 102
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (5e-4, (0.9, 0.95), 0.05)
    assert (config.schedule.warmup, config.train.steps) == (53_333, 400_000)
    assert (config.train.batch_size, config.data["views"]) == (12, 16)
    assert (config.ema.start, config.ema.end, config.ema.anneal_steps) == (0.9998, 0.99999, 100_000)
    assert (config.data["mean"], config.data["std"]) == (-4.268, 4.569)
    with torch.device("meta"):
        model = make_encoder(config).model
    parameters = sum(p.numel() for p in model.parameters())
    assert 85e6 < parameters < 86e6 and model.embeddings.patch_embeddings.grid == (64, 8)
