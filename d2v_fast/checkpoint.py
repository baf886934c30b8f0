"""Checkpoints: one folder each, written atomically and without pickle.

    RUN/checkpoints/step-1000/
        student.safetensors     weights of student and head
        teacher.safetensors     the EMA
        optimizer.safetensors   optimizer state of each parameter
        rng.safetensors         states of torch's generators, by rank
        samples.safetensors     digests of the sources of the samples
        state.json              step, position in the data, settings, counters, the other generators
        manifest.json           size and SHA-256 of each file

With RUN/config.yaml, and RUN/tokenizer if one was trained for the run, this is enough to rebuild the student without its data:
`train.build.make_encoder` gives the module, and student.safetensors holds its weights under the prefix "student.". A pretrained
encoder or tokenizer named in the settings must still exist.

A checkpoint is written as `step-1000.tmp`, the manifest last. Each file and folder is synced to disk before the rename, so a
folder named step-N is complete. The checkpoints of accelerate are not used because they contain pickle.

Of a sharded run rank 0 gathers all tensors, one by one, so that the files are the same for any number of ranks, sharded or not.
It holds a copy of 16 bytes per parameter in host memory: weights, teacher and two moments, 16 GB for ViT-g/14. The Hugging
Face storage of torch.distributed.checkpoint has no pickle either and needs no such copy, but each rank writes its own
files, which are merged in a second pass over the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v_fast.sharding import whole

log = logging.getLogger(__name__)

VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

Tensors = dict[str, dict[str, Tensor]]  # by file, by name


class CheckpointError(ValueError):
    """An unusable checkpoint. The message names it and the remedy."""


class Checkpoint:
    """A finished checkpoint. Its files are verified against their checksums.

    Args:
        folder: RUN/checkpoints/step-N.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder, or the checkpoint is of another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = self._json(MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("version") != VERSION or not isinstance(manifest.get("files"), dict):
            raise CheckpointError(f"{folder}: {MANIFEST} is not a version {VERSION} manifest")
        self.files = manifest["files"]
        for name, found in self.files.items():
            file = folder / name
            if not re.fullmatch(r"\w[\w.-]*", name) or file.is_symlink():
                raise CheckpointError(f"{folder}: {MANIFEST} names {name!r}, which may be outside the folder")
            try:
                size, checksum = file.stat().st_size, found["sha256"]
                if size != found["size"]:
                    raise CheckpointError(f"{file} has {size} bytes instead of {found['size']}")
                if _sha256(file) != checksum:
                    raise CheckpointError(f"{file} is damaged: its checksum differs from {MANIFEST}")
            except FileNotFoundError:
                raise CheckpointError(f"{file} is missing") from None
            except (OSError, TypeError, KeyError) as error:
                raise CheckpointError(f"{file} cannot be checked: {error}") from error
        state = self._json(STATE) if STATE in self.files else None
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise CheckpointError(f"{folder}: {STATE} has no step")
        self.state: dict[str, Any] = state

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors, on the CPU.

        Raises:
            CheckpointError: The file is missing or not a safetensors file.
        """
        file = f"{name}.safetensors"
        if file not in self.files:
            raise CheckpointError(f"{self.folder}: holds no {name}: {MANIFEST} names {', '.join(self.files)}, but no {file}")
        try:
            return load_file(self.folder / file)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: not a safetensors file: {error}") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn errors from a missing or malformed part of the state into CheckpointError."""
        try:
            yield
        except CheckpointError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self.folder}: not a valid version {VERSION} checkpoint: {reason}") from error

    def compare(self, part: str, now: dict[str, Any], allowed: Iterable[str] = ()) -> None:
        """Raise CheckpointError if `part` of the state differs from `now` in keys that are not `allowed` or below one."""
        with self.reading():
            was, now = _flat(self.state[part]), _flat(now)
        differ = [key for key in {**was, **now} if was.get(key, "nothing") != now.get(key, "nothing")]
        differ = [key for key in differ if not any(key == name or key.startswith(f"{name}.") for name in allowed)]
        if differ:
            lines = [f"{key}: was {was.get(key, 'nothing')}, is {now.get(key, 'nothing')}" for key in differ]
            raise CheckpointError(
                f"{self.folder}: its run had different {part}; --resume-allow KEY, given once for each key, accepts an "
                "intended change:\n  " + _first(lines)
            )

    def compare_shapes(self, saved: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Raise CheckpointError if names, shapes or dtypes differ."""
        was, now = ({n: f"{list(t.shape)} {t.dtype}" for n, t in tensors.items()} for tensors in (saved, expected))
        lines = [
            f"{name}: was {was.get(name, 'nothing')}, is {now.get(name, 'nothing')}"
            for name in {**was, **now}
            if was.get(name) != now.get(name)
        ]
        if lines:
            raise CheckpointError(f"{self.folder} is from another model:\n  " + _first(lines))

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder / name} is missing") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error


class Checkpoints:
    """The checkpoints of a run. A thread writes them from a copy in memory while training continues.

    Args:
        folder: RUN/checkpoints.
        keep_last: Finished checkpoints to keep; an older one is removed once a newer one has been read back and verified.
    """

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        self.damaged: list[Path] = []
        self.failed: str | None = None  # why the last write failed
        self._copies: Tensors = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None

    def newest(self) -> Checkpoint:
        """The newest intact checkpoint. Each damaged one that is skipped is logged with the reason.

        Raises:
            CheckpointError: No checkpoint is intact.
        """
        self.damaged = []
        for folder in reversed(_finished(self.folder)):
            try:
                found = Checkpoint(folder)
            except CheckpointError as error:
                log.warning("skipped a checkpoint: %s", error)
                self.damaged.append(folder)
            else:
                return found
        damaged = len(self.damaged)
        raise CheckpointError(f"{self.folder}: " + (f"none of {damaged} checkpoints is intact" if damaged else "no checkpoint"))

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints in order, without verifying them."""
        return [_step(folder) for folder in _finished(self.folder)]

    def reserve(self, tensors: Tensors) -> None:
        """Allocate the memory of the copies in the thread: allocation is the slowest part of a copy."""

        def touch() -> None:
            self._copies = {
                file: {
                    name: torch.zeros(value.shape, dtype=value.dtype, pin_memory=value.is_cuda).fill_(0)
                    for name, value in values.items()
                }
                for file, values in tensors.items()
            }

        self._job = self._thread.submit(touch)

    @property
    def busy(self) -> bool:
        """Whether the thread is still working. The copies must not be changed meanwhile."""
        return self._job is not None and not self._job.done()

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Copy `tensors`, then write them and `state` (JSON-serializable) in the thread, where errors are logged.

        Sharded tensors are gathered one by one, so the other ranks must call `whole` on them in the same order.
        """
        self.wait()
        for file, values in tensors.items():
            copies = self._copies.setdefault(file, {})
            for name in copies.keys() - values.keys():
                del copies[name]
            for name, value in values.items():
                if name not in copies:
                    copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                copies[name].copy_(whole(value), non_blocking=True)
        if any(value.is_cuda for values in tensors.values() for value in values.values()):
            torch.cuda.synchronize()
        text = json.dumps({"step": step, **state})
        self._job = self._thread.submit(self._write, step, self._copies, text)

    def wait(self) -> None:
        """Wait until the thread is idle."""
        if self._job is not None:
            self._job.result()

    def _write(self, step: int, tensors: Tensors, state: str) -> None:
        try:
            write(self.folder, step, tensors, state)
        except Exception as error:
            self.failed = f"the checkpoint of step {step} could not be written: {error}"
            log.error("%s; training continues without it", self.failed)
            return
        self.failed = None
        others = [other for other in _finished(self.folder) if _step(other) != step]
        older = [other for other in others if _step(other) < step and other not in self.damaged]
        for other in set(others) - set(older[max(0, len(older) + 1 - self.keep_last) :]):
            _remove(other)
        self.damaged = []


def write(folder: Path, step: int, tensors: Tensors, state: str) -> Checkpoint:
    """Write `folder`/step-N atomically and read it back.

    Raises:
        OSError: The disk is full or fails. The partial checkpoint is removed.
        CheckpointError: The data read back differ from the data written.
    """
    target = folder / f"step-{step}"
    temporary = target.with_suffix(".tmp")
    for unfinished in folder.glob("step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, values in tensors.items():
            save_file(values, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(state, encoding="utf-8")
        files = {}
        for file in sorted(temporary.iterdir()):
            sync(file)
            files[file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        (temporary / MANIFEST).write_text(json.dumps({"version": VERSION, "files": files}, indent=1), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        _remove(target)  # a damaged checkpoint of the same step
        os.replace(temporary, target)
        sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        return Checkpoint(target)
    except CheckpointError:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a process killed meanwhile leaves no incomplete folder named step-N."""
    with suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_suffix(".old.tmp")))


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power cut."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":  # opens no folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes only files open for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: a reader sees either the old or the new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def refuse_pickle(path: str) -> None:
    """Raise CheckpointError for file types that can run code when loaded."""
    if path.lower().endswith(PICKLES):
        raise CheckpointError(
            f"{path}: is a pickle, which can run any code when it is loaded, so it is not read. If it holds only weights, "
            f'torch.load("{path}", weights_only=True) reads it safely; load them into a model, call '
            "save_pretrained(FOLDER) to write safetensors, and set encoder.pretrained=FOLDER"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _first(lines: list[str], count: int = 10) -> str:
    more = [f"and {len(lines) - count} more"] if len(lines) > count else []
    return "\n  ".join(lines[:count] + more)


def _finished(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
