"""Shards: files in tar archives, such as webdataset's, read in place without unpacking."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np

from d2v_fast.data import DataError, first_line
from d2v_fast.data.cache import cached, files_state

log = logging.getLogger(__name__)

NAMES, OFFSETS, LABELS = "names", "places", "labels"  # files in the cache


def open_tars(
    path: str, tars: list[str], suffixes: Sequence[str], cache: str | None
) -> tuple[list[str], Callable[[int], io.BytesIO], list[str] | None]:
    """Index tar archives: names of their files in archive order, a function that reads one, and their labels.

    The label of `x.jpg` is the content of `x.cls`; labels are None unless all files have one. The index is built once
    and cached. Members with other extensions are left out. The log names truncated members, members whose names lead out of the
    archive, and damaged archives.

    Args:
        path: Location of the archives, for messages.
        tars: The archives.
        suffixes: Extensions of the files to read.
        cache: data.cache.

    Raises:
        DataError: The archives hold no such file.
    """

    def index(folder: Path) -> dict[str, Any]:
        names: list[str] = []
        offsets: list[tuple[int, int, int]] = []
        labels: list[Any] = []
        left_out: list[str] = []
        for number, tar in enumerate(tars):
            found, classes = _members(tar, suffixes, left_out)
            names += [f"{number}/{name}" for name, _, _ in found]
            offsets += [(number, offset, size) for _, offset, size in found]
            labels += [classes.get(_key(name)) for name, _, _ in found]
        labels = [] if None in labels else labels
        for file, texts in ((NAMES, names), (LABELS, labels)):
            (folder / file).write_bytes("\0".join(texts).encode(errors="surrogateescape"))
        (folder / OFFSETS).write_bytes(np.array(offsets, dtype=np.int64).data)
        return {"left_out": left_out}

    where = [os.path.abspath(path), sorted(suffixes)]
    folder, made = cached(cache, "members", where, files_state(path, tars), index)
    for message in made["left_out"]:
        log.warning("left out: %s", message)
    offsets = np.fromfile(folder / OFFSETS, np.int64).reshape(-1, 3)
    if len(offsets) == 0:
        raise DataError(f"data.path={path}: {len(tars)} archives hold no file with one of the extensions {', '.join(suffixes)}")
    names, labels = ((folder / file).read_bytes().decode(errors="surrogateescape").split("\0") for file in (NAMES, LABELS))
    names = [f"{tars[int(number)]}/{name}" for number, name in (name.split("/", 1) for name in names)]

    def file(i: int) -> io.BytesIO:
        number, offset, size = offsets[i].tolist()
        with open(tars[number], "rb", buffering=0) as stream:
            stream.seek(offset)
            content = stream.read(size)
        if len(content) < size:
            raise ValueError(f"is cut off: found {len(content)} of {size} bytes")
        return io.BytesIO(content)

    return names, file, labels if any(labels) and len(labels) == len(names) else None


def _members(tar: str, suffixes: Sequence[str], left_out: list[str]) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """(name, offset, size) of the files with one of `suffixes`, and labels by `_key`."""
    found, labels, length = [], {}, os.path.getsize(tar)
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # keeps tarfile from collecting all of them
                name, end = member.name, member.offset_data + member.size
                wanted = name.lower().endswith((*suffixes, ".cls"))
                if not member.isreg() or member.issparse() or not wanted or PurePosixPath(name).name.startswith("."):
                    continue
                if ".." in PurePosixPath(name).parts or name.startswith("/"):
                    left_out.append(f"{tar}: its member {name!r} leads out of the archive")
                elif end > length:
                    left_out.append(f"{tar}: its member {name!r} is cut off, {end - length} bytes are missing")
                elif name.lower().endswith(".cls"):
                    label = cast(IO[bytes], archive.extractfile(member)).read(1000)
                    labels[_key(name)] = label.decode(errors="replace").strip()
                else:
                    found.append((name, member.offset_data, member.size))
            archive.fileobj.seek(archive.offset)
            # tarfile takes an invalid or missing header for the end of the archive.
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("found neither a header nor an end marker")
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        left_out.append(f"{tar}: cannot be read after {len(found)} files: {first_line(error)}")
    return found, labels


def _key(name: str) -> str:
    """The common part of the names of one sample's files: everything before the first dot of the base name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"
