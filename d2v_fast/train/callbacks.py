"""User hooks: objects that a run calls during training. The guide is docs/callbacks.md."""

from __future__ import annotations

import inspect
import logging
import numbers
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2v_fast.choices import import_class
from d2v_fast.data import first_line

if TYPE_CHECKING:
    from d2v_fast.train.build import Run
    from d2v_fast.train.step import Outcome

log = logging.getLogger(__name__)


class CallbackError(ValueError):
    """A callback that cannot be created or has failed. The message names it, its method and the line in its file."""


class Callback:
    """Base class of callbacks. Override the methods you need; the others do nothing.

    Each method gets the run: `run.state.done` is the number of steps so far, `run.state.core` the model, `run.config` the
    settings and `run.folder.path` the folder. `run.stop = True` ends the run after the current step, as Ctrl-C does. After
    freezing a parameter later than in `on_start`, `del run.state.pairs`, so that the teacher copies it.

    Attributes:
        every_rank: Call the callback on all ranks, each with its own run, instead of on the first rank only.
    """

    every_rank = False

    def on_start(self, run: Run) -> None:
        """Before the first step, also of a resumed run."""

    def on_step(self, run: Run, outcome: Outcome) -> None:
        """After each step. `outcome` holds tensors on the device; reading one synchronizes with it."""

    def on_log(self, run: Run, record: dict[str, float]) -> None:
        """Before a line of the log is written. Numbers added to `record` are written with it."""

    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """After a checkpoint in `folder` is complete; on the first rank only."""

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """After the last step and the export, or after the error that ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """State of the callback for checkpoints, as JSON values. The first rank's is saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`, unless it was empty. Called in a resumed run, before `on_start`."""


class Callbacks:
    """The callbacks of a run.

    Args:
        callbacks: In the order of the calls.
        main: Whether this is the first rank.
    """

    def __init__(self, callbacks: Sequence[Callback], main: bool):
        self.local = [(_name(type(each)), each) for each in callbacks if main or each.every_rank]
        self.awaited: int | None = None  # step of a checkpoint that is being written

    def call(self, method: str, run: Run, *args: Any) -> None:
        """Call a method of each callback.

        Raises:
            CallbackError: A callback fails.
        """
        for name, callback in self.local:
            with _error_context(name, callback, method, run.state.done):
                getattr(callback, method)(run, *args)
                if method == "on_log":
                    _check_record(*args)

    def written(self, run: Run) -> None:
        """Call `on_checkpoint` if the awaited checkpoint has been written."""
        if self.awaited is not None and not run.checkpoints.busy:
            step, self.awaited = self.awaited, None
            if not run.checkpoints.failed:
                self.call("on_checkpoint", run, run.checkpoints.folder / f"step-{step}")

    def end(self, run: Run, error: BaseException | None) -> None:
        """Call `on_end` of each. After an error, further failures are only logged."""
        for name, callback in self.local:
            try:
                with _error_context(name, callback, "on_end", run.state.done):
                    callback.on_end(run, error)
            except Exception as failure:
                if error is None:
                    raise
                log.error("%s", failure)

    def state_dict(self) -> list[list[Any]]:
        """Name and state of each callback that has a state."""
        return [[name, state] for name, callback in self.local if (state := callback.state_dict())]

    def load_state_dict(self, states: list[list[Any]]) -> None:
        """Restore states by name, those of the same name in order. Callbacks may be added or removed on resume."""
        remaining = list(states)
        for name, callback in self.local:
            found = next((each for each in remaining if each[0] == name), None)
            if found is not None:
                remaining.remove(found)
                with _error_context(name, callback, "load_state_dict"):
                    callback.load_state_dict(found[1])


def make_callback(entry: str | dict[str, Any]) -> Callback:
    """Create the callback that an entry of train.callbacks describes.

    Args:
        entry: "package.module:Class", or {"class_path": "package.module:Class", "init_args": {…}}.

    Raises:
        CallbackError: No such class, not a subclass of Callback, or its constructor fails with these arguments.
    """
    setting = entry if isinstance(entry, dict) else {"class_path": entry}
    name, arguments = setting.get("class_path"), setting.get("init_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict) or setting.keys() - {"class_path", "init_args"}:
        raise CallbackError(
            f"train.callbacks: found {entry}, expected package.module:Class or, with arguments, "
            "{class_path: package.module:Class, init_args: {...}}"
        )
    cls = import_class("train.callbacks", name, Callback, "d2v_fast.Callback", CallbackError)
    with _error_context(name, cls, "__init__"):
        return cls(**arguments)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _check_record(record: dict[str, Any]) -> None:
    invalid = {key: value for key, value in record.items() if not isinstance(value, numbers.Real)}
    if invalid:
        raise TypeError(f"put {invalid} into the record, expected numbers by name; convert a tensor with float(…)")


@contextmanager
def _error_context(name: str, callback: Callback | type, method: str, step: int | None = None) -> Iterator[None]:
    """Turn any error into a CallbackError that names the callback and the line in its file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or name.startswith("d2v_fast."):  # these explain themselves
            raise
        file = inspect.getfile(callback if isinstance(callback, type) else type(callback))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        location = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        when = "" if step is None else f" at step {step}"
        raise CallbackError(
            f"train.callbacks: {name}: {method} fails{when}: {type(error).__name__}: {first_line(error)}{location}"
        ) from error
