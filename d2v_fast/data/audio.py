"""Speech: files, a manifest or a Hugging Face data set → 16 kHz crops → waveform and frame mask (method 3.1)."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np

from d2v_fast.choices import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from d2v_fast.data import (
    DataError,
    Plain,
    PretrainingData,
    Source,
    check_regular,
    find_files,
    first_line,
    is_local,
    load_media,
    read_preprocessing,
)
from d2v_fast.data.builtin import builtin_speech
from d2v_fast.data.cache import cached, files_state
from d2v_fast.data.shards import open_tars
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, SpanMask

log = logging.getLogger(__name__)

# Formats of libsndfile, which detects them by content and never runs code from a file.
SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
    *(".sph", ".nist", ".voc"),
)
MANIFESTS = (".tsv", ".csv", ".jsonl", ".json")
# Column of the file → column of the offset in it, as named by Hugging Face, Common Voice, NeMo and SpeechBrain.
FILES = {"file_name": None, "path": None, "audio_filepath": "offset", "wav": "start"}
SPEAKERS = ("speaker", "speaker_id", "client_id", "spk_id")
LENGTHS = "lengths"  # file in the cache
EPS = 1e-5
MAX_VALUES = 2**28  # per recording, 1 GiB: 4.6 h of mono at 16 kHz


class Silent(ValueError):
    """A recording, or part of one, is silent or constant."""


def read_audio(file: str | io.BytesIO, sample_rate: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Mono float32 waveform at `sample_rate`, from any rate and number of channels.

    Args:
        file: Path or bytes.
        sample_rate: In Hz.
        start: First sample of a part, at `sample_rate`; reached by seeking if the format allows it.
        stop: End of the part; None for the whole recording.

    Raises:
        Silent: All samples are equal.
        ValueError: The recording is empty, not finite or too long.
        OSError: The file does not exist.
        soundfile.LibsndfileError: libsndfile cannot read it.
    """
    import soxr

    with _open(file) as recording:
        rate, most = recording.samplerate, _most_frames(recording, sample_rate)
        if stop is not None:
            begin, end = (round(each * rate / sample_rate) for each in (start, stop))
            _seek(recording, begin)
            wave = recording.read(min(end - begin, most), dtype="float32", always_2d=True)
        else:
            # A header can claim any length, and a few kilobytes of FLAC can hold hours of silence.
            wave = recording.read(min(recording.frames, most + 1), dtype="float32", always_2d=True)
        if len(wave) > most:
            raise ValueError(
                f"holds more than {most} samples at {rate} Hz on {recording.channels} channels, 1 GiB as float32: "
                "split the recording"
            )
        wave = wave.mean(axis=1)
    if len(wave) == 0:
        raise ValueError("holds no sample" + f" after {start / sample_rate:.1f} s" * (start > 0))
    with np.errstate(over="ignore"):
        squares = wave @ wave
    if not np.isfinite(squares):  # then the variance would be infinite, and the normalised waveform silent
        raise ValueError("holds samples that are not finite, or whose squares are not")
    # For silence, each layer norm after the convolutions multiplies the gradient by up to 1/√eps, about 300.
    if wave.min() == wave.max():
        raise Silent(f"is silent or constant: all samples are {wave[0]:.3g}")
    return wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)


def count_samples(file: str | io.BytesIO, sample_rate: int) -> int:
    """The length at `sample_rate`: from the header or, if that claims implausibly many, from decoding."""
    with _open(file) as recording:
        frames, rate, most = recording.frames, recording.samplerate, _most_frames(recording, sample_rate)
        plausible = frames <= most or _has_last_frame(recording, frames)
    if not plausible:
        if not isinstance(file, str):
            file.seek(0)
        with _open(file) as recording:
            frames = len(recording.read(most + 1, dtype="float32", always_2d=True))
    return round(frames * sample_rate / rate)


