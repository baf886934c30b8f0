"""Documents: the texts in local files or in a Hugging Face data set.

Local files are not read with `datasets`, because it expects the columns of the first shard in all others, reads "NA" as a
missing value and parses texts that look like numbers or dates.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.compression import compr
from fsspec.utils import infer_compression

from d2v_fast.data import DataError, find_files, first_line, is_local, load_hub
from d2v_fast.data.builtin import builtin_text
from d2v_fast.data.cache import files_state, fingerprint

log = logging.getLogger(__name__)

LONGEST = 2**27  # characters in a line; a tokenizer needs about 40 bytes per character
INSPECTED = 1000  # rows from which the types of columns in a JSON or CSV file are inferred
TEXT = "text"
JSON_TYPES = {str: TEXT, int: "number", float: "number", bool: "boolean", list: "list", dict: "object", type(None): "null"}
COMPRESSED = tuple(ending for ending in (".gz", ".bz2", ".xz", ".lz4", ".zst") if infer_compression(f"x{ending}"))
PACKAGES = {".lz4": "lz4", ".zst": "zstandard"}  # of the compressions that Python itself cannot read


@dataclass
class Documents:
    """Non-empty texts, read again on every iteration.

    Attributes:
        parts: Files, or a single data set.
        read: Yields the texts of one part.
        left_out: One message for each file that was left out.
    """

    parts: Sequence[Any]
    read: Callable[[Any], Iterable[str | None]]
    left_out: Sequence[str] = ()

    def __iter__(self) -> Iterator[str]:
        return filter(None, itertools.chain.from_iterable(map(self.read, self.parts)))


def find_documents(
    path: str, name: str | None = None, split: str = "train", column: str | None = None
) -> tuple[str, Callable[[float], Documents]]:
    """Find documents without reading them: a fingerprint that changes with their content, and a function that opens them.

    Only names, sizes and times of local files are inspected. The returned function takes the maximum share of unreadable
    files; it reads every file once to the end, leaves out the unreadable ones and raises DataError above that share.

    Args:
        path: "builtin", a file, folder or pattern, the name of a Hugging Face data set, or a folder written by `save_to_disk`.
        name: Configuration of the Hugging Face data set.
        split: Split of the Hugging Face data set.
        column: Column of the text; defaults to "text", or to the only column that holds text.

    Raises:
        DataError: No documents were found.
    """
    if path == "builtin":
        texts = builtin_text(split)
        return fingerprint(texts), lambda max_broken: Documents([texts], iter)
    path = os.path.expanduser(path)
    if is_local(path):
        files = _text_files(path)
        return files_state(path, files), partial(_readable, path, files, column)
    found = load_hub(path, name, split)
    wanted = choose_column(path, arrow_types(found.features.arrow_schema), column)
    rows, at_once = found.select_columns(wanted), rows_per_read(found.data.nbytes, len(found))
    documents = Documents([rows], lambda rows: (text for some in rows.iter(at_once) for text in some[wanted]))
    return found._fingerprint, lambda max_broken: documents


def load_documents(
    path: str, name: str | None = None, split: str = "train", column: str | None = None, max_broken: float = 0.01
) -> Documents:
    """Find and open documents; the log names files that are left out. `find_documents` describes the arguments.

    Raises:
        DataError: No readable documents were found, or more than `max_broken` of the files cannot be read.
    """
    documents = find_documents(path, name, split, column)[1](max_broken)
    for message in documents.left_out:
        log.warning("left out: %s", message)
    return documents


def rows_per_read(size: int, rows: int) -> int:
    """Number of rows in a read of about 4 MiB, if `rows` rows take `size` bytes: a row may be a word or a novel."""
    return max(1, min(1000, 2**22 * rows // max(1, size)))


def choose_column(path: str, types: dict[str, str], column: str | None) -> str:
    """The column that holds the text.

    Args:
        path: Location of the data, for error messages.
        types: Type of each column.
        column: The requested column, if any.

    Raises:
        DataError: No column holds text, the requested one does not, or there are several and none was requested.
    """
    texts = [name for name, kind in types.items() if kind == TEXT]
    if not texts:
        found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise DataError(f"data.path={path}: has no text column, found {found or 'no column'}")
    wanted = column or (TEXT if TEXT in texts else texts[0] if len(texts) == 1 else None)
    if wanted not in texts:
        raise DataError(f"data.column: found {column}, expected one of the text columns in {path}: {', '.join(texts)}")
    if list(types) != [TEXT]:  # reveals a table without a header whose first row was taken for one
        log.info("data.path=%s: the text is in column %r of %s", path, wanted, list(types))
    return wanted


def _text_files(path: str) -> list[str]:
    """The non-empty files, all of one type."""
    try:
        found = find_files(path, SUFFIXES)
    except DataError as error:
        raise DataError(f"{error}{''.join(missing_package(ending) for ending in PACKAGES if ending in str(error))}") from None
    kinds = sorted({suffix(file) for file in found})
    if len(kinds) > 1:
        raise DataError(
            f"data.path={path}: found files ending in {', '.join(kinds)}, expected one type; "
            f"select one with a pattern, such as data.path='{os.path.join(path, '*' + kinds[0])}'"
        )
    files = [file for file in found if os.path.getsize(file)]
    if not files:
        raise DataError(f"data.path={path}: holds no text: all {len(found)} files are empty")
    if len(files) < len(found):
        log.warning("%d of %d files of %s are empty", len(found) - len(files), len(found), path)
    return files


def _readable(path: str, files: list[str], column: str | None, max_broken: float) -> Documents:
    """The documents in those files that can be read to the end."""
    types, texts = FORMATS[suffix(files[0])]
    broken: dict[str, str] = {}
    wanted = None
    for file in files:
        try:
            if wanted is None:
                wanted = choose_column(file, types(file), column)
            for _ in texts(file, wanted):
                pass
        except DataError:
            raise
        except Exception as error:  # every library raises its own types
            broken[file] = f"data.path={file}: cannot be read: {first_line(error)}"
    messages = list(broken.values())
    if len(files) == len(messages) == 1:
        raise DataError(messages[0])
    if len(messages) > max_broken * len(files) or len(messages) == len(files):
        first = "\n  ".join(messages[:5])
        share = f"{len(messages)} of {len(files)} files cannot be read"
        raise DataError(f"{share}, more than train.max_broken={max_broken}:\n  {first}")
    return Documents([file for file in files if file not in broken], lambda file: texts(file, wanted), messages)


def suffix(file: str) -> str:
    """The extension of the format, without that of the compression."""
    for ending in COMPRESSED:
        file = file.lower().removesuffix(ending)
    return Path(file).suffix


def missing_package(ending: str) -> str:
    """How to install the package that reads compressed files ending in `ending`; empty if it is not missing."""
    if ending in COMPRESSED or ending not in PACKAGES:
        return ""
    return f"; to read {ending} files: pip install {PACKAGES[ending]}"


@contextmanager
def _opened(file: str, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, decompressed, without a byte order mark."""
    with open(file, "rb") as raw, compr[infer_compression(file)](raw, mode="rb") as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _lines(stream: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(iter(partial(stream.readline, LONGEST + 1), ""), start=1):
        if len(line) > LONGEST:
            raise ValueError(f"line {number} has more than {LONGEST} characters; cut it into several")
        yield line


def _line_types(file: str) -> dict[str, str]:
    return {TEXT: TEXT}


def _line_texts(file: str, column: str) -> Iterator[str]:
    with _opened(file, newline=None) as stream:
        for line in _lines(stream):
            yield line.rstrip("\n")


def _json_rows(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of JSON lines or of one JSON list; a bare string stands for {"text": string}."""
    with _opened(file, newline="\n") as stream:
        lines = enumerate(_lines(stream), start=1)
        for number, line in lines:
            try:
                if not (line := line.strip()):
                    continue
                if line[0] == "[":
                    rows = json.loads(line + "".join(line for _, line in lines))
                else:
                    rows = [json.loads(line)]
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {first_line(error)}") from error
            for row in rows:
                row = {TEXT: row} if isinstance(row, str) else row
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: found a {JSON_TYPES[type(row)]}, expected an object or a string")
                yield number, row


def _json_types(file: str) -> dict[str, str]:
    types: dict[str, set[str]] = {}
    for _, row in itertools.islice(_json_rows(file), INSPECTED):
        for name, value in row.items():
            types.setdefault(name, set()).add(JSON_TYPES[type(value)])
    return {name: " or ".join(sorted(kinds - {"null"})) or "null" for name, kinds in types.items()}


def _json_texts(file: str, column: str) -> Iterator[str | None]:
    row, found = None, False
    for number, row in _json_rows(file):
        found |= column in row
        text = row.get(column)
        if not isinstance(text, str | None):
            raise ValueError(f"line {number}: {column!r} is a {JSON_TYPES[type(text)]}, expected a string")
        # JSON can escape a lone surrogate, which UTF-8 cannot encode.
        yield text and text.encode("utf-8", "replace").decode()
    if row is not None and not found:
        raise ValueError(f"no line has a {column!r}, the last has {', '.join(row) or 'nothing'}")


@contextmanager
def _table(file: str, dialect: dict[str, Any]) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """Header and rows of a table; trailing fields of a row may be missing."""
    csv.field_size_limit(LONGEST)
    with _opened(file, newline="") as stream:
        reader = csv.reader(_lines(stream), strict=True, **dialect)

        def rows(header: list[str]) -> Iterator[list[str]]:
            for row in reader:
                if len(row) > len(header):
                    raise ValueError(f"line {reader.line_num}: found {len(row)} fields, the header names {len(header)}")
                yield row

        try:
            header = next(reader, [])
            yield header, rows(header)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _table_types(file: str, **dialect: Any) -> dict[str, str]:
    with _table(file, dialect) as (header, rows):
        columns = list(itertools.zip_longest(*itertools.islice(rows, INSPECTED)))
    numbers = [name for name, values in zip(header, columns, strict=False) if all(map(_is_number, filter(None, values)))]
    return {name: "number" if name in numbers and name != TEXT else TEXT for name in header}


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _table_texts(file: str, column: str, **dialect: Any) -> Iterator[str | None]:
    with _table(file, dialect) as (header, rows):
        if column not in header:
            raise ValueError(f"no column {column!r}, found {', '.join(header)}")
        index = header.index(column)
        for row in rows:
            yield row[index] if index < len(row) else None


def arrow_types(schema: Any) -> dict[str, str]:
    import pyarrow.types as kinds

    def name(kind: Any) -> str:
        value = kind.value_type if kinds.is_dictionary(kind) else kind
        texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
        return TEXT if any(is_text(value) for is_text in texts) else str(kind)

    return {field.name: name(field.type) for field in schema}


def _parquet_types(file: str) -> dict[str, str]:
    import pyarrow.parquet

    with open(file, "rb") as raw:  # pyarrow rejects names that are not UTF-8
        return arrow_types(pyarrow.parquet.read_schema(raw))


def _parquet_texts(file: str, column: str) -> Iterator[str | None]:
    import pyarrow.parquet

    found = _parquet_types(file)
    if found.get(column) != TEXT:
        raise ValueError(f"no text column {column!r}, found {', '.join(f'{name} ({kind})' for name, kind in found.items())}")
    with open(file, "rb") as raw:
        parquet = pyarrow.parquet.ParquetFile(raw)
        size = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups))
        for rows in parquet.iter_batches(rows_per_read(size, parquet.metadata.num_rows), columns=[column]):
            yield from rows[column].to_pylist()


# For each format, a function for the types of the columns and one for the texts in a column.
JSON, CSV = (_json_types, _json_texts), (_table_types, _table_texts)
TSV: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
FORMATS: dict[str, tuple[Callable[..., dict[str, str]], Callable[..., Iterator[str | None]]]] = {
    ".txt": (_line_types, _line_texts),
    ".jsonl": JSON,
    ".json": JSON,
    ".csv": CSV,
    ".tsv": (partial(_table_types, **TSV), partial(_table_texts, **TSV)),
    ".parquet": (_parquet_types, _parquet_texts),
}
SUFFIXES = (*FORMATS, *(kind + ending for kind in FORMATS if kind != ".parquet" for ending in COMPRESSED))
