"""d2v-export: turn a run, or a checkpoint of another project, into a folder for `AutoModel.from_pretrained` (method 6).

The written model is reloaded and must compute the same states as the training encoder.
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
from d2v_fast.choices import nearest
from d2v_fast.config import MODALITIES, ConfigError, data_class
from d2v_fast.convert import EAT_NORMS, Released, error_context, from_data2vec_pytorch, from_fairseq, make_model
from d2v_fast.data import first_line, is_local
from d2v_fast.data.audio import feature_extractor
from d2v_fast.data.spectrograms import MEAN as SOUND_MEAN
from d2v_fast.data.spectrograms import STD as SOUND_STD
from d2v_fast.data.spectrograms import spectrogram_extractor
from d2v_fast.data.text import limit_length, load_tokenizer
from d2v_fast.data.vision import MEAN, STD, image_processor
from d2v_fast.encoders import Encoder, PatchEncoder, TokenEncoder, class_arguments, example, off_by, wrap
from d2v_fast.figures import FIGURES
from d2v_fast.files import HEAD, LOG, PROBES, TEACHER
from d2v_fast.report import read_lines, read_probes
from d2v_fast.trained import Trained, check_utf8

OLDER = "data2vec-pytorch"
TOLERANCE = 1e-6  # for layer-normalised states in fp32
# Pairs of model types with the same architecture and the same keys on disk.
SAME = {"roberta": "data2vec-text", "data2vec-text": "roberta", "beit": "data2vec-vision", "data2vec-vision": "beit"}
WHY_NOT = {
    ("data2vec-audio", "wav2vec2"): "has one positional convolution with weight norm, where data2vec has several without",
    ("wav2vec2", "data2vec-audio"): "has several positional convolutions with layer norms between, where wav2vec 2.0 has one",
    ("bert", "roberta"): "counts positions from the padding index, not from 0",
    ("vit", "beit"): "has scaled residuals, relative positions and keys without bias",
}
UNFINISHED = ".unfinished"  # subfolder that holds the files until all are written
PIPELINES = {  # hub task by auto class; otherwise feature-extraction
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForSequenceClassification": "text-classification",
}
MEASURES = {"knn": "k-NN accuracy", "linear": "linear accuracy", "accuracy": "linear cloze accuracy", "nats": "cloze in nats"}
LOGGED = ("step", *(name for name, figure in FIGURES.items() if figure.card))


class Exported:
    """The model and processor to write.

    Args:
        encoder: The trained encoder; the reloaded model must reproduce its states.
        processor: Tokenizer, image processor or feature extractor, if any.
        model: The fine-tuned model with its head; default: the encoder's model.
    """

    def __init__(self, encoder: Encoder, processor: Any = None, model: PreTrainedModel | None = None):
        limits = processor is not None and encoder.reads == "text"
        self.encoder, self.processor = encoder.eval(), limit_length(processor, encoder) if limits else processor
        self.model = encoder.model if model is None else model.eval()

    def write(self, folder: Path, as_type: str | None = None) -> float:
        """Write model and processor; return the largest difference between the reloaded model and the encoder.

        Raises:
            ConfigError: The encoder cannot be saved as `as_type`, or its states are not finite.
            OSError: The folder cannot be written.
            RuntimeError: The reloaded model computes different states.
        """
        import transformers

        inputs = example(self.encoder)
        with torch.inference_mode():
            expected = self.encoder(inputs)
        if not expected.isfinite().all():
            raise ConfigError(
                "the encoder's states are not finite: its weights are broken; the run's log.jsonl shows since when"
            )
        model = self.model
        if as_type not in (None, model.config.model_type):
            model = retype(model, as_type)
        with writing(folder):
            nets.save(model, folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
        reloaded = getattr(transformers, auto_class(model)).from_pretrained(folder)
        headed = type(reloaded) is not type(self.encoder.model)  # timm's wrappers have a base_model even without a head
        difference = off_by(expected, reloaded.base_model if headed else reloaded, inputs)
        if headed:
            with torch.inference_mode():
                difference = max(difference, float((reloaded(inputs)[0] - model(inputs)[0]).abs().max()))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{folder}: {type(model).__name__} and the training encoder differ by {difference:.1e}; "
                "do not use it, and please report this"
            )
        return difference


def auto_class(model: PreTrainedModel) -> str:
    """Name of the transformers auto class that loads this kind of model."""
    speech = model.main_input_name == "input_values"
    heads = {
        "ForCTC": "AutoModelForCTC",
        "ForImageClassification": "AutoModelForImageClassification",
        "ForSequenceClassification": f"AutoModelFor{'Audio' if speech else 'Sequence'}Classification",
    }
    return next((name for head, name in heads.items() if type(model).__name__.endswith(head)), "AutoModel")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn any error that a library raises on a full or read-only disk into an OSError."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch each raise their own type
        raise OSError(f"{folder}: cannot be written: {first_line(error)}") from error


@contextmanager
def whole(to: Path) -> Iterator[Path]:
    """Yield a staging folder whose files are moved to `to` at the end; an error leaves nothing behind.

    The folder is inside `to`, so it is on the same disk. Leftovers of a killed process are replaced.

    Raises:
        ConfigError: `to` is in use or cannot be created.
    """
    staging, created = to / UNFINISHED, not to.exists()
    check_utf8(to)
    try:
        if not created and (not to.is_dir() or (any(to.iterdir()) and not staging.is_dir())):
            raise ConfigError(f"--to {to}: already exists; choose another folder")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--to {to}: cannot be written, choose another folder: {error}") from error
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            sync(file)
            os.replace(file, to / file.name)
        staging.rmdir()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if created:
            with suppress(OSError):
                to.rmdir()
        raise


def retype(model: Any, as_type: str) -> Any:
    """The same weights under another model type of the same architecture.

    Raises:
        ConfigError: The architectures differ; the message gives the difference.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    found = model.config.model_type
    if SAME.get(found) != as_type:
        if as_type not in CONFIG_MAPPING:
            raise ConfigError(f"--as {as_type}: not a model type of transformers{nearest(as_type, CONFIG_MAPPING.keys())}")
        why = WHY_NOT.get((found, as_type), "is another architecture")
        also = f" or {SAME[found]}" if found in SAME else ""
        raise ConfigError(f"--as {as_type}: the encoder is {found}, but {as_type} {why}; use {found}{also}")
    ours, theirs = model.config.to_dict(), CONFIG_MAPPING[as_type]().to_dict()
    backbone = {"model_type", "architectures", "transformers_version", "out_indices", "out_features", "stage_names"}
    fields = {name: ours[name] for name in theirs.keys() & ours.keys() - backbone}
    return make_model(AutoConfig.for_model(as_type, **fields), saved_state(model), found)


