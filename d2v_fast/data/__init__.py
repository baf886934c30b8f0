"""From samples to batches: the parts that all modalities share.

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
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from d2v_fast.choices import Range
from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, SpanMask, TokenMask, visible_positions

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Key = tuple[int, int]  # (epoch, sample)
Plain = tuple[np.ndarray, np.ndarray | None]  # samples without augmentation, and their padding mask
COMPARED = 10_000  # samples of a data set whose content is compared when a run resumes
EDGE = 2**16  # bytes at the start and at the end of a file that are compared


class DataError(ValueError):
    """Data that cannot be used; the message says what to change."""


@dataclass
class Source:
    """Where samples come from: their names, a function that reads one, and optional metadata.

    Attributes:
        names: A path or "set[12]" for each sample.
        read: Reads one sample; any exception marks the sample as broken.
        labels: The class of each sample, if known.
        groups: The group of each sample (the speaker of a recording), if known.
        size: Gives the length of a sample, if it can be found without reading the whole sample.
        file: Gives the path or the bytes of the file that a sample is read from; None if samples do not come from files.
        part: Reads a sample from a start to a stop position, without reading the rest.
        lengths: Lengths of all samples, if a manifest lists them.
        state: Gives a fingerprint that changes whenever the content of the samples may have changed.
        digest: Gives bytes that change with the content of a sample, if that takes less than reading its file.
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
    digest: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def digests(self, more: np.ndarray | None = None) -> np.ndarray:
        """(samples,) int64, a hash of each sample's name and, for up to `COMPARED` evenly spaced samples, of its content.

        The common prefix of the names is ignored, so the data set may be moved. Of the content only the file size and the first
        and last `EDGE` bytes are hashed, which bounds the time for large data sets.

        Args:
            more: (samples, any) int64, hashed with each sample.
        """
        count = len(self)
        shared = len(os.path.commonprefix([min(self.names), max(self.names)]))  # noqa: RUF071  names such as "set[0]" too
        stride = -(-count // COMPARED)

        def digest(i: int) -> bytes:
            parts = [self.names[i][shared:].encode(errors="surrogatepass")]
            if self.file and i % stride == 0:
                try:
                    parts.append(self.digest(i) if self.digest else _file_edges(self.file(i)))
                except Exception as error:  # training reports it when it reads the sample
                    parts.append(type(error).__name__.encode())
            if more is not None:
                parts.append(more[i].tobytes())
            return hashlib.blake2b(b"\0".join(parts), digest_size=8).digest()

        def digest_some(begin: int) -> bytes:
            return b"".join(digest(i) for i in range(begin, min(begin + 1000, count)))

        with ThreadPoolExecutor(8) as pool:
            return np.frombuffer(b"".join(pool.map(digest_some, range(0, count, 1000))), dtype=np.int64)


def _file_edges(file: str | io.BytesIO) -> bytes:
    with open(check_regular(file), "rb", buffering=0) if isinstance(file, str) else file as stream:
        return edges(stream, 0, stream.seek(0, os.SEEK_END))


def edges(stream: Any, begin: int, end: int) -> bytes:
    """The size of a range of a binary stream, and its first and last `EDGE` bytes."""
    stream.seek(begin)
    head = stream.read(min(EDGE, end - begin))
    stream.seek(max(begin + len(head), end - EDGE))
    return b"%d " % (end - begin) + head + stream.read(end - stream.tell())


class PretrainingData(Dataset[Any]):
    """Base class of the data sets: maps keys (epoch, sample) to a batch. Masks and augmentations depend only on the keys.

    To use your own data through `data.class`, derive a class that sets `source` and `grid`, and override methods as needed:

        class Series(PretrainingData):
            def __init__(self, *, path: str, length: int = 512, **common):  # settings data.path and data.length
                super().__init__(**common)
                self.source = Source(names, read, labels)

            def fit_to(self, encoder):
                self.grid = encoder.positions(self.length)

    Args:
        mask: How positions are masked, a class of `masking`.
        views: Masked views of each sample, for data2vec 2.0; null for a single mask, as in 1.0.
        seed: Seed of masks, augmentations and order.
    """

    seed: int = 0
    views: int | None = None
    mask: Any
    lengths: np.ndarray | None = None  # of all samples, for bucketing
    grid: int | tuple[int, ...] | None = None  # positions of a sample along each axis; None if samples differ in size
    source: Source
    stream: Any = None  # `streaming.Stream` of data whose number of samples is unknown
    map: Callable[..., Any] = map  # how the samples of a batch are loaded

    def __init__(self, *, mask: Any, views: Annotated[int | None, Range("[1, inf)")] = None, seed: int = 0):
        self.mask, self.views, self.seed = mask, views, seed

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """One augmented sample. Any exception marks the sample as broken."""
        return self.source.read(index)

    def collate(self, samples: list[Any], draws: Draws) -> dict[str, np.ndarray]:
        """Stack and mask samples: a dict of numpy arrays with at least `source` and `mask`."""
        return {"source": np.stack(samples), "mask": self.make_mask(draws, self.grid)}

    def make_mask(self, draws: Draws, *where: Any) -> np.ndarray:
        """Mask (B, T), or with `views` (B, views, T).

        Args:
            draws: Random numbers of the samples.
            where: Arguments of the mask: a grid, or a length and the unpadded lengths (B,).
        """
        sizes = [each[0] if isinstance(each, tuple) and len(each) == 1 else each for each in where]
        if self.views is None:
            return self.mask(draws, *sizes)
        sizes = [np.repeat(each, self.views) if isinstance(each, np.ndarray) else each for each in sizes]
        mask = self.mask(replace(draws, views=self.views), *sizes)
        return mask.reshape(len(draws), self.views, -1)

    def fit_to(self, encoder: Any) -> None:
        """Read what the data need from the encoder, such as its number of positions.

        Raises:
            DataError: Data and encoder do not fit together.
        """

    @property
    def axes(self) -> int:
        """Axes of `grid`."""
        return len(self.grid) if isinstance(self.grid, tuple) else 1

    def check_mask(self) -> None:
        """Raise DataError unless the mask fits `grid`, if there is one."""
        if self.grid is None:
            return
        sides = self.grid if isinstance(self.grid, tuple) else (self.grid,)
        kind, where = type(self.mask), {BlockMask: "two axes", SpanMask: "one axis", TokenMask: "ids of a tokenizer"}
        if kind in where and (kind, self.axes) not in ((BlockMask, 2), (SpanMask, 1)):
            raise DataError(
                f"mask: {kind.__name__} needs {where[kind]}, but the grid of the data is {self.grid}; use mask.kind=random or "
                "mask.kind=exact, which work on any grid"
            )
        total = math.prod(sides)
        if kind is BlockMask and self.mask.count >= total:
            raise DataError(
                f"mask.count={self.mask.count}: a sample has {total} positions, and some must stay visible; the recipe masks "
                f"about 60 % of them, mask.count={round(0.6 * total)}"
            )
        if kind in (ExactBlockMask, SpanMask) and self.mask.length > max(sides):
            one = "block" if kind is ExactBlockMask else "span"
            raise DataError(
                f"mask.length={self.mask.length}: one {one} would cover the whole grid {self.grid}; "
                f"expected at most {max(sides)}"
            )

    def processor(self, encoder: Any) -> Any:
        """The tokenizer, image processor or feature extractor of transformers that makes inputs for the exported encoder."""
        return None

    def sample_name(self, index: int) -> str:
        return self.source.names[index]

    def contents(self) -> tuple[Sequence[str], np.ndarray]:
        """Names of the underlying items and a digest (int64) of each. A run only resumes with the same ones."""
        if self.stream:
            return [self.stream.path], self.stream.digest()
        return self.source.names, self.source.digests()

    def finish(self, batch: Batch) -> Batch:
        """Complete a batch of `collate`, as tensors; by default it is complete.

        With a GPU this runs there, after the copy, so that workers and copy handle less: images as uint8, for instance.
        """
        return batch

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.finish(self.unfinished(keys))

    def unfinished(self, keys: list[Key]) -> Batch:
        """The batch before `finish`."""
        epoch = keys[0][0]
        draws = Draws(self.seed, epoch, [index for _, index in keys])

        # All at once, while their code is in the cache, from which decoding an image evicts it.
        generators = [draws.generator(row) for row in range(len(keys))]

        def load(row: int) -> Any:
            try:
                return self.load(keys[row][1], generators[row])
            except Exception as error:
                return _Broken(error)

        samples, loaded, broken = [], [], []
        for (_, index), sample in zip(keys, self.map(load, range(len(keys))), strict=True):
            if isinstance(sample, _Broken):
                broken.append((index, f"{self.sample_name(index)}: {first_line(sample.error)}"))
            else:
                samples.append(sample)
                loaded.append(index)
        batch: Batch = {"epoch": epoch, "samples": loaded, "broken": broken}
        if samples:
            arrays = self.collate(samples, Draws(self.seed, epoch, loaded))
            if missing := {"source", "mask"} - arrays.keys():
                raise DataError(
                    f"{type(self).__name__}.collate: returns no {' and no '.join(missing)}; found {', '.join(arrays)}"
                )
            if self.views is not None:
                arrays["visible"] = visible_positions(arrays["mask"], arrays.get("padding_mask"))
            batch |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            batch["index"] = batch["mask"].flatten().nonzero().squeeze(1)
        return batch


@dataclass
class _Broken:
    error: Exception


class Unfinished(Dataset[Any]):
    """The batches of a data set before `finish`."""

    def __init__(self, data: PretrainingData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, keys: list[Key]) -> Batch:
        return self.data.unfinished(keys)


class EpochBatches:
    """Endless stream of batches of keys. The order is a pure function of (seed, epoch); batches are dealt to ranks in turn.

    Batches are numbered through all epochs, and batch i goes to rank i modulo `world`. N ranks with M batches per step thus
    process the same samples in each step for every N and M with the same N × M.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples per batch of one rank.
        seed: Seed of the order.
        rank, world: Index of this process and number of processes.
        lengths: (num_samples,) lengths; if given, batches hold samples of similar length.
        max_batch_length: Fill batches up to this padded length (longest sample × samples) instead of up to `batch_size`.
        start: Batches of this rank to skip, for a resumed run.

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
        self.rank, self.world, self.start = rank, world, start
        self.lengths: Any = lengths
        self.max_batch_length: Any = max_batch_length

    def __iter__(self) -> Iterator[list[Key]]:
        # All epochs have the same number of batches.
        epoch, position = divmod(self.start * self.world + self.rank, len(self.epoch(0)))
        while True:
            batches = self.epoch(epoch)
            while position < len(batches):
                yield [(epoch, int(index)) for index in batches[position]]
                position += self.world
            position -= len(batches)
            epoch += 1

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch, for all ranks."""
        rng = np.random.default_rng([self.seed % 2**64, epoch])
        order = rng.permutation(self.num_samples)
        if self.lengths is None:
            batches = _cut(order, self.batch_size)
        elif self.max_batch_length is None:
            batches = self._by_length(order, self.batch_size)
        else:
            batches = self._by_total_length(order)
        if self.lengths is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        if len(batches) < self.world:
            raise DataError(
                f"{self.num_samples} samples make {len(batches)} batches, fewer than the {self.world} processes: "
                "use fewer processes or a smaller train.batch_size"
            )
        return batches

    def _by_length(self, order: np.ndarray, size: int) -> list[np.ndarray]:
        """Sort within windows of 100 batches: little padding or cropping, but still a random order."""
        batches = []
        for begin in range(0, len(order), 100 * size):
            part = order[begin : begin + 100 * size]
            batches += _cut(part[np.argsort(self.lengths[part], kind="stable")], size)
        return batches

    def _by_total_length(self, order: np.ndarray) -> list[np.ndarray]:
        """Fill batches up to `max_batch_length`.

        Samples are bucketed by how many of their length fit into a batch. What does not fill a batch moves to the bucket with
        the next longer samples. The number of batches does not depend on the order.
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
    """Batches of one size, at least one per data set; the remainder is dropped for this epoch."""
    size = min(size, len(order))
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def make_loader(
    data: PretrainingData | Unfinished, batches: EpochBatches | IterableDataset[Any], workers: int, pin_memory: bool = False
) -> DataLoader[Any]:
    """A DataLoader over whole batches; one worker for those of a stream (`StreamBatches`), whose threads decode."""
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        log.warning("train.workers=%d: this system cannot fork processes; the training process loads the data", workers)
        workers = 0
    streamed = isinstance(batches, IterableDataset)
    workers = min(workers, 1) if streamed else workers
    return DataLoader(
        cast(Any, batches if streamed else data),
        **{"batch_size": None} if streamed else {"batch_sampler": batches},
        num_workers=workers,
        # Other start methods would pickle the functions that read samples, which is not possible.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the default one is dropout's, and a resumed run would advance it once more
        collate_fn=_share_memory,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def _share_memory(batch: Any) -> Batch:
    """In a worker, move tensors to shared memory; if that is full, turn them into arrays, which go through a pipe.

    torch would move them in a background thread of the worker, and a failure there would make the run wait forever.
    """
    if get_worker_info() is not None:
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                try:
                    value.share_memory_()
                except RuntimeError:
                    batch[name] = value.numpy()
    return batch


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch, on the device."""
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}


