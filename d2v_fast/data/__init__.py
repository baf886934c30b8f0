"""Samples to batches: what every modality shares.

A batch is a dict of tensors named after the arguments of `Data2Vec.forward`: `source`, `mask`, `index`, and where they apply
`visible`, `target`, `padding_mask`, `target_padding_mask`, `channel_mask`. `broken` lists the samples that could not be read.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, SpanMask, TokenMask, visible_positions

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Key = tuple[int, int]  # (epoch, sample)
COMPARED = 10_000  # samples of a data set whose content is compared when a run resumes
EDGE = 2**16  # bytes at the start and at the end of a file that are compared


class DataError(ValueError):
    """Data that cannot be used; the message says what to change."""


@dataclass
class Source:
    """Where samples come from: names to show, a function that reads one, and what is known of each.

    Attributes:
        names: A path or "set[12]" for each sample.
        read: Reads one sample; whatever it raises marks the sample as broken.
        labels: A class for each sample, where known.
        groups: What belongs together (the speaker of a recording), where known.
        size: Length of a sample, where it can be had without reading all of it.
        file: Path or bytes of the file that a sample is read from; None where the name says all.
        part: Reads one from where to where, without reading all of it.
        lengths: Of all samples, where a list says them.
        state: Changes whenever the content of the samples may have.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    labels: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    size: Callable[[int], int] | None = None
    file: Callable[[int], str | io.BytesIO] | None = None
    part: Callable[[int, int, int], Any] | None = None
    lengths: np.ndarray | None = None
    state: Callable[[], str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def digests(self, more: np.ndarray | None = None) -> np.ndarray:
        """(samples,) int64, each a hash of the sample's name, and of its content for up to `COMPARED` samples spread evenly.

        Names count from where they differ, so that a data set may be moved. Content is the size of the file and its first
        and last `EDGE` bytes, so that the time does not grow with the data set.

        Args:
            more: (samples, any) int64, hashed with each sample.
        """
        count = len(self)
        shared = len(os.path.commonprefix([min(self.names), max(self.names)]))  # noqa: RUF071  of "set[0]" too
        every = -(-count // COMPARED)

        def digest(i: int) -> bytes:
            parts = [self.names[i][shared:].encode(errors="surrogatepass")]
            if self.file and i % every == 0:
                try:
                    parts.append(_edges(self.file(i)))
                except Exception as error:  # training names it when it gets there
                    parts.append(type(error).__name__.encode())
            if more is not None:
                parts.append(more[i].tobytes())
            return hashlib.blake2b(b"\0".join(parts), digest_size=8).digest()

        def digest_some(begin: int) -> bytes:
            return b"".join(digest(i) for i in range(begin, min(begin + 1000, count)))

        with ThreadPoolExecutor(8) as pool:
            return np.frombuffer(b"".join(pool.map(digest_some, range(0, count, 1000))), dtype=np.int64)


def _edges(file: str | io.BytesIO) -> bytes:
    with open(regular(file), "rb", buffering=0) if isinstance(file, str) else file as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        head = stream.read(EDGE)
        stream.seek(max(len(head), size - EDGE))
        return b"%d " % size + head + stream.read(EDGE)


class PretrainingData(Dataset):
    """Base of the data sets: keys (epoch, sample) in, one batch out, masks and augmentations a pure function of the keys.

    Data of your own, for `data.class`, are a class that sets `source` and `grid`, and overrides what is not as they need it:

        class Series(PretrainingData):
            def __init__(self, *, path: str, length: int = 512, **common):  # settings data.path and data.length
                super().__init__(**common)
                self.source = Source(names, read, labels)

            def fit_to(self, encoder):
                self.grid = encoder.positions(self.length)

    Args:
        mask: How positions are masked, one of `masking`.
        views: Masked views of each sample, for data2vec 2.0; null for one mask, as 1.0 takes it.
        seed: Seed of masks, augmentations and order.
    """

    seed: int = 0
    views: int | None = None
    mask: Any
    lengths: np.ndarray | None = None  # per sample, for bucketing
    grid: int | tuple[int, ...] | None = None  # positions of a sample, along each axis; None where samples differ
    source: Source

    def __init__(self, *, mask: Any, views: int | None = None, seed: int = 0):
        self.mask, self.views, self.seed = mask, views, seed

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """One augmented sample. Raises to mark it as broken."""
        return self.source.read(index)

    def collate(self, samples: list[Any], draws: Draws) -> dict[str, np.ndarray]:
        """Stack samples and mask them: `source`, `mask` and more, as numpy arrays."""
        return {"source": np.stack(samples), "mask": self.make_mask(draws, self.grid)}

    def make_mask(self, draws: Draws, *where: Any) -> np.ndarray:
        """Mask (B, T), or with `views` (B, views, T).

        Args:
            draws: Of the samples.
            where: What the mask takes: a grid, or a length and the unpadded lengths (B,).
        """
        where = [each[0] if isinstance(each, tuple) and len(each) == 1 else each for each in where]
        if self.views is None:
            return self.mask(draws, *where)
        where = [np.repeat(each, self.views) if isinstance(each, np.ndarray) else each for each in where]
        mask = self.mask(replace(draws, views=self.views), *where)
        return mask.reshape(len(draws), self.views, -1)

    def fit_to(self, encoder: Any) -> None:
        """Learn from the encoder what the data depend on, such as its number of positions.

        Raises:
            DataError: Data and encoder do not fit together.
        """

    @property
    def axes(self) -> int:
        """Axes of `grid`."""
        return len(self.grid) if isinstance(self.grid, tuple) else 1

    def check_mask(self) -> None:
        """Raise DataError unless the mask fits `grid`."""
        kind, where = type(self.mask), {BlockMask: "two axes", SpanMask: "one axis", TokenMask: "ids of a tokenizer"}
        if kind in where and (kind, self.axes) not in ((BlockMask, 2), (SpanMask, 1)):
            raise DataError(
                f"mask: {kind.__name__} is for {where[kind]}, and the grid of the data is {self.grid}; mask.kind=random and "
                "mask.kind=exact take any"
            )
        total = math.prod(self.grid) if isinstance(self.grid, tuple) else self.grid
        if kind is BlockMask and self.mask.count >= total:
            raise DataError(
                f"mask.count={self.mask.count}: a sample has {total} positions, and some must stay visible; the recipe masks "
                f"about 60 % of them, mask.count={round(0.6 * total)}"
            )
        longest = max(self.grid) if isinstance(self.grid, tuple) else self.grid
        if kind is ExactBlockMask and self.mask.length > longest:
            raise DataError(
                f"mask.length={self.mask.length}: one block would cover the whole grid {self.grid}; expected at most {longest}"
            )

    def processor(self, encoder: Any) -> Any:
        """Tokenizer, image processor or feature extractor of transformers: what makes inputs for the exported encoder."""
        return None

    def sample_name(self, index: int) -> str:
        return self.source.names[index]

    def contents(self) -> tuple[Sequence[str], np.ndarray]:
        """Names of what the samples are made of, and a digest (int64) of each. A run resumes with the same ones only."""
        return self.source.names, self.source.digests()

    def __getitems__(self, keys: list[Key]) -> Batch:
        epoch = keys[0][0]
        every = Draws(self.seed, epoch, [index for _, index in keys])
        samples, read, broken = [], [], []
        for row, (_, index) in enumerate(keys):
            try:
                samples.append(self.load(index, every.generator(row)))
                read.append(index)
            except Exception as error:
                broken.append((index, f"{self.sample_name(index)}: {first_line(error)}"))
        batch: Batch = {"epoch": epoch, "samples": read, "broken": broken}
        if samples:
            arrays = self.collate(samples, Draws(self.seed, epoch, read))
            if lacking := {"source", "mask"} - arrays.keys():
                raise DataError(
                    f"{type(self).__name__}.collate: gives no {' and no '.join(lacking)}; found {', '.join(arrays)}"
                )
            if self.views is not None:
                arrays["visible"] = visible_positions(arrays["mask"], arrays.get("padding_mask"))
            batch |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            batch["index"] = batch["mask"].flatten().nonzero().squeeze(1)
        return batch


class EpochBatches:
    """Endless batches of keys; the order is a pure function of (seed, epoch), and ranks take turns.

    Batch i of all epochs, one after the other, goes to rank i modulo `world`. So N ranks with M batches a step are given the
    same ones in each step whatever N and M are, as long as N × M stays.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples of one rank's batch.
        seed: Seed of the order.
        rank, world: This process among all.
        lengths: (num_samples,) lengths; samples of similar length then share a batch.
        max_batch_length: Fill batches up to this length, of the longest times their number, instead of up to `batch_size`.
        start: Batches of this rank to skip, for a run that goes on.

    Raises:
        DataError: An epoch has fewer batches than there are ranks.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        lengths: np.ndarray | None = None,
        max_batch_length: float | None = None,
        start: int = 0,
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world, self.lengths = rank, world, lengths
        self.max_batch_length, self.start = max_batch_length, start

    def __iter__(self) -> Iterator[list[Key]]:
        # All epochs have as many batches.
        epoch, following = divmod(self.start * self.world + self.rank, len(self.epoch(0)))
        while True:
            batches = self.epoch(epoch)
            while following < len(batches):
                yield [(epoch, int(index)) for index in batches[following]]
                following += self.world
            following -= len(batches)
            epoch += 1

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, of all ranks."""
        rng = np.random.default_rng([self.seed % 2**64, epoch])
        order = rng.permutation(self.num_samples)
        if self.lengths is None:
            batches = _cut(order, self.batch_size)
        elif self.max_batch_length is None:
            batches = self._by_length(order, self.batch_size)
        else:
            batches = self._filled(order)
        if self.lengths is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        if len(batches) < self.world:
            raise DataError(
                f"{self.num_samples} samples make {len(batches)} batches, fewer than the {self.world} processes: "
                "use fewer processes or a smaller train.batch_size"
            )
        return batches

    def _by_length(self, order: np.ndarray, size: int) -> list[np.ndarray]:
        """Sorted within windows of 100 batches: little padding or cropping, and still a random order."""
        batches = []
        for begin in range(0, len(order), 100 * size):
            part = order[begin : begin + 100 * size]
            batches += _cut(part[np.argsort(self.lengths[part], kind="stable")], size)
        return batches

    def _filled(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches of as many samples as fit by the longest of them.

        Samples of which equally many fit are a class, and what is left of it goes to the next longer one. How many batches
        there are is the same for every order.
        """
        fitting = np.maximum(1, self.max_batch_length // np.maximum(1, self.lengths[order])).astype(np.int64)
        batches, rest = [], order[:0]
        order = order[np.argsort(-fitting, kind="stable")]
        sizes, begins = np.unique(-np.sort(-fitting), return_index=True)
        for size, part in zip(sizes[::-1], np.split(order, np.sort(begins)[1:]), strict=True):
            part = np.concatenate([rest, part])
            whole = len(part) // size * size
            if whole:
                batches += self._by_length(part[:whole], size)
            rest = part[whole:]
        return batches + [rest] * (len(rest) > 0)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of one size, of which a data set has one at least; what is left over waits for another epoch."""
    size = min(size, len(order))
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def make_loader(
    data: PretrainingData, batches: EpochBatches, workers: int, prefetch: int = 4, pin_memory: bool = False
) -> DataLoader:
    """A DataLoader over whole batches; see `_hand_over` for what they hold when they come from a worker."""
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        log.warning("train.workers=%d: this system cannot fork a process; the training process loads the data", workers)
        workers = 0
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        # Copies of this process: functions that read samples cannot be pickled, as other ways of starting one would.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else it would draw from the one of dropout, and a run that goes on would draw again
        collate_fn=_hand_over,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
    )


def _hand_over(batch: Batch) -> Batch:
    """A batch as a worker passes it on: tensors in shared memory or, where that is full, arrays, which go through a pipe.

    torch would use shared memory in a thread of the worker, and the run would wait for ever for a batch that did not fit.
    """
    if get_worker_info() is not None:
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                try:
                    value.share_memory_()
                except RuntimeError:
                    batch[name] = value.numpy()
    return batch


def find_files(path: str, suffixes: Sequence[str]) -> list[str]:
    """Files with one of `suffixes` below a folder (hidden ones left out), or those a path or pattern names, sorted.

    What else is there is counted in the log.

    Raises:
        DataError: Nothing is there, or nothing of this kind.
    """
    if os.path.isdir(path):
        found = _below(path, set())
    elif os.path.exists(path):
        found = [path]
    elif glob.has_magic(path):
        found = [file for file in glob.glob(path, recursive=True) if not os.path.isdir(file)]
    else:
        raise DataError(f"data.path={path}: no such file or folder")
    kept, others = [], Counter()
    for file in found:
        if not os.fspath(file).lower().endswith(tuple(suffixes)):
            others[os.path.splitext(file)[1].lower() or "without an ending"] += 1
        elif _may_block(file):
            others["FIFO, socket or device"] += 1
        else:
            kept.append(os.fspath(file))
    counted = ", ".join(f"{count} {kind}" for kind, count in others.most_common(9)) + ", …" * (len(others) > 9)
    if not kept:
        endings = ", ".join(suffixes)
        raise DataError(f"data.path={path}: no file with one of the endings {endings}; found {counted or 'no file at all'}")
    if others:
        log.info("data.path=%s: %d files of other kinds are left out: %s", path, others.total(), counted)
    return sorted(kept)


def _below(folder: str, seen: set[str]) -> Iterator[os.DirEntry]:
    # A link to a folder above would lead round for ever.
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        log.warning("left out: %s", error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
            yield from _below(entry.path, seen)
        else:
            yield entry


def _may_block(file: str | os.DirEntry) -> bool:
    """Whether opening the file may wait for ever, as it is no regular one. A link to nothing fails at once."""
    if isinstance(file, os.DirEntry) and file.is_file(follow_symlinks=False):  # without asking the disk
        return False
    return os.path.exists(file) and not os.path.isfile(file)


def regular(file: str) -> str:
    """The same path, of a file that can be opened without waiting for another process.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is a folder, FIFO, socket or device.
    """
    if not os.path.exists(file):
        raise FileNotFoundError("no such file")
    if not os.path.isfile(file):
        raise ValueError("is not a regular file")
    return file


def as_patterns(files: list[str]) -> list[str]:
    """Patterns that match these files alone, which is how `datasets` takes names.

    Raises:
        DataError: A name that no pattern matches.
    """
    for file in files:
        if "::" in file:  # to fsspec a file inside of another
            raise DataError(f"data.path={file}: cannot be read: '::' in its name means something else to datasets; rename it")
    return [glob.escape(file) for file in files]


def is_local(path: str) -> bool:
    """Whether `path` means files here, and not a data set by its Hugging Face name or a folder written by `save_to_disk`."""
    if is_saved(path):
        return False
    # An ending makes a file of it, but for the version in a name like user/corpus-2.5.
    looks_local = path.startswith((".", "/", "~")) or path.endswith(os.sep) or Path(path).suffix[1:].isalpha()
    return os.path.exists(os.path.expanduser(path)) or glob.has_magic(path) or looks_local


def is_saved(path: str) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    folder = Path(path).expanduser()
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / f"{part}.json").is_file() for part in ("state", "dataset_info")
    )


def load_hub(path: str, name: str | None, split: str) -> Any:
    """A Hugging Face data set: by name, stored here as parquet files, or written by `save_to_disk`.

    Raises:
        DataError: It cannot be loaded; the message says what was tried.
    """
    import datasets

    try:
        if is_saved(path):
            found = datasets.load_from_disk(path)
            splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
            if split not in splits:
                raise DataError(f"data.split={split}: {path} holds {', '.join(splits)}; choose one of them")
            return splits[split].with_format(None)
        if os.path.isdir(path):
            return datasets.load_dataset(path, name, split=split)
        if is_local(path):
            return datasets.load_dataset("parquet", data_files=as_patterns(find_files(path, (".parquet",))), split="train")
        return datasets.load_dataset(path, name, split=split)
    except DataError:
        raise
    except Exception as error:
        tried = f"as a Hugging Face data set (name={name}, split={split}) it cannot be loaded: {first_line(error)}"
        here = is_local(path) or is_saved(path)
        raise DataError(f"data.path={path}: {'' if here else 'no such file or folder here, and '}{tried}") from error


def load_media(path: str, name: str | None, split: str, kind: type) -> tuple[Any, Callable[[int], str | io.BytesIO]]:
    """A data set by `load_hub`, and a function that gives the file (its bytes or its path) in a row, not decoded.

    The files are in the first column of type `kind`, or else in the first column of bytes or of structs {bytes, path}, as in
    parquet files that `datasets` did not write.

    Args:
        kind: `datasets.Image` or `datasets.Audio`.

    Raises:
        DataError: The set cannot be loaded, or no column holds files.
    """
    data = load_hub(path, name, split)
    typed = [column for column, feature in data.features.items() if isinstance(feature, kind)]
    columns = typed or [column for column, feature in data.features.items() if _holds_bytes(feature)]
    if not columns:
        wanted = kind.__name__.lower()
        raise DataError(
            f"data.path={path}: no column of type {wanted}, binary or struct<bytes, path>; found {describe_columns(data)}"
        )
    if len(columns) > 1:
        log.warning("%s: %s may all hold files; column %s is read", path, ", ".join(columns), columns[0])
    files = data.select_columns(columns[:1]).cast_column(columns[0], kind(decode=False))

    def file(index: int) -> str | io.BytesIO:
        entry = files[index][columns[0]] or {}
        if entry.get("bytes"):
            return io.BytesIO(entry["bytes"])
        if not entry.get("path"):
            raise ValueError("is empty")
        if not os.path.isfile(entry["path"]):
            raise FileNotFoundError(f"no such file: {entry['path']}")
        return entry["path"]

    return data, file


def _holds_bytes(feature: Any) -> bool:
    kind = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def describe_columns(data: Any) -> str:
    """Names and types of the columns of a `datasets.Dataset`, for messages."""
    return ", ".join(f"{field.name} ({field.type})" for field in data.features.arrow_schema)


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows on further lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