def saved_state(model: Any) -> dict[str, Tensor]:
    """The weights under the names `save_pretrained` writes, which may differ from the module names."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        with writing(Path(folder)):
            model.save_pretrained(folder, max_shard_size="1TB")
        return load_file(Path(folder) / "model.safetensors")


def open_run(run: Path, checkpoint: str | None = None, teacher: bool = False) -> tuple[Trained, Exported]:
    """Load a run, and the model and processor to export from it.

    Raises:
        ConfigError: Not a run with trained weights, or transformers has no class for its encoder.
        CheckpointError: The requested checkpoint is damaged.
    """
    config = trained.read_config(run)
    if ":" in (config.encoder.model or ""):
        raise ConfigError(
            f"{run}: transformers has no class for the encoder {config.encoder.model}, so AutoModel cannot load it; the run "
            f"leaves its weights in {run / 'export' / 'model.safetensors'} when it ends, for safetensors.torch.load_model"
        )
    found = trained.load(config, run, checkpoint, teacher)
    if config.own_data:
        return found, Exported(found.encoder)
    built_in: Any = data_class(config.modality)
    processor = found.tokenizer if config.is_text else built_in.make_processor(found.encoder, found.config.data)
    return found, Exported(found.encoder, processor)


def public(value: Any) -> Any:
    """Settings without details of this machine: paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and is_local(value) else value


