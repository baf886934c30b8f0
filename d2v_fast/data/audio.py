"""Speech: files, a manifest or a Hugging Face set → 16 kHz crops → waveform and frame mask (method 3.1)."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from d2v_fast.data import DataError, PretrainingData, Source, find_files, first_line, is_local, load_media, regular
from d2v_fast.data.builtin import builtin_speech
from d2v_fast.data.cache import files_state, kept
from d2v_fast.data.shards import open_tars
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, SpanMask

log = logging.getLogger(__name__)

# What libsndfile reads. It knows a format by its content and runs no code from a file.
SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
    *(".sph", ".nist", ".voc"),
)
MANIFESTS = (".tsv", ".csv", ".jsonl", ".json")
# Columns of files, and of where in them a recording starts, as Hugging Face, Common Voice, NeMo and SpeechBrain name them.
FILES = {"file_name": None, "path": None, "audio_filepath": "offset", "wav": "start"}
SPEAKERS = ("speaker", "speaker_id", "client_id", "spk_id")
LENGTHS = "lengths"  # file in the cache
EPS = 1e-5
MAX_VALUES = 2**28  # of a recording, 1 GiB: 4.6 h of mono at 16 kHz


class Silent(ValueError):
    """A recording, or a part of one, that is silent or constant."""


def read_audio(file: str | io.BytesIO, sample_rate: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Mono float32 waveform at `sample_rate`, from any rate and number of channels.

    Args:
        file: Path or bytes.
        sample_rate: In Hz.
        start: First sample of a part, at `sample_rate`; it is found by seeking where the format allows it.
        stop: Its end; None for the whole recording.

    Raises:
        Silent: All samples are the same.
        ValueError: It is empty, not finite or too long.
        OSError: There is no such file.
        soundfile.LibsndfileError: libsndfile cannot read it.
    """
    import soxr

    with _open(file) as recording:
        rate, most = recording.samplerate, _most_frames(recording, sample_rate)
        if stop is not None:
            begin, end = (round(each * rate / sample_rate) for each in (start, stop))
            _go_to(recording, begin)
            wave = recording.read(min(end - begin, most), dtype="float32", always_2d=True)
        else:
            # A header can claim any length, and some kilobytes of FLAC can hold hours of silence.
            wave = recording.read(min(recording.frames, most + 1), dtype="float32", always_2d=True)
        if len(wave) > most:
            raise ValueError(
                f"holds more than {most} samples at {rate} Hz on {recording.channels} channels, 1 GiB of numbers: "
                "cut it into parts"
            )
        wave = wave.mean(axis=1)
    if len(wave) == 0:
        raise ValueError("holds no sample" + f" after {start / sample_rate:.1f} s" * (start > 0))
    with np.errstate(over="ignore"):
        squares = wave @ wave
    if not np.isfinite(squares):  # then the variance would be infinite, and the normalised waveform silent
        raise ValueError("holds samples that are not finite, or whose squares are not")
    # Each layer norm behind the convolutions multiplies the gradient of silence by up to 1/√(its eps), about 300.
    if wave.min() == wave.max():
        raise Silent(f"is silent or constant: all samples are {wave[0]:.3g}")
    return wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)


def count_samples(file: str | io.BytesIO, sample_rate: int) -> int:
    """The length at `sample_rate`: what the header says or, where that is too much to be true, what can be read."""
    with _open(file) as recording:
        frames, rate, most = recording.frames, recording.samplerate, _most_frames(recording, sample_rate)
        true = frames <= most or _reaches(recording, frames)
    if not true:
        if not isinstance(file, str):
            file.seek(0)
        with _open(file) as recording:
            frames = len(recording.read(most + 1, dtype="float32", always_2d=True))
    return round(frames * sample_rate / rate)


def _reaches(recording: Any, frames: int) -> bool:
    """Whether the last frame that a header claims is there."""
    import soundfile

    try:
        recording.seek(frames - 1)
        return len(recording.read(1)) == 1
    except soundfile.LibsndfileError:
        return False


