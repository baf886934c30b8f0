"""The folder of a run: its path and its lock."""

from __future__ import annotations

import copy
import itertools
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_fast.checkpoint import Checkpoints
from d2v_fast.config import Config, ConfigError
from d2v_fast.files import ALARMS, CHECKPOINTS, LOG
from d2v_fast.report import read_lines
from d2v_fast.train.parallel import from_main

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunFolder:
    """The folder of a run, locked until the run ends.

    Attributes:
        name, path: The folder, as named in the settings and as a path.
        resume: Whether the run resumes from a checkpoint; `config.resume` = auto is decided here.

    Args:
        config: `train.output` names the folder; by default a new one in runs/ is created.
        main: Whether this is the main process. Only the main process creates and locks the folder; the others get its name.

    Raises:
        ConfigError: Another process uses the folder, it already holds a run, or it cannot be written.
    """

    def __init__(self, config: Config, main: bool):
        from filelock import FileLock

        chosen = config.train.output
        self.made = chosen is None and main
        if self.made:
            chosen = str(new_folder(config.name))
        self.name = from_main(chosen)
        self.path = Path(self.name)
        # A killed process releases its lock. Runs in one process share it, so that a run that never starts blocks no other.
        self.lock = FileLock(self.path / ".lock", timeout=0, is_singleton=True)
        self.resume, self.parts = config.resume, ("", *config.parts)
        if main and (self.path.exists() or config.resume is not True):
            self._enter()
        self.resume = from_main(self.resume)  # other machines may not see the folder

    def inside(self, name: str) -> RunFolder:
        """The folder of a part of this run, under the same lock."""
        part = copy.copy(self)
        part.path = self.path / name
        return part

    def _enter(self) -> None:
        from filelock import Timeout

        try:
            self.made = self.made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except Timeout:
            raise ConfigError(f"train.output={self.path}: another d2v-train is running there; wait until it ends") from None
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self.resume == "auto":
            self.resume = bool(Checkpoints(self.path / CHECKPOINTS, keep_last=1).steps())
            if not self.resume:  # steps before the first checkpoint are trained and logged again
                for part, name in itertools.product(self.parts, (LOG, ALARMS)):
                    (self.path / part / name).unlink(missing_ok=True)
                shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        has_checkpoints = (self.path / CHECKPOINTS).exists()
        if not self.resume and (has_checkpoints or any(read_lines(self.path / part / LOG) for part in self.parts)):
            self.lock.release()
            remedy = "--resume continues it" if has_checkpoints else "it has no checkpoint to resume from; remove it"
            raise ConfigError(f"train.output={self.path}: already holds a run; {remedy}, or choose another folder")

    def check_shared(self, accelerator: Accelerator) -> None:
        """Raise ConfigError, on all ranks, unless all of them see the folder of rank 0, to which they write their shards."""
        from accelerate.utils import gather_object

        main = accelerator.is_main_process
        file = self.path / f".shared-{uuid.uuid4().hex}"
        if main and self.path.exists():
            file.touch()
        file = self.path / from_main(file.name)  # its name is new, so another machine's folder has no such file
        seen = gather_object([file.exists()])
        if main:
            file.unlink(missing_ok=True)
        if blind := [rank for rank, found in enumerate(seen) if found != seen[0]]:
            raise ConfigError(
                f"train.output={self.path}: ranks {', '.join(map(str, blind))} do not see this folder of rank 0, and with "
                "train.shard each rank writes its shards there; choose a folder on a disk that all machines share"
            )

    def leave(self, steps: int) -> None:
        """Release the lock. A new folder of a run without steps is removed, unless it holds alarms."""
        if self.made and not steps and not (self.path / ALARMS).exists():
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release(force=True)  # also for runs that were built and never started


def new_folder(name: str) -> Path:
    """Create a folder in runs/ for a run without train.output. Runs that start in the same second get different folders."""
    base = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = Path(base), 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = Path(f"{base}-{number}")
        except OSError as error:
            raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"train.output={folder}: cannot be written, choose another folder: {error}")
