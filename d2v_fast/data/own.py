"""Data of one's own, `data.class=package.module:Class`: found by name, and checked before the first step.

`PretrainingData` tells what such a class has to be.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from d2v_fast.data import Batch, DataError, PretrainingData, first_line
from d2v_fast.decoders import CONVOLUTIONS


def own_class(name: str) -> type[PretrainingData]:
    """The class that data.class names.

    Raises:
        DataError: No such class, or none that is a data set.
    """
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"data.class={name}: cannot be imported: {first_line(error)}; expected package.module:Class, of a module that is "
            "installed or lies in the folder of the command"
        ) from error
    # Else os:system would do, with a config from elsewhere.
    if not (isinstance(cls, type) and issubclass(cls, PretrainingData)):
        raise DataError(f"data.class={name}: found {cls!r}, expected a class that derives from d2v_fast.data.PretrainingData")
    arguments = inspect.signature(cls).parameters
    lacking = {"mask", "views", "seed"} - arguments.keys()
    if lacking and not any(each.kind == each.VAR_KEYWORD for each in arguments.values()):
        raise DataError(
            f"data.class={name}: __init__ takes no {', '.join(sorted(lacking))}; let it take **common and begin with "
            "super().__init__(**common)"
        )
    return cls


def check_class(name: str, data: PretrainingData) -> None:
    """Raise DataError for what data of class `name` lack to be trained on."""
    made = {
        method
        for method in ("__len__", "load", "sample_name", "contents", "collate", "fit_to")
        if getattr(type(data), method) is not getattr(PretrainingData, method)
    }
    if not hasattr(data, "mask"):
        raise DataError(f"data.class={name}: has no mask; let its __init__ begin with super().__init__(**common)")
    if (lacking := {"__len__", "load", "sample_name", "contents"} - made) and not hasattr(data, "source"):
        raise DataError(
            f"data.class={name}: has no source; set self.source = Source(names, read) in __init__, or give it the methods "
            f"{', '.join(sorted(lacking))}"
        )
    if data.grid is None and not made & {"collate", "fit_to"}:
        raise DataError(
            f"data.class={name}: has no grid; set self.grid, the positions of a sample along each axis, in __init__ or "
            "fit_to(encoder), or give it a method collate"
        )
    if len(data) == 0:
        raise DataError(f"data.class={name}: has no samples")


def check_batch(name: str, data: PretrainingData, batch: Batch, encoder: Any, decodes: bool) -> None:
    """Raise DataError for a batch of class `name` that no model takes.

    Args:
        name: Of the class.
        data: What the batch is of.
        batch: The first one.
        encoder: The student's.
        decodes: Whether the decoder of data2vec 2.0 is to see the same grid as the mask.
    """
    if batch["mask"].dtype != torch.bool:
        raise DataError(f"data.class={name}: collate gives a mask of {batch['mask'].dtype}, expected bool, True = masked")
    if not decodes:
        if not encoder.masks_features and "target" not in batch:
            raise DataError(
                f"data.class={name}: collate gives no target, but {type(encoder.model).__name__} has no mask vector; give it "
                "masked ids as source and the unmasked ones as target"
            )
        return
    length, size = batch["mask"].shape[-1], batch["source"].shape[-1]
    seen = encoder.positions(size)
    grid, seen = (each if isinstance(each, tuple) and len(each) > 1 else (length,) for each in (data.grid, seen))
    if len(grid) not in CONVOLUTIONS:
        raise DataError(
            f"data.class={name}: its grid {grid} has {len(grid)} axes, and the decoder of data2vec 2.0 runs over at most "
            f"{max(CONVOLUTIONS)}; join some, or take 1.0: head.kind=linear data.views=null"
        )
    if seen != grid:
        raise DataError(
            f"data.class={name}: its grid is {grid}, and encoder.positions({size}) gives {seen}; for the decoder of data2vec "
            "2.0 they must be the same: set self.grid to it, or let positions(size) of the encoder return the grid"
        )


@contextmanager
def blamed(name: str | None, cls: type, what: str) -> Iterator[None]:
    """Turn any error into a DataError that names the class and the line in its file; without a name it stays what it was."""
    try:
        yield
    except Exception as error:
        if name is None or isinstance(error, DataError | MemoryError | torch.OutOfMemoryError):
            raise
        file = inspect.getfile(cls)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        raise DataError(f"data.class={name}: {what}: {type(error).__name__}: {first_line(error)}{place}") from error
