"""Shards: the files in tar archives, such as webdataset's, read where they lie."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d2v_fast.data import DataError, first_line
from d2v_fast.data.cache import files_state, kept

log = logging.getLogger(__name__)

NAMES, PLACES, LABELS = "names", "places", "labels"  # files in the cache


def open_tars(
    path: str, tars: list[str], suffixes: Sequence[str], cache: str | None
) -> tuple[list[str], Callable[[int], io.BytesIO], list[str] | None]:
    """Names of the files in tar archives, in the order of the archives, a function that reads one, and their labels.

    A label is the content of the member that differs in its ending alone, `.cls`; there are none unless all have one. Where the
    members lie is found once and kept. What has another ending is left out; members that are cut off, or whose names lead out
    of the archive, and archives that are damaged from some place on are named in the log.

    Args:
        path: Where the archives are, for messages.
        tars: The archives.
        suffixes: Endings of the files that count.
        cache: data.cache.

    Raises:
        DataError: There is no such file in them.
    """

    def index(folder: Path) -> dict[str, Any]:
        names, places, labels, left_out = [], [], [], []
        for number, tar in enumerate(tars):
            found, classes = _members(tar, suffixes, left_out)
            names += [f"{number}/{name}" for name, _, _ in found]
            places += [(number, offset, size) for _, offset, size in found]
            labels += [classes.get(_key(name)) for name, _, _ in found]
        labels = [] if None in labels else labels
        for file, texts in ((NAMES, names), (LABELS, labels)):
            (folder / file).write_bytes("\0".join(texts).encode(errors="surrogateescape"))
        (folder / PLACES).write_bytes(np.array(places, dtype=np.int64))
        return {"left_out": left_out}

    where = [os.path.abspath(path), sorted(suffixes)]
    folder, made = kept(cache, "members", where, files_state(path, tars), index)
    for message in made["left_out"]:
        log.warning("left out: %s", message)
    places = np.fromfile(folder / PLACES, np.int64).reshape(-1, 3)
    if len(places) == 0:
        raise DataError(f"data.path={path}: {len(tars)} archives hold no file with one of the extensions {', '.join(suffixes)}")
    names, labels = ((folder / file).read_bytes().decode(errors="surrogateescape").split("\0") for file in (NAMES, LABELS))
    names = [f"{tars[int(number)]}/{name}" for number, name in (name.split("/", 1) for name in names)]

    def file(i: int) -> io.BytesIO:
        number, offset, size = places[i].tolist()
        with open(tars[number], "rb", buffering=0) as stream:
            stream.seek(offset)
            content = stream.read(size)
        if len(content) < size:
            raise ValueError(f"is cut off: {len(content)} of {size} bytes are there")
        return io.BytesIO(content)

    return names, file, labels if len(labels) == len(names) else None


def _members(tar: str, suffixes: Sequence[str], left_out: list[str]) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """(name, offset, size) of the files with one of `suffixes`, and the labels by the names without endings."""
    found, labels, length = [], {}, os.path.getsize(tar)
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                archive.members = []  # else it remembers all of them
                name, end = member.name, member.offset_data + member.size
                wanted = name.lower().endswith((*suffixes, ".cls"))
                if not member.isreg() or member.issparse() or not wanted or PurePosixPath(name).name.startswith("."):
                    continue
                if ".." in PurePosixPath(name).parts or name.startswith("/"):
                    left_out.append(f"{tar}: its member {name!r} leads out of the archive")
                elif end > length:
                    left_out.append(f"{tar}: its member {name!r} is cut off, {end - length} bytes are missing")
                elif name.lower().endswith(".cls"):
                    labels[_key(name)] = archive.extractfile(member).read(1000).decode(errors="replace").strip()
                else:
                    found.append((name, member.offset_data, member.size))
            archive.fileobj.seek(archive.offset)
            # Any block that is no header, or none, is the end to tarfile.
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("there is neither a header nor the mark of an end")
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        left_out.append(f"{tar}: what comes after {len(found)} files cannot be read: {first_line(error)}")
    return found, labels


def _key(name: str) -> str:
    """What the files of one sample have in common: all before the first point of the name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"
