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

In a sharded run, rank N writes its shards to student-N.safetensors and so on (`sharding.parts`), from a copy of its share in
memory, and computes their checksums. Once all ranks have written, rank 0 adds the manifest and renames the folder. Such
a checkpoint loads on any number of ranks, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from d2v_fast.sharding import read

log = logging.getLogger(__name__)

VERSION = 3
MANIFEST = "manifest.json"
STATE = "state.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

Tensors = dict[str, dict[str, Tensor]]  # by file, by name
Files = dict[str, dict[str, Any]]  # size and SHA-256 by file name
Part = tuple[int, Files, str]  # step, files that a rank has written, and the reason of a failure or ""


class CheckpointError(ValueError):
    """An unusable checkpoint. The message names it and the remedy."""


class Checkpoint:
    """A finished checkpoint. Its files are verified against their checksums.

    Args:
        folder: RUN/checkpoints/step-N.
        checksums: Whether to verify checksums; otherwise only file sizes are compared.

    Raises:
        CheckpointError: A file is missing, damaged or outside the folder, or the checkpoint has another version.
    """

    def __init__(self, folder: Path, checksums: bool = True):
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
                if checksums and _sha256(file) != checksum:
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

    def tensors(self, name: str, like: Callable[[str], Any] = lambda name: None) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors, or of its shards `name`-0.safetensors and so on, on the CPU.

        Args:
            name: student, teacher, optimizer, rng or samples.
            like: Maps a tensor's name to a tensor with the wanted sharding; then only this rank's shard is read.

        Raises:
            CheckpointError: A file is missing, malformed or not a safetensors file.
        """
        files = [file for file in self.files if re.fullmatch(rf"{name}(-\d+)?\.safetensors", file)]
        if not files:
            raise CheckpointError(
                f"{self.folder}: holds no {name}: {MANIFEST} names {', '.join(self.files)}, but no {name}.safetensors"
            )
        try:
            with self.reading():
                return read([self.folder / file for file in files], like)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder}: {' or '.join(files)}: not a safetensors file: {error}") from error

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
        """Raise CheckpointError if `part` of the state differs from `now` in keys other than `allowed` ones and those below."""
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
        self._job: Future[Any] | None = None
        self._part: Future[Part] | None = None

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
        """Allocate memory for the copies in the thread, because allocation is the slowest part of a copy."""

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
        """Copy `tensors`, then write them and `state` (JSON-serializable) in the thread, where errors are logged."""
        self._copy(tensors)
        text = json.dumps({"step": step, **state})
        self._job = self._thread.submit(self._attempt, step, lambda: write(self.folder, step, self._copies, text))

    def save_part(
        self, step: int, rank: int, tensors: Tensors, metadata: dict[str, dict[str, str]], state: dict[str, Any] | None
    ) -> None:
        """Copy a rank's part of a sharded run, then write it in the thread.

        The checkpoint is complete once rank 0 has called `finish` with the results of `part` from all ranks. No rank may call
        this before rank 0 has called `begin`.

        Args:
            step: Steps so far.
            rank: Rank of this process.
            tensors: Tensors by file; file names must differ between ranks.
            metadata: Metadata of each file.
            state: JSON-serializable; None on all ranks but one.
        """
        self._copy(tensors)
        text = None if state is None else json.dumps({"step": step, **state})

        def write_part() -> Part:
            try:
                folder = self.folder / f"step-{step}.tmp"
                folder.mkdir(parents=True, exist_ok=True)  # if `begin` has failed, this raises the reason
                return step, write_files(folder, self._copies, metadata, text), ""
            except Exception as error:
                return step, {}, f"rank {rank}: {error}"

        self._part = self._job = self._thread.submit(write_part)

    def part(self) -> Part | None:
        """The result of the last `save_part`, once; waits for it. None if there is none."""
        part, self._part = self._part, None
        return None if part is None else part.result()

    def begin(self, step: int) -> None:
        """Create the folder that all ranks write their parts to."""
        with suppress(OSError):  # `save_part` fails with the same reason
            new_folder(self.folder, step)

    def finish(self, parts: list[Part]) -> None:
        """Complete a checkpoint from the parts of all ranks, in the thread, where errors are logged."""
        step = parts[0][0]

        def finish_parts() -> None:
            folder = self.folder / f"step-{step}.tmp"
            if reasons := [reason for *_, reason in parts if reason]:
                shutil.rmtree(folder, ignore_errors=True)
                raise OSError("; ".join(reasons))
            complete(folder, {name: found for _, files, _ in parts for name, found in files.items()})

        self._job = self._thread.submit(self._attempt, step, finish_parts)

    def wait(self) -> None:
        """Wait until the thread is idle."""
        if self._job is not None:
            self._job.result()

    def _copy(self, tensors: Tensors) -> None:
        self.wait()
        for file, values in tensors.items():
            copies = self._copies.setdefault(file, {})
            for name in copies.keys() - values.keys():
                del copies[name]
            for name, value in values.items():
                if name not in copies:
                    copies[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                copies[name].copy_(value, non_blocking=True)
        if any(value.is_cuda for values in tensors.values() for value in values.values()):
            torch.cuda.synchronize()

    def _attempt(self, step: int, work: Callable[[], Any]) -> None:
        try:
            work()
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
    temporary = new_folder(folder, step)
    try:
        files = write_files(temporary, tensors, {}, state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return complete(temporary, files)


def new_folder(folder: Path, step: int) -> Path:
    """Create `folder`/step-N.tmp and remove other unfinished checkpoints."""
    for unfinished in folder.glob("step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary = folder / f"step-{step}.tmp"
    temporary.mkdir(parents=True)
    return temporary


def write_files(folder: Path, tensors: Tensors, metadata: dict[str, dict[str, str]], state: str | None) -> Files:
    """Write tensors, with metadata for their files, and any state to disk; return the files' manifest entries."""
    for name, values in tensors.items():
        save_file(values, folder / f"{name}.safetensors", metadata.get(name))
    names = [f"{name}.safetensors" for name in tensors]
    if state is not None:
        (folder / STATE).write_text(state, encoding="utf-8")
        names.append(STATE)
    files = {}
    for name in sorted(names):
        sync(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return files


def complete(temporary: Path, files: Files) -> Checkpoint:
    """Turn step-N.tmp, which holds `files`, into a checkpoint and read it back. Raises as `write` does."""
    folder, target = temporary.parent, temporary.with_suffix("")
    try:
        manifest = {"version": VERSION, "files": dict(sorted(files.items()))}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        _remove(target)  # may be a damaged checkpoint of the same step
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
    """Delete a checkpoint. It is renamed first, so that a killed process leaves no incomplete folder named step-N."""
    with suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_suffix(".old.tmp")))


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power cut."""
    folder = path.is_dir()
    if folder and sys.platform == "win32":  # Windows cannot open folders
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
