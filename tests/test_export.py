"""d2v-export: a model loaded by AutoModel in a fresh process computes the same as the encoder in training."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import is_torchvision_available

from d2v_fast import cli
from d2v_fast.config import ConfigError
from d2v_fast.data.audio import standardize
from d2v_fast.data.vision import center_crop, to_pixels
from d2v_fast.export import Exported, export_run
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from tests.models import IMAGES, TEXTS, WAVES, inputs, make
from tests.test_training import config


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
    """Student and teacher of each modality, with the code in their model cards."""
    expected = {}
    for modality, run in runs.items():
        for role in ("student", "teacher"):
            folder = f"{modality}-{role}"
            assert export(monkeypatch, run.folder, "--to", folder, *(["--teacher"] if role == "teacher" else [])) in (0, None)
            torch.save(run.inputs, f"{folder}/inputs.pt")
            expected[folder] = getattr(run, role)
        assert not torch.equal(run.student, run.teacher)
    output = subprocess.run([sys.executable, "-c", RELOAD, *expected], check=True, capture_output=True, text=True).stderr
    assert "UNEXPECTED" not in output and "MISSING" not in output, output
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
            "weight norm, where data2vec has several without; use data2vec-audio"
        )
        assert "did you mean data2vec-text?" in export(monkeypatch, run, "--to", "out", "--as", "data2vec-tex")
        assert "but bert is another architecture" in export(monkeypatch, run, "--to", "out", "--as", "bert")

    def test_another_result_is_noticed(self, tmp_path):
        """For example, a version of transformers may compute something else."""
        encoder = make("roberta")
        leave = encoder._leave
        encoder._leave = lambda x: leave(x) + 1e-4
        with pytest.raises(RuntimeError, match="and the training encoder differ by"):
            Exported(encoder).write(tmp_path / "out")

    def test_weights_that_are_not_finite_leave_no_folder(self, tmp_path):
        encoder = make("roberta")
        next(encoder.parameters()).data.fill_(float("nan"))
        with pytest.raises(ConfigError, match="states are not finite"):
            Exported(encoder).write(tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestInputs:
    """Tokenizer and processors prepare inputs as in pre-training."""

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
            found = processor(image, return_tensors="np")["pixel_values"]
            levels = np.abs(found - expected) * 255 * np.array(data.std)[:, None, None]
            # transformers resizes with torchvision if it is installed, which rounds a few pixels differently.
            np.testing.assert_allclose(levels, 0, atol=1.001 if is_torchvision_available() and size != (32, 32) else 1e-3)
            assert (levels > 1e-3).mean() < 2e-3
        assert processor(Image.new("L", (50, 90)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)

    def test_speech(self, runs):
        run = runs["audio"]
        export_run(run.folder, "out")
        waves = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in (6000, 4000)]
        batch = AutoFeatureExtractor.from_pretrained("out")(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
        student = run.trainer.state.core.student
        with torch.no_grad():
            found = AutoModel.from_pretrained("out")(**batch).last_hidden_state
            for wave, states in zip(waves, found, strict=True):
                alone = student(torch.from_numpy(standardize(wave))[None])[0]
                torch.testing.assert_close(states[: len(alone)], alone, rtol=1e-3, atol=1e-3)  # another eps in the norm


def test_the_card_describes_the_run(runs):
    run = runs["text"].folder
    key = {"data": "/home/me/corpus", "name": None, "limit": 500}
    scores = [{"untrained": {"accuracy": 0.0384}, "trained": {"accuracy": accuracy}} for accuracy in (0.1912, 0.7777)]
    probes = [{**key, "step": step, "results": results} for step, results in zip((2, 1), scores, strict=True)]
    (run / "probe.json").write_text(json.dumps(probes))
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
        "On corpus, at most 500 samples",
    ):
        assert part in card
    assert "0.7777" not in card, "a probe of other weights"
    (run / "probe.json").unlink()


class TestForTheHub:
    """The card's metadata is valid for the hub, and nothing reveals this machine."""

    def head(self, folder="out"):
        from huggingface_hub import ModelCard

        return ModelCard(Path(folder, "README.md").read_text()).data.to_dict()

    @pytest.mark.parametrize(
        "modality, more",
        [
            ("text", {"pipeline_tag": "feature-extraction", "language": "en"}),
            ("vision", {"pipeline_tag": "image-feature-extraction"}),
            ("audio", {"pipeline_tag": "feature-extraction"}),
        ],
    )
    def test_what_is_known_and_no_more(self, modality, more, runs):
        export_run(runs[modality].folder, "out")
        assert self.head() == {"library_name": "transformers", "tags": ["data2vec", "d2v-fast"], **more}

    def test_what_a_probe_found(self, runs):
        run = runs["vision"].folder
        key = {"data": "cifar10", "name": None, "limit": 500}
        scores = {"untrained": {"knn": 0.25, "linear": 0.375}, "trained": {"knn": 0.5, "linear": 0.625}}
        (run / "probe.json").write_text(json.dumps([{**key, "step": step, "results": scores} for step in (1, 2)]))
        try:
            export_run(run, "out")
            export_run(run, "teacher", teacher=True)
        finally:
            (run / "probe.json").unlink()
        (model,) = self.head()["model-index"]
        assert model["name"] == "out"
        (result,) = model["results"]  # only for step 2, without the untrained encoder
        assert result["task"] == {"type": "image-classification"}
        assert result["dataset"] == {"name": "cifar10", "type": "cifar10", "split": "test"}
        assert [(each["type"], each["value"], each["name"]) for each in result["metrics"]] == [
            ("accuracy", 0.5, "k-NN accuracy, frozen"),
            ("accuracy", 0.625, "linear accuracy, frozen"),
        ]
        assert "model-index" not in self.head("teacher")  # the teacher was not probed

    def test_what_the_user_says(self, runs, monkeypatch):
        assert not export(monkeypatch, runs["vision"].folder, "--to", "out", "--license", "mit", "--language", "de", "en")
        assert (self.head()["license"], self.head()["language"]) == ("mit", ["de", "en"])

    def test_data_and_model_of_the_hub(self, runs, tmp_path):
        run = self.changed(
            runs["text"].folder, tmp_path, {"data.path": "Salesforce/wikitext", "encoder.pretrained": "me/my-bert"}
        )
        export_run(run, "out")
        assert (self.head()["datasets"], self.head()["base_model"]) == ("Salesforce/wikitext", "me/my-bert")

    def test_nothing_of_this_machine(self, runs, tmp_path):
        places = {"data.path": "/home/me/corpus", "encoder.pretrained": "~/models/bert", "data.tokenizer": "./secret/tokens"}
        run = self.changed(runs["text"].folder, tmp_path, places)
        (tmp_path / "place").mkdir()
        export_run(run, tmp_path / "place" / "out")
        for file in (tmp_path / "place" / "out").iterdir():
            content = file.read_bytes().decode(errors="replace")
            assert not [part for part in ("/home", "~/models", "secret", str(tmp_path)) if part in content], file
        card = (tmp_path / "place" / "out" / "README.md").read_text()
        assert "path: corpus" in card and 'from_pretrained("out"' in card
        assert not {"datasets", "base_model"} & self.head(tmp_path / "place" / "out").keys()

    def changed(self, folder, tmp_path, settings):
        """A copy of a run with other settings, which need not fit its weights."""
        shutil.copytree(folder, tmp_path / "run")
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        for key, value in settings.items():
            section, name = key.split(".")
            config[section][name] = value
            if key == "encoder.pretrained":
                config[section] |= {"model": None, "config": {}}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
        return tmp_path / "run"