def on_hub(name: str | None) -> str | None:
    """`name` if it may be a repository on the hub, else None."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name is None or name == "builtin" or is_local(name):
        return None
    with suppress(HFValidationError):
        validate_repo_id(name)
        return name
    return None


def model_card(
    model: PreTrainedModel, title: str, facts: dict[str, Any], folder: Path, name: str, sections: list[str], **metadata: Any
) -> str:
    """README.md of an exported model, in the format of the Hugging Face hub.

    Args:
        model: The exported model.
        title: Headline.
        facts: Rows of the first table.
        folder: The folder that holds the model now.
        name: Name or path for `from_pretrained` in the usage example.
        sections: Further sections, as Markdown.
        metadata: Fields of `huggingface_hub.ModelCardData`; None is left out.
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
    options = {} if loader != "AutoModel" else class_arguments(type(model))
    if (folder / Path(inspect.getfile(type(model))).name).exists():
        options["trust_remote_code"] = True  # its code is in the folder; not needed after importing d2v_fast
    arguments = "".join(f", {option}={value}" for option, value in options.items())
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
    """Facts for the table, and sections on probe, log and settings, from the files of a run.

    Raises:
        ConfigError: probe.json is damaged.
    """
    config, step = found.config, found.step
    records = [line for line in read_lines(run / LOG) if step is None or line["step"] <= step]
    last = step or (records[-1]["step"] if records else "unknown")
    data, train, targets, parent = public(config.data), config.train, config.targets, trained.parent_run(run)
    start = f", from {public(config.encoder.pretrained)}" if config.encoder.pretrained else ""
    mask, version = type(config.mask).__name__, ""
    if config.head.kind == "conv":
        mask, version = f"{mask} in {data['views']} views, decoder of {config.head.layers} convolutions", " 2.0"
    facts = {
        "data": " ".join(str(data[key]) for key in ("class", "path", "name", "split") if data.get(key)),
        "recipe": f"data2vec{version} on {config.modality}{start}: {targets.source} of the last {targets.top_k} layers, "
        f"norm {targets.norm}, mask {mask}, {train.precision}",
        "steps": f"{last} of {train.batch_size} × {train.accumulate} samples per process",
    }
    if parent:
        others = sorted(file.parent.name for file in parent.glob("*/log.jsonl") if file.parent.name != run.resolve().name)
        facts["steps"] += ", over all modalities"
        facts["blocks"] = f"an experiment: shared and trained jointly with {' and '.join(others)}"
    sections = []
    for probe in read_probes(run / PROBES):
        if probe["step"] == step:
            on = " ".join(filter(None, (public(probe["data"]), probe["name"])))
            sections.append(
                f"## Probe of the frozen student\n\nOn {on}, at most {probe['limit']} samples, by `d2v-probe`.\n\n"
                + _table(probe["results"])
            )
    if records:
        shown = [records[round(i * (len(records) - 1) / 9)] for i in range(10)] if len(records) > 10 else records
        table = {str(i): {name: record[name] for name in LOGGED if name in record} for i, record in enumerate(shown)}
        sections.append("## Log\n\nThe loss says little about what was learned; the std of targets and predictions shows "
                        "collapse.\n\n" + _table(table, labels=False))  # fmt: skip
    settings = yaml.safe_dump(public(yaml.safe_load(config.yaml)), sort_keys=False, allow_unicode=True)
    sections.append(f"## Settings\n\n```yaml\n{settings.strip()}\n```")
    return facts, sections


