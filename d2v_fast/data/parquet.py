"""Parquet files with images or recordings, read in place.

`datasets` stores images and recordings uncompressed: each is a range of bytes in the file, listed in an index. Columns that are
compressed or encoded are read by row groups.
"""

from __future__ import annotations

import itertools
import logging
import os
import struct
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from d2v_fast.data import DataError, edges, first_line
from d2v_fast.data.cache import cached, files_state

log = logging.getLogger(__name__)

RECENT = 2**26  # bytes of row groups that each process keeps
PLACES = "places"  # file in the cache
HEADER = 2**14  # bytes; enough for the header of a page
PLAIN = 0  # encoding


class Parquet:
    """Rows of parquet files with the same columns. Files that cannot be read are logged and left out.

    Footers are read immediately, row groups on demand. Files are opened for each read and not mapped: a process that reads a
    mapped file after it was truncated would be killed.

    Args:
        path: Location of the files, for messages.
        files: The files.
        features: Columns and their types, if already known.
        cache: data.cache.

    Attributes:
        features: `datasets.Features`.

    Raises:
        DataError: None of the files can be read.
    """

    def __init__(self, path: str, files: list[str], features: Any = None, cache: str | None = None):
        import datasets

        self.path, self.cache = path, cache
        self.files: list[str] = []
        self.metadata: list[Any] = []
        failed: Any = None
        with ThreadPoolExecutor(8) as pool:
            for file, found in zip(files, pool.map(_read_footer, files), strict=True):
                if self.files and not isinstance(found, Exception):
                    if missing := set(_schema(self.metadata[0]).names) - set(_schema(found).names):
                        found = ValueError(f"has no column {', '.join(sorted(missing))}, which {self.files[0]} has")
                if isinstance(found, Exception):
                    log.warning("left out: %s: %s", file, first_line(found))
                    failed = found
                else:
                    self.files.append(file)
                    self.metadata.append(found)
        if not self.files:
            raise DataError(f"data.path={path}: none of its {len(files)} parquet files can be read: {first_line(failed)}")
        self.features = features or datasets.Features.from_arrow_schema(_schema(self.metadata[0]))
        counts = [[meta.row_group(i).num_rows for i in range(meta.num_row_groups)] for meta in self.metadata]
        self.groups = [(number, i) for number, rows in enumerate(counts) for i in range(len(rows))]
        self.ends = list(itertools.accumulate(itertools.chain.from_iterable(counts)))
        self.recent: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, column: str) -> list[Any]:
        """All values of a small column."""
        return [value for group in range(len(self.groups)) for value in self._read(group, column).to_pylist()]

    @property
    def names(self) -> list[str]:
        """ "file[row]" for each row."""
        return [f"{file}[{row}]" for file, meta in zip(self.files, self.metadata, strict=True) for row in range(meta.num_rows)]

    def state(self) -> str:
        """A fingerprint that changes whenever the content of the rows may have."""
        return files_state(self.path, self.files)

    def index(self, column: str) -> np.ndarray:
        """(rows, 2) int64: offset and size of each value in its file, -1 for values that pyarrow must read. Cached."""

        def make(folder: Path) -> dict[str, Any]:
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda number: self._find(number, column), range(len(self.files))))
            (folder / PLACES).write_bytes(np.concatenate(found).data)
            return {}

        folder, _ = cached(self.cache, "rows", [os.path.abspath(self.path), column], self.state(), make)
        return np.fromfile(folder / PLACES, np.int64).reshape(-1, 2)

    def _find(self, number: int, column: str) -> np.ndarray:
        metadata, found = self.metadata[number], []
        leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in (column, f"{column}.bytes")]
        with open(self.files[number], "rb", buffering=0) as stream:
            for i in range(metadata.num_row_groups):
                rows = metadata.row_group(i).num_rows
                try:
                    (leaf,) = leaves
                    places = list(_plain_values(stream, metadata.row_group(i).column(leaf), metadata.schema.column(leaf)))
                    if len(places) != rows:
                        raise ValueError(f"found {len(places)} of {rows} values")
                except (ValueError, LookupError, struct.error):  # pyarrow reads it
                    places = [(-1, -1)] * rows
                found += places
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def value(self, row: int, column: str, place: tuple[int, int] = (-1, -1)) -> Any:
        """One value, read at its place in the index or else from its row group, which is kept for later calls."""
        group = bisect_right(self.ends, row)
        begin = self.ends[group - 1] if group else 0
        offset, size = place
        if offset >= 0:
            with open(self.files[self.groups[group][0]], "rb", buffering=0) as stream:
                stream.seek(offset)
                content = stream.read(size)
            if len(content) < size:
                raise ValueError(f"is cut off: found {len(content)} of {size} bytes")
            return content
        with self.lock:
            if (values := self.recent.pop((group, column), None)) is None:
                values = self._read(group, column)
                while self.recent and values.nbytes + sum(each.nbytes for each in self.recent.values()) > RECENT:
                    self.recent.popitem(last=False)
            self.recent[group, column] = values
        return values[row - begin].as_py()

    def digest(self, row: int, column: str, place: tuple[int, int] = (-1, -1)) -> bytes:
        """Size and edges of a value or, if it has no place in the index, of its row group in the file."""
        number, i = self.groups[bisect_right(self.ends, row)]
        begin, size = place
        if begin < 0:
            group = self.metadata[number].row_group(i)
            chunks = [group.column(c) for c in range(group.num_columns)]
            parts = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
            begin = min(_begin(chunk) for chunk in parts)
            size = sum(chunk.total_compressed_size for chunk in parts)
        with open(self.files[number], "rb", buffering=0) as stream:
            return edges(stream, begin, begin + size)

    def _read(self, group: int, column: str) -> Any:
        import pyarrow.parquet

        number, i = self.groups[group]
        with open(self.files[number], "rb") as raw:  # pyarrow rejects names that are not UTF-8
            parquet = pyarrow.parquet.ParquetFile(raw, metadata=self.metadata[number])
            # A thread pool does not survive the fork of a worker.
            return parquet.read_row_group(i, columns=[column], use_threads=False)[column].combine_chunks()


