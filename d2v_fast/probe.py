"""What a frozen encoder has learned, beside the same encoder untrained.

Images and speech: states are averaged over positions; a k-NN and a linear classifier read the label from them.
Text: the cloze probe. 15 % of the tokens are hidden, and a linear classifier reads from the state at each hidden position
which token was there. It needs no labels; its floor is the unigram distribution.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v_fast.config import Config, ConfigError, parse
from d2v_fast.data import DataError, Source, is_local
from d2v_fast.encoders import Encoder
from d2v_fast.masking import TokenMask

NEIGHBOURS = 20
CLOZE_TOKENS = 300  # the cloze probe tells the most frequent tokens apart
CLOZE_L2 = 0.03  # per token; with less, it overfits the states of an untrained encoder


def load_run(run: str | Path) -> tuple[Config, Encoder, Encoder]:
    """Config, student and the same encoder as it was before training.

    Raises:
        ConfigError: The folder holds no finished run.
    """
    from d2v_fast.training import make_encoder

    run = Path(run)
    for part in ("config.yaml", "export"):
        if not (run / part).exists():
            raise ConfigError(f"{run}: has no {part}, so it is not the folder of a run that exported its student")
    config, _ = parse(["--config", str(run / "config.yaml")])
    tokens = None
    if config.modality == "text":
        config.data["tokenizer"] = str(run / "export")
        exported = json.loads((run / "export" / "config.json").read_text(encoding="utf-8"))
        tokens = {key: value for key, value in exported.items() if key == "vocab_size" or key.endswith("_token_id")}
    untrained = make_encoder(config, tokens).eval()
    config.encoder.pretrained, config.encoder.config = (
        str(run / "export"),
        config.encoder.config if ":" in (config.encoder.model or "") else {},
    )
    return config, make_encoder(config).eval(), untrained


def pooled_states(encoder: Encoder, inputs: Sequence[Any], collate: Callable, batch_size: int = 64) -> np.ndarray:
    """Mean state of each input, (N, C); `collate` makes (source, padding_mask or None) of a list of inputs."""
    rows = []
    with torch.inference_mode():
        for begin in range(0, len(inputs), batch_size):
            source, padding_mask = collate(inputs[begin : begin + batch_size])
            states = encoder(source, padding_mask)
            if padding_mask is None:
                rows.append(states.mean(1))
            else:
                seen = (~padding_mask).unsqueeze(-1)
                rows.append((states * seen).sum(1) / seen.sum(1))
    return _finite(rows)


def _finite(states: list[torch.Tensor]) -> np.ndarray:
    found = torch.cat(states).float().numpy()
    if not np.isfinite(found).all():
        raise ConfigError("states of the encoder are not finite: its weights are broken; log.jsonl of the run tells since when")
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


def split_sources(open_split: Callable[..., Source], data: str, name: str | None) -> tuple[Source, Source]:
    """Sources for fitting and for testing: the folders or splits train and test, else a random fifth is for testing.

    Raises:
        DataError: No labels.
    """
    if data == "builtin":
        parts = [open_split("builtin", None, split) for split in ("train", "test")]
    elif is_local(data) and all((Path(data) / split).is_dir() for split in ("train", "test")):
        parts = [open_split(str(Path(data) / split)) for split in ("train", "test")]
    elif is_local(data):
        whole = open_split(data)
        order = np.random.default_rng(0).permutation(len(whole))
        fifth = len(order) // 5
        parts = [_subset(whole, order[fifth:]), _subset(whole, order[:fifth])]
    else:
        parts = [open_split(data, name, split) for split in ("train", "test")]
    for part in parts:
        if part.labels is None or len(set(part.labels)) < 2:
            raise DataError(f"--data {data}: a probe needs labels of at least two classes, found {set(part.labels or [])}")
    return parts[0], parts[1]


def _subset(source: Source, indices: np.ndarray) -> Source:
    return Source(
        [source.names[i] for i in indices],
        lambda i: source.read(indices[i]),
        source.labels and [source.labels[i] for i in indices],
    )


def _read_all(source: Source, limit: int, seed: int = 0) -> tuple[list[Any], list[str]]:
    """Up to `limit` samples, drawn at random, and their labels; unreadable ones are named and left out."""
    samples, labels = [], []
    for i in np.random.default_rng(seed).permutation(len(source))[:limit]:
        try:
            samples.append(source.read(i))
        except Exception as error:
            print(f"left out {source.names[i]}: {error}", file=sys.stderr)
        else:
            labels.append(source.labels[i])
    return samples, labels


def probe_labels(config: Config, encoders: dict[str, Encoder], data: str, name: str | None, limit: int) -> dict[str, dict]:
    """Accuracies of each encoder on labelled images or speech."""
    settings = config.data
    if config.modality == "vision":
        from d2v_fast.data.vision import center_crop, open_images, to_pixels

        def collate(images: list) -> tuple[torch.Tensor, None]:
            crops = [center_crop(image, settings["image_size"]) for image in images]
            return torch.from_numpy(to_pixels(crops, settings["mean"], settings["std"])), None

        parts = split_sources(open_images, data, name)
    else:
        from d2v_fast.data.audio import open_audio, standardize

        frames = next(iter(encoders.values())).positions
        longest = round(settings["max_seconds"] * settings["sample_rate"])

        def collate(waves: list) -> tuple[torch.Tensor, torch.Tensor | None]:
            waves = [(standardize(wave) if settings["normalize"] else wave)[:longest] for wave in waves]
            lengths = [len(wave) for wave in waves]
            source = np.zeros((len(waves), max(lengths)), dtype=np.float32)
            for row, wave in zip(source, waves, strict=True):
                row[: len(wave)] = wave
            seen = torch.tensor([frames(n) for n in lengths])
            padding_mask = torch.arange(frames(max(lengths))) >= seen[:, None]
            return torch.from_numpy(source), padding_mask if padding_mask.any() else None

        def open_split(path: str, name: str | None = None, split: str = "train") -> Source:
            source = open_audio(path, name, split, settings["sample_rate"])

            def read(i: int) -> np.ndarray:
                if frames(len(wave := source.read(i))) == 0:
                    raise ValueError(f"is too short: {len(wave)} samples")
                return wave

            return replace(source, read=read)

        parts = split_sources(open_split, data, name)
    (train, train_labels), (test, test_labels) = (_read_all(part, limit) for part in parts)
    classes = len(set(train_labels))
    if classes < 2 or not test:
        raise DataError(
            f"--data {data}: left to fit on are {len(train)} samples of {classes} classes, to test on {len(test)}; "
            "needed are two classes and one sample: more data, or a higher --limit"
        )
    results = {}
    for title, encoder in encoders.items():
        features = [pooled_states(encoder, samples, collate) for samples in (train, test)]
        results[title] = score(features[0], train_labels, features[1], test_labels)
    results["chance"] = dict.fromkeys(
        ("knn", "linear"), max(np.bincount(np.unique(test_labels, return_inverse=True)[1])) / len(test_labels)
    )
    return results


def probe_cloze(config: Config, encoders: dict[str, Encoder], data: str, name: str | None, limit: int) -> dict[str, dict]:
    """Accuracy and cross-entropy (nats) of a linear reading of hidden tokens, among the most frequent ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from d2v_fast.data.text import TextData

    settings = config.data | {"name": name, "teacher_input": "full"}
    mask = TokenMask(prob=0.15, length=1, keep_special=True)
    parts = []
    for split in ("train", "test"):
        settings |= {"path": _split_path(data, split), "split": split}
        parts.append(_hidden_tokens(TextData(mask=mask, **settings), encoders, limit))
    (train, train_tokens), (test, test_tokens) = parts
    frequent = np.unique(train_tokens, return_counts=True)
    frequent = frequent[0][np.argsort(-frequent[1])[:CLOZE_TOKENS]]
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
    for title in encoders:
        reader = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (CLOZE_L2 * len(train_tokens)), max_iter=200))
        reader.fit(train[title][keep], train_tokens)
        log_probabilities = reader.predict_log_proba(test[title][keep_test])
        results[title] = {
            "accuracy": float((log_probabilities.argmax(1) == columns).mean()),
            "nats": float(-log_probabilities[np.arange(len(columns)), columns].mean()),
        }
    return results