def eval_results(run: Path, found: Trained) -> list[Any]:
    """Results of d2v-probe for these weights, as `huggingface_hub.EvalResult` for the model card's metadata."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=MODALITIES[found.config.modality].task,
            dataset_type=on_hub(probe["data"]) or public(probe["data"]),
            dataset_name=" ".join(filter(None, (public(probe["data"]), probe["name"]))),
            dataset_config=probe["name"],
            dataset_split="test",
            metric_type="cross_entropy" if measure == "nats" else "accuracy",
            metric_name=f"{MEASURES.get(measure, measure)}, frozen",
            metric_value=round(value, 4),
        )
        for probe in read_probes(run / PROBES)
        if probe["step"] == found.step
        for measure, value in probe["results"].get("trained", {}).items()
    ]


def _table(rows: dict[str, dict[str, float]], labels: bool = True) -> str:
    """A Markdown table."""
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
    """Export a run; return the largest difference between the reloaded model and the training encoder.

    Args:
        run: Folder of a `d2v-train` run; its newest weights are exported.
        to: Output folder for model, tokenizer or processor, and a model card made from the run.
        as_type: Model type, for an architecture that transformers has under two names; "data2vec-pytorch" adds
            data2vec.pt, whose `encoder` is the state dict that scripts of that project load.
        teacher: Export the teacher instead of the student.
        checkpoint: Checkpoint to export instead of the newest weights, such as step-1000.
        hub: Name of the repository on the hub, for the model card.
        metadata: Model card metadata: `license`, `language` and other fields of `huggingface_hub.ModelCardData`.

    Raises:
        ConfigError: The run has no trained weights, or its encoder cannot be exported exactly; the message gives the reason.
        OSError: The folder cannot be written; its previous content is kept.
    """
    run, to = Path(run), Path(to)
    found, exported = open_run(run, checkpoint, teacher)
    facts, sections = run_sections(run, found)
    data, old = found.config.data, as_type == OLDER
    known: dict[str, Any] = {"base_model": on_hub(found.config.encoder.pretrained), "datasets": on_hub(data.get("path"))}
    if not teacher and (results := eval_results(run, found)):
        known |= {"eval_results": results, "model_name": hub or to.resolve().name}
    known["pipeline_tag"] = "feature-extraction" if found.config.own_data else MODALITIES[found.config.modality].pipeline
    if found.config.is_text and data["path"] == "builtin":
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

                # Includes the untrained pooler, as that project's checkpoints do.
                torch.save({"encoder": AutoModel.from_pretrained(folder).state_dict()}, folder / "data2vec.pt")
            (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return difference


def _with_processor(encoder: Encoder, released: Released, source: str, tokenizer: str | None) -> Exported:
    """The model of another project with the processor that its settings describe; for text, with `tokenizer`."""
    model, settings = released.model, released.settings
    if isinstance(encoder, TokenEncoder):
        exported = Exported(encoder, tokenizer and load_tokenizer(tokenizer), model)
        if tokenizer and len(exported.processor) > model.config.vocab_size:
            raise ConfigError(
                f"--tokenizer {tokenizer}: its {len(exported.processor)} tokens exceed the model's {model.config.vocab_size}"
            )
        return exported
    if source == "eat":
        norm = next((EAT_NORMS[name] for name in EAT_NORMS if settings.get(name)), (SOUND_MEAN, SOUND_STD))
        length, bins = model.config.image_size
        return Exported(encoder, spectrogram_extractor(length, bins, *norm), model)
    if isinstance(encoder, PatchEncoder):
        inception = settings.get("imagenet_default_mean_and_std", True) is False
        mean, std = ((0.5,) * 3, (0.5,) * 3) if inception else (MEAN, STD)
        return Exported(encoder, image_processor(encoder._image_size()[0], mean, std), model)
    normalize = settings.get("task.normalize", settings.get("normalize", True))
    return Exported(encoder, feature_extractor(encoder, 16_000, normalize), model)


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
    """Export a checkpoint of another project; return the largest difference after reloading.

    Args:
        file: The checkpoint.
        to: Output folder.
        source: "fairseq" (also for the paper's vision code), "eat" or "data2vec-pytorch". Head or decoder and teacher, if
            present, are saved next to the encoder, where `d2v-train encoder.pretrained=…` finds them.
        as_type: Model type, for an architecture that transformers has under two names.
        encoder: For data2vec-pytorch: model.encoder_checkpoint of its YAML file.
        tokenizer: Tokenizer to save with a text model, a name or folder.
        hub: Name of the repository on the hub, for the model card.
        metadata: Model card metadata, as in `export_run`.

    Raises:
        ValueError: Not a checkpoint of that project, or no class of transformers computes the model exactly.
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
    with error_context(file, "its settings do not form a model"):
        loaded = wrap(released.model.base_model)
    exported, settings = _with_processor(loaded, released, source, tokenizer), released.settings
    if source == "eat":
        headless = exported.model is loaded.model
        metadata["pipeline_tag"] = "feature-extraction" if headless else "audio-classification"
    facts = {
        "data": public(settings.get("task.data", settings.get("data_path", "unknown"))),
        "checkpoint": f"{Path(file).name} of {source}",
    }
    with whole(to) as folder:
        difference = exported.write(folder, as_type)
        if released.licence and not metadata.get("license"):
            metadata["license"] = released.licence
            facts["licence"] = f"{released.licence}, for the weights released by the authors; for others: d2v-export --license"
        title = f"data2vec: {Path(file).stem}"
        card = model_card(exported.model, title, facts, folder, hub or to.resolve().name, [], **metadata)
        with writing(to):
            if released.decoder:
                header = released.decoder_settings or {}
                save_file(released.decoder, folder / HEAD, {name: str(value) for name, value in header.items()})
            if released.teacher:
                save_file(released.teacher, folder / TEACHER)
            (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return difference


class Hub:
    """A repository on the Hugging Face hub to upload to.

    Args:
        name: NAME, in the account of the token's user, or OWNER/NAME.

    Raises:
        ConfigError: Invalid name, no token, or the hub rejects the token.
    """

    def __init__(self, name: str):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        self.option = f"--push-to-hub {name}"
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ConfigError(f"{self.option}: expected NAME or OWNER/NAME: {first_line(error)}") from error
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(f"{self.option}: HF_HUB_OFFLINE is set; unset it, or leave out --push-to-hub")
        if not get_token():
            raise ConfigError(
                f"{self.option}: no token found; run `hf auth login` or set HF_TOKEN=… to a token with write access, "
                "or leave out --push-to-hub to write only the folder"
            )
        self.api = HfApi()
        try:
            user = self.api.whoami()["name"]
        except Exception as error:  # HTTP, network or token
            raise ConfigError(f"{self.option}: login to the hub failed: {first_line(error)}; run `hf auth login`") from error
        self.name = name if "/" in name else f"{user}/{name}"

    def push(self, folder: str, private: bool) -> str:
        """Create the repository if needed and upload the folder; return the repository's URL.

        Raises:
            ConfigError: The hub refused or could not be reached; the local folder is unchanged.
        """
        try:
            self.api.create_repo(self.name, private=private, exist_ok=True)
            self.api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=f"d2v-fast {d2v_fast.__version__}")
        except Exception as error:
            raise ConfigError(
                f"{self.option}: {first_line(error)}; {folder} is complete, retry with `hf upload {self.name} {folder}`"
            ) from error
        return f"{self.api.endpoint}/{self.name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2v-export",
        usage="d2v-export RUN --to DIR [options]\n"
        "       d2v-export --from fairseq|eat|data2vec-pytorch CHECKPOINT --to DIR [options]",
        description="Export a model for AutoModel.from_pretrained: weights, tokenizer or processor, and a model card. "
        "The result is reloaded and compared with the training encoder.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a d2v-train run, or checkpoint of another project")
    parser.add_argument("--to", required=True, metavar="DIR", help="output folder, new or empty")
    parser.add_argument(
        "--as",
        dest="as_type",
        metavar="TYPE",
        help="model type, for architectures with two: "
        + ", ".join(f"{a} = {b}" for a, b in list(SAME.items())[::2])
        + f"; {OLDER} adds data2vec.pt for scripts that load its 'encoder'",
    )
    parser.add_argument("--teacher", action="store_true", help="export the teacher instead of the student")
    parser.add_argument("--checkpoint", metavar="step-N", help="checkpoint to export; default: the newest intact weights")
    parser.add_argument(
        "--from",
        dest="source",
        choices=["fairseq", "eat", OLDER],
        help="project that wrote the checkpoint; fairseq includes the paper's vision code",
    )
    parser.add_argument("--encoder", metavar="NAME", help="with data2vec-pytorch: model.encoder_checkpoint of its YAML file")
    parser.add_argument("--tokenizer", metavar="NAME", help="with --from: tokenizer to save with a text model, name or folder")
    parser.add_argument("--license", metavar="ID", help="license for the model card, such as apache-2.0")
    parser.add_argument("--language", metavar="CODE", nargs="+", help="language for the model card, such as en")
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="upload the folder to the Hugging Face hub as NAME or OWNER/NAME; needs a write token (hf auth login)",
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: create the repository as private")
    return parser


