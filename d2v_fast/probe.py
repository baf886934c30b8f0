"""Probe a frozen encoder and compare it with the same encoder untrained.

Images, speech, spectrograms and custom labelled data: a k-NN and a linear classifier predict the label from the mean state
over positions and, if there is a CLS token, also from its state.
Text: the cloze probe. 15 % of the tokens are hidden. A linear classifier predicts each hidden token from the state at its
position, and another one from the states of the two neighbouring tokens. It needs no labels; the baseline is the unigram
distribution. A student of data2vec 2.0 never sees the mask token, so only the second classifier is meaningful for it.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from d2v_fast import trained
from d2v_fast.checkpoint import write_text
from d2v_fast.config import Config, ConfigError, data_class
from d2v_fast.data import DataError, Source, first_line, is_local
from d2v_fast.encoders import Encoder
from d2v_fast.files import PROBES
from d2v_fast.masking import Draws, TokenMask
from d2v_fast.report import measure, read_probes
from d2v_fast.train.build import make_data

log = logging.getLogger(__name__)

NEIGHBOURS = 20
CLS = ", CLS"  # title suffix of results from the CLS token only
ADJACENT = ", adjacent"  # title suffix of results from the tokens to the left and right of a hidden one
CLOZE_TOKENS = 300  # the cloze probe classifies this many of the most frequent tokens
CLOZE_L2 = 0.03  # per token; with less, it overfits the states of an untrained encoder
BATCH_SIZE, CLOZE_BATCH_SIZE = 64, 32


@dataclass
class States:
    """Runs encoders and returns their states.

    Args:
        encoders: Encoders by title.
        device: Device to run on.
        precision: fp32, or bf16 for matrix products.
        batch_size: Inputs per forward pass.
    """

    encoders: dict[str, Encoder]
    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int = BATCH_SIZE

    def __post_init__(self):
        for encoder in self.encoders.values():
            encoder.to(self.device)

    def __call__(self, source: Tensor, padding_mask: Tensor | None) -> dict[str, Tensor]:
        """States (B, T, C) in fp32, by title, on the device; also those of the CLS token, if there is one, (B, 1, C)."""
        found: dict[str, Tensor] = {}
        source = source.to(self.device)
        padding_mask = None if padding_mask is None else padding_mask.to(self.device)
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            try:
                for title, encoder in self.encoders.items():
                    encoded = encoder.encode(source, padding_mask)
                    found[title] = encoded.states.float()
                    if encoded.extra is not None and encoded.extra.shape[1]:
                        found[f"{title}{CLS}"] = encoded.extra[:, :1].float()
                return found
            except torch.OutOfMemoryError as error:
                raise ConfigError(f"--batch-size {self.batch_size}: does not fit in GPU memory; lower it") from error


def progress(what: str | None, total: int, unit: str) -> Any:
    """Progress bar; updated every 30 s if stderr is not a terminal; disabled without a title."""
    from tqdm import tqdm

    options = {"disable": True} if what is None else {"mininterval": 0.1 if sys.stderr.isatty() else 30}
    return tqdm(desc=what, total=total, unit=unit, dynamic_ncols=True, **options)


def _finite(states: list[Tensor]) -> np.ndarray:
    found = torch.cat(states).numpy()
    if not np.isfinite(found).all():
        raise ConfigError("the encoder's states are not finite: its weights are broken; the run's log.jsonl shows since when")
    return found


def score(train: np.ndarray, train_labels: Sequence, test: np.ndarray, test_labels: Sequence) -> dict[str, float]:
    """Accuracy of a cosine k-NN and of logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    knn = KNeighborsClassifier(min(NEIGHBOURS, len(train)), metric="cosine").fit(train, train_labels)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(train, train_labels)
    return {"knn": float(knn.score(test, test_labels)), "linear": float(linear.score(test, test_labels))}


def knn_accuracy(
    train: np.ndarray, train_labels: Sequence, test: np.ndarray, test_labels: Sequence, temperature: float = 0.07
) -> float:
    """Accuracy of a k-NN with votes weighted by exp(cosine / temperature) (Wu et al. 2018), as in DINO."""
    classes, numbers = np.unique(train_labels, return_inverse=True)
    train, test = (rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12) for rows in (train, test))
    cosine = test @ train.T
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
    votes = np.zeros((len(test), len(classes)))
    rows = np.arange(len(test))[:, None]
    np.add.at(votes, (rows, numbers[nearest]), np.exp(cosine[rows, nearest] / temperature))
    return float((classes[votes.argmax(1)] == np.asarray(test_labels)).mean())


