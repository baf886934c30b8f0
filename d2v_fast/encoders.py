"""Transformer encoders seen one way: embed → mask_features → place → transform.

Hugging Face models are recognised by what they eat (token ids, pixels, waveforms), not by name. An encoder of your own is an
`nn.Module` with two methods (three for images and speech) and a name for what the teacher should hand out:

    class Mine(nn.Module):
        hidden_size = 256
        def __init__(self): self.blocks = nn.ModuleList(...)
        def embed(self, inputs): ...                             # → local features (B, T, C), before any mask
        def contextualize(self, features, padding_mask=None): ...  # (B, T, C), padding_mask (B, T) True = padding
        def positions(self, size): ...   # image side → (rows, columns); samples of a waveform → frames; not for tokens

    encoder = Encoder(Mine(), layers="blocks", ffn="mlp.2")  # ffn: the last Linear of a block's FFN, seen from the block
    model = Data2Vec(encoder, top_k=4)
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast import blocks
from d2v_fast.data import first_line

log = logging.getLogger(__name__)

LayerSource = Literal["ffn", "block_output", "block_input"]


class Encoded(NamedTuple):
    """What the blocks compute.

    Attributes:
        states: (B, T, C), or (N, C) where rows were asked for.
        layers: Results of the last K blocks, first to last: K × (B, T, C).
    """

    states: Tensor
    layers: list[Tensor]


class Encoder(nn.Module):
    """A transformer encoder in the pieces that data2vec needs.

    Attributes:
        halves: Function of `d2v_fast.blocks` that runs a block by its halves; None for blocks that are not known there.
        narrow: Run what follows the attention of the last block at the wanted rows only. Needs `halves`.

    Args:
        model: A module with `embed(inputs) → (B, T, C)` and `contextualize(features, padding_mask) → (B, T, C)`.
        layers: Dotted path of the `nn.ModuleList` of transformer blocks; found by itself in Hugging Face models.
        ffn: Dotted path, seen from a block, of the module whose output is the FFN result before dropout and residual;
            default is the last `nn.Linear` of the block.
        hidden_size: Channels C; default is `model.hidden_size` or `model.config.hidden_size`.

    Raises:
        ValueError: The blocks, the FFN or the hidden size cannot be found; the message says how to name them.
    """

    local: tuple[str, ...] = ()  # parameters of the features before masking, as name prefixes
    positional: tuple[str, ...] = ()  # parameters of positions inside `contextualize`, as name prefixes
    mask_token_name: str | None = None
    masks_features: bool = True  # else the input itself is masked, and no mask vector is learned

    def __init__(self, model: nn.Module, layers: str | None = None, ffn: str | None = None, hidden_size: int | None = None):
        super().__init__()
        self.model = model
        self.layers_name = layers or self._find_layers()
        self.ffn_name = ffn
        config = getattr(model, "config", None)
        self.hidden_size = hidden_size or getattr(model, "hidden_size", None) or getattr(config, "hidden_size", None)
        if self.hidden_size is None:
            raise ValueError(f"{type(model).__name__} has neither hidden_size nor config.hidden_size: pass hidden_size=…")
        if not isinstance(self.blocks, nn.ModuleList | nn.Sequential):
            found = type(self.blocks).__name__
            raise ValueError(f"layers={self.layers_name!r}: found a {found}, expected an nn.ModuleList of blocks")
        self.halves = self._compiled_halves = None
        self.narrow = False
        if self.masks_features and not self._has(self.mask_token_name):
            self.mask_token_name = None
            self.mask_embedding = nn.Parameter(torch.empty(self.hidden_size).normal_(std=0.02))

    # What an encoder does

    def embed(self, inputs: Tensor) -> Tensor:
        """Local features (B, T, C), before masking and without context."""
        return self.model.embed(inputs)

    def mask_features(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features with the learned mask vector at masked positions; features (B, T, C), mask (B, T) bool."""
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(features.dtype), features)

    def place(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Features with their positions, (B, T, C), where the model adds positions after masking."""
        return features

    def transform(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        layers: int = 0,
        source: LayerSource = "ffn",
        rows: Tensor | None = None,
    ) -> Encoded:
        """Run the blocks on placed features.

        Never `output_hidden_states`: it would force eager attention and keep every layer.

        Args:
            x: (B, T, C), from `place`.
            padding_mask: (B, T) bool, True = padding.
            layers: Number K of last blocks whose results are returned.
            source: What a block's result is (spec 1.3): its FFN's output, its own output, or its input.
            rows: (N,) int64, positions of the flattened (B, T) whose states are wanted; all by default. With `narrow` the last
                of `layers` is zero elsewhere.

        Raises:
            ValueError: There are fewer blocks than `layers`, or one that was not called.
        """
        if layers:
            self.check_layers(layers, source)
        length = x.shape[1]
        if self.halves is None:
            with self._captured(layers, source) as captured:
                states = self._whole(x, padding_mask)
            if len(captured) < layers:
                raise ValueError(
                    f"{type(self.model).__name__}: {layers - len(captured)} of the last {layers} blocks gave no result; "
                    "call them as modules, and name the FFN's output if it is not the last Linear: ffn=…"
                )
            results = [self._scaled(result[:, -length:], block, source) for block, result in captured.items()]
            return Encoded(states if rows is None else states.flatten(0, 1)[rows], results)
        halves = self._compiled_halves or self.halves
        batch, results, narrowed = len(x), [], None
        x, extra, arguments = self._enter(x, padding_mask)
        for left, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            if left < layers and source == "block_input":
                results.append(x[:, extra:])
            if self._dropped():
                continue
            if left == 0 and rows is not None and self._narrows(block):
                narrowed = rows if extra == 0 else rows + extra * (rows // length + 1)
            if narrowed is not None or (left < layers and source == "ffn"):
                x, ffn = halves(block, x, narrowed, **arguments)
            else:
                x, ffn = blocks.first(block(x, **arguments)), None
            if left < layers and source != "block_input":
                result = self._scaled(x if ffn is None or source != "ffn" else ffn, block, source)
                if narrowed is not None:
                    result = result.new_zeros(batch * length, result.shape[-1]).index_copy_(0, rows, result[0])
                    result = result.view(batch, length, -1)
                results.append(result[:, -length:])
        states = self._leave(x)
        if narrowed is not None:
            return Encoded(states[0], results)
        states = states[:, extra:]
        return Encoded(states if rows is None else states.flatten(0, 1)[rows], results)

    def contextualize(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """States (B, T, C) of all positions; padding_mask (B, T) bool, True = padding."""
        return self.transform(self.place(features, padding_mask), padding_mask).states

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """States of an unmasked input, as a probe or a user wants them."""
        return self.contextualize(self.embed(inputs), padding_mask)

    def positions(self, size: int) -> int | tuple[int, int]:
        """Number of positions for an input of this size (tokens, samples), or the grid of patches for an image side."""
        return self.model.positions(size) if hasattr(self.model, "positions") else size

    @property
    def mask_token(self) -> Tensor:
        return self.mask_embedding if self.mask_token_name is None else self._lookup(self.mask_token_name)

    # Its layers

    @property
    def blocks(self) -> nn.ModuleList:
        return self._lookup(self.layers_name)

    def compile_halves(self) -> None:
        """Run blocks by their halves through `torch.compile`, if the halves are known."""
        self._compiled_halves = self.halves and torch.compile(self.halves)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compiled_halves": None}  # which neither pickle nor deepcopy can take along

    def check_layers(self, layers: int, source: LayerSource) -> None:
        """Raise ValueError if there are fewer blocks, or none or other modules than `ffn` names in them."""
        if not 1 <= layers <= len(self.blocks):
            raise ValueError(f"top_k: found {layers}, but {type(self.model).__name__} has {len(self.blocks)} layers")
        if source == "ffn":
            for block in self.blocks[-layers:]:
                self._ffn(block)

    # What a family knows of its blocks

    def _enter(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, int, dict[str, Any]]:
        """Input of the first block (B, E + T, C), the number E of extra tokens in front, and the arguments of all blocks."""
        raise NotImplementedError

    def _leave(self, x: Tensor) -> Tensor:
        """The output of the last block as states."""
        return x

    def _whole(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """States (B, T, C) as the model itself runs its blocks, for those whose halves are not known."""
        return self.model.contextualize(x, padding_mask)

    def _dropped(self) -> bool:
        """Whether layer-drop leaves the next block out."""
        return False

    def _narrows(self, block: nn.Module) -> bool:
        # Stochastic depth drops samples, which rows no longer tell apart.
        return self.narrow and not (block.training and any(getattr(m, "drop_prob", None) for m in block.modules()))

    @staticmethod
    def _scaled(result: Tensor, block: nn.Module, source: LayerSource) -> Tensor:
        """BEiT scales the FFN's result before the residual; its scaled form is the layer's result (spec 1.3)."""
        scale = getattr(block, "lambda_2", None) if source == "ffn" else None
        return result * scale if isinstance(scale, Tensor) else result

    @contextmanager
    def _captured(self, layers: int, source: LayerSource) -> Iterator[dict[nn.Module, Tensor]]:
        """Results of the last blocks while the model runs them itself, by hooks that live as long as the call."""
        results: dict[nn.Module, Tensor] = {}
        hooks = []
        for block in self.blocks[len(self.blocks) - layers :]:
            if source == "block_input":

                def keep(module, args, kwargs, block=block):
                    results[block] = args[0] if args else kwargs["hidden_states"]

                hooks.append(block.register_forward_pre_hook(keep, with_kwargs=True))
            else:

                def keep(module, args, output, block=block):
                    results[block] = blocks.first(output)

                hooks.append((self._ffn(block) if source == "ffn" else block).register_forward_hook(keep))
        try:
            yield results
        finally:
            for hook in hooks:
                hook.remove()

    def not_averaged(self, scope: Literal["all", "encoder", "layers"]) -> list[str]:
        """Patterns of the parameters that a teacher of this scope copies instead of averaging (spec 1.6)."""
        prefixes = {"all": (), "encoder": self.local, "layers": self.local + self.positional}[scope]
        names = [name for name, _ in self.named_parameters()]
        patterns = [f"model.{prefix}*" for prefix in prefixes]
        return [p for p in patterns if any(name.startswith(p[:-1]) for name in names)]

    def save(self, folder: str | Path) -> None:
        """Write the model alone: Hugging Face format where it has one, else its weights as safetensors."""
        if hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(folder)
            return
        from safetensors.torch import save_model

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(Path(folder) / "model.safetensors"))

    def _lookup(self, path: str) -> Any:
        found: Any = self.model
        for name in path.split("."):
            if not hasattr(found, name):
                raise ValueError(f"{path!r}: {type(found).__name__} has no attribute {name!r}")
            found = getattr(found, name)
        return found

    def _has(self, path: str | None) -> bool:
        """Whether the model has a parameter of this name; wav2vec 2.0 and ViT may lack their mask vector."""
        return path is not None and path in dict(self.model.named_parameters())

    def _find_layers(self) -> str:
        wanted = getattr(getattr(self.model, "config", None), "num_hidden_layers", None)
        lists = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        for name, modules in lists.items():
            inner = " ".join(n for n, _ in modules[0].named_modules())
            if len(modules) == wanted and "att" in inner:
                return name
        raise ValueError(
            f"cannot find the transformer layers of {type(self.model).__name__}: no nn.ModuleList has "
            f"config.num_hidden_layers = {wanted} blocks with attention inside. Name it: layers=… "
            f"(found: {', '.join(f'{name} of {len(m)}' for name, m in lists.items()) or 'no nn.ModuleList'})"
        )

    def _ffn(self, block: nn.Module) -> nn.Module:
        if self.ffn_name is not None:
            try:
                return block.get_submodule(self.ffn_name)
            except AttributeError:
                names = [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]
                raise ValueError(f"ffn={self.ffn_name!r}: not in {type(block).__name__}; its Linears: {names}") from None
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise ValueError(f"{type(block).__name__} has no nn.Linear: name the FFN output, ffn=…")
        return linears[-1]


class TokenEncoder(Encoder):
    """RoBERTa, BERT, Data2VecText and their kin: ids → token and position embeddings → blocks.

    Masking happens in the ids, so the student's features are masked already.
    """

    local = ("embeddings",)
    masks_features = False

    def embed(self, inputs: Tensor) -> Tensor:
        return self.model.embeddings(input_ids=inputs)

    def _attend(self, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        from transformers.masking_utils import create_bidirectional_mask

        if padding_mask is None:
            return None
        return create_bidirectional_mask(config=self.model.config, inputs_embeds=x, attention_mask=~padding_mask)

    def _enter(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, int, dict[str, Any]]:
        return x, 0, dict(attention_mask=self._attend(x, padding_mask))

    def _leave(self, x: Tensor) -> Tensor:
        norm = getattr(self.model, "LayerNorm", None)  # RobertaPreLayerNorm
        return x if norm is None else norm(x)

    def _whole(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return self._leave(self.model.encoder(x, attention_mask=self._attend(x, padding_mask)).last_hidden_state)


class _PositionIndex:
    """In place of a bias module's own: its index of relative positions, kept on the device of its table.

    transformers keeps it on the host, from where each look-up, forward and backward, copies it and waits for a GPU.
    """

    def __init__(self, bias: nn.Module):
        self.bias, self.kept = bias, {}

    def __call__(self, window_size: tuple[int, int]) -> Tensor:
        key = window_size, self.bias.relative_position_bias_table.device
        if key not in self.kept:
            self.kept[key] = type(self.bias).generate_relative_position_index(window_size).to(key[1], non_blocking=True)
        return self.kept[key]


class PatchEncoder(Encoder):
    """BEiT, ViT, DeiT, Data2VecVision: pixels → patch embeddings → extra tokens and positions → blocks → final norm."""

    local = ("embeddings",)
    positional = ("shared_position_bias", "encoder.relative_position_bias")
    mask_token_name = "embeddings.mask_token"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for module in self.model.modules():
            if hasattr(module, "generate_relative_position_index"):
                module.generate_relative_position_index = _PositionIndex(module)

    def embed(self, inputs: Tensor) -> Tensor:
        patches = self.model.embeddings.patch_embeddings(inputs)
        return patches[0] if isinstance(patches, tuple) else patches

    def _enter(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, int, dict[str, Any]]:
        model, embeddings = self.model, self.model.embeddings
        extra = [embeddings.cls_token]
        if hasattr(embeddings, "distillation_token"):
            extra.append(embeddings.distillation_token)
        x = torch.cat([*(token.to(x.dtype).expand(len(x), -1, -1) for token in extra), x], dim=1)
        if embeddings.position_embeddings is not None:
            x = x + embeddings.position_embeddings
        x = embeddings.dropout(x)
        size, arguments = self._image_size(), {}
        if hasattr(model, "encoder"):  # Data2VecVision
            arguments = dict(relative_position_bias=None, resolution=size)
            if model.encoder.has_relative_position_bias:
                bias = model.encoder.relative_position_bias
                arguments["relative_position_bias"] = bias(self.positions(size[0]), dim_size=x.shape[1])
        elif hasattr(model, "shared_position_bias"):  # BEiT
            bias = model.shared_position_bias
            if bias is not None:
                bias = bias(self.positions(size[0]), dim_size=x.shape[1])
            arguments = dict(attention_mask=bias, resolution=size)
        return x, len(extra), arguments

    def _leave(self, x: Tensor) -> Tensor:
        return self.model.layernorm(x)

    def _whole(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        x, extra, arguments = self._enter(x, padding_mask)
        for block in self.blocks:
            x = blocks.first(block(x, **arguments))
        return self._leave(x)[:, extra:]

    def positions(self, size: int) -> tuple[int, int]:
        patch = self.model.config.patch_size
        high, wide = self._image_size()
        return high // patch, wide // patch

    def _image_size(self) -> tuple[int, int]:
        size = self.model.config.image_size
        return tuple(size) if isinstance(size, list | tuple) else (size, size)


class WaveEncoder(Encoder):
    """Wav2Vec2, HuBERT, Data2VecAudio: waveform → conv stack → projection → positional conv → blocks.

    `feature_grad_mult` scales the gradient into the conv stack; 0 freezes it (spec 3.1).
    """

    local = ("feature_extractor", "feature_projection", "masked_spec_embed")
    positional = ("encoder.pos_conv_embed",)
    mask_token_name = "masked_spec_embed"
    feature_grad_mult: float = 1.0

    def embed(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.feature_grad_mult > 0):
            # The conv stack of transformers marks its input as requiring grad, in place.
            features = self.model.feature_extractor(inputs.detach()).transpose(1, 2)
        if 0 < self.feature_grad_mult < 1:
            features = features * self.feature_grad_mult + features.detach() * (1 - self.feature_grad_mult)
        norm = getattr(self.model.feature_projection, "layer_norm", None)
        return self.model.feature_projection.projection(features if norm is None else norm(features))

    def mask_features(self, features: Tensor, mask: Tensor) -> Tensor:
        # The projection's dropout is the student's alone; what `embed` gives may be the teacher's too (spec 1.6).
        return super().mask_features(self.model.feature_projection.dropout(features), mask)

    @property
    def _stable(self) -> bool:  # the norm comes after the blocks, not before
        return getattr(self.model.config, "do_stable_layer_norm", False)

    def place(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if self.halves is None:
            return features  # the model itself adds positions
        if padding_mask is not None:
            features = features.masked_fill(padding_mask.unsqueeze(-1), 0)
        return features + self.model.encoder.pos_conv_embed(features)

    def _enter(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, int, dict[str, Any]]:
        from transformers.masking_utils import create_bidirectional_mask

        encoder = self.model.encoder
        attend = None if padding_mask is None else ~padding_mask
        attend = create_bidirectional_mask(config=self.model.config, inputs_embeds=x, attention_mask=attend)
        if not self._stable:
            x = encoder.layer_norm(x)
        return encoder.dropout(x), 0, dict(attention_mask=attend)

    def _leave(self, x: Tensor) -> Tensor:
        return self.model.encoder.layer_norm(x) if self._stable else x

    def _whole(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        attend = None
        if padding_mask is not None:
            attend = ~padding_mask
            x = x.clone()  # transformers zeroes padding in place
        return self.model.encoder(x, attention_mask=attend).last_hidden_state

    def _dropped(self) -> bool:
        drop = self.model.config.layerdrop
        return self.training and drop > 0 and bool(torch.rand([]) < drop)

    def positions(self, size: int) -> int:
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            size = (size - kernel) // stride + 1 if size >= kernel else 0
        return size


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
    # spec 8.1: here num_conv_pos_embeddings is the number of layers of the positional convolution.
    "data2vec-audio": dict(conv_pos_kernel_size=19, num_conv_pos_embeddings=5),
}


def wrap(model: nn.Module, layers: str | None = None, ffn: str | None = None) -> Encoder:
    """`model` as an Encoder: a Hugging Face model by its main input, anything else by its own `embed`/`contextualize`.

    Raises:
        ValueError: The module is neither.
    """
    if hasattr(model, "embed") and hasattr(model, "contextualize"):
        return Encoder(model, layers, ffn)
    adapter = ADAPTERS.get(getattr(model, "main_input_name", None))
    if adapter is None:
        raise ValueError(
            f"{type(model).__name__} is neither a Hugging Face encoder of text, images or speech nor a module with the "
            "methods embed(inputs) and contextualize(features, padding_mask); see d2v_fast.encoders"
        )
    for part in adapter.local:
        if part != adapter.mask_token_name and not hasattr(model, part):
            raise ValueError(
                f"{type(model).__name__} has no {part!r}, so its features cannot be told from its context: "
                "give it the methods embed and contextualize; see d2v_fast.encoders"
            )
    encoder = adapter(model, layers, ffn)
    kinds = {blocks.known(block) for block in encoder.blocks}
    if len(kinds) == 1 and ffn is None:
        encoder.halves = kinds.pop()
    _check_states(encoder)
    return encoder


def example(encoder: Encoder, batch: int = 2, tokens: int = 64) -> Tensor:
    """Random inputs of a Hugging Face encoder."""
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
    return float((model(inputs).last_hidden_state[:, -states.shape[1] :] - states).abs().max())


def _check_states(encoder: Encoder) -> None:
    """Tried on one small input, where weights are at hand: the pieces of the model do what it does as a whole."""
    model = encoder.model
    if any(p.device.type != "cpu" or p.dtype != torch.float32 or not p.isfinite().all() for p in model.parameters()):
        return
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            inputs = example(encoder, 1, 16)
            x = encoder.place(encoder.embed(inputs))
            difference = off_by(encoder.transform(x, layers=len(encoder.blocks)).states, model, inputs)
        why = f"its pieces compute other states than the whole, off by {difference:.1e}" if difference > 1e-3 else None
    except Exception as error:  # each class of transformers has errors of its own
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        for module, mode in training.items():
            module.training = mode
    if why:
        raise ValueError(
            f"{type(model).__name__} is not put together as the models that are known here: {why}; "
            f"give it the methods embed and contextualize, see {Path(__file__).parent}/docs/encoders.md"
        )


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
) -> Encoder:
    """An encoder from a Hugging Face model type, from pretrained weights, or from your own class.

    Args:
        model: Model type of transformers ("roberta", "beit", "wav2vec2", "data2vec-audio", …) or "package.module:Class".
        pretrained: Hub name or folder to load instead of starting from random weights.
        config: Fields of the configuration class (of the constructor for your own class).
        init: "data2vec" re-initialises a random BEiT or ViT as the authors do (spec 3.3); "sincos" gives it the fixed
            sin-cos positions of MAE and data2vec 2.0 (spec 4.1).
        layers: Path of the block list, where it is not found by itself.
        ffn: Path inside a block of the FFN output, where it is not the last Linear.
        feature_grad_mult: Gradient scale of the convolutions of a speech encoder.
        attention: Attention implementation of transformers; models without it fall back to eager.

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
        return wrap(own, layers, ffn)

    from safetensors import SafetensorError
    from transformers import MODEL_MAPPING, AutoConfig

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
    cls = MODEL_MAPPING[type(hf_config)]
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
    encoder = wrap(hf_model, layers, ffn)
    if isinstance(encoder, WaveEncoder):
        encoder.feature_grad_mult = feature_grad_mult
        if feature_grad_mult == 0:  # else DDP would wait for gradients
            encoder.model.feature_extractor.requires_grad_(False)
    if init != "hf" and pretrained is None:
        if not isinstance(encoder, PatchEncoder):
            raise ValueError(f"encoder.init={init!r}: is for images, found {type(encoder.model).__name__}")
        (_init_data2vec if init == "data2vec" else _init_sincos)(encoder)
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


def _new_config(model: str | None, fields: dict[str, Any]):
    import difflib

    from transformers import CONFIG_MAPPING

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


@torch.no_grad()
def _init_data2vec(encoder: PatchEncoder) -> None:
    """Truncated normal .02 cut at one std; what writes to the residual of block i is divided by √(2i) (spec 3.3)."""

    def draw(weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)

    for name, parameter in encoder.named_parameters():
        if name.endswith(("cls_token", "mask_token")) or (parameter.ndim > 1 and "position" not in name):
            draw(parameter)
    for depth, block in enumerate(encoder.blocks, start=1):
        attention_out = [m for n, m in block.named_modules() if "att" in n and isinstance(m, nn.Linear)][-1]
        for linear in (attention_out, encoder._ffn(block)):
            linear.weight.div_((2 * depth) ** 0.5)


@torch.no_grad()
def _init_sincos(encoder: PatchEncoder) -> None:
    """Absolute positions become sines and cosines of column and row, as in MAE, and stay so (spec 4.1)."""
    positions = encoder.model.embeddings.position_embeddings
    if positions is None:
        raise ValueError(f"encoder.init='sincos': {type(encoder.model).__name__} has no absolute positions")
    high, wide = encoder.positions(0)
    omega = 10_000 ** -(torch.arange(encoder.hidden_size // 4) / (encoder.hidden_size // 4))
    column, row = torch.arange(wide).repeat(high), torch.arange(high).repeat_interleave(wide)
    angles = [axis[:, None] * omega for axis in (column, row)]
    positions.zero_()
    positions[0, -high * wide :] = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    positions.requires_grad_(False)


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