def _go_to(recording: Any, frame: int) -> None:
    import soundfile

    try:
        # Frames of MP3 need bits of those before, as many as twenty where there are few bits a frame.
        before = min(frame, 20 * 1152) if recording.format == "MP3" else 0
        recording.seek(frame - before)
        if before:
            recording.read(before)
    except soundfile.LibsndfileError:  # a format that cannot be sought in
        while frame and (read := len(recording.read(min(frame, 2**20), dtype="float32"))):
            frame -= read


def _open(file: str | io.BytesIO) -> Any:
    """A `soundfile.SoundFile` to read once, all of it or a part."""
    import soundfile

    # As bytes, since soundfile would encode a name strictly, and not every name on a disk is UTF-8.
    recording = soundfile.SoundFile(os.fsencode(regular(file)) if isinstance(file, str) else file)
    if recording.frames == 0 and recording.format in ("WAV", "WAVEX"):
        # The recorder was killed before it wrote the lengths. libsndfile reads to the end if the length of the whole is 8.
        with open(file, "rb") if isinstance(file, str) else file as stream:
            stream.seek(0)
            content = bytearray(stream.read(4 * MAX_VALUES))
        content[4:8] = struct.pack("<I", 8)
        recording = soundfile.SoundFile(io.BytesIO(content))
    # Else soundfile seeks after each read, which fails at the end of a file whose header does not know its length.
    recording.seekable = lambda: False
    return recording


def _most_frames(recording: Any, sample_rate: int) -> int:
    return int(MAX_VALUES / max(recording.channels, sample_rate / recording.samplerate))


def _manifest(path: str) -> list[dict[str, Any]]:
    """Rows of a manifest, each with a `file_name`.

    That is fairseq's TSV (root, then path and samples), a table (CSV, or TSV, which has no quotes), JSON lines, or
    SpeechBrain's JSON: an object of rows by name.

    Raises:
        DataError: It cannot be read, or names no files.
    """
    root = Path(path).parent
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # names may be of any bytes
            if path.endswith(".csv"):
                rows = list(csv.DictReader(file, strict=True))
            elif path.endswith(".tsv"):
                lines = [line.rstrip("\r").split("\t") for line in file.read().split("\n") if line.strip()]
                header = lines.pop(0) if lines else []
                if len(header) == 1 and header[0] not in FILES:
                    root, header = Path(header[0]), ["file_name", "samples"]
                rows = [dict(zip(header, line, strict=False)) for line in lines]
            else:
                rows = _json_rows(file.read())
    except csv.Error as error:
        raise DataError(f"data.path={path}: not a manifest: {error}, which may be a quote that is not closed") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.path={path}: not a manifest: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        key = next((key for key in FILES if row.get(key)), None) if isinstance(row, dict) else None
        if key is None:
            found = list(row) if isinstance(row, dict) else row
            raise DataError(f"data.path={path}: row {number} has no file_name, found {found}")
        if not isinstance(row[key], str):
            raise DataError(f"data.path={path}: row {number}: {key} is {row[key]!r}, expected the path of a file")
        if str(row.get(FILES[key]) or "").strip("0."):
            raise DataError(
                f"data.path={path}: row {number} is a part of {row[key]}, from {FILES[key]}={row[FILES[key]]}; "
                "only whole files are read: cut the recordings"
            )
        name = re.sub(r"^(\$[\w.]+|\{\w+\})/", "", row[key])  # SpeechBrain's $data_root/ or {data_root}/
        if number == 1 and not (root / name).exists() and (root / "clips" / name).exists():
            root = root / "clips"  # as in Common Voice
        row["file_name"] = str(root / name)
    return rows


