"""The commands from a user's view: exit code, one-line message, and output files."""

import json
import logging
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

import d2v_fast
from d2v_fast import cli
from d2v_fast.data import DataError

pytestmark = pytest.mark.usefixtures("here")

SMALL = [
    "encoder.config.hidden_size=32",
    "encoder.config.num_attention_heads=2",
    "encoder.config.num_hidden_layers=2",
    "encoder.config.intermediate_size=32",
    "targets.top_k=2",
    "train.steps=2",
    "train.batch_size=4",
    "train.workers=0",
    "train.log_every=1",
]
VISION = ["--config", "vision/tiny", *SMALL]
TEXT = ["--config", "text/tiny", *SMALL, "data.block_size=16", "data.vocab_size=300"]
AUDIO = ["--config", "audio/tiny", *SMALL, f"encoder.config.conv_dim={[8] * 7}", "data.join_seconds=0"]

OWN = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    class Mine(nn.Module):
        hidden_size = 8

        def __init__(self, tokens=300):
            super().__init__()
            self.embedding = nn.Embedding(tokens, 8)
            self.layers = nn.ModuleList(Block(8) for _ in range(3))

        def embed(self, ids):
            return self.embedding(ids)

        def contextualize(self, features, padding_mask=None):
            for layer in self.layers:
                features = layer(features)
            return features
