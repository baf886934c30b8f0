"""Speech: files, a manifest or a Hugging Face set → 16 kHz crops → waveform and frame mask (spec 3.1)."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from d2v_fast.data import DataError, PretrainingData, Source, find_files, is_local, load_hub
from d2v_fast.data.builtin import builtin_speech
from d2v_fast.masking import Draws, SpanMask

log = logging.getLogger(__name__)

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
MANIFESTS = (".tsv", ".csv", ".jsonl")
EPS = 1e-5


def read_audio(file: str | io.BytesIO, sample_rate: int) -> np.ndarray:
    """Mono float32 waveform at `sample_rate`, from any rate and number of channels."""
    import soundfile
    import soxr

    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    if len(wave) == 0:
        raise ValueError("holds no sample")
    if not np.isfinite(wave).all():
        raise ValueError("holds samples that are not finite")
    return wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)


def _manifest(path: str) -> list[dict[str, str]]:
    """Rows of a manifest with a `file_name`: fairseq's TSV (root, then path and samples), CSV, or JSON lines."""
    root = Path(path).parent
    with open(path, newline="") as file:
        if path.endswith(".jsonl"):
            rows = [json.loads(line) for line in file if line.strip()]
        elif path.endswith(".tsv"):
            root = Path(file.readline().strip())
            rows = [{"file_name": line.split("\t")[0]} for line in file if line.strip()]
        else:
            rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=1):
        name = row.get("file_name") or row.get("path")
        if not name:
            raise DataError(f"{path}: row {number} has no file_name, its columns are {list(row)}")
        row["file_name"] = str(root / name)
    return rows


def open_audio(path: str, name: str | None = None, split: str = "train", sample_rate: int = 16_000) -> Source:
    """Recordings of "builtin", a folder (with metadata.csv: file_name, label, speaker), a manifest, or a Hugging Face set.

    Without metadata the folder of a file counts as its label and its speaker.

    Raises:
        DataError: No recording is there.
    """
    if path == "builtin":
        return builtin_speech(split)
    if is_local(path):
        path = os.path.expanduser(path)
        table = os.path.join(path, "metadata.csv") if os.path.isdir(path) else path
        if os.path.isfile(table) and table.endswith(MANIFESTS):
            rows = _manifest(table)
        else:
            rows = [{"file_name": file} for file in find_files(path, SUFFIXES)]
        if not rows:
            raise DataError(f"data.path={path}: lists no file")
        files = [row["file_name"] for row in rows]
        folders = [Path(file).parent.name for file in files]
        labels = [row["label"] for row in rows] if "label" in rows[0] else folders
        speakers = [row["speaker"] for row in rows] if "speaker" in rows[0] else folders
        return Source(files, lambda i: read_audio(files[i], sample_rate), labels, speakers)
    import datasets

    recordings = load_hub(path, name, split)
    columns = [column for column, kind in recordings.features.items() if isinstance(kind, datasets.Audio)]
    if not columns:
        raise DataError(f"data.path={path}: the set has no column of audio, only {list(recordings.features)}")
    recordings = recordings.cast_column(columns[0], datasets.Audio(decode=False))

    def read(i: int) -> np.ndarray:
        entry = recordings[i][columns[0]]
        return read_audio(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"], sample_rate)

    def column(*names: str) -> list[str] | None:
        found = [n for n in names if n in recordings.features]
        return [str(value) for value in recordings[found[0]]] if found else None

    names = [f"{path}[{i}]" for i in range(len(recordings))]
    return Source(names, read, column("label"), column("speaker_id", "speaker"))


def durations(source: Source, sample_rate: int, workers: int = 8) -> np.ndarray:
    """Samples of each recording at `sample_rate`, from the headers where files have one; 0 where it cannot be read."""
    from concurrent.futures import ThreadPoolExecutor

    import soundfile
    from tqdm import tqdm

    def samples(i: int) -> int:
        try:
            if os.path.isfile(source.names[i]):
                info = soundfile.info(source.names[i])
                return round(info.frames * sample_rate / info.samplerate)
            return len(source.read(i))
        except Exception:
            return 0

    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(samples, range(len(source))), "durations", len(source), leave=False, disable=len(source) < 5000)
        return np.fromiter(found, dtype=np.int64, count=len(source))