def expand_braces(pattern: str) -> list[str]:
    """The strings that a pattern with braces stands for, as in bash: "{a,b}", "{0000..0099}", "{0..90..10}", nested ones.

    Braces without comma or range stand for themselves.
    """
    for opened, inner, closed in _braces(pattern):
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", inner):
            first, last, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1) or 1
            padded = any(re.match(r"-?0\d", each) for each in numbers.group(1, 2))
            width = max(map(len, numbers.group(1, 2))) if padded else 0
            sign = 1 if first <= last else -1
            choices = [f"{number:0{width}d}" for number in range(first, last + sign, sign * step)]
        elif len(choices := _split_commas(inner)) == 1:
            continue
        rest = expand_braces(pattern[closed + 1 :])
        return [pattern[:opened] + middle + end for choice in choices for middle in expand_braces(choice) for end in rest]
    return [pattern]


def _braces(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Start, content and end of the pairs of braces, outer ones before those inside."""
    for opened, character in enumerate(pattern):
        depth = 0
        for i in range(opened, len(pattern) if character == "{" else opened):
            depth += (pattern[i] == "{") - (pattern[i] == "}")
            if depth == 0:
                yield opened, pattern[opened + 1 : i], i
                break


def _split_commas(text: str) -> list[str]:
    """Split at commas outside of braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def find_files(path: str, suffixes: Sequence[str]) -> list[str]:
    """Sorted files with one of `suffixes`: those below a folder (hidden ones excepted), or those that match a path or pattern.

    Patterns may have braces (`expand_braces`), wildcards, or both. Other files are counted in the log.

    Raises:
        DataError: The path or a member of braces does not exist, or no file has one of the suffixes.
    """
    if os.path.isdir(path):
        found: Iterable[str | os.DirEntry[str]] = _walk(path, set())
    elif os.path.exists(path):
        found = [path]
    elif len(members := expand_braces(path)) > 1:
        matches = {member: [member] if os.path.exists(member) else glob.glob(member, recursive=True) for member in members}
        if missing := [member for member in members if not matches[member]]:
            first = ", ".join(missing[:5]) + ", …" * (len(missing) > 5)
            raise DataError(f"data.path={path}: {len(missing)} of the {len(members)} files it names do not exist: {first}")
        found = {file for files in matches.values() for file in files if not os.path.isdir(file)}
    elif glob.has_magic(path):
        found = [file for file in glob.glob(path, recursive=True) if not os.path.isdir(file)]
    else:
        raise DataError(f"data.path={path}: no such file or folder")
    kept, others = [], Counter[str]()
    for file in found:
        if not os.fspath(file).lower().endswith(tuple(suffixes)):
            others[os.path.splitext(file)[1].lower() or "without an extension"] += 1
        elif _may_block(file):
            others["FIFO, socket or device"] += 1
        else:
            kept.append(os.fspath(file))
    counted = ", ".join(f"{count} {kind}" for kind, count in others.most_common(9)) + ", …" * (len(others) > 9)
    if not kept:
        expected = ", ".join(suffixes)
        raise DataError(f"data.path={path}: no file with one of the extensions {expected}; found {counted or 'no file at all'}")
    if others:
        log.info("data.path=%s: %d files of other types are left out: %s", path, others.total(), counted)
    return sorted(kept)


def _walk(folder: str, seen: set[str]) -> Iterator[os.DirEntry[str]]:
    # A link to a parent folder would recurse forever.
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
            yield from _walk(entry.path, seen)
        else:
            yield entry


def _may_block(file: str | os.DirEntry[str]) -> bool:
    """Whether opening the file may block forever: it exists but is not a regular file. A dangling link fails at once."""
    if isinstance(file, os.DirEntry) and file.is_file(follow_symlinks=False):  # needs no system call
        return False
    return os.path.exists(file) and not os.path.isfile(file)


def check_regular(file: str) -> str:
    """Return `file` if it is a regular file, which can be opened without waiting for another process.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is a folder, FIFO, socket or device.
    """
    if not os.path.exists(file):
        raise FileNotFoundError("no such file")
    if not os.path.isfile(file):
        raise ValueError("is not a regular file")
    return file


def as_patterns(files: list[str]) -> list[str]:
    """Patterns that match exactly these files; `datasets` treats every name as a pattern.

    Raises:
        DataError: A name cannot be written as a pattern.
    """
    for file in files:
        if "::" in file:  # fsspec's notation for a file inside another
            raise DataError(f"data.path={file}: cannot be read: datasets reads '::' in a name as a chained URL; rename it")
    return [glob.escape(file) for file in files]


def is_local(path: str) -> bool:
    """Whether `path` means local files, as opposed to a Hugging Face name or a folder written by `save_to_disk`."""
    if is_saved(path):
        return False
    # A path with an extension is a file, except for a version number as in user/corpus-2.5.
    looks_local = path.startswith((".", "/", "~")) or path.endswith(os.sep) or Path(path).suffix[1:].isalpha()
    pattern = glob.has_magic(path) or len(expand_braces(path)) > 1
    return os.path.exists(os.path.expanduser(path)) or pattern or looks_local


def is_saved(path: str) -> bool:
    """Whether this folder was written by `save_to_disk` of `datasets`."""
    folder = Path(path).expanduser()
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / f"{part}.json").is_file() for part in ("state", "dataset_info")
    )