def _read_footer(file: str) -> Any:
    """The metadata of a file, or the exception that reading it raised."""
    import pyarrow.parquet

    try:
        with open(file, "rb") as raw:
            return pyarrow.parquet.read_metadata(raw)
    except Exception as error:
        return error


def _schema(metadata: Any) -> Any:
    return metadata.schema.to_arrow_schema()


def _begin(chunk: Any) -> int:
    return min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))


def _plain_values(stream: Any, chunk: Any, column: Any) -> Iterator[tuple[int, int]]:
    """Offset and size of each value of a column chunk of byte arrays.

    Args:
        stream: The file, unbuffered.
        chunk: `pyarrow.parquet.ColumnChunkMetaData`.
        column: `pyarrow.parquet.ColumnSchema`.

    Raises:
        ValueError: The values are compressed, missing, repeated, or encoded by a dictionary or by differences.
    """
    if chunk.compression != "UNCOMPRESSED" or chunk.physical_type != "BYTE_ARRAY" or column.max_repetition_level:
        raise ValueError("is compressed, repeated, or not a column of byte arrays")
    at, end = _begin(chunk), _begin(chunk) + chunk.total_compressed_size
    while at < end:
        stream.seek(at)
        page, length = _thrift(stream.read(HEADER), 0)
        # Field numbers are those of PageHeader in parquet.thrift: 5 is a data page, 8 one of version 2, 3 the size.
        first, second = page.get(5), page.get(8)
        body: Any = first or second
        if not body or body[2 if first else 4] != PLAIN:
            raise ValueError("is not plainly encoded")
        at, stop = at + length, at + length + page[3]
        if second:
            at += second.get(5, 0) + second.get(6, 0)  # levels, which mark missing values
        elif column.max_definition_level:
            stream.seek(at)
            at += 4 + struct.unpack("<i", stream.read(4))[0]
        for _ in range(body[1]):
            stream.seek(at)
            (size,) = struct.unpack("<i", stream.read(4))
            if size < 0 or at + 4 + size > stop:
                raise ValueError("has missing values")
            yield at + 4, size
            at += 4 + size
        if at != stop:
            raise ValueError("is not a page of byte arrays")


def _thrift(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct in thrift's compact protocol, without lists and doubles, and the position after it."""

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    fields, field = dict[int, Any](), 0
    while head := data[at]:
        at += 1
        kind, step = head & 15, head >> 4
        field = field + step if step else _signed(number())
        if kind in (1, 2):
            fields[field] = kind == 1
        elif kind in (4, 5, 6):
            fields[field] = _signed(number())
        elif kind == 8:
            size = number()  # moves `at`
            at += size
        elif kind == 12:
            fields[field], at = _thrift(data, at)
        else:
            raise ValueError(f"has the thrift type {kind} in a page header, which is not supported")
    return fields, at + 1


def _signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)
