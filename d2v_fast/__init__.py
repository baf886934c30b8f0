"""d2v-fast: data2vec pre-training for text, images and speech."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "EMAConfig": "d2v_fast.config",
    "EMATeacher": "d2v_fast.ema",
    "Encoder": "d2v_fast.encoders",
    "HeadConfig": "d2v_fast.config",
    "LossConfig": "d2v_fast.config",
    "TargetsConfig": "d2v_fast.config",
    "build_encoder": "d2v_fast.encoders",
    "data2vec_loss": "d2v_fast.loss",
    "wrap": "d2v_fast.encoders",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from d2v_fast.config import EMAConfig as EMAConfig
    from d2v_fast.config import HeadConfig as HeadConfig
    from d2v_fast.config import LossConfig as LossConfig
    from d2v_fast.config import TargetsConfig as TargetsConfig
    from d2v_fast.decoders import ConvDecoder as ConvDecoder
    from d2v_fast.ema import EMATeacher as EMATeacher
    from d2v_fast.encoders import Encoder as Encoder
    from d2v_fast.encoders import build_encoder as build_encoder
    from d2v_fast.encoders import wrap as wrap
    from d2v_fast.loss import Data2VecLoss as Data2VecLoss
    from d2v_fast.loss import data2vec_loss as data2vec_loss
    from d2v_fast.model import Data2Vec as Data2Vec
    from d2v_fast.nets import Data2Vec2AudioConfig as Data2Vec2AudioConfig
    from d2v_fast.nets import Data2Vec2AudioForCTC as Data2Vec2AudioForCTC
    from d2v_fast.nets import Data2Vec2AudioForSequenceClassification as Data2Vec2AudioForSequenceClassification
    from d2v_fast.nets import Data2Vec2AudioModel as Data2Vec2AudioModel
    from d2v_fast.nets import Data2Vec2VisionConfig as Data2Vec2VisionConfig
    from d2v_fast.nets import Data2Vec2VisionForImageClassification as Data2Vec2VisionForImageClassification
    from d2v_fast.nets import Data2Vec2VisionModel as Data2Vec2VisionModel
    from d2v_fast.train.callbacks import Callback as Callback
else:  # hidden from type checkers, which would otherwise accept any misspelt name as Any

    def __getattr__(name: str) -> Any:
        # Lazy, so that importing the loss does not import transformers.
        if name in _HOME:
            if _HOME[name] == "d2v_fast.encoders":
                importlib.import_module("d2v_fast.nets")  # registers our models with transformers
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
