"""Encoders from model types, names on the hub, folders, and models at hand."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_fast.data import first_line
from d2v_fast.encoders import blocks
from d2v_fast.encoders.base import Encoder
from d2v_fast.encoders.patches import PatchEncoder, init_data2vec, init_sincos
from d2v_fast.encoders.spliced import READS, SplicedEncoder
from d2v_fast.encoders.tokens import TokenEncoder
from d2v_fast.encoders.trial import splice
from d2v_fast.encoders.waves import WaveEncoder

log = logging.getLogger(__name__)

ADAPTERS = {"input_ids": TokenEncoder, "pixel_values": PatchEncoder, "input_values": WaveEncoder}

# Where the defaults of transformers are not what data2vec needs: BEiT has no mask token, no positions and no final norm.
_BEIT = dict(
    use_mask_token=True,
    use_mean_pooling=False,
    use_shared_relative_position_bias=True,
    layer_norm_eps=1e-6,
    layer_scale_init_value=1e-4,
    drop_path_rate=0.0,
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "beit": _BEIT,
    "data2vec-vision": _BEIT,
    "data2vec-text": dict(layer_norm_eps=1e-5, type_vocab_size=1, max_position_embeddings=514),
    "roberta": dict(layer_norm_eps=1e-5, type_vocab_size=1, max_position_embeddings=514),
    "vit_mae": dict(mask_ratio=0.0),  # masks come from here
    # method 6.1: here num_conv_pos_embeddings is the number of layers of the positional convolution.
    "data2vec-audio": dict(conv_pos_kernel_size=19, num_conv_pos_embeddings=5),
}


def wrap(model: nn.Module, layers: str | None = None, ffn: str | None = None, features: str | None = None) -> Encoder:
    """`model` as an Encoder: a Hugging Face model by its main input, anything else by its own `embed`/`contextualize`.

    Families that are known here are taken apart; others run whole, with the output of the module `features` exchanged.

    Raises:
        ValueError: The module is neither.
    """
    if hasattr(model, "embed") and hasattr(model, "contextualize"):
        if features is not None:
            raise ValueError(f"features={features!r}: is for models of transformers; {type(model).__name__} has its own embed")
        return Encoder(model, layers, ffn)
    reads = getattr(model, "main_input_name", None)
    if reads not in READS or not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} is neither a Hugging Face encoder of text, images or speech nor a module with the "
            "methods embed(inputs) and contextualize(features, padding_mask); see d2v_fast.encoders"
        )
    if reads in ADAPTERS and features is None:
        try:
            return _taken_apart(model, ADAPTERS[reads], layers, ffn)
        except ValueError as error:
            log.debug("%s", error)
    return splice(model, features, layers, ffn)


def _taken_apart(model: nn.Module, adapter: type[Encoder], layers: str | None, ffn: str | None) -> Encoder:
    """The model in the pieces of a family that is known; ValueError if it is of none."""
    for part in adapter.local:
        if part != adapter.mask_token_name and not hasattr(model, part):
            raise ValueError(f"{type(model).__name__} has no {part!r}")
    encoder = adapter(model, layers, ffn)
    kinds = {blocks.known(block) for block in encoder.blocks}
    if len(kinds) == 1 and ffn is None:
        encoder.halves = kinds.pop()
    _check_states(encoder)
    return encoder


def example(encoder: Encoder, batch: int = 2, tokens: int = 64) -> Tensor:
    """Random inputs of a Hugging Face encoder."""
    if isinstance(encoder, SplicedEncoder):
        return encoder.example(batch, tokens)
    config, generator = encoder.model.config, torch.Generator().manual_seed(0)
    if isinstance(encoder, TokenEncoder):
        length = min(tokens, config.max_position_embeddings - 2)
        return torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    if isinstance(encoder, PatchEncoder):
        return torch.randn(batch, config.num_channels, *encoder._image_size(), generator=generator)
    return torch.randn(batch, 16_000, generator=generator)


@torch.no_grad()
def off_by(states: Tensor, model: nn.Module, inputs: Tensor) -> float:
    """Largest difference of an encoder's states from those that a model of transformers computes as a whole."""
    ordered = {}
    if "noise" in inspect.signature(model.forward).parameters:  # ViT-MAE shuffles patches by it
        ordered = {"noise": torch.arange(states.shape[1]).expand(len(states), -1)}
    return float((model(inputs, **ordered).last_hidden_state[:, -states.shape[1] :] - states).abs().max())


def _check_states(encoder: Encoder) -> None:
    """Tried on one small input, where weights are at hand: the pieces of the model do what it does as a whole."""
    model = encoder.model
    if any(p.is_meta or not p.isfinite().all() for p in model.parameters()):
        return
    like = next(model.parameters())
    close = 1e-3 if like.dtype.itemsize >= 4 else 0.1
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            inputs = example(encoder, 1, 16).to(like.device)
            inputs = inputs.to(like.dtype) if inputs.is_floating_point() else inputs
            x = encoder.place(encoder.embed(inputs))
            difference = off_by(encoder.transform(x, layers=len(encoder.blocks)).states, model, inputs)
        why = f"its pieces compute other states than the whole, off by {difference:.1e}" if difference > close else None
    except Exception as error:  # each class of transformers has errors of its own
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        for module, mode in training.items():
            module.training = mode
    if why:
        raise ValueError(
            f"{type(model).__name__} is not put together as the models that are known here: {why}; "
            f"give it the methods embed and contextualize, see {Path(__file__).parents[1]}/docs/encoders.md"
        )


