"""Remote data, streamed through `datasets`: files are not downloaded first, and the number of samples is unknown.

Each rank reads its part of the stream (`split_dataset_by_node`) into windows of about `shuffle_buffer` samples and shuffles
within a window. A window can be read again from the state of the stream at its start, so a checkpoint holds a few numbers and
a resumed run continues with exactly the next sample. Masks and augmentations depend on (seed, epoch, number of the sample) as
in other data sets, but the order and the numbers depend on the number of ranks.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from d2v_fast.data import (
    Batch,
    DataError,
    PretrainingData,
    as_patterns,
    expand_braces,
    find_files,
    first_line,
    is_local,
    is_saved,
)
from d2v_fast.data.cache import fingerprint

log = logging.getLogger(__name__)

# Builders of `datasets` by extension.
BUILDERS = {
    **{".parquet": ("parquet", {}), ".txt": ("text", {}), ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"})},
    **{".jsonl": ("json", {}), ".json": ("json", {}), ".tar": ("webdataset", {})},
}
RETRIES = 3  # on top of those of `datasets`
PAUSE = 1.0  # seconds before the first retry, doubled for each later one
LARGEST = 2**29  # bytes or tokens in a window
END = object()

Sample = tuple[int, int, Any]  # epoch, number, content
State = dict[str, Any]


def is_remote(path: str) -> bool:
    """Whether `path` is a URL, such as hf://datasets/user/name or s3://bucket/train-{000..099}.parquet."""
    return "://" in path