"""


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return "images"


@pytest.fixture
def corpus(tmp_path):
    words = "one two three four five six seven".split()
    rng = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("\n".join(" ".join(rng.choice(words, 20)) for _ in range(40)))
    return "corpus.txt"


@pytest.fixture
def waves(tmp_path):
    (tmp_path / "waves").mkdir()
    for i in range(8):
        soundfile.write(tmp_path / f"waves/{i}.wav", 0.1 * np.random.default_rng(i).normal(size=6000), 16000)
    return "waves"


def run(monkeypatch, command, *args):
    """Exit code or message of a command."""
    monkeypatch.setattr(sys, "argv", [f"d2v-{command}", *args])
    with pytest.raises(SystemExit) as exit:
        getattr(cli, command)()
    return exit.value.code


def train(monkeypatch, *args):
    return run(monkeypatch, "train", *args)


class TestRuns:
    @pytest.mark.parametrize("modality", ["text", "vision", "audio"])
    def test_writes_log_config_and_student(self, modality, monkeypatch, request):
        args, data = {"text": (TEXT, "corpus"), "vision": (VISION, "images"), "audio": (AUDIO, "waves")}[modality]
        data = request.getfixturevalue(data)
        assert train(monkeypatch, *args, f"data.path={data}", "train.output=run") in (0, None)
        log = [json.loads(line) for line in open("run/log.jsonl")]
        assert [record["step"] for record in log] == [1, 2] and all(np.isfinite(record["loss"]) for record in log)
        assert yaml.safe_load(open("run/config.yaml"))["data"]["path"] == data
        from transformers import AutoModel

        assert AutoModel.from_pretrained("run/export").config.hidden_size == 32

        assert "train.output=run: already holds a run" in train(monkeypatch, *args, f"data.path={data}", "train.output=run")
        assert train(monkeypatch, "--config", "run/config.yaml", "train.output=again") in (0, None)
        again = [json.loads(line) for line in open("again/log.jsonl")]
        assert [record["loss"] for record in again] == [record["loss"] for record in log]

    def test_on_data_reached_by_a_link(self, monkeypatch, images):
        os.symlink("images", "link")
        os.symlink("..", "images/up")
        assert train(monkeypatch, *VISION, "data.path=./link/") in (0, None)
        assert os.listdir("runs")[0].startswith("vision-tiny-")

    def test_with_a_custom_encoder(self, monkeypatch, corpus):
        with open("my_encoder.py", "w") as file:
            file.write(textwrap.dedent(OWN))
        args = [
            "modality=text",
            "encoder.model=my_encoder:Mine",
            "targets.top_k=2",
            *SMALL[5:],
            *TEXT[-2:],
            f"data.path={corpus}",
        ]
        assert "Name it with encoder.layers=" in train(monkeypatch, *args)
        args += ["encoder.layers=layers", "encoder.ffn=down"]
        assert train(monkeypatch, *args) in (0, None)
        assert "3 layers" in train(monkeypatch, *args, "targets.top_k=4")
        assert "exceed the encoder's vocab_size of 9" in train(monkeypatch, *args, "encoder.config.tokens=9")
        assert "has no attribute 'Yours'" in train(monkeypatch, *args, "encoder.model=my_encoder:Yours")
        assert "No module named 'yours'" in train(monkeypatch, *args, "encoder.model=yours:Mine")

    def test_broken_samples_are_skipped_and_named(self, monkeypatch, images, caplog):
        for name in ("one.png", "two.png"):
            open(f"images/{name}", "w").write("no image")
        args = [*VISION, f"data.path={images}", "train.batch_size=14", "train.steps=1"]
        with caplog.at_level("WARNING"):
            assert train(monkeypatch, *args, "train.max_broken=0.2", "train.output=run") in (0, None)
        assert all(f"unreadable sample: images/{name}: is not an image" in caplog.text for name in ("one.png", "two.png"))
        assert json.loads(open("run/log.jsonl").readline())["broken_samples"] == 2
        message = train(monkeypatch, *args)
        assert message.startswith("d2v-train: 2 of 14 samples cannot be read, more than train.max_broken=0.01:")
        assert "images/one.png" in message and "images/two.png" in message
        assert not os.listdir("runs")  # no folder of a run without a step


class TestMessages:
    @pytest.mark.parametrize(
        "args, message",
        [
            ([], "no settings: d2v-train --config PRESET, one of audio/"),
            (["--config", "vision/tinny"], "--config vision/tinny: no such file or preset; did you mean vision/tiny?"),
            ([*VISION, "train.stepz=1"], "train.stepz: no such setting; did you mean train.steps?"),
            ([*VISION, "mask.prob=1"], "mask.prob: found 1.0, expected a number in (0, 1)"),
            ([*VISION, "encoder.model=biet"], "encoder.model='biet': not a transformers model type; did you mean"),
            (
                [*VISION, "encoder.config.hidden_sise=8"],
                "encoder.config.hidden_sise: ViTConfig has no such field; did you mean",
            ),
            ([*VISION, "targets.top_k=3"], "found 3, but ViTModel has 2 layers"),
            ([*VISION, "data.path=nowhere/"], "data.path=nowhere/: no such file or folder"),
            ([*VISION, "data.path=~/nowhere"], "nowhere: no such file or folder"),
            ([*VISION, "data.path=some/set"], "folder here, and it cannot be loaded as a Hugging Face data set"),
            ([*VISION, "data.split=tset"], "data.split=tset: builtin data have the splits"),
            ([*VISION, "data.image_size=64"], "data.image_size=64: the encoder takes 32"),
            ([*TEXT, "data.path=."], "data.path=.: no file with one of the extensions .txt"),
            ([*TEXT, "data.split=tset"], "data.split=tset: builtin data have the splits"),
            ([*AUDIO, "data.path=."], "data.path=.: no file with one of the extensions .wav"),
        ],
    )
    def test_is_one_line(self, args, message, monkeypatch):
        found = train(monkeypatch, *args)
        assert found.startswith("d2v-train: ") and message in found
        assert len(found.splitlines()) <= 2 and "Traceback" not in found

    def test_text_shorter_than_a_block(self, monkeypatch):
        open("short.txt", "w").write("brief")
        assert "fewer than one block of data.block_size=16" in train(monkeypatch, *TEXT, "data.path=short.txt")

    def test_vocabulary_larger_than_the_encoders(self, monkeypatch, corpus):
        message = train(monkeypatch, *TEXT, f"data.path={corpus}", "encoder.config.vocab_size=20")
        assert "exceed the encoder's vocab_size of 20" in message

    def test_a_mask_that_covers_nothing(self, monkeypatch, corpus):
        message = train(monkeypatch, *TEXT, f"data.path={corpus}", "mask.prob=1e-9")
        assert "the mask covers no position in 100 batches in a row" in message and "raise mask.prob" in message

    def test_audio_shorter_than_a_frame(self, monkeypatch):
        soundfile.write("a.wav", np.ones(100), 16000)
        message = train(monkeypatch, *AUDIO, "data.path=a.wav", "data.min_seconds=0")
        assert "0.0063 s, gives 0 frames" in message or "0.0062 s, gives 0 frames" in message

    def test_collapse(self, monkeypatch, images):
        settings = ["collapse.action=stop", "collapse.after=0", "collapse.target_std=9"]
        assert "below collapse.target_std=9" in train(monkeypatch, *VISION, f"data.path={images}", *settings)

    def test_a_device_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
        message = train(monkeypatch, *VISION, "train.device=cuda")
        assert message.startswith("d2v-train: train.device=cuda: torch") and "finds no GPU; d2v-doctor may show why" in message

    def test_a_tilde_is_expanded_in_every_path(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        message = train(monkeypatch, *VISION, "encoder.pretrained=~/none")
        assert f"encoder.pretrained={tmp_path}/none: " in message
        for command, args, shown in (
            ("probe", ["~/none"], "none: has no config.yaml"),
            ("report", ["~/none"], "none: has no log.jsonl"),
            ("export", ["~/none", "--to=~/new"], "none"),
        ):
            assert f"{tmp_path}/{shown}" in run(monkeypatch, command, *args)

    def test_control_characters_in_names_are_escaped(self, monkeypatch):
        """Both in the final message and in the log."""

        def refuse(args):
            raise DataError("\x1b[2J\x9b\udce9é.png:\n  a\tb")

        monkeypatch.setattr(cli, "parse", refuse)
        assert train(monkeypatch) == "d2v-train: \\x1b[2J\\x9b\\udce9é.png:\n  a\tb"
        record = logging.LogRecord("", logging.INFO, "", 0, "skipped %s", ("\x1b]0;x\x07",), None)
        assert cli._Formatter("%(message)s").format(record) == "skipped \\x1b]0;x\\x07"

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("unable to allocate 9 TiB")])
    def test_out_of_memory(self, error, monkeypatch):
        def step(state, micro_batches):
            raise error

        monkeypatch.setattr("d2v_fast.train.loop.step", step)
        message = train(monkeypatch, *VISION)
        assert message.startswith("d2v-train: out of memory; a smaller train.batch_size with a larger train.accumulate needs")
        assert message.endswith(str(error))

    def test_a_broken_package_is_named(self, monkeypatch):
        def imports(args):
            try:
                raise RuntimeError("operator torchvision::nms does not exist")
            except RuntimeError as error:
                raise ModuleNotFoundError("Could not import module 'ViTModel'") from error

        monkeypatch.setattr(cli, "parse", imports)
        message = (
            "a package is missing or broken, d2v-doctor may name it: RuntimeError: operator torchvision::nms does not exist"
        )
        assert train(monkeypatch) == f"d2v-train: {message}"

    def test_fused_is_strict(self, monkeypatch):
        monkeypatch.setattr("d2v_fast.ops.native.library", lambda: "the C++ library is not built")
        assert train(monkeypatch, *VISION, "--fused") == (
            "d2v-train: --fused: the native loss cannot run: the C++ library is not built"
        )

    def test_an_interrupted_start_is_silent(self, monkeypatch):
        def interrupted(args):
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "parse", interrupted)
        assert train(monkeypatch, *VISION) == 130

    def test_an_error_in_a_worker_arrives_plain(self, monkeypatch, images):
        from d2v_fast.data.vision import ImageData

        def collate(self, samples, draws):
            raise DataError("data.mean: found nonsense, expected sense")

        monkeypatch.setattr(ImageData, "collate", collate)
        message = train(monkeypatch, *VISION, f"data.path={images}", "train.workers=1")
        assert message == "d2v-train: data.mean: found nonsense, expected sense"


class TestInformation:
    @pytest.mark.parametrize("command", ["train", "probe", "export", "report", "doctor"])
    def test_version(self, command, monkeypatch, capsys):
        assert run(monkeypatch, command, "--version") is None
        assert capsys.readouterr().out == f"d2v-{command} {d2v_fast.__version__}\n"

    @pytest.mark.parametrize("command", ["train --help", "doctor"])
    def test_output_in_an_old_encoding(self, command):
        """An encoding that Windows uses for pipes."""
        name, *args = command.split()
        code = f"import sys; sys.argv[1:] = {args}; from d2v_fast import cli; cli.{name}()"
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_help_explains_the_settings_of_the_modality(self, monkeypatch, capsys):
        assert train(monkeypatch, "--config", "audio/tiny", "--help") == 0
        out = capsys.readouterr().out
        assert "--data.join_seconds" in out and "--mask.min_spans" in out and "image_size" not in out
        assert "Join recordings of one speaker" in " ".join(out.split())

    def test_printed_config_can_be_loaded(self, monkeypatch, capsys):
        assert train(monkeypatch, *TEXT, "--print_config") == 0
        first = capsys.readouterr().out
        open("mine.yaml", "w").write(first)
        assert train(monkeypatch, "--config", "mine.yaml", "--print_config") == 0
        assert capsys.readouterr().out == first
        assert yaml.safe_load(first)["encoder"]["config"]["hidden_size"] == 32


def test_the_installed_command(images):
    """In a separate process: the exit code, and only messages on stderr."""
    open("images/broken.png", "w").write("no image")
    command = [sys.executable, "-m", "d2v_fast.cli", *VISION, "data.path=images", "train.workers=1", "train.batch_size=13"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr and len(lines) == 5
    assert lines[-2:] == [
        "d2v-train: 1 of 13 samples cannot be read, more than train.max_broken=0.01:",
        "  images/broken.png: is not an image in one of the formats JPEG, PNG, WEBP, GIF, TIFF, BMP, PPM, JPEG2000, AVIF",
    ]