class TestPushToHub:
    """With a stand-in for the hub's API."""

    @pytest.fixture
    def hub(self, monkeypatch):
        calls = []

        class Api:
            endpoint = "hub:"

            def whoami(self):
                return {"name": "me"}

            def create_repo(self, name, **more):
                calls.append(("create", name, more))

            def upload_folder(self, **more):
                calls.append(("upload", sorted(file.name for file in Path(more["folder_path"]).iterdir()), more["repo_id"]))

        monkeypatch.setattr("huggingface_hub.HfApi", Api)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        return Api, calls

    @pytest.mark.parametrize("name, private", [("mine", False), ("lab/mine", True)])
    def test_what_is_put_there(self, name, private, hub, runs, monkeypatch, capsys):
        run = runs["vision"].folder
        assert not export(monkeypatch, run, "--to", "out", "--push-to-hub", name, *["--private"] * private)
        place = name if "/" in name else f"me/{name}"
        files = sorted(file.name for file in Path("out").iterdir())
        assert {"README.md", "config.json", "model.safetensors"} <= set(files)
        assert hub[1] == [("create", place, {"private": private, "exist_ok": True}), ("upload", files, place)]
        assert f'from_pretrained("{place}"' in Path("out/README.md").read_text()
        assert capsys.readouterr().out.splitlines()[-1] == f"hub:/{place}"

    def test_refused_before_anything(self, hub, runs, monkeypatch):
        def refused(*more, name="mine"):
            message = export(monkeypatch, runs["vision"].folder, "--to", "out", "--push-to-hub", name, *more)
            assert not Path("out").exists() and not hub[1]
            return message

        assert "--push-to-hub a/b/c: expected NAME or OWNER/NAME" in refused(name="a/b/c")
        with monkeypatch.context() as patch:
            patch.setattr(hub[0], "whoami", lambda self: [][0])
            assert "--push-to-hub mine: login to the hub failed: list index" in refused()
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            assert "HF_HUB_OFFLINE is set" in refused()
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        assert "--push-to-hub mine: no token found; run `hf auth login` or set HF_TOKEN=…" in refused()
        message = export(monkeypatch, runs["vision"].folder, "--to", "out", "--private")
        assert "--private: is only valid with --push-to-hub" in message

    def test_a_hub_that_fails_leaves_the_folder(self, hub, runs, monkeypatch):
        def fail(self, **more):
            raise OSError("403 Forbidden")

        monkeypatch.setattr(hub[0], "upload_folder", fail)
        message = export(monkeypatch, runs["vision"].folder, "--to", "out", "--push-to-hub", "mine")
        assert "403 Forbidden; out is complete, retry with `hf upload me/mine out`" in message
        assert Path("out/model.safetensors").exists()


