"""Samples to batches: what every modality shares.

A batch is a dict of tensors named after the arguments of `Data2Vec.forward`: `source`, `mask`, `index`, and where they apply
`target`, `padding_mask`, `target_padding_mask`, `channel_mask`. `broken` lists the samples that could not be read.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from d2v_fast.masking import Draws

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Key = tuple[int, int]  # (epoch, sample)


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
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    labels: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    size: Callable[[int], int] | None = None

    def __len__(self) -> int:
        return len(self.names)


class PretrainingData(Dataset):
    """Base of the data sets: keys (epoch, sample) in, one batch out, masks and augmentations a pure function of the keys."""

    seed: int = 0
    lengths: np.ndarray | None = None  # per sample, for bucketing
    name: str

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int, rng: np.random.Generator) -> Any:
        """One augmented sample. Raises to mark it as broken."""
        raise NotImplementedError

    def collate(self, samples: list[Any], draws: Draws) -> dict[str, np.ndarray]:
        """Stack samples and mask them: `source`, `mask` and more, as numpy arrays."""
        raise NotImplementedError

    def fit_to(self, encoder: Any) -> None:
        """Learn from the encoder what the data depend on, such as its number of positions.

        Raises:
            DataError: Data and encoder do not fit together.
        """

    def processor(self, encoder: Any) -> Any:
        """Tokenizer, image processor or feature extractor of transformers: what makes inputs for the exported encoder."""
        raise NotImplementedError

    def sample_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def checksum(self) -> str:
        """SHA-256 of what tells these samples from others: their names and lengths. A run goes on with the same ones only."""
        names = "\0".join(self.sample_name(index) for index in range(len(self)))
        return hashlib.sha256(names.encode() + (b"" if self.lengths is None else self.lengths.tobytes())).hexdigest()

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
            batch |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            batch["index"] = batch["mask"].flatten().nonzero().squeeze(1)
        return batch


class EpochBatches:
    """Endless batches of keys; the order is a pure function of (seed, epoch), each rank takes its share.

    Args:
        num_samples: Size of the data set.
        batch_size: Samples of one rank's batch.
        seed: Seed of the order.
        rank, world: This process among all.
        lengths: (num_samples,) lengths; samples of similar length then share a batch.
        max_batch_length: Fill batches up to this total length instead of up to `batch_size`.
        start: Batches of this rank to skip, for a run that goes on.
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
        epoch, skip = 0, self.start
        while True:
            batches = self.epoch(epoch)
            for batch in batches[skip:]:
                yield [(epoch, int(index)) for index in batch]
            skip = max(0, skip - len(batches))
            epoch += 1

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """This rank's batches of one epoch."""
        rng = np.random.default_rng([self.seed % 2**64, epoch])
        order = rng.permutation(self.num_samples)
        if self.lengths is None:
            batches = self._cut(order)
        else:
            # Sorted within windows of 100 batches: little padding or cropping, and still a random order.
            window = 100 * self.batch_size
            batches = []
            for begin in range(0, len(order), window):
                part = order[begin : begin + window]
                batches += self._cut(part[np.argsort(self.lengths[part], kind="stable")])
            batches = [batches[i] for i in rng.permutation(len(batches))]
        whole = len(batches) // self.world * self.world
        if whole == 0:
            raise DataError(
                f"{self.num_samples} samples make {len(batches)} batches, fewer than the {self.world} processes: "
                "use fewer processes or a smaller train.batch_size"
            )
        return batches[self.rank : whole : self.world]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        if self.max_batch_length is None:
            size = min(self.batch_size, len(order))
            return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        batches, begin = [], 0
        for end in range(1, len(order) + 1):
            longest = self.lengths[order[begin:end]].max()
            if end - begin > 1 and longest * (end - begin) > self.max_batch_length:
                batches.append(order[begin : end - 1])
                begin = end - 1
        batches.append(order[begin:])
        return batches


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

    Raises:
        DataError: Nothing is there, or nothing of this kind.
    """
    found = []
    if os.path.isdir(path):
        seen = set()
        for folder, folders, files in os.walk(path, followlinks=True):
            # A link to a folder above would lead round for ever.
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    elif os.path.exists(path):
        found = [path]
    elif glob.has_magic(path):
        found = glob.glob(path, recursive=True)
    else:
        raise DataError(f"data.path={path}: no such file or folder")
    found = [file for file in found if file.lower().endswith(tuple(suffixes))]
    if not found:
        raise DataError(f"data.path={path}: no file with one of the endings {', '.join(suffixes)}")
    return sorted(found)


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
    """Whether `path` means files here and not the name of a Hugging Face data set."""
    # An ending makes a file of it, but for the version in a name like user/corpus-2.5.
    looks_local = path.startswith((".", "/", "~")) or path.endswith(os.sep) or Path(path).suffix[1:].isalpha()
    return os.path.exists(os.path.expanduser(path)) or glob.has_magic(path) or looks_local


def load_hub(path: str, name: str | None, split: str) -> Any:
    """A Hugging Face data set by name, or one that is stored here as parquet files.

    Raises:
        DataError: It cannot be had; the message tells what was tried.
    """
    import datasets

    try:
        if os.path.isdir(path):
            return datasets.load_dataset(path, name, split=split)
        if is_local(path):
            return datasets.load_dataset("parquet", data_files=as_patterns(find_files(path, (".parquet",))), split="train")
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:
        tried = f"as a Hugging Face data set (name={name}, split={split}) it cannot be loaded: {first_line(error)}"
        raise DataError(f"data.path={path}: {'' if is_local(path) else 'no such file or folder here, and '}{tried}") from error


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows on further lines."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