def _split_path(data: str, split: str) -> str:
    """Where a split of `data` lies: its folder or file of that name; else the set itself has splits."""
    if not is_local(data):
        return data
    if (Path(data) / split).is_dir():
        return str(Path(data) / split)
    if Path(data).is_dir() and list(Path(data).glob(f"{split}*")):
        return str(Path(glob.escape(data)) / f"{split}*")
    raise DataError(f"--data {data}: expected a folder with {split}/ or {split}.txt in it")


def _hidden_tokens(data: Any, encoders: dict[str, Encoder], limit: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """States of each encoder at hidden positions, and the tokens that were there."""
    states: dict[str, list] = {title: [] for title in encoders}
    tokens: list[np.ndarray] = []
    order = np.random.default_rng(0).permutation(len(data))
    for begin in range(0, len(order), 32):
        batch = data.__getitems__([(0, int(i)) for i in order[begin : begin + 32]])
        tokens.append(batch["target"][batch["mask"]].numpy())
        with torch.inference_mode():
            for title, encoder in encoders.items():
                states[title].append(encoder(batch["source"], batch.get("padding_mask"))[batch["mask"]])
        if sum(map(len, tokens)) >= limit:
            break
    return {title: _finite(rows) for title, rows in states.items()}, np.concatenate(tokens)


def main(args: list[str]) -> None:
    """The command d2v-probe."""
    parser = argparse.ArgumentParser(
        prog="d2v-probe",
        description="k-NN and linear probe of a run's frozen student, beside the same encoder untrained. "
        "Images and speech need labels (folders, or metadata.csv with a column label); text needs none.",
    )
    parser.add_argument("run", help="folder of a run of d2v-train")
    parser.add_argument("--data", default="builtin", help="folder with train/ and test/, a Hugging Face set, or builtin")
    parser.add_argument("--name", help="configuration of the Hugging Face set")
    parser.add_argument(
        "--limit",
        type=int,
        default=20_000,
        help="most samples (text: hidden tokens) to fit and to test on (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's default")
    options = parser.parse_args(args)
    if options.limit < 1:
        parser.error(f"--limit {options.limit}: expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    config, trained, untrained = load_run(options.run)
    encoders = {"untrained": untrained, "trained": trained}
    run = probe_cloze if config.modality == "text" else probe_labels
    results = run(config, encoders, os.path.expanduser(options.data), options.name, options.limit)
    text = json.dumps({"data": options.data, **results}, indent=2) + "\n"
    (Path(options.run) / "probe.json").write_text(text, encoding="utf-8")
    columns = list(next(iter(results.values())))
    print(f"{'':12}" + "".join(f"{column:>12}" for column in columns))
    for title, row in results.items():
        cells = [f"{row[column]:12.3f}" if column == "nats" else f"{row[column]:12.1%}" for column in columns]
        print(f"{title:12}" + "".join(cells))