class Stream:
    """Endless samples of a remote data set.

    Args:
        path: A URL or pattern of URLs, hf://datasets/user/name, the name of a Hugging Face data set, or local files.
        name: Configuration of the Hugging Face data set.
        split: Split of the Hugging Face data set.
        buffer: Samples to shuffle at a time.
        timeout: Seconds to wait for the remote.

    Attributes:
        data: `datasets.IterableDataset`.
        features: Its columns and their types.
        convert: (row, leftovers of earlier rows) → (samples, new leftovers).
        pending: Content of the samples of the current batch, by number.

    Raises:
        DataError: The data set cannot be found, or the remote does not answer.
    """

    def __init__(self, path: str, name: str | None, split: str, buffer: int, timeout: float):
        self.path, self.name, self.split, self.buffer, self.timeout = path, name, split, buffer, timeout
        self.data = self.with_timeout(lambda: _load(path, name, split))
        try:
            self.features = self.data.features or self.with_timeout(lambda: self.data._resolve_features().features)
        except StopIteration:  # of `datasets`, which reads the first row
            self.features = None
        if self.features is None:
            raise DataError(f"data.path={path}: holds no rows")
        self.convert: Callable[[Any, list], tuple[list, list]] = lambda row, rest: ([row], rest)
        self.pending: dict[int, Any] = {}

    def digest(self, more: Any = None) -> np.ndarray:
        """(1,) int64, a hash of the location of the data, whose content is unknown."""
        found = fingerprint([self.path, self.name, self.split, more])
        return np.frombuffer(bytes.fromhex(found)[:8], dtype=np.int64)

    def with_timeout(self, call: Callable[[], Any]) -> Any:
        """Run `call` in a thread that is abandoned after `timeout`, and return its result.

        Raises:
            DataError: `call` does not return in time.
        """
        results: queue.SimpleQueue = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put((call(), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            value, error = results.get(timeout=self.timeout)
        except queue.Empty:
            raise DataError(
                f"data.path={self.path}: the remote has not answered within data.stream_timeout={self.timeout:g} seconds; "
                "check the connection, or raise the timeout"
            ) from None
        if error is not None:
            raise error
        return value

    def samples(self, seed: int, rank: int, world: int, state: State | None, buffer: int) -> Iterator[tuple[Sample, State]]:
        """Samples of a rank in shuffled order, each with the state to resume from after it."""
        from datasets.distributed import split_dataset_by_node

        taken = state["taken"] if state else 0
        reader = _Reader(self, split_dataset_by_node(self.data, rank=rank, world_size=world), seed, rank, world, state)
        begin, window = reader.state(), _Window(reader, buffer)
        window.fill(buffer)
        while True:
            following, after = _Window(reader, buffer), reader.state()
            order = np.random.default_rng([seed % 2**64, begin["number"]]).permutation(len(window.samples))
            for position, i in enumerate(order.tolist()):
                following.fill(position + 1)  # at the same pace, so that no step waits for a whole window
                if position >= taken:
                    yield window.samples[i], {**begin, "taken": position + 1}
            following.fill(buffer)
            begin, window, taken = after, following, 0


class _Window:
    """Consecutive samples of one epoch; where it ends depends only on the data, not on when they are read."""

    def __init__(self, reader: _Reader, buffer: int):
        self.reader, self.buffer, self.size, self.closed = reader, buffer, 0, False
        self.samples: list[Sample] = []

    def fill(self, count: int) -> None:
        """Read until the window holds `count` samples or is complete."""
        while not self.closed and len(self.samples) < min(count, self.buffer):
            found = self.reader.read()
            self.closed = found is None and bool(self.samples)
            self.samples += found or []
            self.size += sum(len(content) for *_, content in found or [] if content is not None)
            self.closed |= self.size >= LARGEST


class _Reader:
    """Reads rows of one rank in order, epoch by epoch."""

    def __init__(self, stream: Stream, data: Any, seed: int, rank: int, world: int, state: State | None):
        self.stream, self.data, self.seed, self.rank, self.world = stream, data, seed, rank, world
        state = state or {"epoch": 0, "rows": None, "rest": [], "number": 0}
        self.epoch, self.rows, self.rest, self.number = (state[name] for name in ("epoch", "rows", "rest", "number"))
        # Number of samples and of leftovers at the start of the epoch; None in an epoch that was resumed.
        self.at_start: tuple[int, int] | None = None
        self._begin()

    def state(self) -> State:
        """The state from which the next row can be read."""
        return {"epoch": self.epoch, "rows": self.rows, "rest": list(self.rest), "number": self.number, "taken": 0}

    def read(self) -> list[Sample] | None:
        """Samples that the next row completes; None at the end of an epoch.

        Raises:
            DataError: The remote does not answer or keeps failing, or an epoch holds no sample.
        """
        for retry in itertools.count():
            try:
                row = self.stream.with_timeout(lambda: _fetch(next(self.examples, END)))
                break
            except DataError:
                raise
            except Exception as error:
                if retry == RETRIES:
                    raise DataError(
                        f"data.path={self.stream.path}: cannot be read, after {RETRIES} retries: {first_line(error)}"
                    ) from error
                log.warning("data.path=%s: %s; trying again", self.stream.path, first_line(error))
                time.sleep(PAUSE * 2**retry)
                self._begin()
        if row is END:
            if self.at_start == (self.number, len(self.rest)):
                raise DataError(f"data.path={self.stream.path}: holds no sample for rank {self.rank} of {self.world}")
            self.epoch, self.rows, self.at_start = self.epoch + 1, None, (self.number, len(self.rest))
            self._begin()
            return None
        self.rows = self.data.state_dict()
        contents, self.rest = self.stream.convert(row, self.rest)
        first = self.number
        self.number += len(contents)
        return [(self.epoch, (first + i) * self.world + self.rank, content) for i, content in enumerate(contents)]

    def _begin(self) -> None:
        if self.rows is None and self.at_start is None:
            self.at_start = (self.number, len(self.rest))
        # `datasets` seeds its shuffle of the files with this number; 0 keeps their order.
        self.data.set_epoch(int(np.random.SeedSequence([self.seed % 2**64, self.epoch]).generate_state(1)[0]))
        self.data.load_state_dict(self.rows)
        self.examples = iter(self.data)


class StreamBatches(IterableDataset):
    """Batches of a rank, each with the state to resume from after it as "stream". A DataError ends them with {"failed": text}.

    One process reads; `threads` decode the samples of a batch.

    Args:
        data: Data set whose `stream` is set.
        start: Number of earlier batches, in a resumed run.
        state: State of the stream after them.
    """

    def __init__(
        self,
        data: PretrainingData,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        start: int = 0,
        state: State | None = None,
        buffer: int | None = None,
    ):
        self.data, self.batch_size, self.seed, self.rank, self.world = data, batch_size, seed, rank, world
        self.threads, self.start, self.state, self.buffer = threads, start, state, buffer or data.stream.buffer
        self.finishes = True  # whether batches are finished here rather than on the GPU

    def __iter__(self) -> Iterator[Batch]:
        data, stream = self.data, self.data.stream
        pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        data.map = pool.map if pool else map
        samples = stream.samples(self.seed, self.rank, self.world, self.state, self.buffer)
        try:
            while True:
                taken = list(itertools.islice(samples, self.batch_size))
                stream.pending = {number: content for (_, number, content), _ in taken}
                load = data.__getitems__ if self.finishes else data.unfinished
                batch = load([(epoch, number) for (epoch, number, _), _ in taken])
                yield batch | {"stream": taken[-1][1]}
        except DataError as error:  # as text, which crosses processes without a traceback
            yield {"failed": str(error)}
        finally:
            if pool:
                pool.shutdown(wait=False)


class Numbered(Sequence[str]):
    """Names of samples by their number: path[0], path[1], …"""

    def __init__(self, path: str):
        self.path = path

    def __getitem__(self, index: Any) -> Any:
        return f"{self.path}[{index}]"

    def __len__(self) -> int:
        return 0  # unknown


def _fetch(row: Any) -> Any:
    """Load the remote files that a row refers to as bytes."""
    from datasets.utils.file_utils import xopen

    if row is END:
        return row
    for column, value in row.items():
        if isinstance(value, dict) and not value.get("bytes") and is_remote(str(value.get("path") or "")):
            with xopen(value["path"], "rb") as file:
                row[column] = {**value, "bytes": file.read()}
    return row


def _load(path: str, name: str | None, split: str) -> Any:
    """The `datasets.IterableDataset` of a path.

    Raises:
        DataError: It cannot be loaded.
    """
    import datasets

    from d2v_fast.data.documents import missing_package, suffix

    try:
        if path.startswith("hf://datasets/") and len(parts := path.removeprefix("hf://datasets/").strip("/").split("/")) <= 2:
            repo, _, revision = "/".join(parts).partition("@")
            return datasets.load_dataset(repo, name, split=split, streaming=True, revision=revision or None)
        if not is_remote(path) and (is_saved(path) or not is_local(path)):
            if is_saved(path):
                raise DataError(
                    f"data.streaming=true: {path} is local and was written by save_to_disk; use data.streaming=false"
                )
            return datasets.load_dataset(path, name, split=split, streaming=True)
        endings = tuple(BUILDERS)
        files = expand_braces(path) if is_remote(path) else find_files(path, endings)
        kinds = {suffix(file) for file in files}
        if len(kinds) > 1 or not kinds <= set(endings):
            raise DataError(
                f"data.path={path}: a stream needs files of one type among {', '.join(endings)}; select them with a "
                f"pattern, such as s3://bucket/corpus/*.parquet{''.join(map(missing_package, sorted(kinds)))}"
            )
        builder, options = BUILDERS[kinds.pop()]
        files = files if is_remote(path) else as_patterns(files)
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)
    except DataError:
        raise
    except Exception as error:
        failed = f"data.path={path}: cannot be streamed (name={name}, split={split}): {first_line(error)}"
        raise DataError(f"{failed}; check these, and the connection to the remote") from error
