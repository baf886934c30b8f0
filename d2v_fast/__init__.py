"""d2v-fast: data2vec pre-training for text, images and speech."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Callback": "d2v_fast.train.callbacks",
    "ConvDecoder": "d2v_fast.decoders",
    "Data2Vec": "d2v_fast.model",
    "Data2Vec2AudioConfig": "d2v_fast.nets",
    "Data2Vec2AudioForCTC": "d2v_fast.nets",
    "Data2Vec2AudioForSequenceClassification": "d2v_fast.nets",
    "Data2Vec2AudioModel": "d2v_fast.nets",
    "Data2Vec2VisionConfig": "d2v_fast.nets",
    "Data2Vec2VisionForImageClassification": "d2v_fast.nets",
    "Data2Vec2VisionModel": "d2v_fast.nets",
    "Data2VecLoss": "d2v_fast.loss",
    "EMATeacher": "d2v_fast.ema",
    "Encoder": "d2v_fast.encoders",
    "build_encoder": "d2v_fast.encoders",
    "data2vec_loss": "d2v_fast.loss",
    "wrap": "d2v_fast.encoders",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the loss does not import transformers.
    if name in _HOME:
        if _HOME[name] == "d2v_fast.encoders":
            importlib.import_module("d2v_fast.nets")  # registers our models with transformers
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
