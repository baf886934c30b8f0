"""Checkpoints of EAT: loaded models compute the same as tests/released.py, the image model of 2.0 on spectrograms."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from d2v_fast.config import parse
from d2v_fast.convert import from_fairseq
from d2v_fast.decoders import ConvDecoder
from d2v_fast.export import import_checkpoint, main
from d2v_fast.train.build import make_data, make_encoder, make_model
from tests.released import EAT, ImageClassifier, checkpoint, make, make_teacher

SOUND = torch.randn(2, 1, 64, 128).double()  # 4 × 8 patches
EXACT = dict(rtol=0, atol=1e-10)

pytestmark = pytest.mark.usefixtures("here")


def eat(**changed):
    return make("image", EAT | changed)


def save(original, teacher=None, change=None):
    saved = checkpoint(original, teacher)
    saved["model"] |= change or {}
    torch.save(saved, "checkpoint.pt")
    return "checkpoint.pt"


def load(*args):
    return from_fairseq(save(*args), eat=True)


def close(found, expected):
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    "changed", [{}, dict(max_length=4), dict(prenet_depth=1), dict(target_length=48, max_length=4)], ids=str
)
@torch.no_grad()
def test_student_and_teacher_compute_what_the_original_does(changed):
    original = eat(**changed)
    teacher = make_teacher(original)
    released = load(original, teacher)
    sound = SOUND[:, :, : changed.get("target_length", 64)]
    config = released.model.config
    assert (config.image_size, config.num_channels, config.patch_size) == ([sound.shape[2], 128], 1, 16)
    expected, taught = original.double().extract(sound), teacher.double().extract(sound)
    assert (expected - taught).abs().max() > 0.1
    released.model.save_pretrained("again")
    for model in (released.model, AutoModel.from_pretrained("again")):
        close(model.double()(sound).last_hidden_state, expected)
    released.model.load_state_dict(released.teacher)
    close(released.model(sound).last_hidden_state, taught)
    assert released.licence == "mit"


def test_decoder_runs_over_time_and_mel():
    original = eat()
    released = load(original)
    decoder = ConvDecoder(32, **released.decoder_settings).double().eval()
    decoder.load_state_dict(released.decoder)
    x = torch.randn(2, 32, 32).double()
    close(decoder(x, (4, 8)), original.double().encoder.decoder(x))


def test_length_from_the_task():
    original = eat()
    del original.cfg["model"]["modalities"]["image"]["target_length"]
    original.cfg["task"]["target_length"] = 32
    assert load(original).model.config.image_size == [32, 128]


def test_published_size_without_settings():
    original = eat(target_length=1024, max_length=768)
    for settings in (original.cfg["model"]["modalities"]["image"], original.cfg["task"]):
        settings.pop("target_length", None)
    assert load(original).model.config.image_size == [1024, 128]


def test_training_resumes_with_the_same_loss():
    """Student, decoder and teacher from the folder that d2v-export writes give the loss of the original."""
    original = eat()
    teacher = make_teacher(original)
    assert import_checkpoint(save(original, teacher), "out", "eat") == 0
    changed = ["head.width=32", "head.layers=3", "head.groups=8", "head.noise=0", "targets.top_k=2"]
    changed += ["loss.cls_weight=.01", "loss.cls_reduction=sum", "data.path=builtin", "data.min_seconds=0.1", "data.views=3"]
    config, _ = parse(["--config", "spectrogram/eat-base", "encoder.pretrained=out", *changed])
    assert (config.data["target_length"], config.data["mel_bins"]) == (64, 128)
    encoder = make_encoder(config)
    data = make_data(config)
    data.fit_to(encoder)
    batch = data.__getitems__([(0, 0), (0, 1)])
    assert batch["source"].shape == (2, 1, 64, 128) and batch["mask"].shape == (2, 3, 32)
    model = make_model(config, encoder).double().eval()
    original, teacher, mask = original.double(), teacher.double(), batch["mask"]
    with torch.no_grad():
        _, results = teacher.run_blocks(teacher.encoder.contextualize(teacher.encoder.local_features(SOUND)))
        expected = original.losses(*original.student(SOUND, mask), original.targets(results), mask)
        found = model(SOUND, mask)
    size, fp32 = expected["sample_size"], dict(rtol=1e-6, atol=0)  # the loss is computed in fp32
    torch.testing.assert_close(found.loss - found.cls_loss, expected["regression"] / size, **fp32)
    torch.testing.assert_close(found.cls_loss.double(), expected["cls"] / size, **fp32)


@pytest.mark.parametrize(
    "task, mean, std", [({}, -4.268, 4.569), ({"esc50_eval": True}, -6.627, 5.359), ({"spcv2_eval": True}, -6.846, 5.565)]
)
@torch.no_grad()
def test_fine_tuned(task, mean, std):
    """They classify by CLS, and their inputs are normalised as in fine-tuning."""
    original = ImageClassifier(eat(), 5)
    original.cfg |= {"task": task}
    original.cfg["model"] |= {"prediction_mode": "PredictionMode.CLS_TOKEN", "target_length": 48}
    released = load(original)
    assert released.model.config.pooling == "cls" and released.model.config.image_size == [48, 128]
    sound = SOUND[:, :, :48]
    states = original.double().model.extract(sound)
    close(released.model.double()(sound).logits, original.head(original.fc_norm(states[:, 0])))
    import_checkpoint(save(original.float()), "out", "eat")
    extractor = AutoFeatureExtractor.from_pretrained("out")
    assert (extractor.mean, extractor.std, extractor.max_length) == (mean, std, 48)
    with open("out/README.md") as card:
        assert "audio-classification" in card.read()
    del original.cfg["model"]["prediction_mode"]
    assert load(original).model.config.pooling == "cls"


def test_command(capsys):
    main(["--from", "eat", save(eat(), make_teacher(eat())), "--to", "out"])
    assert "d2v-train --config spectrogram/eat-base encoder.pretrained=out" in capsys.readouterr().out
    with open("out/preprocessor_config.json") as file:
        assert json.load(file)["feature_extractor_type"] == "ASTFeatureExtractor"
    inputs = AutoFeatureExtractor.from_pretrained("out")(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained("out")(inputs.input_values.unsqueeze(1)).last_hidden_state
    assert states.shape == (1, 1 + 32, 32)
    with open("out/README.md") as card:
        text = card.read()
    assert "pipeline_tag: feature-extraction" in text and "license: mit" in text


POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"


@pytest.mark.parametrize(
    "original, change, found",
    [
        (lambda: make("image"), {}, "its patches have 3 channels, EAT's have 1"),
        (lambda: make("audio"), {}, "has an encoder of AUDIO, but EAT's is one of IMAGE"),
        (lambda: eat(max_length=3), {}, "are not the sines and cosines of 4 × 8 patches"),
        (eat, {POSITIONS: torch.randn(1, 48, 32)}, "are not the sines and cosines of 4 × 8 patches"),
        (lambda: eat(target_length=72), {}, r"image_size=\[72, 128\]: not a multiple of patch_size=16"),
    ],
)
def test_refused(original, change, found):
    with pytest.raises(ValueError, match=found):
        load(original(), None, change)


def test_each_command_points_to_the_other():
    with pytest.raises(ValueError, match="for a model of EAT, use --from eat"):
        from_fairseq(save(eat()))
    torch.save({"model": {"patch_embed.proj.weight": torch.ones(1)}}, "other.pt")
    with pytest.raises(ValueError, match="not a model of EAT; try --from fairseq"):
        from_fairseq("other.pt", eat=True)
