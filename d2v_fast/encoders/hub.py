"""Build encoders from model types, hub names, folders, or existing models."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.choices import Init, import_class
from d2v_fast.config import EncoderConfig
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

# Overrides for transformers' defaults. For example, BEiT has no mask token, positions or final norm by default.
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
    "vit_mae": dict(mask_ratio=0.0),  # data2vec does the masking
    # In this class num_conv_pos_embeddings is the number of layers of the positional convolution (method 6.1).
    "data2vec-audio": dict(conv_pos_kernel_size=19, num_conv_pos_embeddings=5),
}


def wrap(model: nn.Module, layers: str | None = None, ffn: str | None = None, features: str | None = None) -> Encoder:
    """Wrap a Hugging Face model, or a module with the methods `embed` and `contextualize`, as an Encoder.

    Known families run in pieces. Other Hugging Face models run whole, with the output of the module `features` replaced.

    Raises:
        ValueError: The model is of neither kind, or it cannot be run this way.
    """
    if hasattr(model, "embed") and hasattr(model, "contextualize"):
        if features is not None:
            raise ValueError(f"features={features!r}: only for transformers models; {type(model).__name__} has its own embed")
        return Encoder(model, layers, ffn)
    reads = getattr(model, "main_input_name", None)
    if reads not in READS or not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} is neither a Hugging Face encoder of text, images or speech nor a module with the "
            "methods embed(inputs) and contextualize(features, padding_mask); see d2v_fast.encoders"
        )
    if reads in ADAPTERS and features is None:
        try:
            return _in_pieces(model, ADAPTERS[reads], layers, ffn)
        except ValueError as error:
            log.debug("%s", error)
    return splice(model, features, layers, ffn)


def _in_pieces(model: nn.Module, adapter: type[Encoder], layers: str | None, ffn: str | None) -> Encoder:
    """Wrap a model of a known family. Raises ValueError if it does not fit."""
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
    """Random inputs for a Hugging Face encoder."""
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
    """Largest absolute difference between an encoder's states and those of the transformers model itself."""
    in_order = {}
    if "noise" in inspect.signature(model.forward).parameters:  # ViT-MAE shuffles the patches by it
        in_order = {"noise": torch.arange(states.shape[1]).expand(len(states), -1)}
    return float((model(inputs, **in_order).last_hidden_state[:, -states.shape[1] :] - states).abs().max())


def _check_states(encoder: Encoder) -> None:
    """Check on a small input that the pieces compute the same states as the whole model; skipped without usable weights."""
    model = encoder.model
    if any(p.is_meta or not p.isfinite().all() for p in model.parameters()):
        return
    like = next(model.parameters())
    tolerance = 1e-3 if like.dtype.itemsize >= 4 else 0.1
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            inputs = example(encoder, 1, 16).to(like.device)
            inputs = inputs.to(like.dtype) if inputs.is_floating_point() else inputs
            x = encoder.place(encoder.embed(inputs))
            difference = off_by(encoder.transform(x, layers=len(encoder.blocks)).states, model, inputs)
        why = f"its pieces and the whole model differ by {difference:.1e}" if difference > tolerance else None
    except Exception as error:  # model classes raise all kinds of errors
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        for module, mode in training.items():
            module.training = mode
    if why:
        raise ValueError(
            f"{type(model).__name__} does not have the structure of a known family: {why}; "
            f"give it the methods embed and contextualize, see {Path(__file__).parents[1]}/docs/encoders.md"
        )


def model_class(config: type) -> Any:
    """The transformers model class for this config class; the first if there are several."""
    from transformers import MODEL_MAPPING

    found: Any = MODEL_MAPPING[config]
    return found[0] if isinstance(found, tuple) else found


def class_arguments(cls: type[nn.Module]) -> dict[str, bool]:
    """Constructor arguments, in addition to the config, that give a model exactly the weights an encoder needs."""
    # Poolers get no gradient. The mask token of ViT and DeiT is a constructor argument, not a config field.
    wanted = dict(add_pooling_layer=False, use_mask_token=True)
    return {name: value for name, value in wanted.items() if name in inspect.signature(cls.__init__).parameters}