def split_sources(open_split: Callable[..., Source], data: str, name: str | None) -> tuple[Source, Source]:
    """Train and test sources: the folders or splits with these names, or a random fifth for testing.

    Raises:
        DataError: No labels.
    """
    if data == "builtin":
        parts = [open_split("builtin", None, split) for split in ("train", "test")]
    elif is_local(data) and all((Path(data) / split).is_dir() for split in ("train", "test")):
        parts = [open_split(str(Path(data) / split)) for split in ("train", "test")]
    elif is_local(data):
        parts = _hold_out_fifth(open_split(data))
    else:
        parts = [open_split(data, name, split) for split in ("train", "test")]
    return _labelled(data, parts)


def own_sources(
    config: Config, encoder: Encoder, data: str, path: str | None, name: str | None
) -> tuple[Source, Source, Callable]:
    """Train and test sources of a custom data class, and a function from a list of samples to (source, padding_mask or None).

    If the class has a setting `split`, it is set to train and to test; otherwise a random fifth is for testing. All samples are
    loaded with the same random draws, so they are augmented alike.

    Args:
        config: Settings of the run.
        encoder: Passed to `fit_to`.
        data: Name of the data in messages.
        path: Value for the setting `path`; None keeps that of the run.
        name: Value for the setting `name`; None keeps that of the run.

    Raises:
        ConfigError: The class takes no such path or name.
        DataError: No labels.
    """
    changed = {key: value for key, value in (("path", path), ("name", name)) if value is not None}
    for key in changed.keys() - config.data.keys():
        option = "data" if key == "path" else key
        raise ConfigError(f"--{option} {changed[key]}: {config.data['class']} takes no data.{key}; leave it out")
    splits = [{"split": "train"}, {"split": "test"}] if "split" in config.data else [{}]
    made = [make_data(replace(config, data=config.data | changed | split)) for split in splits]
    parts = []
    for each in made:
        each.fit_to(encoder)
        labels = getattr(getattr(each, "source", None), "labels", None)
        if labels is None or len(labels) != len(each):
            raise DataError(
                f"data.class={config.data['class']}: found {'no' if labels is None else len(labels)} labels of {len(each)} "
                "samples; for a probe give a label for each, self.source = Source(names, read, labels)"
            )
        names = [each.sample_name(i) for i in range(len(each))]
        read = cast(Any, lambda i, each=each: each.load(int(i), np.random.default_rng(0)))
        parts.append(Source(names, read, list(labels)))

    def collate(samples: list) -> tuple[Tensor, Tensor | None]:
        arrays = made[0].collate(samples, Draws(0, 0, range(len(samples))))
        batch = made[0].finish({name: torch.as_tensor(array) for name, array in arrays.items()})
        return batch["source"], batch.get("padding_mask")

    return *_labelled(data, parts if len(parts) == 2 else _hold_out_fifth(parts[0])), collate


def _labelled(data: str, parts: Sequence[Source]) -> tuple[Source, Source]:
    for part in parts:
        if part.labels is None or len(set(part.labels)) < 2:
            raise DataError(f"--data {data}: a probe needs labels of at least two classes, found {set(part.labels or [])}")
    return parts[0], parts[1]


def _hold_out_fifth(whole: Source) -> list[Source]:
    order = np.random.default_rng(0).permutation(len(whole))
    fifth = len(order) // 5
    return [_subset(whole, order[fifth:]), _subset(whole, order[:fifth])]


def _subset(source: Source, indices: np.ndarray) -> Source:
    return Source(
        [source.names[i] for i in indices],
        lambda i: source.read(indices[i]),
        source.labels and [source.labels[i] for i in indices],
    )


