"""What a run that starts from pretrained weights adopts in addition to the weights."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from d2v_fast import build_encoder
from d2v_fast.config import ConfigError, parse
from d2v_fast.data.text import train_tokenizer
from d2v_fast.data.vision import image_processor
from d2v_fast.export import import_checkpoint
from d2v_fast.train.build import make_data, make_encoder, make_model
from tests.models import COMMON, WAVE
from tests.released import checkpoint, make, make_teacher

pytestmark = pytest.mark.usefixtures("here")

TEXTS = ["alpha beta gamma delta", "one two three four"] * 40
SIZES = COMMON | {"num_hidden_layers": 2}


@pytest.fixture
def text():
    tokenizer = train_tokenizer(iter(TEXTS), 280, 32)
    tokenizer.save_pretrained("text")
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **SIZES)).save_pretrained("text")
    return "text"


@pytest.fixture
def vision():
    ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)).save_pretrained("vision")
    image_processor(16, (0.5,) * 3, (0.25,) * 3).save_pretrained("vision")
    return "vision"


@pytest.fixture
def audio():
    Wav2Vec2Model(Wav2Vec2Config(num_feat_extract_layers=3, num_conv_pos_embeddings=8, **SIZES, **WAVE)).save_pretrained(
        "audio"
    )
    Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False).save_pretrained("audio")
    return "audio"


def settings(*args):
    config, _ = parse(["--config", *args])
    return config


class TestText:
    @pytest.mark.parametrize("preset", ["text/tiny", "text/roberta-base"])
    def test_the_tokenizer_is_the_encoders(self, text, preset, capsys):
        config = settings(preset, "encoder.pretrained=text", "data.path=builtin", "data.block_size=16")
        assert config.data["tokenizer"] == "text" and "data.tokenizer: text" in config.yaml.replace(
            "  tokenizer", "data.tokenizer"
        )
        assert "encoder.pretrained=text: data.tokenizer=text, as it was trained" in capsys.readouterr().err
        data = make_data(config)
        assert data.vocabulary.size == 280
        data.fit_to(make_encoder(config))

    def test_one_that_is_asked_for_stays(self, text):
        shutil.copytree("text", "other")
        assert settings("text/tiny", "encoder.pretrained=text", "data.tokenizer=other").data["tokenizer"] == "other"
        with open("mine.yaml", "w") as file:
            json.dump({"modality": "text", "encoder": {"pretrained": "text"}, "data": {"tokenizer": "other"}}, file)
        assert settings("mine.yaml").data["tokenizer"] == "other"
        assert settings("mine.yaml", "encoder.pretrained=text").data["tokenizer"] == "text"

    def test_a_new_vocabulary_is_refused(self, text):
        with pytest.raises(ConfigError, match=r"data\.tokenizer=train: .* encoder\.pretrained=text was trained with another"):
            make_data(settings("text/tiny", "encoder.pretrained=text", "data.tokenizer=train"))

    def test_without_a_tokenizer(self, text, capsys):
        RobertaModel.from_pretrained("text").save_pretrained("bare")
        config = settings("text/tiny", "encoder.pretrained=bare")
        assert (
            "encoder.pretrained=bare: has no usable tokenizer: holds a model but no tokenizer vocabulary"
            in capsys.readouterr().err
        )
        with pytest.raises(ConfigError, match=r"name the tokenizer that the encoder was trained with"):
            make_data(config)

    def test_home_is_found(self, text, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        config = settings("text/tiny", "encoder.pretrained=~/text")
        assert config.data["tokenizer"] == f"{tmp_path}/text"
        assert make_encoder(config).model.config.vocab_size == 280


class TestPreprocessing:
    def test_images(self, vision):
        config = settings("vision/tiny", "encoder.pretrained=vision", "data.std=[1,1,1]")
        assert [config.data[key] for key in ("image_size", "mean", "std")] == [16, (0.5,) * 3, (1.0,) * 3]
        make_data(config).fit_to(make_encoder(config))

    def test_images_that_are_not_normalised(self, vision):
        file = Path("vision/preprocessor_config.json")
        said = json.loads(file.read_text())
        file.write_text(json.dumps(said | {"do_normalize": False}))
        data = settings("vision/tiny", "encoder.pretrained=vision").data
        assert (data["mean"], data["std"]) == ((0.0,) * 3, (1.0,) * 3)
        del said["do_normalize"]  # which is true by default
        file.write_text(json.dumps(said))
        assert settings("vision/tiny", "encoder.pretrained=vision").data["mean"] == (0.5,) * 3

    def test_speech(self, audio):
        data = settings("audio/tiny", "encoder.pretrained=audio").data
        assert (data["sample_rate"], data["normalize"], data["max_seconds"]) == (8000, False, 2.0)

    @pytest.mark.parametrize("modality", ["vision", "audio"])
    def test_what_is_not_known_is_the_presets(self, modality):
        plain, data = (settings(f"{modality}/tiny", *more).data for more in ([], ["encoder.pretrained=nowhere"]))
        assert data == plain


class TestWeights:
    def test_of_another_model_are_refused(self, text):
        """Its blocks have some names in common with ViT's."""
        ViTConfig(image_size=16, patch_size=4, **SIZES).save_pretrained("text")
        with pytest.raises(
            ValueError, match=r"encoder\.pretrained=text: lacks \d+ of the \d+ weights of ViTModel: embeddings\.cls"
        ):
            build_encoder(pretrained="text")

    def test_that_are_missing_are_named(self, text, caplog):
        build_encoder(pretrained="text")
        assert "lacks" not in caplog.text
        encoder = build_encoder(pretrained="text", config={"num_hidden_layers": 3})
        assert "lacks 16 of the 53 weights of RobertaModel: encoder.layer.2.attention" in caplog.text
        kept = RobertaModel.from_pretrained("text").state_dict()
        assert torch.equal(encoder.model.encoder.layer[1].output.dense.weight, kept["encoder.layer.1.output.dense.weight"])

    def test_of_another_shape(self, text):
        with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape \[280, 32\], its config says \[30, 32\]"):
            build_encoder(pretrained="text", config={"vocab_size": 30})

    def test_that_are_not_there(self):
        RobertaConfig(**SIZES).save_pretrained("empty")
        with pytest.raises(ValueError, match=r"encoder\.pretrained=empty: its weights cannot be read: .*model\.safetensors"):
            build_encoder(pretrained="empty")

    def test_of_a_custom_encoder(self):
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, "model.safetensors")
        with pytest.raises(ValueError, match=r"encoder\.pretrained=\.: .*Missing key.*stem\.weight"):
            build_encoder("tests.models:Handwritten", pretrained=".", layers="blocks", ffn="mlp.2")