def _has_last_frame(recording: Any, frames: int) -> bool:
    """Whether the last frame that the header claims can be read."""
    import soundfile

    try:
        recording.seek(frames - 1)
        return len(recording.read(1)) == 1
    except soundfile.LibsndfileError:
        return False


def _seek(recording: Any, frame: int) -> None:
    import soundfile

    try:
        # An MP3 frame needs bits of preceding frames, of up to twenty at low bit rates.
        before = min(frame, 20 * 1152) if recording.format == "MP3" else 0
        recording.seek(frame - before)
        if before:
            recording.read(before)
    except soundfile.LibsndfileError:  # the format does not support seeking
        while frame and (read := len(recording.read(min(frame, 2**20), dtype="float32"))):
            frame -= read


def _open(file: str | io.BytesIO) -> Any:
    """A `soundfile.SoundFile` to read once, whole or in part."""
    import soundfile

    # The name as bytes: soundfile encodes strings strictly, and not every file name is UTF-8.
    recording = soundfile.SoundFile(os.fsencode(check_regular(file)) if isinstance(file, str) else file)
    if recording.frames == 0 and recording.format in ("WAV", "WAVEX"):
        # The recording program did not write the lengths. With a RIFF length of 8, libsndfile reads to the end of the file.
        with open(file, "rb") if isinstance(file, str) else file as stream:
            stream.seek(0)
            content = bytearray(stream.read(4 * MAX_VALUES))
        content[4:8] = struct.pack("<I", 8)
        recording = soundfile.SoundFile(io.BytesIO(content))
    # Otherwise soundfile seeks after each read, which fails at the end of a file whose header lacks its length.
    recording.seekable = lambda: False
    return recording


def _most_frames(recording: Any, sample_rate: int) -> int:
    return int(MAX_VALUES / max(recording.channels, sample_rate / recording.samplerate))


def _manifest(path: str) -> list[dict[str, Any]]:
    """Rows of a manifest, each with a `file_name`.

    A manifest is a TSV of fairseq (root, then path and samples), a table (CSV, or TSV without quotes), JSON lines, or JSON of
    SpeechBrain (an object of rows by name).

    Raises:
        DataError: The manifest cannot be read, or a row names no file.
    """
    root = Path(path).parent
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # names may hold any bytes
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
        raise DataError(f"data.path={path}: not a manifest: {error}, possibly an unclosed quote") from error
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
                "only whole files are supported: split the recordings into files"
            )
        name = re.sub(r"^(\$[\w.]+|\{\w+\})/", "", row[key])  # SpeechBrain's $data_root/ or {data_root}/
        if number == 1 and not (root / name).exists() and (root / "clips" / name).exists():
            root = root / "clips"  # as in Common Voice
        row["file_name"] = str(root / name)
    return rows