def model_class(config: type) -> type[nn.Module]:
    """The class of transformers for this class of configuration; the first where it has several."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING[config]
    return found[0] if isinstance(found, tuple) else found


def class_arguments(cls: type[nn.Module]) -> dict[str, bool]:
    """What a class of transformers is to be told beside its config, to have all weights of an encoder and no others."""
    # Poolers get no gradient; mask tokens of ViT and DeiT are an argument and not a config field.
    wanted = dict(add_pooling_layer=False, use_mask_token=True)
    return {name: value for name, value in wanted.items() if name in inspect.signature(cls.__init__).parameters}


def build_encoder(
    model: str | None = None,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    init: Literal["hf", "data2vec", "sincos"] = "hf",
    layers: str | None = None,
    ffn: str | None = None,
    feature_grad_mult: float = 1.0,
    attention: str = "sdpa",
    features: str | None = None,
    bidirectional: bool = False,
) -> Encoder:
    """An encoder from a Hugging Face model type, from pretrained weights, or from your own class.

    Args:
        model: Model type of transformers ("roberta", "beit", "wav2vec2", "data2vec-audio", …), "timm/NAME" for a model of timm,
            or "package.module:Class".
        pretrained: Hub name or folder to load instead of starting from random weights.
        config: Fields of the configuration class (of the constructor for your own class and for timm).
        init: "data2vec" re-initialises a random BEiT or ViT as the authors do (method 3.3); "sincos" gives it the fixed
            sin-cos positions of MAE and data2vec 2.0 (method 4.1).
        layers: Path of the block list, where it is not found by itself.
        ffn: Path inside a block of the FFN output, where it is not the last Linear.
        feature_grad_mult: Gradient scale of the convolutions of a speech encoder.
        attention: Attention implementation of transformers; models without it fall back to eager.
        features: Path of the module that makes local features, where the model is to run whole and it is not found by itself.
        bidirectional: Let the attention of a decoder-only model see later positions too, as LLM2Vec does. It is written into
            the config, `is_causal`, which transformers follows.

    Raises:
        ValueError: No such model type, config field or class.
    """
    config = dict(config or {})
    pretrained = pretrained and os.path.expanduser(pretrained)
    if model is not None and ":" in model:
        module, _, name = model.partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"encoder.model={model!r}: {error}") from None
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):  # else os:system would do, with a config from elsewhere
            raise ValueError(f"encoder.model={model!r}: found {cls!r}, expected a class that derives from nn.Module")
        try:
            own = cls(**config)
        except TypeError as error:
            raise ValueError(f"encoder.config: {error}") from error
        if pretrained is not None:
            from safetensors.torch import load_model

            try:
                load_model(own, str(Path(pretrained) / "model.safetensors"))
            except RuntimeError as error:
                raise ValueError(f"encoder.pretrained={pretrained}: {' '.join(str(error).split())}") from error
        return wrap(own, layers, ffn, features)

    from safetensors import SafetensorError
    from transformers import MODEL_MAPPING, AutoConfig

    from d2v_fast import nets

    nets.register()
    if "trust_remote_code" in config:
        raise ValueError(
            "encoder.config.trust_remote_code: code that comes with a model is not run; to use a class that you have read: "
            "encoder.model=package.module:Class"
        )
    if pretrained is not None:
        try:
            hf_config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"encoder.pretrained={pretrained}: neither a folder with a model nor one to be had from the hub: "
                f"{first_line(error)}"
            ) from error
    else:
        hf_config = _new_config(model, config)
    if type(hf_config) not in MODEL_MAPPING:
        raise ValueError(f"encoder.model={hf_config.model_type!r}: transformers has no encoder for it")
    cls = model_class(type(hf_config))
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ValueError(
            f"encoder.model={hf_config.model_type!r}: {cls.__name__} has a decoder too; its encoder alone can be trained from "
            "Python: d2v_fast.wrap(model.get_encoder())"
        )
    if bidirectional:
        hf_config.is_causal = False
    arguments = class_arguments(cls)
    if attention == "sdpa" and not getattr(cls, "_supports_sdpa", False):
        attention = "eager"
    try:
        if pretrained is not None:
            asked = dict(config=hf_config, dtype=torch.float32, attn_implementation=attention, **arguments)
            report = dict(output_loading_info=True, ignore_mismatched_sizes=True)
            hf_model, loaded = cls.from_pretrained(pretrained, **asked, **report)
            hf_model.train()
        else:
            hf_config._attn_implementation = attention
            hf_model = cls(hf_config, **arguments)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"encoder.pretrained={pretrained}: its weights are a pickle that holds more than weights and could run any "
            "code; it is not loaded. Ask its author for safetensors, which save_pretrained writes"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"encoder.pretrained={pretrained}: its weights cannot be read: {first_line(error)}") from error
    except (ArithmeticError, AssertionError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        setting = f"encoder.config={config}" if attention in ("sdpa", "eager") else f"encoder.attention={attention}"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{setting}: {cls.__name__} cannot be made with it: {reason}") from error
    if pretrained is not None:
        _check_loaded(hf_model, loaded, pretrained)
    if hasattr(hf_model, "timm_model"):
        _tell_of_timm(hf_model)
    if bidirectional:
        causal = [module.is_causal for module in hf_model.modules() if hasattr(module, "is_causal")]
        if causal and not any(causal):
            raise ValueError(f"encoder.bidirectional=true: {cls.__name__} has no causal attention; leave the setting out")
        log.info("%s: its attention sees later positions too (encoder.bidirectional=true)", cls.__name__)
    encoder = wrap(hf_model, layers, ffn, features)
    if isinstance(encoder, WaveEncoder):
        encoder.feature_grad_mult = feature_grad_mult
        if feature_grad_mult == 0:  # else DDP would wait for gradients
            encoder.model.feature_extractor.requires_grad_(False)
    if init != "hf" and pretrained is None:
        spliced = init == "sincos" and isinstance(encoder, SplicedEncoder) and isinstance(encoder.positions(0), tuple)
        placed = hasattr(getattr(encoder.model, "embeddings", None), "position_embeddings")
        if not isinstance(encoder, PatchEncoder) and not (spliced and placed):
            name = type(encoder.model).__name__
            raise ValueError(f"encoder.init={init!r}: is for ViT, BEiT and their kin, found {name}; take encoder.init=hf")
        (init_data2vec if init == "data2vec" else init_sincos)(encoder)
    return encoder


def _check_loaded(model: nn.Module, loaded: dict[str, Any], pretrained: str) -> None:
    """Name the parameters that pretrained weights lack, and refuse weights that lack most or have other shapes."""
    if loaded["mismatched_keys"]:
        name, found, expected = sorted(loaded["mismatched_keys"])[0]
        raise ValueError(f"encoder.pretrained={pretrained}: {name} has shape {list(found)}, its config says {list(expected)}")
    missing, total = sorted(loaded["missing_keys"]), len(list(model.parameters()))
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        count = f"{len(missing)} of the {total} weights of {type(model).__name__}"
        message = f"encoder.pretrained={pretrained}: lacks {count}: {names}"
        if len(missing) > total / 2:
            raise ValueError(f"{message}; its config.json and its weights are of different models")
        log.warning("%s; they start at random", message)


def _tell_of_timm(model: nn.Module) -> None:
    """Put into the config what those of transformers say of a model, and leave out what only its pooled result needs."""
    inner, config = model.timm_model, model.config
    told, embed = config.model_args or {}, getattr(inner, "patch_embed", None)
    config.do_pooling = False
    config.hidden_size, config.num_hidden_layers = inner.num_features, len(getattr(inner, "blocks", ()))
    size = getattr(embed, "img_size", None) or told.get("img_size") or inner.pretrained_cfg["input_size"][1:]
    config.image_size = [size, size] if isinstance(size, int) else list(size)
    config.num_channels = told.get("in_chans", 3)
    # timm itself asks for it in the file of an exported model.
    config.pretrained_cfg = (getattr(config, "pretrained_cfg", None) or {}) | dict(
        input_size=[config.num_channels, *config.image_size]
    )
    for part in ("fc_norm", "attn_pool", "head"):
        if isinstance(getattr(inner, part, None), nn.Module):
            getattr(inner, part).requires_grad_(False)


def _new_config(model: str | None, fields: dict[str, Any]):
    import difflib

    from transformers import CONFIG_MAPPING

    if (model or "").startswith("timm/"):
        if importlib.util.find_spec("timm") is None:
            raise ValueError(f"encoder.model={model!r}: needs timm: pip install 'd2v-fast[timm]'")
        return CONFIG_MAPPING["timm_wrapper"](architecture=model.removeprefix("timm/"), model_args=fields, num_labels=0)
    if model not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model), list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"encoder.model={model!r}: not a model type of transformers{hint}")
    known = CONFIG_MAPPING[model]()
    for name in fields:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, list(known.to_dict()), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"encoder.config.{name}: {type(known).__name__} has no such field{hint}")
    try:
        return CONFIG_MAPPING[model](**{**DEFAULTS.get(model, {}), **fields})
    except Exception as error:  # each configuration class has errors of its own
        raise ValueError(f"encoder.config: {' '.join(str(error).split())}") from error


def describe(encoder: Encoder) -> str:
    """One line for the log."""
    parameters = sum(p.numel() for p in encoder.parameters())
    return json.dumps(
        {
            "encoder": type(encoder.model).__name__,
            "layers": len(encoder.blocks),
            "hidden_size": encoder.hidden_size,
            "parameters": parameters,
        }
    )