def test_a_log_that_a_killed_run_left(runs, tmp_path):
    shutil.copytree(runs["text"].folder, tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    with open(tmp_path / "run" / "log.jsonl", "w") as log:
        log.write(lines[0] + '\n{"step": 2, "loss": null, "lr": 0.5}\n{"step": 3, "loss": 7777}\n{"step": 4, "lo')
    export_run(tmp_path / "run", "out")
    card = open("out/README.md").read()
    assert "| steps | 2 of 4" in card and "| 2 |  |" in card and "7777" not in card, "steps after these weights"


def test_the_snippets_of_data2vec_pytorch(runs, monkeypatch):
    """As in its README: assign the model to a classifier, and load the encoder of a checkpoint."""
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
            (["{run}", "--to", "."], "--to .: already exists; choose another folder"),
            (["{run}", "--to", "out", "--encoder", "x"], "--encoder: is only valid with --from"),
            (["{run}", "--to", "out", "--from", "fairseq", "--teacher"], "--teacher: is for runs of d2v-train"),
            (["{run}", "--to", "out", "--from", "fairseq", "--checkpoint", "step-2"], "--checkpoint: is for runs of d2v-train"),
            (
                ["{run}", "--to", "out", "--checkpoint", "step-5"],
                "--checkpoint step-5: not in {run}/checkpoints; available: step-2",
            ),
            (["{run}", "--to", "something"], "--to something: already exists; choose another folder"),
            (["{run}", "--to", "something/out"], "--to something/out: cannot be written, choose another folder: [Errno 20]"),
            (["nowhere.pt", "--to", "out", "--from", "fairseq"], "nowhere.pt: no such file"),
        ],
    )
    def test_are_one_line(self, args, message, runs, monkeypatch):
        open("something", "w").close()
        run = runs["vision"].folder
        found = export(monkeypatch, *(arg.format(run=run) for arg in args))
        assert found.startswith(f"d2v-export: {message.format(run=run)}") and len(found.splitlines()) == 1

    def test_no_teacher_without_a_checkpoint(self, runs, tmp_path):
        (tmp_path / "run").mkdir()
        for part in ("config.yaml", "export"):
            (tmp_path / "run" / part).symlink_to(runs["text"].folder / part)
        with pytest.raises(ConfigError, match="--teacher: only checkpoints hold the teacher, and run: it has no checkpoint"):
            export_run("run", "out", teacher=True)

    def test_a_custom_encoder_has_no_transformers_class(self, runs, tmp_path):
        (tmp_path / "run" / "export").mkdir(parents=True)
        (tmp_path / "run" / "config.yaml").write_text("modality: text\nencoder:\n  model: my_encoder:Mine\n")
        with pytest.raises(ConfigError, match=r"no class for the encoder my_encoder:Mine.*run/export/model\.safetensors"):
            export_run("run", "out")


