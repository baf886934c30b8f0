"""Untrusted settings, weights and data must not run code, read outside their folder or exhaust memory."""

import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import EpsImagePlugin, Image

from d2v_fast.config import ConfigError, parse, read_yaml
from d2v_fast.data import DataError, load_hub
from d2v_fast.data.audio import MAX_VALUES, count_samples, open_audio, read_audio
from d2v_fast.data.documents import load_documents
from d2v_fast.data.text import TextData, load_tokenizer
from d2v_fast.data.vision import open_images
from d2v_fast.encoders import build_encoder
from d2v_fast.masking import TokenMask


@pytest.fixture(autouse=True)
def nothing_explodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("exploded").exists(), "code from a file was run"


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_the_bomb_works():
    pickle.loads(pickle.dumps(Bomb()))
    os.rmdir("exploded")


class TestSettings:
    @pytest.mark.parametrize(
        "text",
        [
            "train: !!python/object/apply:os.mkdir [exploded]",
            "train: !!python/object/new:os.mkdir [exploded]",
            "train: {steps: !!python/name:os.mkdir }",
            "train: !!python/module:os",
            "train: !!python/tuple [1, 2]",
            "train: !mine {a: 1}",
            "modality: vision\ntrain: &t\n  steps: 3\nloss: *t",
            "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]",
            "train: &t\n  steps: *t",
            "train: " + "[" * 50_000 + "]" * 50_000,
            "train: {steps: 1",
            "\0",
        ],
    )
    def test_yaml_with_more_than_values(self, text):
        Path("hostile.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"--config hostile\.yaml: not valid YAML: "):
            read_yaml("hostile.yaml")

    @pytest.mark.parametrize("model", ["os:mkdir", "subprocess:Popen", "builtins:exec", "d2v_fast.train:train"])
    def test_an_encoder_that_is_none(self, model):
        """A preset from elsewhere may name any function; only nn.Module classes are called."""
        with pytest.raises(ValueError, match=r"expected a class that derives from nn\.Module"):
            build_encoder(model, config={"path": "exploded"})


@pytest.fixture
def remote():
    """A model that ships its own code."""
    Path("remote").mkdir()
    maps = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
    Path("remote/config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": maps}))
    Path("remote/tokenizer_config.json").write_text(json.dumps({"auto_map": maps}))
    Path("remote/code.py").write_text("import os\nos.mkdir('exploded')\n")
    return "remote"


class TestWeights:
    def test_code_that_comes_with_a_model(self, remote, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *args: "y")  # transformers asks the user
        with pytest.raises(ValueError, match="custom code"):
            build_encoder(pretrained=remote)
        with pytest.raises(ValueError, match=r"encoder\.config\.trust_remote_code: code shipped with a model is not run"):
            build_encoder(pretrained=remote, config={"trust_remote_code": True})
        with pytest.raises(DataError, match="custom code"):
            load_tokenizer(remote)

    @pytest.mark.parametrize(
        "write", [lambda file: file.write_bytes(pickle.dumps(Bomb())), lambda file: torch.save(Bomb(), file)]
    )
    def test_a_pickle_among_them(self, write):
        from transformers import ViTConfig

        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained("model")
        write(Path("model/pytorch_model.bin"))
        with pytest.raises(ValueError, match=r"encoder\.pretrained=model: its weights are a pickle .* it is not loaded"):
            build_encoder(pretrained="model")

    def test_a_pickle_in_the_place_of_safetensors(self):
        from transformers import ViTConfig

        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained("model")
        Path("model/model.safetensors").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match=r"encoder\.pretrained=model: its weights cannot be read"):
            build_encoder(pretrained="model")

    @pytest.mark.parametrize("name", ["old.pt", "run/checkpoint.PTH", "pytorch_model.bin", "x.pkl", "x.ckpt"])
    def test_a_pickle_to_resume_from(self, name):
        with pytest.raises(ValueError, match=r"a pickle, which can run any code .* weights_only=True"):
            parse(["--resume", name])


