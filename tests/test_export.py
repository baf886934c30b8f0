"""d2v-export: what AutoModel loads in a fresh process computes what the encoder did in training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

from d2v_fast import cli
from d2v_fast.config import ConfigError
from d2v_fast.data.audio import standardize
from d2v_fast.data.vision import center_crop, to_pixels
from d2v_fast.export import Exported, export_run
from tests.models import IMAGES, TEXTS, WAVES, inputs, make


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def export(monkeypatch, *args):
    """Exit code or message of d2v-export."""
    monkeypatch.setattr(sys, "argv", ["d2v-export", *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        cli.export()
    return exit.value.code


RELOAD = """
import sys, torch
from pathlib import Path
for line in sys.argv[1:]:
    exec(Path(line, "README.md").read_text().split("```python")[1].split("```")[0])
    with torch.no_grad():
        torch.save(model(torch.load(line + "/inputs.pt")).last_hidden_state, line + "/states.pt")
"""


def test_a_fresh_process_loads_what_was_trained(runs, monkeypatch):
    """Student and teacher of each modality, by what their model cards say."""
    expected = {}
    for modality, run in runs.items():
        for role in ("student", "teacher"):
            folder = f"{modality}-{role}"
            assert export(monkeypatch, run.folder, "--to", folder, *(["--teacher"] if role == "teacher" else [])) in (0, None)
            torch.save(run.inputs, f"{folder}/inputs.pt")
            expected[folder] = getattr(run, role)
        assert not torch.equal(run.student, run.teacher)
    said = subprocess.run([sys.executable, "-c", RELOAD, *expected], check=True, capture_output=True, text=True).stderr
    assert "UNEXPECTED" not in said and "MISSING" not in said, said  # as the model card has it, no weight is amiss
    for folder, states in expected.items():
        found = torch.load(f"{folder}/states.pt")[:, -states.shape[1] :]
        torch.testing.assert_close(found, states, rtol=0, atol=1e-6)


class TestArchitectures:
    @pytest.mark.parametrize("name", [*TEXTS, *IMAGES, *WAVES])
    def test_each_is_exact(self, name, tmp_path):
        encoder = make(name)
        assert Exported(encoder).write(tmp_path / "out") <= 1e-6
        x = inputs(name)
        with torch.no_grad():
            found = AutoModel.from_pretrained(tmp_path / "out")(x).last_hidden_state
            torch.testing.assert_close(found[:, -encoder(x).shape[1] :], encoder(x), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "name, other",
        [("roberta", "data2vec-text"), ("data2vec-text", "roberta"), ("beit", "data2vec-vision"), ("data2vec-vision", "beit")],
    )
    def test_under_the_other_name(self, name, other, tmp_path):
        encoder, x = make(name), inputs(name)
        Exported(encoder).write(tmp_path / "out", other)
        assert AutoConfig.from_pretrained(tmp_path / "out").model_type == other
        with torch.no_grad():
            found = AutoModel.from_pretrained(tmp_path / "out")(x).last_hidden_state
            torch.testing.assert_close(found[:, -encoder(x).shape[1] :], encoder(x), rtol=0, atol=1e-6)

    def test_what_is_not_the_same_is_refused_with_the_reason(self, runs, monkeypatch):
        run = runs["audio"].folder
        message = export(monkeypatch, run, "--to", "out", "--as", "wav2vec2")
        assert message == (
            "d2v-export: --as wav2vec2: the encoder is data2vec-audio, but wav2vec2 has one positional convolution with "
            "weight norm, where data2vec has several without; exact is only data2vec-audio"
        )
        assert "did you mean data2vec-text?" in export(monkeypatch, run, "--to", "out", "--as", "data2vec-tex")
        assert "but bert is another architecture" in export(monkeypatch, run, "--to", "out", "--as", "bert")

    def test_another_result_is_noticed(self, tmp_path):
        """Should a version of transformers compute something else than the encoder does."""
        encoder = make("roberta")
        contextualize = encoder.contextualize
        encoder.contextualize = lambda *args: contextualize(*args) + 1e-4
        with pytest.raises(RuntimeError, match="computes other states than the training encoder"):
            Exported(encoder).write(tmp_path / "out")

    def test_weights_that_are_not_finite_leave_no_folder(self, tmp_path):
        encoder = make("roberta")
        next(encoder.parameters()).data.fill_(float("nan"))
        with pytest.raises(ConfigError, match="states are not finite"):
            Exported(encoder).write(tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestInputs:
    """Tokenizer and processors prepare what the encoder saw in pre-training."""

    def test_text(self, runs):
        export_run(runs["text"].folder, "out")
        ours, theirs = runs["text"].trainer.data.tokenizer, AutoTokenizer.from_pretrained("out")
        assert theirs("the exception is raised")["input_ids"] == ours("the exception is raised")["input_ids"]
        assert AutoConfig.from_pretrained("out").pad_token_id == theirs.pad_token_id

    def test_images(self, runs):
        export_run(runs["vision"].folder, "out")
        data = runs["vision"].trainer.data
        processor = AutoImageProcessor.from_pretrained("out")
        for size in ((32, 32), (64, 64)):
            image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
            expected = to_pixels([center_crop(image, 32)], data.mean, data.std)
            np.testing.assert_allclose(processor(image, return_tensors="np")["pixel_values"], expected, atol=1e-5)
        assert processor(Image.new("L", (50, 90)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)

    def test_speech(self, runs):
        run = runs["audio"]
        export_run(run.folder, "out")
        waves = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in (6000, 4000)]
        batch = AutoFeatureExtractor.from_pretrained("out")(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
        student = run.trainer.core.student
        with torch.no_grad():
            found = AutoModel.from_pretrained("out")(**batch).last_hidden_state
            for wave, states in zip(waves, found, strict=True):
                alone = student(torch.from_numpy(standardize(wave))[None])[0]
                torch.testing.assert_close(states[: len(alone)], alone, rtol=1e-3, atol=1e-3)  # another eps in the norm


def test_the_card_tells_of_the_run(runs):
    run = runs["text"].folder
    probe = {"data": "builtin", "untrained": {"accuracy": 0.0384}, "trained": {"accuracy": 0.1912}}
    (run / "probe.json").write_text(json.dumps(probe))
    export_run(run, "out")
    card = open("out/README.md").read()
    last = [json.loads(line) for line in open(run / "log.jsonl")][-1]
    for part in (
        "library_name: transformers",
        "| data | builtin train |",
        "ffn of the last 2 layers",
        "| steps | 2 of 4 × 1 samples",
        "RobertaModel, 2 layers, 32 wide",
        f"torch {torch.__version__}",
        "AutoTokenizer.from_pretrained",
        "| trained | 0.1912 |",
        f"| 2 | {last['loss']:.4g} | {last['target_std']:.4g} |",
        "block_size: 16",
    ):
        assert part in card
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.to_dict()["tags"] == ["data2vec", "d2v-fast"]


def test_a_log_that_a_killed_run_left(runs, tmp_path):
    shutil.copytree(runs["text"].folder, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": null, "lr": 0.5}\n{"step": 4, "lo')
    export_run(tmp_path / "run", "out")
    card = open("out/README.md").read()
    assert "| steps | 3 of 4" in card and "| 3 |  |" in card


def test_the_snippets_of_data2vec_pytorch(runs, monkeypatch):
    """What its README does with a model: assign it into a classifier, and load the encoder of a checkpoint."""
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    run = runs["text"]
    export_run(run.folder, "out", "data2vec-pytorch")
    roberta = RobertaModel.from_pretrained("out")
    classifier = RobertaForSequenceClassification(roberta.config)
    classifier.roberta = roberta
    checkpoint = torch.load("out/data2vec.pt")
    loaded = RobertaModel(RobertaConfig.from_pretrained("out"))
    loaded.load_state_dict(checkpoint["encoder"])
    with torch.no_grad():
        for model in (classifier.eval().roberta, loaded.eval()):
            torch.testing.assert_close(model(run.inputs).last_hidden_state, run.student, rtol=0, atol=1e-6)


class TestMessages:
    @pytest.mark.parametrize(
        "args, message",
        [
            (["nowhere", "--to", "out"], "nowhere: has no config.yaml, so it is not the folder of a run"),
            (["{run}", "--to", "."], "--to .: exists already; choose another folder"),
            (["{run}", "--to", "out", "--encoder", "x"], "--encoder: goes with --from"),
            (["{run}", "--to", "out", "--from", "fairseq", "--teacher"], "--teacher: is for runs of d2v-train"),
            (["nowhere.pt", "--to", "out", "--from", "fairseq"], "nowhere.pt: no such file"),
        ],
    )
    def test_are_one_line(self, args, message, runs, monkeypatch):
        open("something", "w").close()
        found = export(monkeypatch, *(arg.format(run=runs["vision"].folder) for arg in args))
        assert found.startswith(f"d2v-export: {message}") and len(found.splitlines()) == 1

    def test_no_teacher_without_a_checkpoint(self, runs, tmp_path):
        (tmp_path / "run").mkdir()
        for part in ("config.yaml", "export"):
            (tmp_path / "run" / part).symlink_to(runs["text"].folder / part)
        with pytest.raises(ConfigError, match="has no checkpoint, and only checkpoints hold the teacher"):
            export_run("run", "out", teacher=True)

    def test_an_encoder_of_your_own_has_no_class(self, runs, tmp_path):
        (tmp_path / "run" / "export").mkdir(parents=True)
        (tmp_path / "run" / "config.yaml").write_text("modality: text\nencoder:\n  model: my_encoder:Mine\n")
        with pytest.raises(ConfigError, match=r"no class for the encoder my_encoder:Mine.*run/export/model\.safetensors"):
            export_run("run", "out")


def test_the_command_in_a_process_of_its_own(runs):
    command = [sys.executable, "-c", "from d2v_fast.cli import export; export()", runs["vision"].folder, "--to", "out"]
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 'out: AutoModel.from_pretrained("out") computes what the training encoder does, to 0\n'
