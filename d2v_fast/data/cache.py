"""What is made once of the data and kept on disk, such as the tokens of a corpus.

An entry is a folder: the files that were made, and entry.json, which says what they were made of and holds their checksums. It
is made under a lock beside it. The first process of a machine works, the others wait for the lock; no collective is involved,
so that it may take as long as it takes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from d2v_fast.data import DataError

log = logging.getLogger(__name__)

VERSION = 1  # raised with every change of what entries hold
ENTRY = "entry.json"


def kept(
    cache: str | None, kind: str, of: Any, state: Any, make: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The folder of an entry, made now if there is none that can be used, and what `make` returned of it.

    Args:
        cache: Where entries lie, data.cache; by default beside the cache of Hugging Face.
        kind: Begins the name of the folder.
        of: Names what the entry is made of, to go into JSON. One of another `of` lies beside it.
        state: What changes with the content of that, to go into JSON. One of another `state` is made again.
        make: Writes files into an empty folder, and returns what to remember of them, to go into JSON.

    Raises:
        DataError: The cache cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    place = Path(cache or os.path.join(HF_HOME, "d2v-fast")).expanduser() / f"{kind}-{fingerprint(of)}"
    expected = {"version": VERSION, "state": fingerprint(state)}
    try:
        return place, _look(place, expected)
    except LookupError:
        pass
    lock = FileLock(f"{place}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process, which prepares %s", place)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where a disk knows no locks
        raise _cannot_write(place, error) from error
    try:
        return place, _look(place, expected)
    except LookupError as problem:
        if problem.args:
            log.warning("%s: %s; it is made again", place, problem.args[0])
        return place, _fill(place, expected, make)
    finally:
        lock.release()


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits for what goes into JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


def files_state(path: str, files: Sequence[str]) -> str:
    """What changes whenever the content of files may have: names below `path`, sizes and times."""

    def look(file: str) -> list[Any]:
        try:
            found = os.stat(file)
        except OSError as error:  # a link to nothing
            return [error.errno]
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    return fingerprint([[os.path.relpath(file, path), *look(file)] for file in files])


def _look(place: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What is remembered of an entry.

    Raises:
        LookupError: It cannot be used; says why, where there is one.
    """
    if not place.exists():
        raise LookupError
    try:
        entry = json.loads((place / ENTRY).read_text(encoding="utf-8"))
        if entry["version"] != expected["version"]:
            raise LookupError(f"is of version {entry['version']}, and this is {expected['version']}")
        if entry["state"] != expected["state"]:
            raise LookupError("is of data that have changed since")
        damaged = [name for name, checksum in entry["files"].items() if _checksum(place / name) != checksum]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LookupError(f"is damaged: {error}") from error
    if damaged:
        raise LookupError(f"is damaged: {', '.join(damaged)} is not what was written")
    return entry["made"]


def _fill(place: Path, expected: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    beside = place.with_name(f"{place.name}.tmp")
    try:
        for folder in (beside, place):  # of a process that was killed; of no use
            shutil.rmtree(folder, ignore_errors=True)
        beside.mkdir()
        made = make(beside)
        files = {file.name: _checksum(file) for file in sorted(beside.iterdir())}
        (beside / ENTRY).write_text(json.dumps({**expected, "files": files, "made": made}), encoding="utf-8")
        os.replace(beside, place)
        return json.loads(json.dumps(made))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or str(error.filename).startswith(str(place)):
            raise _cannot_write(place, error) from error
        raise  # of reading the data
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _cannot_write(place: Path, error: Exception) -> DataError:
    why = getattr(error, "strerror", None) or error
    return DataError(
        f"data.cache={place.parent}: cannot be written: {why}; what is made of the data is kept there: make room, or name "
        "another folder"
    )