class TestWeights:
    def test_of_a_run_that_was_killed(self, runs, tmp_path):
        """Without export/, the files are the same."""
        for modality, run in runs.items():
            shutil.copytree(run.folder, tmp_path / modality, ignore=shutil.ignore_patterns("export"))
            for folder, out in ((run.folder, "from-export"), (tmp_path / modality, "from-checkpoint")):
                export_run(folder, f"{modality}-{out}")
            for file in Path(f"{modality}-from-export").iterdir():
                other = Path(f"{modality}-from-checkpoint", file.name)
                assert file.read_text(errors="replace").replace("from-export", "from-checkpoint") == other.read_text(
                    errors="replace"
                )

    def test_of_a_checkpoint_that_is_named(self, tmp_path):
        trainer = build(config("vision", tmp_path / "run", "train.save_every=2"))
        loop(trainer)
        for role in ("student", "teacher"):
            file = tmp_path / "run" / "checkpoints" / "step-2" / f"{role}.safetensors"
            export_run("run", role, teacher=role == "teacher", checkpoint="step-2")
            name, = [name for name in load_file(file) if name.endswith("cls_token")]  # fmt: skip
            assert torch.equal(AutoModel.from_pretrained(role).embeddings.cls_token, load_file(file)[name])
            assert "| steps | 2 of" in Path(role, "README.md").read_text()


class TestWhole:
    """A folder is written completely or not at all."""

    def test_what_a_killed_process_left_is_replaced(self, runs):
        Path("out/.unfinished").mkdir(parents=True)
        Path("out/.unfinished/model.safetensors").write_text("half")
        Path("out/README.md").write_text("moved already")
        export_run(runs["vision"].folder, "out")
        assert sorted(os.listdir("out")) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
        assert "data2vec vision" in Path("out/README.md").read_text()

    @pytest.mark.parametrize("modality", ["text", "vision"])
    @pytest.mark.parametrize("there", [True, False])
    def test_a_full_disk_leaves_things_as_they_were(self, modality, there, runs, monkeypatch):
        def limited(self, folder, *args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            return write(self, folder, *args)

        if there:
            Path("out").mkdir()
        limits, write = resource.getrlimit(resource.RLIMIT_FSIZE), Exported.write
        monkeypatch.setattr(Exported, "write", limited)
        try:
            message = export(monkeypatch, runs[modality].folder, "--to", "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert message.startswith("d2v-export: out/.unfinished: cannot be written: ") and "\n" not in message
        assert os.path.exists("out") == there and (not there or os.listdir("out") == [])

    def test_in_an_empty_folder_that_is_there(self, runs):
        Path("out").mkdir()
        os.chdir("out")
        export_run(runs["vision"].folder, ".")
        assert os.path.exists("config.json") and 'from_pretrained("out"' in Path("README.md").read_text()

    def test_names_that_are_not_utf8(self, runs):
        """Neither safetensors nor tokenizers support them."""
        name = os.fsdecode(b"caf\xe9")
        os.symlink(runs["vision"].folder, name)
        for run, to in ((runs["vision"].folder, f"{name}-out"), (name, "out")):
            with pytest.raises(ConfigError, match=r"^'caf\\udce9\S*: is not UTF-8, .*; rename or link it$"):
                export_run(run, to)
        assert os.listdir() == [name]

    def test_other_files_are_not_touched(self, runs):
        Path("out").mkdir()
        Path("out/mine").touch()
        with pytest.raises(ConfigError, match="--to out: already exists"):
            export_run(runs["vision"].folder, "out")
        assert os.listdir("out") == ["mine"]


def test_the_command_in_a_separate_process(runs):
    command = [sys.executable, "-c", "from d2v_fast.cli import export; export()", runs["vision"].folder, "--to", "out"]
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    run = runs["vision"].folder
    assert (done.returncode, done.stderr) == (0, f"student of step 2, from {run}/export\n")
    assert done.stdout == 'out: AutoModel.from_pretrained("out") matches the training encoder to 0\n'
