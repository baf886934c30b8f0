"""Tests on a GPU. `TEST_DEVICE=cpu TRITON_INTERPRET=1` runs those that a CPU can, which checks only their own code."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ABSENT = DEVICE == "cuda" and not torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise on anything that makes the host wait for the GPU."""
    if DEVICE != "cuda":
        yield
        return
    with warnings.catch_warnings(action="ignore"):  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