class TestData:
    def test_pickles_in_a_set(self):
        Path("set").mkdir()
        for name in ("train.pkl", "train.pickle"):
            Path("set", name).write_bytes(pickle.dumps(Bomb()))
        for name in ("train.pt", "train.bin"):
            torch.save(Bomb(), Path("set", name))
        np.save("set/train.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
        for path in ("set", "set/train.pkl", "set/train.npy"):
            with pytest.raises(DataError, match=f"data.path={path}: "):
                load_documents(path)
            with pytest.raises(DataError, match=f"data.path={path}: "):
                open_images(path)
            with pytest.raises(DataError, match=f"data.path={path}: "):
                open_audio(path)

    @pytest.mark.parametrize("ending", ["pickle", "pkl", "pyd", "pth", "npy"])
    def test_pickles_in_an_archive_of_a_set(self, ending):
        Path("set").mkdir()
        with tarfile.open("set/train.tar", "w") as archive:
            for name in (f"0.{ending}", f"1.{ending}"):
                Path(name).write_bytes(pickle.dumps(Bomb()))
                archive.add(name)
        with pytest.raises(DataError, match=r"data\.path=set: "):
            open_images("set")

    def test_code_that_comes_with_a_set(self):
        Path("set").mkdir()
        Path("set/set.py").write_text("import os\nos.mkdir('exploded')\n")
        with pytest.raises(DataError, match="scripts are no longer supported"):
            load_hub("set", None, "train")

    @pytest.mark.parametrize("name", ["../secret.wav", "/etc/secret.wav", "a/../../secret.wav"])
    def test_a_table_with_paths_outside_its_folder(self, name):
        Path("set").mkdir()
        soundfile.write("secret.wav", np.zeros(16000), 16000)
        Path("set/metadata.csv").write_text(f"file_name,label\n{name},x\n")
        with pytest.raises(DataError, match=r"set/metadata\.csv: names .*secret\.wav, which is outside the folder"):
            open_audio("set")
        assert len(open_audio("set/metadata.csv")) == 1  # allowed, because the user names it

    def test_a_decompression_bomb_image(self):
        """200 kB of PNG that would take 4.8 GB."""

        def chunk(kind, content):
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        side = 40_000
        packer = zlib.compressobj(9)
        packed = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        Path("bomb.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
        )
        with pytest.raises(Image.DecompressionBombError, match="1600000000 pixels"):
            open_images("bomb.png").read(0)

    def test_postscript_among_images(self, monkeypatch):
        """Pillow would hand it to Ghostscript, whose language can write files."""
        Path("bin").mkdir()
        Path("bin/gs").write_text("#!/bin/sh\nmkdir exploded\n")
        Path("bin/gs").chmod(0o755)
        monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once per process
        script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        Path("images").mkdir()
        Path("images/holiday.jpg").write_bytes(script)
        rows = datasets.Dataset.from_dict({"image": [{"bytes": script, "path": None}], "text": ["a caption of an image"]})
        rows.cast_column("image", datasets.Image()).to_parquet("set.parquet")
        for path in ("images", "set.parquet"):
            with pytest.raises(ValueError, match="is not an image in one of the formats JPEG, PNG"):
                open_images(path).read(0)
        assert len(TextData(mask=TokenMask(0.3, 2), path="set.parquet", block_size=4, vocab_size=300))

    def test_a_recording_with_a_huge_claimed_length(self):
        soundfile.write("claim.flac", np.tile([0, 0.5], 8000), 16000)
        content = bytearray(Path("claim.flac").read_bytes())
        content[21] |= 0x0F  # STREAMINFO: 36 bits of its length, all set
        content[22:26] = b"\xff" * 4
        Path("claim.flac").write_bytes(content)
        assert len(read_audio("claim.flac", 16_000)) == count_samples("claim.flac", 16_000) == 16_000

    def test_a_decompression_bomb_recording(self):
        """An hour of silence on 8 channels is half a megabyte of FLAC and 1.7 GiB of numbers."""
        with soundfile.SoundFile("silence.flac", "w", 16_000, 8) as file:
            for _ in range(3600):
                file.write(np.zeros((16_000, 8), dtype=np.int16))
        assert os.path.getsize("silence.flac") < 1e6
        with pytest.raises(ValueError, match="holds more than 33554432 samples at 16000 Hz on 8 channels, 1 GiB"):
            read_audio("silence.flac", 16_000)

    def test_a_decompression_bomb_recording_at_another_rate(self):
        soundfile.write("slow.wav", np.zeros(17_000), 1)
        assert 17_000 * 16_000 > MAX_VALUES
        with pytest.raises(ValueError, match="holds more than 16777 samples at 1 Hz"):
            read_audio("slow.wav", 16_000)

    def test_a_wav_with_a_longer_claimed_length(self):
        soundfile.write("claim.wav", np.tile([0, 0.5], 500), 16_000)
        content = bytearray(Path("claim.wav").read_bytes())
        content[40:44] = b"\xf0\xff\xff\xff"
        Path("claim.wav").write_bytes(content)
        assert len(read_audio("claim.wav", 16_000)) == 1000
