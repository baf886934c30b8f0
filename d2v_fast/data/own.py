"""Custom data sets, `data.class=package.module:Class`: imported by name and checked before the first step.

`PretrainingData` describes the interface.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from d2v_fast.choices import import_class
from d2v_fast.data import Batch, DataError, PretrainingData, first_line
from d2v_fast.decoders import CONVOLUTIONS


def own_class(name: str) -> type[PretrainingData]:
    """Import the class named by data.class.

    Raises:
        DataError: The class cannot be imported, or is not a data set.
    """
    cls = import_class("data.class", name, PretrainingData, "d2v_fast.data.PretrainingData", DataError)
    arguments = inspect.signature(cls).parameters
    missing = {"mask", "views", "seed"} - arguments.keys()
    if missing and not any(each.kind == each.VAR_KEYWORD for each in arguments.values()):
        raise DataError(
            f"data.class={name}: __init__ takes no {', '.join(sorted(missing))}; let it take **common and start with "
            "super().__init__(**common)"
        )
    return cls


def check_class(name: str, data: PretrainingData) -> None:
    """Raise DataError if the data set lacks something that training needs; `name` is its class."""
    defined = {
        method
        for method in ("__len__", "load", "sample_name", "contents", "collate", "fit_to")
        if getattr(type(data), method) is not getattr(PretrainingData, method)
    }
    if not hasattr(data, "mask"):
        raise DataError(f"data.class={name}: has no mask; let its __init__ start with super().__init__(**common)")
    if (missing := {"__len__", "load", "sample_name", "contents"} - defined) and not hasattr(data, "source"):
        raise DataError(
            f"data.class={name}: has no source; set self.source = Source(names, read) in __init__, or define the methods "
            f"{', '.join(sorted(missing))}"
        )
    if data.grid is None and not defined & {"collate", "fit_to"}:
        raise DataError(
            f"data.class={name}: has no grid; set self.grid, the positions of a sample along each axis, in __init__ or "
            "fit_to(encoder), or define the method collate"
        )
    if len(data) == 0:
        raise DataError(f"data.class={name}: has no samples")


def check_batch(name: str, data: PretrainingData, batch: Batch, encoder: Any, decodes: bool) -> None:
    """Raise DataError if the first batch of a custom data set does not fit the model.

    Args:
        name: Name of the class.
        data: The data set.
        batch: Its first batch.
        encoder: The student's encoder.
        decodes: Whether the model has the decoder of data2vec 2.0, which needs the grid of the mask.
    """
    if batch["mask"].dtype != torch.bool:
        raise DataError(f"data.class={name}: collate returns a mask of {batch['mask'].dtype}, expected bool, True = masked")
    if not decodes:
        if not encoder.masks_features and "target" not in batch:
            raise DataError(
                f"data.class={name}: collate returns no target, but {type(encoder.model).__name__} has no mask vector; "
                "return the masked ids as source and the unmasked ones as target"
            )
        return
    length, size = batch["mask"].shape[-1], batch["source"].shape[-1]
    found = encoder.positions(size)
    grid, found = (each if isinstance(each, tuple) and len(each) > 1 else (length,) for each in (data.grid, found))
    if len(grid) not in CONVOLUTIONS:
        raise DataError(
            f"data.class={name}: its grid {grid} has {len(grid)} axes, but the decoder of data2vec 2.0 supports at most "
            f"{max(CONVOLUTIONS)}; merge some, or use 1.0: head.kind=linear data.views=null"
        )
    if found != grid:
        raise DataError(
            f"data.class={name}: its grid is {grid}, but encoder.positions({size}) returns {found}; the decoder of data2vec "
            "2.0 needs both to be equal: set self.grid to it, or let positions(size) of the encoder return the grid"
        )


@contextmanager
def error_context(name: str | None, cls: type, what: str) -> Iterator[None]:
    """Turn any error into a DataError that names the class and the line in its file; without a name, errors pass unchanged."""
    try:
        yield
    except Exception as error:
        if name is None or isinstance(error, DataError | MemoryError | torch.OutOfMemoryError):
            raise
        file = inspect.getfile(cls)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        location = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        raise DataError(f"data.class={name}: {what}: {type(error).__name__}: {first_line(error)}{location}") from error
