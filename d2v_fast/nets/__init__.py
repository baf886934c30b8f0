"""The image and speech models of data2vec 2.0 as transformers models.

Importing this module registers them with the Auto classes of transformers.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from d2v_fast.nets.audio import (
    Data2Vec2AudioConfig,
    Data2Vec2AudioForCTC,
    Data2Vec2AudioForSequenceClassification,
    Data2Vec2AudioModel,
)
from d2v_fast.nets.vision import Data2Vec2VisionConfig, Data2Vec2VisionForImageClassification, Data2Vec2VisionModel

__all__ = [
    "Data2Vec2AudioConfig",
    "Data2Vec2AudioForCTC",
    "Data2Vec2AudioForSequenceClassification",
    "Data2Vec2AudioModel",
    "Data2Vec2VisionConfig",
    "Data2Vec2VisionForImageClassification",
    "Data2Vec2VisionModel",
    "register",
    "save",
]

AUTO: dict[type[PreTrainedConfig], dict[Any, type[PreTrainedModel]]] = {
    Data2Vec2VisionConfig: {
        AutoModel: Data2Vec2VisionModel,
        AutoModelForImageClassification: Data2Vec2VisionForImageClassification,
    },
    Data2Vec2AudioConfig: {
        AutoModel: Data2Vec2AudioModel,
        AutoModelForAudioClassification: Data2Vec2AudioForSequenceClassification,
        AutoModelForCTC: Data2Vec2AudioForCTC,
    },
}


def register() -> None:
    """Register the models with the Auto classes of transformers; safe to call repeatedly."""
    for config, models in AUTO.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, model in models.items():
            auto.register(config, model, exist_ok=True)


register()


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a transformers model, and for the models of this module also the file that defines it.

    If d2v-fast is imported, `AutoModel.from_pretrained(folder)` uses its class and runs no code from the folder. Otherwise
    `trust_remote_code=True` loads the class from the folder. The same holds for the Auto classes of the heads, whichever of the
    models was saved. Weights of a timm model keep timm's names.
    """
    models: dict[Any, Any] = AUTO.get(type(model.config), {})
    if type(model) not in models.values():
        timm = hasattr(model, "timm_model")
        weights = {name.removeprefix("timm_model."): value for name, value in model.state_dict().items()} if timm else None
        model.save_pretrained(folder, state_dict=weights)
        return
    code = Path(inspect.getfile(type(model)))
    names = {AutoConfig: type(model.config)} | models
    model.config.auto_map = {auto.__name__: f"{code.stem}.{cls.__name__}" for auto, cls in names.items()}
    try:
        model.save_pretrained(folder)
    finally:
        del model.config.auto_map
    shutil.copyfile(code, Path(folder) / code.name)