def load_hub(path: str, name: str | None, split: str) -> Any:
    """A Hugging Face data set, from its name, local parquet files or a folder written by `save_to_disk`.

    Raises:
        DataError: It cannot be loaded; the message says what was tried.
    """
    import datasets

    with _loading(path, name, split):
        if is_saved(path):
            found = datasets.load_from_disk(path)
            splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
            if split not in splits:
                raise DataError(f"data.split={split}: {path} has {', '.join(splits)}; choose one of them")
            return splits[split].with_format(None)
        if is_local(path) and not os.path.isdir(path):
            return datasets.load_dataset("parquet", data_files=as_patterns(find_files(path, (".parquet",))), split="train")
        return datasets.load_dataset(path, name, split=split)


@contextmanager
def _loading(path: str, name: str | None, split: str) -> Iterator[None]:
    """Turn exceptions of `datasets` into DataErrors."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        failed = f"cannot be loaded as a Hugging Face data set (name={name}, split={split}): {first_line(error)}"
        local = is_local(path) or is_saved(path)
        raise DataError(f"data.path={path}: {'' if local else 'no such file or folder here, and it '}{failed}") from error


def load_media(path: str, name: str | None, split: str, kind: type, cache: str | None = None) -> tuple[Any, Source]:
    """A data set, and its rows as a `Source` of undecoded files, as bytes or paths; `read` returns them too.

    Local parquet files are read in place (`Parquet`), everything else by `load_hub`. Files are taken from the first column of
    type `kind` or, failing that, from the first column of bytes or of structs {bytes, path}, as in parquet files of other
    writers.

    Args:
        kind: `datasets.Image` or `datasets.Audio`.
        cache: data.cache.

    Raises:
        DataError: The data set cannot be loaded, or no column holds files.
    """
    from d2v_fast.data.parquet import Parquet

    parquet = _local_parquet(path, name, split)
    data: Any = Parquet(path, *parquet, cache) if parquet else load_hub(path, name, split)
    column = media_column(path, data.features, kind)
    places: Any = data.index(column) if parquet else None
    files: Any = None if parquet else data.select_columns([column]).cast_column(column, kind(decode=False))

    def file(index: int) -> str | io.BytesIO:
        return media_file(data.value(index, column, places[index].tolist()) if parquet else files[index][column])

    if parquet:
        digest = lambda i: data.digest(i, column, places[i].tolist())  # noqa: E731
        return data, Source(data.names, file, file=file, state=data.state, digest=digest)
    return data, Source([f"{path}[{i}]" for i in range(len(data))], file, file=file, state=lambda: data._fingerprint)


def media_column(path: str, features: Any, kind: type) -> str:
    """The column of `datasets.Features` that holds the files of `load_media`.

    Raises:
        DataError: There is none.
    """
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    columns = typed or [column for column, feature in features.items() if _holds_bytes(feature)]
    if not columns:
        wanted = kind.__name__.lower()
        found = ", ".join(f"{field.name} ({field.type})" for field in features.arrow_schema)
        raise DataError(f"data.path={path}: no column of type {wanted}, binary or struct<bytes, path>; found {found}")
    if len(columns) > 1:
        log.warning("%s: columns %s may all hold files; using column %s", path, ", ".join(columns), columns[0])
    return columns[0]


def media_file(entry: Any) -> str | io.BytesIO:
    """The path or content of a file as a table stores it: bytes, a path, or {"bytes", "path"}.

    Raises:
        ValueError: It is empty.
        FileNotFoundError: It is a path of no file.
    """
    if not isinstance(entry, dict):
        entry = {"bytes" if isinstance(entry, bytes) else "path": entry}
    if entry.get("bytes"):
        return io.BytesIO(entry["bytes"])
    if not entry.get("path"):
        raise ValueError("is empty")
    if not os.path.isfile(entry["path"]):
        raise FileNotFoundError(f"no such file: {entry['path']}")
    return entry["path"]


def _local_parquet(path: str, name: str | None, split: str) -> tuple[list[str], Any] | None:
    """Local parquet files of a split, and their features if a README.md lists them; None for data of another kind."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    if is_saved(path) or not is_local(path):
        return None
    if not os.path.isdir(path):
        return find_files(path, (".parquet",)), None
    with _loading(path, name, split):
        builder = datasets.load_dataset_builder(path, name)  # knows which files are of which split
    files = (builder.config.data_files or {}).get(split)
    return (list(files), builder.info.features) if files and isinstance(builder, Parquet) else None


def _holds_bytes(feature: Any) -> bool:
    kind = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def read_preprocessing(read: Callable[[str], Any], name: str) -> dict[str, Any]:
    """The preprocessor_config.json of a pretrained encoder, by a function of transformers; empty if it has none."""
    try:
        return read(name)[0]
    except OSError:
        return {}


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