def standardize(wave: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the whole utterance."""
    return (wave - wave.mean()) / np.sqrt(wave.var() + EPS)


class AudioData(PretrainingData):
    """Crops of speech.

    Args:
        path: "builtin", a folder of recordings (with or without metadata.csv), a manifest (.tsv, .csv, .jsonl), or the
            name of a Hugging Face set.
        name: Configuration of the Hugging Face set, such as clean.
        split: Its split.
        sample_rate: Rate in Hz that everything is resampled to.
        min_seconds: Shorter recordings are left out.
        max_seconds: Longest crop.
        crop: Crop a batch to its shortest recording, as the authors do; without, recordings are padded.
        join_seconds: Join recordings of one speaker until they are this long, for sets of short clips; 0 for never.
        normalize: Bring each recording to zero mean and unit variance before it is cropped.
        batch_seconds: Fill batches up to this many seconds instead of up to train.batch_size.
        channel_prob: Share of feature channels that spans of channels would cover, set to zero for the student.
        channel_length: Channels a span.
        mask: How frames are masked.
        seed: Seed of masks, crops and order.
    """

    def __init__(
        self,
        *,
        mask: SpanMask,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        sample_rate: int = 16_000,
        min_seconds: float = 2.0,
        max_seconds: float = 20.0,
        crop: bool = True,
        join_seconds: float = 0.0,
        normalize: bool = True,
        batch_seconds: float | None = None,
        channel_prob: float = 0.0,
        channel_length: int = 10,
    ):
        self.name, self.mask, self.seed, self.sample_rate = path, mask, seed, sample_rate
        self.max_samples, self.crop, self.normalize = round(max_seconds * sample_rate), crop, normalize
        self.join_samples = round(join_seconds * sample_rate)
        self.max_batch_length = None if batch_seconds is None else batch_seconds * sample_rate
        self.channel_mask = SpanMask(channel_prob, channel_length) if channel_prob > 0 else None
        self.source = open_audio(path, name, split, sample_rate)
        found = durations(self.source, sample_rate)
        if self.join_samples:
            groups = self.source.groups or [""] * len(self.source)
            _, group = np.unique(np.asarray(groups), return_inverse=True)
            self.siblings = [np.flatnonzero((group == g) & (found > 0)) for g in range(group.max() + 1)]
            self.group = group
            found = np.maximum(found, self.join_samples)
        # A recording whose header cannot be read stays in: reading it reports it as broken, by name.
        self.kept = np.flatnonzero((found == 0) | (found >= min_seconds * sample_rate))
        if len(self.kept) == 0:
            raise DataError(
                f"data.path={path}: none of its {len(self.source)} recordings is as long as data.min_seconds={min_seconds}; "
                f"the longest has {found.max() / sample_rate:.2f} s. Lower it, or join short clips: data.join_seconds=2"
            )
        if len(self.kept) < len(self.source):
            log.info("%d recordings are shorter than %g s and left out", len(self.source) - len(self.kept), min_seconds)
        self.lengths = np.minimum(found[self.kept], self.max_samples)

    def __len__(self) -> int:
        return len(self.kept)

    def sample_name(self, index: int) -> str:
        return self.source.names[self.kept[index]]

    def fit_to(self, encoder: Any) -> None:
        self.frames, self.channels = encoder.positions, encoder.hidden_size
        shortest = int(self.lengths[self.lengths > 0].min(initial=self.max_samples))
        if self.frames(shortest) < 2:
            raise DataError(
                f"data.path={self.name}: the shortest recording, {shortest / self.sample_rate:.4f} s, gives "
                f"{self.frames(shortest)} frames of the encoder, too few to mask one and see another: "
                "raise data.min_seconds"
            )

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        first = self.kept[index]
        wave = self._read(first)
        while len(wave) < self.join_samples:
            wave = np.concatenate([wave, self._read(rng.choice(self.siblings[self.group[first]]))])
        start = rng.integers(0, max(0, len(wave) - self.max_samples) + 1)
        return wave[start : start + self.max_samples]

    def _read(self, index: int) -> np.ndarray:
        wave = self.source.read(index)
        return standardize(wave) if self.normalize else wave

    def collate(self, samples: list[np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        lengths = np.array([len(wave) for wave in samples])
        batch = {}
        if self.crop:
            lengths[:] = lengths.min()
            offsets = draws.uniform(-1, 1)[:, 0]
            starts = [int(u * (len(wave) - lengths[0] + 1)) for u, wave in zip(offsets, samples, strict=True)]
            source = np.stack([wave[a : a + lengths[0]] for a, wave in zip(starts, samples, strict=True)])
        else:
            source = np.zeros((len(samples), lengths.max()), dtype=np.float32)
            for row, wave in zip(source, samples, strict=True):
                row[: len(wave)] = wave
        batch["source"] = source.astype(np.float32)
        frames = np.array([self.frames(int(n)) for n in lengths])
        batch["mask"] = self.mask(draws, int(frames.max()), frames)
        padding_mask = np.arange(frames.max()) >= frames[:, None]
        if padding_mask.any():
            batch["padding_mask"] = padding_mask
        if self.channel_mask is not None:
            channels = Draws(~draws.seed, draws.epoch, draws.samples)
            batch["channel_mask"] = self.channel_mask(channels, self.channels)
        return batch