def _lengths(rows: list[dict[str, Any]], sample_rate: int) -> np.ndarray | None:
    """Samples of each recording, from `duration` in seconds or fairseq's `samples`; None unless every row has a valid one."""
    try:
        values = [float(row["duration"]) * sample_rate if "duration" in row else int(row["samples"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        return None
    found = np.array(values, dtype=np.float64)
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
    """Open "builtin", a folder (with metadata.csv: file_name, label, speaker), a manifest, tar archives or a Hugging Face set.

    Manifests may have the columns in `FILES` and `SPEAKERS`, and `label`. Without metadata, a file's folder is both its label
    and its speaker.

    Raises:
        DataError: No recordings were found.
    """
    if path == "builtin":
        return builtin_speech(split)
    if "://" in path:
        raise DataError(
            f"data.path={path}: recordings are not streamed, because the samples depend on all of their lengths "
            "(data.min_seconds, join_seconds, whole_seconds); download them, or name the Hugging Face data set, which does"
        )
    path = os.path.expanduser(path)
    if is_local(path):
        table = os.path.join(path, "metadata.csv") if os.path.isdir(path) else path
        if os.path.isfile(table) and table.endswith(MANIFESTS):
            rows = _manifest(table)
            if not rows:
                raise DataError(f"data.path={path}: lists no files")
            outside = [row["file_name"] for row in rows if os.path.relpath(row["file_name"], path).startswith("..")]
            if outside and table != path:
                raise DataError(
                    f"{table}: names {outside[0]}, which is outside the folder; if that is intended, set data.path={table}"
                )
        else:
            found = find_files(path, (*SUFFIXES, ".parquet", ".tar"))
            rows = [{"file_name": file} for file in found if not file.lower().endswith((".parquet", ".tar"))]
            tars = [file for file in found if file.lower().endswith(".tar")]
            if tars and not rows:
                names, member, labels = open_tars(path, tars, SUFFIXES, cache)
                source = _source(names, member, sample_rate, labels, [Path(each).parent.name for each in names])
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

    recordings, opened = load_media(path, name, split, datasets.Audio, cache)

    def values(*names: str) -> list[str] | None:
        present = [n for n in names if n in recordings.features]
        return [str(value) for value in recordings[present[0]]] if present else None

    source = _source(opened.names, cast(Any, opened.file), sample_rate, values("label"), values(*SPEAKERS))
    return replace(source, state=opened.state, digest=opened.digest)


def _source(
    names: Sequence[str], file: Callable[[int], str | io.BytesIO], sample_rate: int, labels: list | None, speakers: list | None
) -> Source:
    def read(i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return read_audio(file(i), sample_rate, start, stop)

    return Source(names, read, labels, speakers, lambda i: count_samples(file(i), sample_rate), file, part=read)


def durations(source: Source, workers: int = 8) -> np.ndarray:
    """Samples of each recording, from the manifest or the headers if possible; 0 for recordings that cannot be read."""
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
    """Normalise an utterance to zero mean and unit variance."""
    return (wave - wave.mean()) / np.sqrt(wave.var() + EPS)


def feature_extractor(encoder: Any, sample_rate: int, normalize: bool) -> Any:
    """A feature extractor of transformers that pads and applies `standardize`."""
    from transformers import Wav2Vec2FeatureExtractor

    # Encoders whose first convolution has a group norm were trained without an attention mask (transformers' own rule).
    masks = getattr(getattr(encoder.model, "config", None), "feat_extract_norm", "layer") == "layer"
    return Wav2Vec2FeatureExtractor(sampling_rate=sample_rate, do_normalize=normalize, return_attention_mask=masks)


class AudioData(PretrainingData):
    """Crops of speech.

    Args:
        path: "builtin", a folder of recordings (with or without metadata.csv), a manifest (.tsv, .csv, .jsonl,
            .json), tar archives, or the name of a Hugging Face data set.
        name: Configuration of the Hugging Face data set, such as clean.
        split: Split of the Hugging Face data set.
        sample_rate: Rate in Hz that recordings are resampled to.
        min_seconds: Minimum length; shorter recordings are left out.
        max_seconds: Maximum length of a crop.
        whole_seconds: Longer recordings are split into equal parts of at most max_seconds; each part is a sample and is read
            without the rest.
        crop: Crop a batch to its shortest recording, as the authors do; otherwise recordings are padded.
        length_multiple: Make the number of frames a multiple of this, by cutting crops or padding recordings further.
            null = 32 on a GPU, so that few shapes occur, else 1.
        join_seconds: Join recordings of one speaker until they are this long, for data sets of short clips; 0 disables it.
        normalize: Normalise each recording, or each part of a long one, to zero mean and unit variance before cropping.
        batch_seconds: Fill batches up to this many seconds instead of up to train.batch_size samples.
        channel_prob: Share of the student's feature channels to zero in spans, if spans did not overlap.
        channel_length: Channels per span.
        cache: Folder for the lengths of the recordings; defaults to a folder in the Hugging Face cache.
        mask: How frames are masked.
        views: Masked views of each sample, for data2vec 2.0; null for a single mask, as in 1.0.
        seed: Seed of masks, crops and order.
    """

    def __init__(
        self,
        *,
        mask: SpanMask | RandomMask | ExactBlockMask,
        views: Annotated[int | None, Range("[1, inf)")] = None,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        sample_rate: PositiveInt = 16_000,
        min_seconds: NonNegativeFloat = 2.0,
        max_seconds: Annotated[float, Range("(0, 86400]")] = 20.0,
        whole_seconds: PositiveFloat = 60.0,
        crop: bool = True,
        length_multiple: Annotated[int | None, Range("[1, 1024]")] = None,
        join_seconds: NonNegativeFloat = 0.0,
        normalize: bool = True,
        batch_seconds: Annotated[float | None, Range("(0, inf)")] = None,
        channel_prob: Annotated[float, Range("[0, 1)")] = 0.0,
        channel_length: PositiveInt = 10,
        cache: str | None = None,
    ):
        super().__init__(mask=mask, views=views, seed=seed)
        self.name, self.sample_rate = path, sample_rate
        self.max_samples, self.crop, self.normalize = round(max_seconds * sample_rate), crop, normalize
        self.length_multiple = length_multiple or 1
        self.join_samples = round(join_seconds * sample_rate)
        self.max_batch_length = None if batch_seconds is None else batch_seconds * sample_rate
        self.channel_mask = SpanMask(channel_prob, channel_length) if channel_prob > 0 else None
        self.source = open_audio(path, name, split, sample_rate, cache)
        found = self.durations = self._durations([path, name, split], cache)
        # A manifest may list long recordings in a source that cannot read parts.
        long = (found > max(self.max_samples, whole_seconds * sample_rate)) & (self.source.part is not None)
        self.parts = np.where(long, -(-found // self.max_samples), 1)
        if self.join_samples:
            groups = self.source.groups or [""] * len(self.source)
            _, group = np.unique(np.asarray(groups), return_inverse=True)
            self.siblings = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
            self.group = group
            found = np.maximum(found, self.join_samples)
        # A recording with an unreadable header is kept: loading it reports it as broken, by name.
        self.kept = np.flatnonzero((found == 0) | (found >= min_seconds * sample_rate))
        if len(self.kept) == 0:
            raise DataError(
                f"data.path={path}: none of its {len(self.source)} recordings is as long as data.min_seconds={min_seconds}; "
                f"the longest has {found.max() / sample_rate:.2f} s. Lower it, or join short clips: data.join_seconds=2"
            )
        if len(self.kept) < len(self.source):
            log.info("left out %d recordings shorter than %g s", len(self.source) - len(self.kept), min_seconds)
        self.first = np.cumsum(self.parts[self.kept]) - self.parts[self.kept]  # index of each recording's first sample
        self.recording = np.repeat(self.kept, self.parts[self.kept])
        starts, stops = self._bounds(np.arange(len(self.recording)))
        self.lengths = np.where(
            self.parts[self.recording] > 1, stops - starts, np.minimum(found, self.max_samples)[self.recording]
        )

    def _durations(self, where: list[Any], cache: str | None) -> np.ndarray:
        """Samples of each recording, cached if they have to be measured."""
        source = self.source
        if source.lengths is not None or source.state is None:
            return durations(source)

        def measure(folder: Path) -> dict[str, Any]:
            (folder / LENGTHS).write_bytes(durations(source).data)
            return {}

        key = [os.path.abspath(where[0]), *where[1:], self.sample_rate]
        folder, _ = cached(cache, "durations", key, source.state(), measure)
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
        """Start and end of samples in their recordings."""
        recording = self.recording[index]
        length, parts = self.durations[recording], self.parts[recording]
        part = index - self.first[np.searchsorted(self.kept, recording)]
        return part * length // parts, (part + 1) * length // parts

    def contents(self) -> tuple[Sequence[str], np.ndarray]:
        # The grouping of recordings matters, not the names of the speakers.
        group = np.array([each[0] for each in self.siblings])[self.group] if self.join_samples else 0 * self.durations
        # A manifest with lengths may name millions of files; do not open them.
        source = self.source if self.source.lengths is None else replace(self.source, file=None)
        return source.names, source.digests(np.stack([self.durations, group], axis=1))

    def fit_to(self, encoder: Any) -> None:
        self.frames, self.channels = encoder.positions, encoder.hidden_size
        if self.frames(self.sample_rate) == self.sample_rate:
            raise DataError(
                f"encoder.model: {type(encoder.model).__name__} needs a method positions(samples) that returns "
                "the number of frames"
            )
        lengths = cast(np.ndarray, self.lengths)
        shortest = int(lengths[lengths > 0].min(initial=self.max_samples))
        if self.frames(shortest) < 2:
            raise DataError(
                f"data.path={self.name}: the shortest recording, {shortest / self.sample_rate:.4f} s, gives "
                f"{self.frames(shortest)} frames of the encoder, but at least 2 are needed, one masked and one visible: "
                "raise data.min_seconds or data.max_seconds"
            )
        longest = self.frames(self.max_samples)
        if isinstance(self.mask, SpanMask) and self.mask.length > longest:
            raise DataError(
                f"mask.length={self.mask.length}: one span would cover the {longest} frames of data.max_seconds; expected less"
            )

    files: tuple[str, ...] = ("sample_rate", "normalize")  # settings that `read_files` may find

    @staticmethod
    def largest_batch(settings: dict[str, Any], encoder: Any, size: int) -> tuple[tuple[int, ...], Any]:
        """Shape of the largest batch of `size` samples, and its positions."""
        if settings["batch_seconds"]:
            size = max(1, int(settings["batch_seconds"] / settings["max_seconds"]))
        samples = round(settings["max_seconds"] * settings["sample_rate"])
        return (size, samples), encoder.positions(samples)

    @staticmethod
    def read_files(name: str) -> dict[str, Any]:
        """The settings in `files` of the pretrained encoder `name`, as far as its files contain them."""
        from transformers import FeatureExtractionMixin

        found = read_preprocessing(FeatureExtractionMixin.get_feature_extractor_dict, name)
        return {"sample_rate": found.get("sampling_rate"), "normalize": found.get("do_normalize")}

    @staticmethod
    def make_processor(encoder: Any, settings: dict[str, Any]) -> Any:
        """`processor` from the settings, without the data."""
        return feature_extractor(encoder, settings["sample_rate"], settings["normalize"])

    def processor(self, encoder: Any) -> Any:
        return self.make_processor(encoder, vars(self))  # attributes have the names of their settings

    @staticmethod
    def for_probe(encoder: Any, settings: dict[str, Any]) -> tuple[Callable[..., Source], Callable[[list[Any]], Plain]]:
        """For a probe: functions that open recordings by path, name and split, and stack them uncropped, up to max_seconds."""
        frames = encoder.positions
        longest = round(settings["max_seconds"] * settings["sample_rate"])

        def open_split(path: str, name: str | None = None, split: str = "train") -> Source:
            source = open_audio(path, name, split, settings["sample_rate"])

            def read(i: int) -> np.ndarray:
                if frames(len(wave := source.read(i))) == 0:
                    raise ValueError(f"is too short: {len(wave)} samples")
                return wave

            return replace(source, read=read)

        def collate(samples: list[Any]) -> Plain:
            waves = [(standardize(wave) if settings["normalize"] else wave)[:longest] for wave in samples]
            lengths = [len(wave) for wave in waves]
            source = np.zeros((len(waves), max(lengths)), dtype=np.float32)
            for row, wave in zip(source, waves, strict=True):
                row[: len(wave)] = wave
            seen = np.array([frames(n) for n in lengths])
            padding_mask = np.arange(frames(max(lengths))) >= seen[:, None]
            return source, padding_mask if padding_mask.any() else None

        return open_split, collate

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        first = self.recording[index]
        wave = self._read(index)
        failed = 0
        while len(wave) < self.join_samples:
            try:
                wave = np.concatenate([wave, self._read_any(rng.choice(self.siblings[self.group[first]]), rng)])
            except Exception as error:
                # An unreadable recording is reported when it is loaded itself; this sample is not broken.
                failed += 1
                if failed == 100:
                    raise ValueError(f"no recording to join to it can be read: {first_line(error)}") from error
        if self.frames(len(wave)) < 2:
            # Shorter than its header claims. It must not enter a batch, which is cropped to its shortest recording.
            raise ValueError(f"is too short: {len(wave)} samples")
        start = rng.integers(0, max(0, len(wave) - self.max_samples) + 1)
        return wave[start : start + self.max_samples]

    def _read(self, index: int) -> np.ndarray:
        """A recording, or a part of a long one; if that part is silent, the next one that is not."""
        recording = self.recording[index]
        parts = int(self.parts[recording])
        if parts == 1:
            return self._read_whole(recording)
        first = int(self.first[np.searchsorted(self.kept, recording)])
        part: Any = self.source.part
        for ahead in range(min(parts, 100)):
            start, stop = self._bounds(first + (index - first + ahead) % parts)
            try:
                return self._normalized(part(recording, int(start), int(stop)))
            except Silent as error:
                silent = error
        raise silent

    def _read_any(self, recording: int, rng: np.random.Generator) -> np.ndarray:
        """A whole recording, which may be too short to be a sample, or a random part of a long one."""
        if self.parts[recording] == 1:
            return self._read_whole(recording)
        return self._read(int(self.first[np.searchsorted(self.kept, recording)] + rng.integers(self.parts[recording])))

    def _read_whole(self, recording: int) -> np.ndarray:
        return self._normalized(self.source.read(recording))

    def _normalized(self, wave: np.ndarray) -> np.ndarray:
        return standardize(wave) if self.normalize else wave

    def _rounded(self, samples: int) -> int:
        """Length of a batch whose shortest crop or longest recording has this many samples; equal for equal frames."""
        frames, multiple = self.frames(samples), self.length_multiple
        if multiple == 1 or (self.crop and frames < multiple):
            return samples
        if self.crop:
            return bisect_left(range(samples), frames // multiple * multiple, key=self.frames)
        return bisect_right(range(2**40), -(-frames // multiple) * multiple, key=self.frames) - 1

    def collate(self, samples: list[np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        lengths = np.array([len(wave) for wave in samples])
        batch: dict[str, np.ndarray] = {}
        if self.crop:
            lengths[:] = self._rounded(int(lengths.min()))
            offsets = draws.uniform(-1, 1)[:, 0]
            starts = [int(u * (len(wave) - lengths[0] + 1)) for u, wave in zip(offsets, samples, strict=True)]
            source = np.stack([wave[a : a + lengths[0]] for a, wave in zip(starts, samples, strict=True)])
        else:
            source = np.zeros((len(samples), self._rounded(int(lengths.max()))), dtype=np.float32)
            for row, wave in zip(source, samples, strict=True):
                row[: len(wave)] = wave
        batch["source"] = source.astype(np.float32)
        frames = np.array([self.frames(int(n)) for n in lengths])
        longest = self.frames(source.shape[1])
        batch["mask"] = self.make_mask(draws, longest, frames)
        padding_mask = np.arange(longest) >= frames[:, None]
        if padding_mask.any():
            batch["padding_mask"] = padding_mask
        if self.channel_mask is not None:
            channels = Draws(~draws.seed, draws.epoch, draws.samples)
            batch["channel_mask"] = self.channel_mask(channels, self.channels)
        return batch