class TestReleased:
    """A released data2vec 2.0, exported and then trained further."""

    @pytest.fixture
    def released(self):
        student = make("image")
        teacher = make_teacher(student)
        torch.save(checkpoint(student, teacher), "checkpoint.pt")
        import_checkpoint("checkpoint.pt", "out", "fairseq")
        return student, teacher

    def model(self, *changes):
        data = (
            "data.image_size=16",
            "targets.top_k=2",
            "targets.source=ffn",
            "head.groups=8",
            "head.layers=3",
            "head.width=32",
        )
        config = settings("vision/tiny-2", "encoder.pretrained=out", *data, *changes)
        return make_model(config, make_encoder(config))

    def test_student_teacher_and_decoder_are_those_of_the_checkpoint(self, released):
        student, teacher = released
        model, pixels = self.model().eval(), torch.randn(2, 3, 16, 16)
        mask = torch.stack([torch.randperm(16) < 10 for _ in range(4)]).view(2, 2, 16)
        model.head.noise = 0.0
        with torch.no_grad():
            _, expected = student.student(pixels, mask)
            index = mask.flatten().nonzero().squeeze(1)
            found = model.predict(pixels, model.student.embed(pixels), mask, index).predictions
            torch.testing.assert_close(found, expected.flatten(0, 1)[index], rtol=1e-4, atol=1e-4)
            _, results = teacher.run_blocks(teacher.encoder.contextualize(teacher.encoder.local_features(pixels)))
            layers = model.teacher_layers(pixels, None, None)
            torch.testing.assert_close(layers[-1], results[-1], rtol=1e-4, atol=1e-4)

    def test_another_decoder_starts_at_random_and_says_so(self, released, caplog):
        self.model("head.width=16")
        assert (
            "does not fit this head, which starts untrained; made with: head.dropout=0.0 head.groups=8 head.kernel=3"
            in caplog.text
        )
        caplog.clear()
        with pytest.raises(ConfigError, match=r"^head\.pretrained=out: .*size mismatch"):
            self.model("head.width=16", "head.pretrained=out")

    def test_what_is_missing_is_named(self, released, caplog):
        os.remove("out/head.safetensors")
        os.remove("out/teacher.safetensors")
        model = self.model()
        assert "has no head.safetensors, so the decoder starts untrained" in caplog.text
        assert "the teacher was not saved and starts as a copy of the student" in caplog.text
        for ours, theirs in zip(model.teacher.module.parameters(), model.student.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_a_teacher_of_another_encoder(self, released):
        save_file({"embeddings.cls_token": torch.zeros(1, 1, 8)}, "out/teacher.safetensors")
        with pytest.raises(ConfigError, match=r"teacher\.safetensors: .*remove it to start the teacher as a copy"):
            self.model()

    def test_a_checkpoint_of_our_own_goes_before(self, released, caplog):
        """A resumed run has a head and a teacher already."""
        caplog.set_level("INFO")
        more = ["encoder.pretrained=out", "data.image_size=16", "targets.top_k=2"]
        config = replace(settings("vision/tiny-2", *more), resume=True)
        make_model(config, make_encoder(config))
        assert "teacher" not in caplog.text and "head" not in caplog.text