def pooled_states(
    states: States, source: Source, collate: Callable, limit: int, what: str | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Mean state of each sample and, if there is a CLS token, its state, (N, C) by title; and the samples' labels.

    Args:
        states: The encoders.
        source: The samples. Up to `limit` are drawn; unreadable ones are logged and skipped.
        collate: Turns a list of samples into (source, padding_mask or None).
        limit: Maximum number of samples.
        what: Title of the progress bar; None = no bar.
    """
    rows: dict[str, list[Tensor]] = defaultdict(list)
    order, labels = np.random.default_rng(0).permutation(len(source))[:limit], []
    with progress(what, len(order), "sample") as bar:
        for begin in range(0, len(order), states.batch_size):
            samples = []
            for i in order[begin : begin + states.batch_size]:
                try:
                    samples.append(source.read(i))
                except Exception as error:
                    log.warning("left out %s: %s", source.names[i], first_line(error))
                else:
                    labels.append(cast(Sequence[str], source.labels)[i])
            if samples:
                inputs, padding_mask = collate(samples)
                for title, found in states(inputs, padding_mask).items():
                    rows[title].append(_mean(found, padding_mask).cpu())
            bar.update(min(states.batch_size, len(order) - begin))
    return {title: _finite(found) for title, found in rows.items()}, labels


def _mean(states: Tensor, padding_mask: Tensor | None) -> Tensor:
    if padding_mask is None:
        return states.mean(1)
    seen = (~padding_mask).unsqueeze(-1).to(states.device)
    return (states * seen).sum(1) / seen.sum(1)


def labelled_parts(config: Config, encoder: Encoder, data: str, name: str | None) -> tuple[Source, Source, Callable]:
    """Labelled train and test sources, and a function from a list of samples to (source, padding_mask or None).

    Raises:
        ConfigError: The custom data class takes no such path or name.
        DataError: The data cannot be read or have no labels.
    """
    settings = config.data
    if config.own_data:
        return own_sources(config, encoder, data, None if data == settings["class"] else data, name)
    built_in: Any = data_class(config.modality)
    open_split, stack = built_in.for_probe(encoder, settings)

    def collate(samples: list) -> tuple[Tensor, Tensor | None]:
        source, padding_mask = stack(samples)
        return torch.from_numpy(source), None if padding_mask is None else torch.from_numpy(padding_mask)

    return *split_sources(open_split, data, name), collate


def probe_labels(config: Config, states: States, data: str, name: str | None, limit: int) -> dict[str, dict]:
    """Accuracies of each encoder on labelled images, speech, spectrograms or custom data."""
    *parts, collate = labelled_parts(config, next(iter(states.encoders.values())), data, name)
    found = [pooled_states(states, part, collate, limit, split) for part, split in zip(parts, ("train", "test"), strict=True)]
    (train, train_labels), (test, test_labels) = found
    classes = len(set(train_labels))
    if classes < 2 or not test_labels:
        raise DataError(
            f"--data {data}: {len(train_labels)} samples of {classes} classes are left to fit and {len(test_labels)} to test, "
            "but a probe needs two classes and one test sample; use more data or a higher --limit"
        )
    results = {title: score(train[title], train_labels, test[title], test_labels) for title in train}
    results["chance"] = dict.fromkeys(
        ("knn", "linear"), max(np.bincount(np.unique(test_labels, return_inverse=True)[1])) / len(test_labels)
    )
    return results


def probe_cloze(config: Config, states: States, data: str, name: str | None, limit: int) -> dict[str, dict]:
    """Accuracy and cross-entropy (nats) of linear classifiers that predict hidden tokens, among the most frequent ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from d2v_fast.data.text import TextData

    settings = config.data | {"name": name, "teacher_input": "full", "views": None}
    del settings["class"]
    mask = TokenMask(prob=0.15, length=1, keep_special=True)
    parts = []
    for split in ("train", "test"):
        settings |= {"path": _split_path(data, split), "split": split}
        parts.append(_hidden_tokens(TextData(mask=mask, **settings), states, limit, split))
    (train, train_tokens), (test, test_tokens) = parts
    distinct, occurrences = np.unique(train_tokens, return_counts=True)
    frequent = distinct[np.argsort(-occurrences)[:CLOZE_TOKENS]]
    keep, keep_test = np.isin(train_tokens, frequent), np.isin(test_tokens, frequent)
    train_tokens, test_tokens = train_tokens[keep], test_tokens[keep_test]
    classes, counts = np.unique(train_tokens, return_counts=True)
    columns = np.searchsorted(classes, test_tokens)
    results = {
        "unigram": {
            "accuracy": float((test_tokens == classes[counts.argmax()]).mean()),
            "nats": float(-np.log(counts / counts.sum())[columns].mean()),
        }
    }
    for title in train:
        reader = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (CLOZE_L2 * len(train_tokens)), max_iter=200))
        reader.fit(train[title][keep], train_tokens)
        log_probabilities = reader.predict_log_proba(test[title][keep_test])
        results[title] = {
            "accuracy": float((log_probabilities.argmax(1) == columns).mean()),
            "nats": float(-log_probabilities[np.arange(len(columns)), columns].mean()),
        }
    return results


def _split_path(data: str, split: str) -> str:
    """Path of a split of local `data`, a folder or a file pattern; the names of other data sets are returned unchanged."""
    if not is_local(data):
        return data
    if (Path(data) / split).is_dir():
        return str(Path(data) / split)
    if Path(data).is_dir() and list(Path(data).glob(f"{split}*")):
        return str(Path(glob.escape(data)) / f"{split}*")
    raise DataError(f"--data {data}: expected a folder with {split}/ or {split}.txt in it")


