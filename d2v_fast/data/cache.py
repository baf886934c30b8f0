"""On-disk cache of files derived from the data, such as the tokens of a corpus.

An entry is a folder with the derived files and entry.json, which records what they were derived from and their checksums. It is
built under a lock file next to it. The first process on a machine builds it, and the others wait for the lock. No collective is
involved, so building may take any length of time.
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

VERSION = 2  # to be raised whenever the contents of entries change
ENTRY = "entry.json"


def cached(
    cache: str | None, kind: str, key: Any, state: Any, make: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The folder of an entry and the metadata that `make` returned for it; builds the entry if there is no usable one.

    Args:
        cache: Root of the cache, data.cache; defaults to a folder in the Hugging Face cache.
        kind: Prefix of the folder name.
        key: JSON-serialisable; identifies what the entry is derived from. Different keys have separate entries.
        state: JSON-serialisable; changes with the content behind the key. An entry with another `state` is rebuilt.
        make: Writes files into an empty folder and returns JSON-serialisable metadata.

    Raises:
        DataError: The cache cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    folder = Path(cache or os.path.join(HF_HOME, "d2v-fast")).expanduser() / f"{kind}-{fingerprint(key)}"
    expected = {"version": VERSION, "state": fingerprint(state)}
    try:
        return folder, _load(folder, expected)
    except LookupError:
        pass
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process to build %s", folder)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter on a file system without locks
        raise _cannot_write(folder, error) from error
    try:
        return folder, _load(folder, expected)
    except LookupError as problem:
        if problem.args:
            log.warning("%s: %s; rebuilding it", folder, problem.args[0])
        return folder, _fill(folder, expected, make)
    finally:
        lock.release()


def fingerprint(value: Any) -> str:
    """Hash of a JSON-serialisable value, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


def files_state(path: str, files: Sequence[str]) -> str:
    """Fingerprint of the names (relative to `path`), sizes and times of files: changes whenever their content may have."""

    def stat(file: str) -> list[Any]:
        try:
            found = os.stat(file)
        except OSError as error:  # a dangling link
            return [error.errno]
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    return fingerprint([[os.path.relpath(file, path), *stat(file)] for file in files])


def _load(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The metadata of an entry.

    Raises:
        LookupError: There is no entry (without arguments), or it is unusable (with the reason).
    """
    if not folder.exists():
        raise LookupError
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        if entry["version"] != expected["version"]:
            raise LookupError(f"has version {entry['version']}, expected {expected['version']}")
        if entry["state"] != expected["state"]:
            raise LookupError("the data have changed since it was built")
        damaged = [name for name, checksum in entry["files"].items() if _checksum(folder / name) != checksum]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LookupError(f"is damaged: {error}") from error
    if damaged:
        raise LookupError(f"is damaged: wrong checksum of {', '.join(damaged)}")
    return entry["made"]


def _fill(folder: Path, expected: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        for stale in (temporary, folder):  # from a killed process, or unusable
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        made = make(temporary)
        files = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
        (temporary / ENTRY).write_text(json.dumps({**expected, "files": files, "made": made}), encoding="utf-8")
        os.replace(temporary, folder)
        return json.loads(json.dumps(made))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or str(error.filename).startswith(str(folder)):
            raise _cannot_write(folder, error) from error
        raise  # from reading the data
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _cannot_write(folder: Path, error: Exception) -> DataError:
    why = getattr(error, "strerror", None) or error
    return DataError(
        f"data.cache={folder.parent}: cannot be written: {why}; files derived from the data are stored there: free some space, "
        "or set another folder"
    )
