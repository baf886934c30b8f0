"""d2v-export: what `AutoModel.from_pretrained` loads, from a run or from a checkpoint of another project (method 6).

What is written is read back and has to compute what the training encoder does.
"""

from __future__ import annotations

import argparse
import inspect
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

import d2v_fast
from d2v_fast import nets, trained
from d2v_fast.checkpoint import sync
from d2v_fast.config import ConfigError, nearest
from d2v_fast.convert import EAT_NORMS, Released, from_data2vec_pytorch, from_fairseq, make_model, named
from d2v_fast.data import first_line, is_local
from d2v_fast.data.audio import feature_extractor
from d2v_fast.data.spectrograms import MEAN as SOUND_MEAN
from d2v_fast.data.spectrograms import STD as SOUND_STD
from d2v_fast.data.spectrograms import spectrogram_extractor
from d2v_fast.data.text import limit_length, load_tokenizer
from d2v_fast.data.vision import MEAN, STD, image_processor
from d2v_fast.encoders import Encoder, PatchEncoder, TokenEncoder, class_arguments, example, off_by, wrap
from d2v_fast.report import read_lines, read_probes
from d2v_fast.train.folder import HEAD, TEACHER
from d2v_fast.trained import Trained, check_utf8

OLDER = "data2vec-pytorch"
TOLERANCE = 1e-6  # of states after a layer norm, in fp32
# Two names of one architecture, with the same keys on disk.
SAME = {"roberta": "data2vec-text", "data2vec-text": "roberta", "beit": "data2vec-vision", "data2vec-vision": "beit"}
WHY_NOT = {
    ("data2vec-audio", "wav2vec2"): "has one positional convolution with weight norm, where data2vec has several without",
    ("wav2vec2", "data2vec-audio"): "has several positional convolutions with layer norms between, where wav2vec 2.0 has one",
    ("bert", "roberta"): "counts positions from the padding index on and not from 0",
    ("vit", "beit"): "has scaled residuals, relative positions and keys without bias",
}
UNFINISHED = ".unfinished"  # folder in the one to write, until all of it is there
PIPELINES = {  # the task of the hub by the class that loads a model; else feature-extraction
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSequenceClassification": "text-classification",
}
PROBED = {  # the task of the hub that a probe stands for
    "vision": "image-classification",
    "audio": "audio-classification",
    "spectrogram": "audio-classification",
    "text": "fill-mask",
}
MEASURES = {"knn": "k-NN accuracy", "linear": "linear accuracy", "accuracy": "linear cloze accuracy", "nats": "cloze in nats"}
LOGGED = ("step", "loss", "target_std", "prediction_std", "feature_std", "lr", "ema_decay")


class Exported:
    """What goes into the folder.

    Args:
        encoder: As it was trained; its states are what the reloaded model has to compute.
        processor: Tokenizer, image processor or feature extractor, where there is one.
        model: With a head around the encoder's model, where it was fine-tuned.
    """

    def __init__(
        self,
        encoder: Encoder,
        processor: Any = None,
        model: PreTrainedModel | None = None,
    ):
        limits = processor is not None and encoder.reads == "text"
        self.encoder, self.processor = encoder.eval(), limit_length(processor, encoder) if limits else processor
        self.model = encoder.model if model is None else model.eval()

    def write(self, folder: Path, as_type: str | None = None) -> float:
        """Model and processor; returns the largest difference between the reloaded model and the encoder.

        Raises:
            ConfigError: The encoder is not of the architecture `as_type`, or its weights are broken.
            OSError: The folder cannot be written.
        """
        import transformers

        inputs = example(self.encoder)
        with torch.inference_mode():
            expected = self.encoder(inputs)
        if not expected.isfinite().all():
            raise ConfigError(
                "the encoder's states are not finite: its weights are broken; log.jsonl of the run tells since when"
            )
        model = self.model
        if as_type not in (None, model.config.model_type):
            model = retype(model, as_type)
        with writing(folder):
            nets.save(model, folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
        again = getattr(transformers, auto_class(model)).from_pretrained(folder)
        headed = type(again) is not type(self.encoder.model)  # models of timm call what they wrap their base
        difference = off_by(expected, again.base_model if headed else again, inputs)
        if headed:
            with torch.inference_mode():
                difference = max(difference, float((again(inputs)[0] - model(inputs)[0]).abs().max()))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{folder}: {type(model).__name__} computes other states than the training encoder, off by {difference:.1e}; "
                "do not use it, and please report this"
            )
        return difference


