"""Hooks for people: objects that a run calls as it goes; docs/callbacks.md is the guide."""

from __future__ import annotations

import importlib
import inspect
import logging
import numbers
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2v_fast.data import first_line

if TYPE_CHECKING:
    from d2v_fast.train.build import Run
    from d2v_fast.train.step import Outcome

log = logging.getLogger(__name__)


class CallbackError(ValueError):
    """A callback that cannot be made, or that has failed; the message names it, its method and the line in its file."""


class Callback:
    """What a run calls. Override what you need; the rest does nothing.

    Each method gets the run: `run.state.done` are the steps so far, `run.state.core` is the model, `run.config` the settings,
    `run.folder.path` the folder. `run.stop = True` ends the run after the current step, as Ctrl-C does.

    Attributes:
        every_rank: Call it on all ranks, each with its own run, and not on the first alone.
    """

    every_rank = False

    def on_start(self, run: Run) -> None:
        """Before the first step, also of a run that goes on."""

    def on_step(self, run: Run, outcome: Outcome) -> None:
        """After each step. `outcome` holds tensors on the device; reading one waits for it."""

    def on_log(self, run: Run, record: dict[str, float]) -> None:
        """Before a line of the log is written. Numbers that are put into `record` are written with it."""

    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """Once a checkpoint lies in `folder`, whole; on the first rank alone."""

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """After the last step and the export, or after the error that ended the run."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON knows it; that of the first rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In a run that goes on, before `on_start`: what `state_dict` gave, unless that was empty."""


class Callbacks:
    """The callbacks of a run, called in their order.

    Args:
        callbacks: In their order.
        main: Whether this is the first rank.
    """

    def __init__(self, callbacks: Sequence[Callback], main: bool):
        self.here = [(_name(type(each)), each) for each in callbacks if main or each.every_rank]
        self.awaited: int | None = None  # step of a checkpoint that is being written

    def call(self, method: str, run: Run, *args: Any) -> None:
        """Call a method of each.

        Raises:
            CallbackError: It fails.
        """
        for name, callback in self.here:
            with _blamed(name, callback, method, run.state.done):
                getattr(callback, method)(run, *args)
                if method == "on_log":
                    _check_record(*args)

    def written(self, run: Run) -> None:
        """Tell them of the newest checkpoint if it has been written since."""
        if self.awaited is not None and not run.checkpoints.busy:
            step, self.awaited = self.awaited, None
            if not run.checkpoints.failed:
                self.call("on_checkpoint", run, run.checkpoints.folder / f"step-{step}")

    def end(self, run: Run, error: BaseException | None) -> None:
        """Tell all of them; after an error, one that fails as well is only logged."""
        for name, callback in self.here:
            try:
                with _blamed(name, callback, "on_end", run.state.done):
                    callback.on_end(run, error)
            except Exception as failure:
                if error is None:
                    raise
                log.error("%s", failure)

    def state_dict(self) -> list[list[Any]]:
        """Name and state of each that has one."""
        return [[name, state] for name, callback in self.here if (state := callback.state_dict())]

    def load_state_dict(self, states: list[list[Any]]) -> None:
        """Give each the next state under its name. Callbacks may come and go between runs."""
        left = list(states)
        for name, callback in self.here:
            found = next((each for each in left if each[0] == name), None)
            if found is not None:
                left.remove(found)
                with _blamed(name, callback, "load_state_dict"):
                    callback.load_state_dict(found[1])


def make_callback(entry: str | dict[str, Any]) -> Callback:
    """The object that an entry of train.callbacks describes.

    Args:
        entry: "package.module:Class", or {"class_path": "package.module:Class", "init_args": {…}}.

    Raises:
        CallbackError: No such class, one that does not derive from Callback, or one that cannot be made of these arguments.
    """
    setting = entry if isinstance(entry, dict) else {"class_path": entry}
    name, arguments = setting.get("class_path"), setting.get("init_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict) or setting.keys() - {"class_path", "init_args"}:
        raise CallbackError(
            f"train.callbacks: found {entry}, expected package.module:Class, with arguments "
            "{class_path: package.module:Class, init_args: {...}}"
        )
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CallbackError(
            f"train.callbacks: {name}: cannot be imported: {first_line(error)}; expected package.module:Class, of a module "
            "that is installed or lies in the folder of the command"
        ) from error
    # Else os:system would do, with a config from elsewhere.
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        raise CallbackError(f"train.callbacks: {name}: found {cls!r}, expected a class that derives from d2v_fast.Callback")
    with _blamed(name, cls, "__init__"):
        return cls(**arguments)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _check_record(record: dict[str, Any]) -> None:
    strange = {key: value for key, value in record.items() if not isinstance(value, numbers.Real)}
    if strange:
        raise TypeError(f"put {strange} into the record, expected numbers by name; of a tensor float(…)")


@contextmanager
def _blamed(name: str, callback: Callback | type, method: str, step: int | None = None) -> Iterator[None]:
    """Turn any error into a CallbackError that names the callback and the line in its file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or name.startswith("d2v_fast."):  # which explain themselves
            raise
        file = inspect.getfile(callback if isinstance(callback, type) else type(callback))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        when = "" if step is None else f" at step {step}"
        raise CallbackError(
            f"train.callbacks: {name}: {method} fails{when}: {type(error).__name__}: {first_line(error)}{place}"
        ) from error