def main(args: list[str]) -> None:
    """The command d2v-export."""
    from transformers.utils import logging

    # Its warnings about missing poolers and torchvision do not matter here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = _parser().parse_args(args)
    metadata = {"license": options.license, "language": options.language}
    if options.private and not options.push_to_hub:
        raise ConfigError("--private: is only valid with --push-to-hub")
    hub = Hub(options.push_to_hub) if options.push_to_hub else None
    metadata["hub"] = hub and hub.name
    run, to = os.path.expanduser(options.run), os.path.expanduser(options.to)
    if options.source is None:
        for name in ("encoder", "tokenizer"):
            if getattr(options, name):
                raise ConfigError(f"--{name}: is only valid with --from; a run of d2v-train has its own")
        difference = export_run(run, to, options.as_type, options.teacher, options.checkpoint, **metadata)
        print(f'{to}: AutoModel.from_pretrained("{to}") matches the training encoder to {difference:.1g}')
    elif options.teacher:
        raise ConfigError("--teacher: is for runs of d2v-train; other projects fine-tune the student, so it is exported")
    elif options.checkpoint:
        raise ConfigError("--checkpoint: is for runs of d2v-train; for other projects, name the file itself")
    else:
        import_checkpoint(run, to, options.source, options.as_type, options.encoder, options.tokenizer, **metadata)
        print(f'{to}: AutoModel.from_pretrained("{to}") has the weights of {run}')
        if not any(Path(to).glob("tokenizer*")) and not (Path(to) / "preprocessor_config.json").exists():
            print("no tokenizer saved: add one with --tokenizer NAME, for most text models roberta-base")
        if (Path(to) / HEAD).exists():
            last = "" if (Path(to) / TEACHER).exists() else "; it has no teacher, which then starts as a copy of the student"
            recipe = {OLDER: "ITS.yaml", "eat": "spectrogram/eat-base"}.get(options.source, "MODALITY/v2-SIZE")
            print(f"to continue training: d2v-train --config {recipe} encoder.pretrained={to}{last}")
    if hub:
        print(hub.push(to, options.private))