def auto_class(model: PreTrainedModel) -> str:
    """Name of the class of transformers that loads a model of this kind by its folder."""
    speech = model.main_input_name == "input_values"
    heads = {
        "ForCTC": "AutoModelForCTC",
        "ForImageClassification": "AutoModelForImageClassification",
        "ForSequenceClassification": f"AutoModelFor{'Audio' if speech else 'Sequence'}Classification",
    }
    return next((name for head, name in heads.items() if type(model).__name__.endswith(head)), "AutoModel")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise OSError for whatever a library raises when the disk is full or read-only."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch each have their own
        raise OSError(f"{folder}: cannot be written: {first_line(error)}") from error


@contextmanager
def whole(to: Path) -> Iterator[Path]:
    """A folder to write in, whose files are moved to `to` at the end; an error leaves nothing behind.

    It lies inside of `to`, so that both are on one disk. What a killed process left there is replaced.

    Raises:
        ConfigError: `to` is in use or cannot be made.
    """
    beside, made = to / UNFINISHED, not to.exists()
    check_utf8(to)
    try:
        if not made and (not to.is_dir() or (any(to.iterdir()) and not beside.is_dir())):
            raise ConfigError(f"--to {to}: exists already; choose another folder")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--to {to}: cannot be written, choose another folder: {error}") from error
    try:
        yield beside
        for file in sorted(beside.iterdir()):
            sync(file)
            os.replace(file, to / file.name)
        beside.rmdir()
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if made:
            with suppress(OSError):
                to.rmdir()
        raise


def retype(model: Any, as_type: str) -> Any:
    """The same weights in another class of the same architecture.

    Raises:
        ConfigError: The architectures differ; the message says where.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    found = model.config.model_type
    if SAME.get(found) != as_type:
        if as_type not in CONFIG_MAPPING:
            raise ConfigError(f"--as {as_type}: not a model type of transformers{nearest(as_type, CONFIG_MAPPING.keys())}")
        why = WHY_NOT.get((found, as_type), "is another architecture")
        also = f" or {SAME[found]}" if found in SAME else ""
        raise ConfigError(f"--as {as_type}: the encoder is {found}, but {as_type} {why}; exact is only {found}{also}")
    ours, theirs = model.config.to_dict(), CONFIG_MAPPING[as_type]().to_dict()
    backbone = {"model_type", "architectures", "transformers_version", "out_indices", "out_features", "stage_names"}
    fields = {name: ours[name] for name in theirs.keys() & ours.keys() - backbone}
    return make_model(AutoConfig.for_model(as_type, **fields), saved_state(model), found)


def saved_state(model: Any) -> dict[str, Tensor]:
    """The weights under the names that `save_pretrained` writes, which may differ from those of the modules."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        with writing(Path(folder)):
            model.save_pretrained(folder, max_shard_size="1TB")
        return load_file(Path(folder) / "model.safetensors")


def open_run(run: Path, checkpoint: str | None = None, teacher: bool = False) -> tuple[Trained, Exported]:
    """What a run has trained, and what of it goes into the folder.

    Raises:
        ConfigError: Not a run that has trained something, or an encoder that transformers has no class for.
        CheckpointError: The checkpoint asked for is damaged.
    """
    config = trained.read_config(run)
    if ":" in (config.encoder.model or ""):
        raise ConfigError(
            f"{run}: transformers has no class for the encoder {config.encoder.model}, so AutoModel cannot load it; a run that "
            f"ends or is resumed leaves its weights in {run / 'export' / 'model.safetensors'}, for safetensors.torch.load_model"
        )
    found = trained.load(config, run, checkpoint, teacher)
    data = found.config.data
    if config.own_data:
        return found, Exported(found.encoder)
    if config.modality == "text":
        return found, Exported(found.encoder, found.tokenizer)
    if config.modality == "vision":
        return found, Exported(found.encoder, image_processor(data["image_size"], data["mean"], data["std"]))
    if config.modality == "spectrogram":
        sizes = [data[key] for key in ("target_length", "mel_bins", "mean", "std")]
        return found, Exported(found.encoder, spectrogram_extractor(*sizes))
    return found, Exported(found.encoder, feature_extractor(found.encoder, data["sample_rate"], data["normalize"]))


def public(value: Any) -> Any:
    """Settings without what they tell of this machine: of paths, the last part."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def on_hub(name: str | None) -> str | None:
    """`name`, if it may be one of the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name in (None, "builtin") or is_local(name):
        return None
    with suppress(HFValidationError):
        validate_repo_id(name)
        return name


