"""One operator, several implementations: the table of which exist and how one is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from d2v_fast.ops import reference


@functools.cache
def _compiled() -> Callable:
    return torch.compile(reference.data2vec_loss, dynamic=True)


LOSS_IMPLEMENTATIONS: dict[str, Callable[[], Callable]] = {
    "eager": lambda: reference.data2vec_loss,
    "compile": _compiled,
}


def loss_implementation(impl: str) -> Callable:
    """The implementation of the loss called `impl`; "auto" takes the best that works here.

    Raises:
        ValueError: `impl` is not one of the implementations.
    """
    if impl == "auto":
        impl = "eager"
    if impl not in LOSS_IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected 'auto' or one of {sorted(LOSS_IMPLEMENTATIONS)}")
    return LOSS_IMPLEMENTATIONS[impl]()
