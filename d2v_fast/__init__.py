"""d2v-fast: data2vec pre-training for text, images and speech."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Data2Vec": "d2v_fast.model",
    "Data2VecLoss": "d2v_fast.loss",
    "EMATeacher": "d2v_fast.ema",
    "Encoder": "d2v_fast.encoders",
    "build_encoder": "d2v_fast.encoders",
    "data2vec_loss": "d2v_fast.loss",
    "wrap": "d2v_fast.encoders",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    # Lazily, so that the loss does not wait for transformers.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