def model_card(
    model: PreTrainedModel, title: str, facts: dict[str, Any], folder: Path, name: str, sections: list[str], **metadata: Any
) -> str:
    """README.md of an exported model, in the format of the Hugging Face hub.

    Args:
        model: What was exported.
        title: Headline.
        facts: Rows of the first table.
        folder: Where the model lies now.
        name: What `from_pretrained` will find it by.
        sections: Further ones, as Markdown.
        metadata: What `huggingface_hub.ModelCardData` takes; what is None is left out.
    """
    from huggingface_hub import ModelCardData
    from transformers import AutoConfig
    from transformers import __version__ as transformers_version

    config, loader = AutoConfig.from_pretrained(folder), auto_class(model)
    facts |= {
        "architecture": f"{config.architectures[0]}, {config.num_hidden_layers} layers, {config.hidden_size} wide",
        "exported with": f"d2v-fast {d2v_fast.__version__}, torch {torch.__version__}, transformers {transformers_version}, "
        f"Python {platform.python_version()}",
    }
    if getattr(config, "is_causal", True) is False:
        facts["attention"] = "bidirectional: is_causal is false in its config, and transformers follows it"
    rows = "\n".join(
        f"| {fact} | {' '.join(str(value).split()).replace('|', chr(92) + '|')} |" for fact, value in facts.items()
    )
    arguments = {} if loader != "AutoModel" else class_arguments(type(model))
    if (folder / Path(inspect.getfile(type(model))).name).exists():
        arguments["trust_remote_code"] = True  # the file is beside; not needed after an import from d2v_fast
    arguments = "".join(f", {argument}={value}" for argument, value in arguments.items())
    use = f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("{name}"{arguments})'
    for file, processor in (("tokenizer.json", "AutoTokenizer"), ("preprocessor_config.json", "AutoImageProcessor")):
        if (folder / file).exists():
            audio = "feature_extractor_type" in (folder / file).read_text(encoding="utf-8")
            processor = "AutoFeatureExtractor" if audio else processor
            use = use.replace(f"{loader}\n", f"{loader}, {processor}\n", 1)
            use += f'\nprocessor = {processor}.from_pretrained("{name}")'
    task = PIPELINES.get(loader, f"{'image-' * (model.main_input_name == 'pixel_values')}feature-extraction")
    head = ModelCardData(
        library_name="transformers", tags=["data2vec", "d2v-fast"], **{"pipeline_tag": task} | metadata
    ).to_yaml()
    body = [f"# {title}", f"| | |\n|---|---|\n{rows}", f"```python\n{use}\n```", *sections]
    return f"---\n{head}\n---\n" + "\n\n".join(body) + "\n"


def run_sections(run: Path, found: Trained) -> tuple[dict[str, Any], list[str]]:
    """What the files of a run say of these weights: facts for the table, and sections on probe, log and settings.

    Raises:
        ConfigError: probe.json is damaged.
    """
    config, step = found.config, found.step
    records = [line for line in read_lines(run / "log.jsonl") if step is None or line["step"] <= step]
    last = step or (records[-1]["step"] if records else "unknown")
    data, train, targets, whole = public(config.data), config.train, config.targets, trained.whole_of(run)
    start = f", from {public(config.encoder.pretrained)}" if config.encoder.pretrained else ""
    mask, version = type(config.mask).__name__, ""
    if config.head.kind == "conv":
        mask, version = f"{mask} in {data['views']} views, decoder of {config.head.layers} convolutions", " 2.0"
    facts = {
        "data": " ".join(str(data[key]) for key in ("class", "path", "name", "split") if data.get(key)),
        "recipe": f"data2vec{version} on {config.modality}{start}: {targets.source} of the last {targets.top_k} layers, "
        f"norm {targets.norm}, mask {mask}, {train.precision}",
        "steps": f"{last} of {train.batch_size} × {train.accumulate} samples a process",
    }
    if whole:
        others = sorted(file.parent.name for file in whole.glob("*/log.jsonl") if file.parent.name != run.resolve().name)
        facts["steps"] += ", of all modalities together"
        facts["blocks"] = f"an experiment: trained together with those of {' and '.join(others)}, as the same weights"
    sections = []
    for probe in read_probes(run / "probe.json"):
        if probe["step"] == step:
            on = " ".join(filter(None, (public(probe["data"]), probe["name"])))
            sections.append(
                f"## Probe of the frozen student\n\nOn {on}, at most {probe['limit']} samples, by `d2v-probe`.\n\n"
                + _table(probe["results"])
            )
    if records:
        shown = [records[round(i * (len(records) - 1) / 9)] for i in range(10)] if len(records) > 10 else records
        table = {str(i): {name: record[name] for name in LOGGED if name in record} for i, record in enumerate(shown)}
        sections.append("## Log\n\nThe loss says little about what was learned; the std of targets and predictions tells a "
                        "collapse.\n\n" + _table(table, labels=False))  # fmt: skip
    settings = yaml.safe_dump(public(yaml.safe_load(config.yaml)), sort_keys=False, allow_unicode=True)
    sections.append(f"## Settings\n\n```yaml\n{settings.strip()}\n```")
    return facts, sections