def _hidden_tokens(data: Any, states: States, limit: int, what: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """States of each encoder at hidden positions and next to them, by title, and the hidden tokens."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    tokens: list[np.ndarray] = []
    order = np.random.default_rng(0).permutation(len(data))
    with progress(what, limit, "token") as bar:
        for begin in range(0, len(order), states.batch_size):
            batch = data.__getitems__([(0, int(i)) for i in order[begin : begin + states.batch_size]])
            tokens.append(batch["target"][batch["mask"]].numpy())
            for title, found in states(batch["source"], batch.get("padding_mask")).items():
                row, column = batch["mask"].to(found.device).nonzero(as_tuple=True)
                rows[title].append(found[row, column].cpu())
                neighbours = column - 1, (column + 1).clamp(max=found.shape[1] - 1)  # the first token is special, never hidden
                rows[f"{title}{ADJACENT}"].append(torch.cat([found[row, at] for at in neighbours], dim=1).cpu())
            bar.update(len(tokens[-1]))
            if bar.n >= limit:
                break
    return {title: _finite(found) for title, found in rows.items()}, np.concatenate(tokens)


def _save_result(file: Path, probe: dict[str, Any]) -> None:
    """Write results to probe.json, replacing those of the same data, name, limit and step."""
    key = ("data", "name", "limit", "step")
    others = [other for other in read_probes(file) if any(other[k] != probe[k] for k in key)]
    write_text(file, json.dumps([*others, probe], indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2v-probe",
        description="k-NN and linear probe of a run's frozen student, compared with the same encoder untrained. "
        "Images and speech need labels: folders, or a column `label` in parquet or, for speech, metadata.csv. Custom data need "
        "the labels of their Source. Text needs none. "
        "Results are added to probe.json in the run's folder.",
    )
    parser.add_argument("run", help="folder of a d2v-train run, which may still be running")
    parser.add_argument(
        "--data",
        help="folder with train/ and test/, a Hugging Face set, or builtin, which is the default for a run on builtin data; "
        "for custom data the setting data.path, by default that of the run",
    )
    parser.add_argument("--name", help="configuration of the Hugging Face set")
    parser.add_argument("--checkpoint", metavar="step-N", help="checkpoint to probe; default: the newest intact weights")
    parser.add_argument(
        "--limit",
        type=int,
        default=20_000,
        help="maximum number of samples (text: hidden tokens) to fit and to test on (default: %(default)s)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = GPU if there is one")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="precision of the encoders (default: %(default)s)"
    )
    sizes = f"default: {BATCH_SIZE}; cloze probe: {CLOZE_BATCH_SIZE}"
    parser.add_argument("--batch-size", type=int, help=f"samples per forward pass ({sizes})")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's default")
    return parser


def main(args: list[str]) -> None:
    """The command d2v-probe."""
    parser = _parser()
    options = parser.parse_args(args)
    for option, least in (("limit", 1), ("batch_size", 1), ("threads", 0)):
        if (value := getattr(options, option)) is not None and value < least:
            parser.error(f"--{option.replace('_', '-')} {value}: expected at least {least}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; d2v-doctor may show why")
    run = Path(os.path.expanduser(options.run))
    config = trained.read_config(run)
    if options.data is None and not config.own_data and config.data["path"] != "builtin":
        raise ConfigError(
            f"--data: missing; the run was trained on {config.data['path']}, so name a set to probe on: a folder with "
            "train/ and test/, a Hugging Face set, or builtin"
        )
    default = config.data["class"] if config.own_data else "builtin"
    data, file = os.path.expanduser(options.data or default), run / PROBES
    read_probes(file)  # fail early if results cannot be added to it
    found = trained.load(config, run, options.checkpoint)
    probe, usual = (probe_cloze, CLOZE_BATCH_SIZE) if config.is_text else (probe_labels, BATCH_SIZE)
    batch_size = options.batch_size or usual
    states = States({"untrained": found.untrained(), "trained": found.encoder}, device, options.precision, batch_size)
    log.info("probing on %s, %s on %s", " ".join(filter(None, (data, options.name))), options.precision, device)
    results = probe(found.config, states, data, options.name, options.limit)
    columns = list(next(iter(results.values())))
    print(f"{'':20}" + "".join(f"{column:>12}" for column in columns))
    for title, row in results.items():
        print(f"{title:20}" + "".join(f"{measure(column, row[column]):>12}" for column in columns))
    key = {"data": data, "name": options.name, "limit": options.limit, "step": found.step}
    try:
        _save_result(file, {**key, "results": results})
    except OSError as error:
        raise ConfigError(f"{file}: these results could not be written to it: {error.strerror}") from error