def build_encoder(
    model: str | None = None,
    pretrained: str | None = None,
    config: dict[str, Any] | None = None,
    init: Init = EncoderConfig.init,
    layers: str | None = None,
    ffn: str | None = None,
    feature_grad_mult: float = EncoderConfig.feature_grad_mult,
    attention: str = EncoderConfig.attention,
    features: str | None = None,
    bidirectional: bool = False,
) -> Encoder:
    """Build an encoder from a Hugging Face model type, pretrained weights, or your own class.

    Args:
        model: transformers model type ("roberta", "beit", "wav2vec2", "data2vec-audio", …), "timm/NAME" for a timm model, or
            "package.module:Class".
        pretrained: Hub name or folder to load instead of starting from random weights.
        config: Fields of the config class, or constructor arguments of your own class or the timm model.
        init: "data2vec" re-initialises a random BEiT or ViT as the authors do (method 3.3); "sincos" gives it the fixed
            sin-cos positions of MAE and data2vec 2.0 (method 4.1).
        layers: Path of the block list, if it is not detected automatically.
        ffn: Path, inside a block, of the FFN output, if it is not the last Linear.
        feature_grad_mult: Gradient scale of the convolutions of a speech encoder.
        attention: Attention implementation of transformers; models without SDPA fall back to eager.
        features: Path of the local-features module, if it is not detected automatically; the model then runs whole.
        bidirectional: Make the attention of a decoder-only model bidirectional, as LLM2Vec does. Sets `is_causal` to False in
            the config, which transformers follows.

    Raises:
        ValueError: The model type, config field or class does not exist, or the model cannot be built or loaded.
    """
    EncoderConfig(init=init, feature_grad_mult=feature_grad_mult)  # checks them
    config = dict(config or {})
    pretrained = pretrained and os.path.expanduser(pretrained)
    if model is not None and ":" in model:
        cls = import_class("encoder.model", model, nn.Module, "nn.Module")
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
            "encoder.config.trust_remote_code: code shipped with a model is not run; to use a class that you have read, set "
            "encoder.model=package.module:Class"
        )
    if pretrained is not None:
        try:
            hf_config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"encoder.pretrained={pretrained}: neither a model folder nor available from the hub: {first_line(error)}"
            ) from error
    else:
        hf_config = _new_config(str(model), config)
    if type(hf_config) not in MODEL_MAPPING:
        raise ValueError(f"encoder.model={hf_config.model_type!r}: transformers has no encoder for it")
    cls = model_class(type(hf_config))
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ValueError(
            f"encoder.model={hf_config.model_type!r}: {cls.__name__} also has a decoder; train its encoder from Python with "
            "d2v_fast.wrap(model.get_encoder())"
        )
    if bidirectional:
        hf_config.is_causal = False
    arguments = class_arguments(cls)
    if attention == "sdpa" and not getattr(cls, "_supports_sdpa", False):
        attention = "eager"
    try:
        if pretrained is not None:
            options = dict(config=hf_config, dtype=torch.float32, attn_implementation=attention, **arguments)
            report = dict(output_loading_info=True, ignore_mismatched_sizes=True)
            hf_model, loaded = cls.from_pretrained(pretrained, **options, **report)
            hf_model.train()
        else:
            hf_config._attn_implementation = attention
            hf_model = cls(hf_config, **arguments)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"encoder.pretrained={pretrained}: its weights are a pickle with other objects in it, which could run arbitrary "
            "code, so it is not loaded. Ask the author for safetensors, the format of save_pretrained"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"encoder.pretrained={pretrained}: its weights cannot be read: {first_line(error)}") from error
    except (ArithmeticError, AssertionError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        setting, remedy = f"encoder.config={config}", f"set other fields of {type(hf_config).__name__}"
        if attention not in ("sdpa", "eager"):
            setting, remedy = f"encoder.attention={attention}", "leave it out"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{setting}: {cls.__name__} cannot be built with it: {reason}; {remedy}") from error
    if pretrained is not None:
        _check_loaded(hf_model, loaded, pretrained)
    if hasattr(hf_model, "timm_model"):
        _complete_timm_config(hf_model)
    if bidirectional:
        causal = [module.is_causal for module in hf_model.modules() if hasattr(module, "is_causal")]
        if causal and not any(causal):
            raise ValueError(f"encoder.bidirectional=true: {cls.__name__} has no causal attention; remove the setting")
        log.info("%s: attention is bidirectional (encoder.bidirectional=true)", cls.__name__)
    encoder = wrap(hf_model, layers, ffn, features)
    if isinstance(encoder, WaveEncoder):
        encoder.feature_grad_mult = feature_grad_mult
        if feature_grad_mult == 0:  # otherwise DDP waits for gradients
            encoder.model.feature_extractor.requires_grad_(False)
    if init != "hf" and pretrained is None:
        spliced = init == "sincos" and isinstance(encoder, SplicedEncoder) and isinstance(encoder.positions(0), tuple)
        placed = hasattr(getattr(encoder.model, "embeddings", None), "position_embeddings")
        if not isinstance(encoder, PatchEncoder) and not (spliced and placed):
            name = type(encoder.model).__name__
            raise ValueError(f"encoder.init={init!r}: only for ViT, BEiT and similar models, found {name}; use encoder.init=hf")
        (init_data2vec if init == "data2vec" else init_sincos)(encoder)
    return encoder


def _check_loaded(model: nn.Module, loaded: dict[str, Any], pretrained: str) -> None:
    """Warn about missing weights; raise ValueError if most are missing or shapes differ."""
    if loaded["mismatched_keys"]:
        name, found, expected = sorted(loaded["mismatched_keys"])[0]
        raise ValueError(f"encoder.pretrained={pretrained}: {name} has shape {list(found)}, its config says {list(expected)}")
    missing, total = sorted(loaded["missing_keys"]), len(list(model.parameters()))
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        count = f"{len(missing)} of the {total} weights of {type(model).__name__}"
        message = f"encoder.pretrained={pretrained}: lacks {count}: {names}"
        if len(missing) > total / 2:
            raise ValueError(f"{message}; its config.json and its weights belong to different models")
        log.warning("%s; they are initialised randomly", message)


def _complete_timm_config(model: Any) -> None:
    """Add the fields that transformers configs have, and freeze the parts that only the pooled output needs."""
    inner, config = model.timm_model, model.config
    arguments, embed = config.model_args or {}, getattr(inner, "patch_embed", None)
    config.do_pooling = False
    config.hidden_size, config.num_hidden_layers = inner.num_features, len(getattr(inner, "blocks", ()))
    size = getattr(embed, "img_size", None) or arguments.get("img_size") or inner.pretrained_cfg["input_size"][1:]
    config.image_size = [size, size] if isinstance(size, int) else list(size)
    config.num_channels = arguments.get("in_chans", 3)
    # timm requires it in the config file of an exported model.
    config.pretrained_cfg = (getattr(config, "pretrained_cfg", None) or {}) | dict(
        input_size=[config.num_channels, *config.image_size]
    )
    for part in ("fc_norm", "attn_pool", "head"):
        if isinstance(getattr(inner, part, None), nn.Module):
            getattr(inner, part).requires_grad_(False)


def _new_config(model: str, fields: dict[str, Any]) -> Any:
    import difflib

    from transformers import CONFIG_MAPPING

    if model.startswith("timm/"):
        if importlib.util.find_spec("timm") is None:
            raise ValueError(f"encoder.model={model!r}: needs timm: pip install 'd2v-fast[timm]'")
        wrapper: Any = CONFIG_MAPPING["timm_wrapper"]
        return wrapper(architecture=model.removeprefix("timm/"), model_args=fields, num_labels=0)
    if model not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model), list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"encoder.model={model!r}: not a transformers model type{hint}")
    known = CONFIG_MAPPING[model]()
    for name in fields:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, list(known.to_dict()), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"encoder.config.{name}: {type(known).__name__} has no such field{hint}")
    try:
        return CONFIG_MAPPING[model](**{**DEFAULTS.get(model, {}), **fields})
    except Exception as error:  # config classes raise all kinds of errors
        raise ValueError(f"encoder.config: {' '.join(str(error).split())}") from error


def describe(encoder: Encoder) -> str:
    """A one-line description of the encoder for the log."""
    parameters = sum(p.numel() for p in encoder.parameters())
    return json.dumps(
        {
            "encoder": type(encoder.model).__name__,
            "layers": len(encoder.blocks),
            "hidden_size": encoder.hidden_size,
            "parameters": parameters,
        }
    )