def eval_results(run: Path, found: Trained) -> list[Any]:
    """What d2v-probe found of these weights, as `huggingface_hub.EvalResult`, for the head of the model card."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=PROBED.get(found.config.modality, "feature-extraction"),
            dataset_type=on_hub(probe["data"]) or public(probe["data"]),
            dataset_name=" ".join(filter(None, (public(probe["data"]), probe["name"]))),
            dataset_config=probe["name"],
            dataset_split="test",
            metric_type="cross_entropy" if measure == "nats" else "accuracy",
            metric_name=f"{MEASURES.get(measure, measure)}, frozen",
            metric_value=round(value, 4),
        )
        for probe in read_probes(run / "probe.json")
        if probe["step"] == found.step
        for measure, value in probe["results"].get("trained", {}).items()
    ]


def _table(rows: dict[str, dict[str, float]], labels: bool = True) -> str:
    """Markdown."""
    columns = list(next(iter(rows.values())))
    lines = [[*([""] if labels else []), *columns]]
    for label, row in rows.items():
        lines.append(
            [*([label] if labels else []), *(f"{row[c]:.4g}" if isinstance(row.get(c), int | float) else "" for c in columns)]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def export_run(
    run: str | Path,
    to: str | Path,
    as_type: str | None = None,
    teacher: bool = False,
    checkpoint: str | None = None,
    hub: str | None = None,
    **metadata: Any,
) -> float:
    """Export a run; returns the largest difference between the reloaded model and the training encoder.

    Args:
        run: Folder of `d2v-train`, whose newest weights are taken.
        to: Folder to write: model, tokenizer or processor, and a model card made from the run.
        as_type: Model type of transformers, where the encoder's architecture has two names; "data2vec-pytorch" adds
            data2vec.pt, whose `encoder` is the state dict that scripts for that project load.
        teacher: Take the teacher instead of the student.
        checkpoint: Take these weights instead, such as step-1000.
        hub: Where the folder will be on the hub, for the model card.
        metadata: For the head of the model card: `license`, `language` and more of `huggingface_hub.ModelCardData`.

    Raises:
        ConfigError: Nothing trained, or an encoder that cannot be exported exactly; the message says why.
        OSError: The folder cannot be written; it is left as it was.
    """
    run, to = Path(run), Path(to)
    found, exported = open_run(run, checkpoint, teacher)
    facts, sections = run_sections(run, found)
    data, old = found.config.data, as_type == OLDER
    known = {"base_model": on_hub(found.config.encoder.pretrained), "datasets": on_hub(data.get("path"))}
    if not teacher and (results := eval_results(run, found)):
        known |= {"eval_results": results, "model_name": hub or to.resolve().name}
    if found.config.own_data or found.config.modality == "spectrogram":  # which the input of image models does not tell
        known["pipeline_tag"] = "feature-extraction"
    elif found.config.modality == "text" and data["path"] == "builtin":
        known["language"] = "en"
    with whole(to) as folder:
        difference = exported.write(folder, None if old else as_type)
        facts["weights"] = (
            f"{'teacher' if teacher else 'student'}; reloaded, its states differ by {difference:.1g} from those in training"
        )
        title = f"data2vec {found.config.modality}: {run.resolve().name}"
        metadata = known | {k: v for k, v in metadata.items() if v}
        card = model_card(exported.model, title, facts, folder, hub or to.resolve().name, sections, **metadata)
        with writing(to):
            if old:
                from transformers import AutoModel

                # With the pooler that is there, and untrained, in that project too.
                torch.save({"encoder": AutoModel.from_pretrained(folder).state_dict()}, folder / "data2vec.pt")
            (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return difference


def import_checkpoint(
    file: str | Path,
    to: str | Path,
    source: str,
    as_type: str | None = None,
    encoder: str | None = None,
    tokenizer: str | None = None,
    hub: str | None = None,
    **metadata: Any,
) -> float:
    """Export a checkpoint of another project; returns the largest difference after reloading.

    Args:
        file: The checkpoint.
        to: Folder to write.
        source: "fairseq", also for the vision code of the paper, "eat", or "data2vec-pytorch". Head or decoder and the
            teacher, where they are in it, are put beside the encoder, from where `d2v-train encoder.pretrained=…` takes them.
        as_type: Model type of transformers, where the architecture has two names.
        encoder: For data2vec-pytorch: model.encoder_checkpoint of its YAML file.
        tokenizer: Tokenizer to put beside a text model, a name or folder.
        hub: Where the folder will be on the hub, for the model card.
        metadata: For the head of the model card, as in `export_run`.

    Raises:
        ValueError: Not such a checkpoint, or none that a class of transformers computes exactly.
    """
    from safetensors.torch import save_file

    file, to = str(file), Path(to)
    if not os.path.isfile(file):
        raise ConfigError(f"{file}: no such file")
    if source in ("fairseq", "eat"):
        released = from_fairseq(file, source == "eat")
    elif encoder is None:
        raise ConfigError(f"--from {OLDER}: needs --encoder, the model.encoder_checkpoint of the run's YAML file")
    else:
        model, head = from_data2vec_pytorch(file, encoder)
        released = Released(model, {}, decoder=head)
    model, settings = released.model, released.settings
    with named(file, "its settings make no model"):
        loaded = wrap(model.base_model)
    if isinstance(loaded, TokenEncoder):
        exported = Exported(loaded, tokenizer and load_tokenizer(tokenizer), model)
        if tokenizer and len(exported.processor) > model.config.vocab_size:
            raise ConfigError(
                f"--tokenizer {tokenizer}: its {len(exported.processor)} tokens exceed the model's {model.config.vocab_size}"
            )
    elif source == "eat":
        norm = next((EAT_NORMS[name] for name in EAT_NORMS if settings.get(name)), (SOUND_MEAN, SOUND_STD))
        exported = Exported(loaded, spectrogram_extractor(*model.config.image_size, *norm), model)
        metadata["pipeline_tag"] = "feature-extraction" if model is model.base_model else "audio-classification"
    elif isinstance(loaded, PatchEncoder):
        inception = settings.get("imagenet_default_mean_and_std", True) is False
        mean, std = ((0.5,) * 3, (0.5,) * 3) if inception else (MEAN, STD)
        exported = Exported(loaded, image_processor(loaded._image_size()[0], mean, std), model)
    else:
        normalize = settings.get("task.normalize", settings.get("normalize", True))
        exported = Exported(loaded, feature_extractor(loaded, 16_000, normalize), model)
    facts = {
        "data": public(settings.get("task.data", settings.get("data_path", "unknown"))),
        "checkpoint": f"{Path(file).name} of {source}",
    }
    with whole(to) as folder:
        difference = exported.write(folder, as_type)
        if released.licence and not metadata.get("license"):
            metadata["license"] = released.licence
            facts["licence"] = f"{released.licence}, of the weights that the authors released; for others: d2v-export --license"
        title = f"data2vec: {Path(file).stem}"
        card = model_card(exported.model, title, facts, folder, hub or to.resolve().name, [], **metadata)
        with writing(to):
            if released.decoder:
                told = released.decoder_settings or {}
                save_file(released.decoder, folder / HEAD, {name: str(value) for name, value in told.items()})
            if released.teacher:
                save_file(released.teacher, folder / TEACHER)
            (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return difference


class Hub:
    """A place on the Hugging Face hub that a folder will be put to.

    Args:
        name: NAME, of the user whose token it is, or OWNER/NAME.

    Raises:
        ConfigError: No name of the hub, no token, or one that the hub does not take.
    """

    def __init__(self, name: str):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        self.asked = f"--push-to-hub {name}"
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(f"{self.asked}: expected NAME or OWNER/NAME: {first_line(error)}") from error
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"{self.asked}: HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out")
        if not get_token():
            raise ConfigError(
                f"{self.asked}: found no token; `hf auth login`, or HF_TOKEN=…, with one that may write, or leave "
                "--push-to-hub out and only the folder is written"
            )
        self.api = HfApi()
        try:
            user = self.api.whoami()["name"]
        except Exception as error:  # of HTTP, of the network, of the token
            raise ConfigError(f"{self.asked}: the hub does not take the token: {first_line(error)}; `hf auth login`") from error
        self.name = name if "/" in name else f"{user}/{name}"

    def push(self, folder: str, private: bool) -> str:
        """Make the repository if it is not there, and put the folder into it; returns its address.

        Raises:
            ConfigError: The hub refused or could not be reached; the folder is as it was.
        """
        try:
            self.api.create_repo(self.name, private=private, exist_ok=True)
            self.api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=f"d2v-fast {d2v_fast.__version__}")
        except Exception as error:
            raise ConfigError(
                f"{self.asked}: {first_line(error)}; {folder} is whole, `hf upload {self.name} {folder}` tries again"
            ) from error
        return f"{self.api.endpoint}/{self.name}"


def main(args: list[str]) -> None:
    """The command d2v-export."""
    from transformers.utils import logging

    # What it says of poolers that are not there, and of torchvision, changes nothing here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        prog="d2v-export",
        usage="d2v-export RUN --to DIR [options]\n"
        "       d2v-export --from fairseq|eat|data2vec-pytorch CHECKPOINT --to DIR [options]",
        description="Write what AutoModel.from_pretrained loads: weights, tokenizer or processor, and a model card. "
        "The result is read back and compared with the training encoder.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run of d2v-train, or the checkpoint of another project")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--as",
        dest="as_type",
        metavar="TYPE",
        help="model type, where an architecture has two: "
        + ", ".join(f"{a} = {b}" for a, b in list(SAME.items())[::2])
        + f"; {OLDER} adds data2vec.pt for scripts that load its 'encoder'",
    )
    parser.add_argument("--teacher", action="store_true", help="the teacher instead of the student")
    parser.add_argument(
        "--checkpoint", metavar="step-N", help="weights of this checkpoint; default: the newest that are intact"
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=["fairseq", "eat", OLDER],
        help="project that wrote the checkpoint; fairseq includes the vision code of the paper",
    )
    parser.add_argument("--encoder", metavar="NAME", help="with data2vec-pytorch: model.encoder_checkpoint of its YAML file")
    parser.add_argument("--tokenizer", metavar="NAME", help="with --from: tokenizer to put beside a text model, name or folder")
    parser.add_argument("--license", metavar="ID", help="for the head of the model card, such as apache-2.0")
    parser.add_argument("--language", metavar="CODE", nargs="+", help="for the same, such as en")
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="put the folder on the Hugging Face hub too, as NAME or OWNER/NAME; needs a token that may write (hf auth login)",
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a repository that it makes is private")
    options = parser.parse_args(args)
    metadata = {"license": options.license, "language": options.language}
    if options.private and not options.push_to_hub:
        raise ConfigError("--private: goes with --push-to-hub")
    hub = Hub(options.push_to_hub) if options.push_to_hub else None
    metadata["hub"] = hub and hub.name
    run, to = os.path.expanduser(options.run), os.path.expanduser(options.to)
    if options.source is None:
        for name in ("encoder", "tokenizer"):
            if getattr(options, name):
                raise ConfigError(f"--{name}: goes with --from; a run of d2v-train has its own")
        difference = export_run(run, to, options.as_type, options.teacher, options.checkpoint, **metadata)
        print(f'{to}: AutoModel.from_pretrained("{to}") computes what the training encoder does, to {difference:.1g}')
    elif options.teacher:
        raise ConfigError("--teacher: is for runs of d2v-train; from other projects the student is taken, as they fine-tune it")
    elif options.checkpoint:
        raise ConfigError("--checkpoint: is for runs of d2v-train; of other projects name the file itself")
    else:
        import_checkpoint(run, to, options.source, options.as_type, options.encoder, options.tokenizer, **metadata)
        print(f'{to}: AutoModel.from_pretrained("{to}") has the weights of {run}')
        if not any(Path(to).glob("tokenizer*")) and not (Path(to) / "preprocessor_config.json").exists():
            print("without tokenizer: --tokenizer NAME puts one beside, for most text models the one of roberta-base")
        if (Path(to) / HEAD).exists():
            last = (
                "" if (Path(to) / TEACHER).exists() else "; the teacher was not saved there and starts as a copy of the student"
            )
            recipe = {OLDER: "ITS.yaml", "eat": "spectrogram/eat-base"}.get(options.source, "MODALITY/v2-SIZE")
            print(f"to train it further: d2v-train --config {recipe} encoder.pretrained={to}{last}")
    if hub:
        print(hub.push(to, options.private))