def _lengths(rows: list[dict[str, Any]], sample_rate: int) -> np.ndarray | None:
    """Samples of each recording by its `duration` in seconds or, in fairseq's list, its samples; None unless all have one."""
    try:
        found = [float(row["duration"]) * sample_rate if "duration" in row else int(row["samples"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        return None
    found = np.array(found, dtype=np.float64)
    return np.round(found).astype(np.int64) if ((found > 0) & (found < 2**48)).all() else None


def _json_rows(text: str) -> list[Any]:
    """Rows of JSON lines, of a list of rows, or of an object of rows by name."""
    try:
        found = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(found, dict):
        return list(found.values()) if all(isinstance(row, dict) for row in found.values()) else [found]
    return found if isinstance(found, list) else [found]


def open_audio(
    path: str, name: str | None = None, split: str = "train", sample_rate: int = 16_000, cache: str | None = None
) -> Source:
    """Recordings of "builtin", a folder (with metadata.csv: file_name, label, speaker), a manifest, tar archives, or a set.

    The columns of manifests are those of `FILES` and `SPEAKERS`, and label.

    Without metadata the folder of a file counts as its label and its speaker.

    Raises:
        DataError: No recording is there.
    """
    if path == "builtin":
        return builtin_speech(split)
    path = os.path.expanduser(path)
    if is_local(path):
        table = os.path.join(path, "metadata.csv") if os.path.isdir(path) else path
        if os.path.isfile(table) and table.endswith(MANIFESTS):
            rows = _manifest(table)
            if not rows:
                raise DataError(f"data.path={path}: lists no file")
            outside = [row["file_name"] for row in rows if os.path.relpath(row["file_name"], path).startswith("..")]
            if outside and table != path:
                raise DataError(
                    f"{table}: names {outside[0]}, which is not in the folder; if that is meant, data.path={table} reads it"
                )
        else:
            found = find_files(path, (*SUFFIXES, ".parquet", ".tar"))
            rows = [{"file_name": file} for file in found if not file.lower().endswith((".parquet", ".tar"))]
            tars = [file for file in found if file.lower().endswith(".tar")]
            if tars and not rows:
                names, file, labels = open_tars(path, tars, SUFFIXES, cache)
                source = _source(names, file, sample_rate, labels, [Path(each).parent.name for each in names])
                return replace(source, state=lambda: files_state(path, tars))
        if rows:
            files = [row["file_name"] for row in rows]
            folders = [Path(file).parent.name for file in files]

            def column(*keys: str) -> list[str]:
                key = next((key for key in keys if all(key in row for row in rows)), None)
                return [str(row[key]) for row in rows] if key else folders

            source = _source(files, files.__getitem__, sample_rate, column("label"), column(*SPEAKERS))
            return replace(source, lengths=_lengths(rows, sample_rate), state=lambda: files_state(path, files))
    import datasets

    recordings, file = load_media(path, name, split, datasets.Audio)

    def known(*names: str) -> list[str] | None:
        found = [n for n in names if n in recordings.features]
        return [str(value) for value in recordings[found[0]]] if found else None

    names = [f"{path}[{i}]" for i in range(len(recordings))]
    source = _source(names, file, sample_rate, known("label"), known(*SPEAKERS))
    return replace(source, state=lambda: recordings._fingerprint)


def _source(
    names: list[str], file: Callable[[int], str | io.BytesIO], sample_rate: int, labels: list | None, speakers: list | None
) -> Source:
    def read(i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return read_audio(file(i), sample_rate, start, stop)

    return Source(names, read, labels, speakers, lambda i: count_samples(file(i), sample_rate), file, part=read)


def durations(source: Source, workers: int = 8) -> np.ndarray:
    """Samples of each recording: as a list says, or else from the headers where there are some; 0 where it cannot be read."""
    if source.lengths is not None:
        return source.lengths
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    def samples(i: int) -> int:
        try:
            return source.size(i) if source.size else len(source.read(i))
        except Exception:
            return 0

    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(samples, range(len(source))), "durations", len(source), leave=False, disable=len(source) < 5000)
        return np.fromiter(found, dtype=np.int64, count=len(source))


def standardize(wave: np.ndarray) -> np.ndarray:
    """Zero mean, unit variance over the whole utterance."""
    return (wave - wave.mean()) / np.sqrt(wave.var() + EPS)


def feature_extractor(encoder: Any, sample_rate: int, normalize: bool) -> Any:
    """Padding and `standardize`, as a feature extractor of transformers."""
    from transformers import Wav2Vec2FeatureExtractor

    # An encoder whose first convolution has a group norm was not trained with padding masked (transformers' own rule).
    masks = getattr(getattr(encoder.model, "config", None), "feat_extract_norm", "layer") == "layer"
    return Wav2Vec2FeatureExtractor(sampling_rate=sample_rate, do_normalize=normalize, return_attention_mask=masks)


class AudioData(PretrainingData):
    """Crops of speech.

    Args:
        path: "builtin", a folder of recordings (with or without metadata.csv), a manifest (.tsv, .csv, .jsonl,
            .json), tar archives, or the name of a Hugging Face set.
        name: Configuration of the Hugging Face set, such as clean.
        split: Its split.
        sample_rate: Rate in Hz that everything is resampled to.
        min_seconds: Shorter recordings are left out.
        max_seconds: Longest crop.
        whole_seconds: Longer recordings are never read whole, but in equal parts of at most max_seconds, each a sample of
            its own.
        crop: Crop a batch to its shortest recording, as the authors do; without, recordings are padded.
        join_seconds: Join recordings of one speaker until they are this long, for sets of short clips; 0 for never.
        normalize: Bring each recording, or part of a long one, to zero mean and unit variance before it is cropped.
        batch_seconds: Fill batches up to this many seconds instead of up to train.batch_size.
        channel_prob: Share of feature channels that spans of channels would cover, set to zero for the student.
        channel_length: Channels a span.
        cache: Folder where the lengths of the recordings are kept; by default beside the cache of Hugging Face.
        mask: How frames are masked.
        views: Masked views of each sample, for data2vec 2.0; null for one mask, as 1.0 takes it.
        seed: Seed of masks, crops and order.
    """

    def __init__(
        self,
        *,
        mask: SpanMask | RandomMask | ExactBlockMask,
        views: int | None = None,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        sample_rate: int = 16_000,
        min_seconds: float = 2.0,
        max_seconds: float = 20.0,
        whole_seconds: float = 60.0,
        crop: bool = True,
        join_seconds: float = 0.0,
        normalize: bool = True,
        batch_seconds: float | None = None,
        channel_prob: float = 0.0,
        channel_length: int = 10,
        cache: str | None = None,
    ):
        super().__init__(mask=mask, views=views, seed=seed)
        self.name, self.sample_rate = path, sample_rate
        self.max_samples, self.crop, self.normalize = round(max_seconds * sample_rate), crop, normalize
        self.join_samples = round(join_seconds * sample_rate)
        self.max_batch_length = None if batch_seconds is None else batch_seconds * sample_rate
        self.channel_mask = SpanMask(channel_prob, channel_length) if channel_prob > 0 else None
        self.source = open_audio(path, name, split, sample_rate, cache)
        found = self.durations = self._durations([path, name, split], cache)
        # A list may say what it likes of a source that has no parts to read.
        long = (found > max(self.max_samples, whole_seconds * sample_rate)) & (self.source.part is not None)
        self.parts = np.where(long, -(-found // self.max_samples), 1)
        if self.join_samples:
            groups = self.source.groups or [""] * len(self.source)
            _, group = np.unique(np.asarray(groups), return_inverse=True)
            self.siblings = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
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
        self.first = np.cumsum(self.parts[self.kept]) - self.parts[self.kept]  # sample of each recording
        self.recording = np.repeat(self.kept, self.parts[self.kept])
        starts, stops = self._bounds(np.arange(len(self.recording)))
        self.lengths = np.where(
            self.parts[self.recording] > 1, stops - starts, np.minimum(found, self.max_samples)[self.recording]
        )

    def _durations(self, where: list[str | None], cache: str | None) -> np.ndarray:
        """Samples of each recording; what was read for them is kept."""
        source = self.source
        if source.lengths is not None or source.state is None:
            return durations(source)

        def measure(folder: Path) -> dict[str, Any]:
            (folder / LENGTHS).write_bytes(durations(source))
            return {}

        folder, _ = kept(cache, "durations", [os.path.abspath(where[0]), *where[1:], self.sample_rate], source.state(), measure)
        return np.fromfile(folder / LENGTHS, np.int64)

    def __len__(self) -> int:
        return len(self.recording)

    def sample_name(self, index: int) -> str:
        name = self.source.names[self.recording[index]]
        if self.parts[self.recording[index]] == 1:
            return name
        start, stop = (each / self.sample_rate for each in self._bounds(index))
        return f"{name} from {start:.1f} s to {stop:.1f} s"

    def _bounds(self, index: Any) -> tuple[Any, Any]:
        """Where parts of recordings begin and end."""
        recording = self.recording[index]
        length, parts = self.durations[recording], self.parts[recording]
        part = index - self.first[np.searchsorted(self.kept, recording)]
        return part * length // parts, (part + 1) * length // parts

    def contents(self) -> tuple[Sequence[str], np.ndarray]:
        # Who is joined with whom counts, and not what the speakers are called.
        group = np.array([each[0] for each in self.siblings])[self.group] if self.join_samples else 0 * self.durations
        # A list that says the lengths may name files by the million; those it names are not opened.
        source = self.source if self.source.lengths is None else replace(self.source, file=None)
        return source.names, source.digests(np.stack([self.durations, group], axis=1))

    def fit_to(self, encoder: Any) -> None:
        self.frames, self.channels = encoder.positions, encoder.hidden_size
        if self.frames(self.sample_rate) == self.sample_rate:
            raise DataError(
                f"encoder.model: {type(encoder.model).__name__} needs a method positions(samples) that returns "
                "the number of frames"
            )
        shortest = int(self.lengths[self.lengths > 0].min(initial=self.max_samples))
        if self.frames(shortest) < 2:
            raise DataError(
                f"data.path={self.name}: the shortest recording, {shortest / self.sample_rate:.4f} s, gives "
                f"{self.frames(shortest)} frames of the encoder, too few to mask one and see another: "
                "raise data.min_seconds or data.max_seconds"
            )

    def processor(self, encoder: Any) -> Any:
        return feature_extractor(encoder, self.sample_rate, self.normalize)

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        first = self.recording[index]
        wave = self._read(index)
        failed = 0
        while len(wave) < self.join_samples:
            try:
                wave = np.concatenate([wave, self._read_any(rng.choice(self.siblings[self.group[first]]), rng)])
            except Exception as error:
                # One that cannot be read is named when its own turn comes; the first of them is not to blame.
                failed += 1
                if failed == 100:
                    raise ValueError(f"nothing to join to it can be read: {first_line(error)}") from error
        if self.frames(len(wave)) < 2:
            # Its header promised more. A batch is cropped to its shortest recording, so this one would spoil the others.
            raise ValueError(f"is too short: {len(wave)} samples")
        start = rng.integers(0, max(0, len(wave) - self.max_samples) + 1)
        return wave[start : start + self.max_samples]

    def _read(self, index: int) -> np.ndarray:
        """A recording, or the part of a long one, or the next one that is not silent."""
        recording = self.recording[index]
        parts = int(self.parts[recording])
        if parts == 1:
            return self._read_whole(recording)
        first = int(self.first[np.searchsorted(self.kept, recording)])
        for ahead in range(min(parts, 100)):
            start, stop = self._bounds(first + (index - first + ahead) % parts)
            try:
                return self._normalized(self.source.part(recording, int(start), int(stop)))
            except Silent as error:
                silent = error
        raise silent

    def _read_any(self, recording: int, rng: np.random.Generator) -> np.ndarray:
        """Of a recording, which may be one that is too short to be a sample, all or any part."""
        if self.parts[recording] == 1:
            return self._read_whole(recording)
        return self._read(int(self.first[np.searchsorted(self.kept, recording)] + rng.integers(self.parts[recording])))

    def _read_whole(self, recording: int) -> np.ndarray:
        return self._normalized(self.source.read(recording))

    def _normalized(self, wave: np.ndarray) -> np.ndarray:
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
        batch["mask"] = self.make_mask(draws, int(frames.max()), frames)
        padding_mask = np.arange(frames.max()) >= frames[:, None]
        if padding_mask.any():
            batch["padding_mask"] = padding_mask
        if self.channel_mask is not None:
            channels = Draws(~draws.seed, draws.epoch, draws.samples)
            batch["channel_mask"] = self.channel_mask(channels, self.channels)
        return batch
