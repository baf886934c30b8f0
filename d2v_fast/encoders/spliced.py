"""Run any transformers encoder whole, with the output of its local-features module replaced.

The model is a black box: a `Splice` holds the properties that `trial` found. The model itself handles everything after the
features, such as absolute, rotary or relative positions, CLS and register tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.encoders import blocks
from d2v_fast.encoders.base import Encoded, Encoder, gather

READS = {"input_ids": "text", "pixel_values": "vision", "input_values": "audio", "input_features": "spectrogram"}
TOKENS = 13  # length of the trial's text input; no axis of a model has this size


@dataclass
class Splice:
    """The properties of a model that are needed to run it with replaced features.

    Attributes:
        reads: Kind of input: text (token ids), vision (pixels), audio (waveforms) or spectrogram.
        features: Dotted path of the module that computes the local features.
        shape: Shape of one input; () for text.
        order: Batch, position and channel axes of that module's output.
        rest: Number of further items in its output tuple; None if it returns a bare tensor.
        width: Number of channels of the features.
        grid: Grid of positions; () if their number depends on the input.
        per_step: Samples or frames for the first position, and for each further position; None if there is no such rule.
        extra: Number of extra tokens in front of the positions.
        stem: Path of the module that takes the raw audio input, if it is not the features module.
        squeeze: Number of positions that share one block output.
        axes: Axes of the blocks' arguments that index positions, by block and path.
        local, positional: Names of the parameters of the features, and of what is added to them before the blocks.
        no_padding: Why padding cannot be excluded from the context; None if it can.
        no_gather: Why the blocks cannot run on a subset of the positions; None if they can.
    """

    reads: str
    features: str = ""
    shape: tuple[int, ...] = ()
    order: tuple[int, ...] = (0, 1, 2)
    rest: int | None = None
    width: int = 0
    grid: tuple[int, ...] = ()
    per_step: tuple[int, int] | None = None
    extra: int = 0
    stem: str | None = None
    squeeze: int = 1
    axes: dict[tuple, list[int]] = field(default_factory=dict)
    local: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    no_padding: str | None = None
    no_gather: str | None = None

    @property
    def timed(self) -> bool:
        return self.reads in ("audio", "spectrogram")

    @property
    def time(self) -> int:
        """Time axis of `shape`."""
        return max(range(len(self.shape)), key=lambda axis: self.shape[axis], default=0)


class StopForward(Exception):
    """Ends a forward pass early; may carry a tensor."""


class SplicedEncoder(Encoder):
    """A transformers model whose local features are replaced while it runs.

    Args:
        model: Takes `input_ids`, `pixel_values`, `input_values` or `input_features`; its `last_hidden_state` is (B, E + T, C).
        splice: How to run it, found by `trial.splice`.
        layers, ffn: As for `Encoder`.
    """

    def __init__(self, model: Any, splice: Splice, layers: str, ffn: str | None = None):
        self.splice, self.local, self.positional = splice, splice.local, splice.positional
        self.masks_features = splice.reads != "text"  # text is masked at the token ids
        known = ("mask_token", "masked_spec_embed")
        names = [n for n, p in model.named_parameters() if n.rpartition(".")[2] in known and p.numel() == p.shape[-1]]
        self.mask_token_name = names[0] if names else None
        super().__init__(model, layers, ffn)
        parameters = inspect.signature(model.forward).parameters
        self.takes = {name for name in ("attention_mask", "noise", "use_cache") if name in parameters}
        if not isinstance(getattr(model.config, "patch_size", None), int):
            self.takes.discard("noise")
        special = [value for name, value in model.config.to_dict().items() if name.endswith("token_id")]
        self.ids = [i for i in range(3, min(getattr(model.config, "vocab_size", None) or 0, 200)) if i not in special]

    @property
    def reads(self) -> str:  # type: ignore[override]  # a trial changes the splice
        return self.splice.reads

    @property
    def features_name(self) -> str:
        return self.splice.features

    @property
    def extra(self) -> int:
        return self.splice.extra

    @property
    def extra_tokens(self) -> bool:  # type: ignore[override]
        return self.extra > 0

    @property
    def no_gather(self) -> str | None:
        return self.splice.no_gather

    @property
    def gathers(self) -> bool:
        return self.no_gather is None

    def embed(self, inputs: Tensor) -> Tensor:
        return self._features_of(self.until(self.splice.features, lambda: self.call(inputs)))

    def place_visible(self, features: Tensor, mask: Tensor, visible: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if self.training and getattr(self.blocks[0], "gradient_checkpointing", False):
            name = type(self.model).__name__
            raise ValueError(f"{name}: gradient checkpointing would recompute its blocks on ungathered inputs; turn it off")
        if not self.gathers:
            raise ValueError(f"{type(self.model).__name__} cannot encode the visible positions alone: {self.no_gather}")
        return gather(self.placed(features, padding_mask), visible)

    def transform(self, x: Tensor, padding_mask: Tensor | None = None, **wanted: Any) -> Encoded:
        encoded = super().transform(x, padding_mask, **wanted)
        if self.splice.squeeze == 1:
            return encoded
        steps = torch.arange(x.shape[1], device=x.device) // self.splice.squeeze  # several positions share one block output
        return encoded._replace(layers=[result[:, steps.clamp(max=result.shape[1] - 1)] for result in encoded.layers])

    def positions(self, size: int) -> int | tuple[int, ...]:
        if self.reads == "text":
            return size
        if self.splice.per_step is None:
            return self.splice.grid if len(self.splice.grid) > 1 else self.splice.grid[0]
        first, step = self.splice.per_step
        return max(0, (size - first) // step + 1)

    def example(self, batch: int, tokens: int = TOKENS) -> Tensor:
        """Random inputs: token ids (B, T) without special tokens, otherwise (B, *splice.shape)."""
        if self.reads == "text":
            if not self.ids:
                raise ValueError(f"{type(self.model.config).__name__} has no vocab_size")
            return torch.tensor(self.ids)[torch.randint(len(self.ids), (batch, tokens))].to(self.kind()["device"])
        return torch.randn(batch, *self.splice.shape, **self.kind())

    # The model with other features

    def run(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Last states (B, E + T, C) of the model, run on a dummy input with its features replaced by `features` (B, T, C)."""
        splice, (batch, length) = self.splice, features.shape[:2]
        if self.reads == "text":
            inputs = torch.full((batch, length), self.ids[0], device=features.device)
            pad = getattr(self.model.config, "pad_token_id", None)
            if padding_mask is not None and pad is not None:
                inputs = inputs.masked_fill(padding_mask, pad)
        else:
            shape = list(splice.shape)
            if splice.per_step is not None:
                shape[splice.time] = splice.per_step[0] + (length - 1) * splice.per_step[1]
            elif length != math.prod(splice.grid):
                expected = " × ".join(map(str, splice.grid))
                raise ValueError(f"{type(self.model).__name__}: found {length} positions, expected {expected}")
            inputs = torch.zeros(1, *shape, **self.kind()).expand(batch, *shape)
        features = features.clone()  # some models zero padding or add positions in place
        with ExitStack() as stack:
            module = self.model.get_submodule(splice.features)
            stack.enter_context(override_forward(module, lambda *args, **kwargs: self._as_output(features)))
            if splice.stem is not None:
                stem = self.model.get_submodule(splice.stem)
                stack.enter_context(override_forward(stem, _on_one_sample(stem.forward)))
            return self.call(inputs, padding_mask)

    def call(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Last states (B, E + T, C) of the unchanged model."""
        arguments: dict[str, Any] = {self.model.main_input_name: inputs}
        if padding_mask is not None:
            if self.splice.no_padding:
                name = type(self.model).__name__
                raise ValueError(f"padding_mask: {name} {self.splice.no_padding}; crop inputs to one length")
            seen = ~padding_mask
            if self.splice.timed and self.splice.per_step is not None:
                first, step = self.splice.per_step
                sizes = first + (seen.sum(1) - 1) * step
                seen = torch.arange(inputs.shape[1 + self.splice.time], device=seen.device) < sizes[:, None]
            arguments["attention_mask"] = seen.long()
        if "noise" in self.takes:  # ViT-MAE sorts the patches by it
            arguments["noise"] = torch.arange(math.prod(self.splice.grid), device=inputs.device).expand(len(inputs), -1)
        if "use_cache" in self.takes:
            arguments["use_cache"] = False
        config = self.model.config
        augments = getattr(config, "apply_spec_augment", None)
        if not augments:
            return self._in_rows(self.model(**arguments).last_hidden_state)
        try:
            config.apply_spec_augment = False  # otherwise the model masks its input in train mode
            return self.model(**arguments).last_hidden_state
        finally:
            config.apply_spec_augment = augments

    def until(self, path: str, run: Callable[[], Any], inputs: bool = False) -> Any:
        """Call `run` up to the module at `path`; return that module's output, or its first input."""
        module = self.model.get_submodule(path)

        def stop(module, args, *rest):
            raise StopForward(first_argument(args, rest[0]) if inputs else rest[-1])

        register = module.register_forward_pre_hook if inputs else module.register_forward_hook
        hook = register(stop, with_kwargs=True)
        try:
            run()
        except StopForward as end:
            return end.args[0]
        finally:
            hook.remove()
        raise ValueError(f"{type(self.model).__name__} does not run {path}")

    def placed(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Input of the first block at the positions, (B, T, C)."""
        x = self.until(f"{self.layers_name}.0", lambda: self.run(features, padding_mask), inputs=True)
        return blocks.flat(x)[:, self.extra :]

    def kind(self) -> dict[str, Any]:
        """Device and dtype of the model."""
        parameter = next(self.model.parameters())
        return dict(device=parameter.device, dtype=parameter.dtype)

    def _in_rows(self, states: Tensor) -> Tensor:
        """States (B, T, C); converts those of a model that returns (B, H, W, C) or (B, C, H, W)."""
        if states.ndim == 4 and states.shape[1] == self.hidden_size:
            return states.flatten(2).transpose(1, 2)
        return blocks.flat(states) if states.shape[-1] == self.hidden_size else states

    def _features_of(self, output: Any) -> Tensor:
        x, grid = blocks.first(output).permute(self.splice.order), self.splice.grid
        found = tuple(x.shape[1:-1])
        if grid and found not in (grid, (math.prod(grid),)):
            name = self.splice.features
            raise ValueError(f"encoder.features={name}: found a grid of {found}, expected {grid} from config.image_size")
        return x.flatten(1, -2)

    def _as_output(self, features: Tensor) -> Any:
        order, rest = self.splice.order, self.splice.rest
        grid = self.splice.grid if len(order) == 4 else (features.shape[1],)
        x = features.unflatten(1, grid).permute([order.index(axis) for axis in range(len(order))])
        return x if rest is None else (x, *[None] * rest)

    # Blocks on a subset of the positions

    def _whole(self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None) -> Tensor:
        if visible is None:
            return self.run(x, padding_mask)
        # Run on zero features to get the extra tokens. The other arguments of the blocks are gathered.
        length = math.prod(self.splice.grid) if self.splice.grid else int(visible.max()) + 1
        padding = None
        if padding_mask is not None:
            padding = padding_mask.new_ones(len(x), length).scatter(1, visible, padding_mask)
        with self._gathering(x, visible, length):
            return self.run(x.new_zeros(1, 1, self.splice.width).expand(len(x), length, -1), padding)

    @contextmanager
    def _gathering(self, x: Tensor, visible: Tensor, length: int) -> Iterator[None]:
        """Pass x (B, V, C) to the first block, after the extra tokens, and gather the other block arguments at `visible`.

        Args:
            x: Placed features of the visible positions.
            visible: (B, V) int64, out of `length`.
        """
        extra = torch.arange(self.extra, device=x.device).expand(len(x), -1)
        rows = torch.cat([extra, visible + self.extra], dim=1)

        def change(number: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            first = first_path(args, kwargs)

            def replace(path: tuple, value: Tensor) -> Tensor:
                if path == first and number > 0:
                    return value
                if path == first:
                    return torch.cat([value[:, : self.extra].to(x.dtype), x], dim=1) if self.extra else x
                axes = self.splice.axes.get((number, path))
                if axes is None:  # a mask that was absent in the trial
                    axes = [axis for axis in (2, 3) if value.ndim == 4 and value.shape[axis] == self.extra + length]
                return _gather_axes(value, axes, rows if value.shape[axes[0]] != length else visible) if axes else value

            return map_tensors(replace, args, kwargs)

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):

                def hook(block, args, kwargs, number=number):
                    return change(number, args, kwargs)

                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _on_one_sample(forward: Callable) -> Callable:
    """A forward for a batch of identical samples; computes one and expands the result."""

    @torch.no_grad()
    def expanded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        one = forward(x[:1], *args, **kwargs)
        return one.expand(len(x), *one.shape[1:])

    return expanded


@contextmanager
def override_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Temporarily replace the module's forward."""
    before = vars(module).get("forward")  # accelerate may have replaced it too
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a block."""
    return args[0] if args else next(iter(kwargs.values()))


def first_path(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The path of the first argument, as in `map_tensors`."""
    return (0,) if args else (next(iter(kwargs)),)


def map_tensors(fn: Callable[[tuple, Tensor], Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Apply `fn(path, tensor)` to all tensors in a block's arguments, also inside tuples and lists."""

    def visit(path: tuple, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(visit((*path, i), item) for i, item in enumerate(value))
        return fn(path, value) if isinstance(value, Tensor) else value

    return tuple(visit((i,), arg) for i, arg in enumerate(args)), {name: visit((name,), arg) for name, arg in kwargs.items()}


def _gather_axes(value: Tensor, axes: list[int], rows: Tensor) -> Tensor:
    """`value` at `rows` (B, V) along `axes`; a batch axis is added if it has none, broadcasting over heads."""
    if axes[0] == 0:
        value, axes = (
            (value[None, None], [2 + axis for axis in axes]) if value.ndim == 2 else (value[None], [1 + a for a in axes])
        )
    value = value.expand(len(rows), *value.shape[1:])
    for axis in axes:
        index = rows.view(len(rows), *[rows.shape[1] if other == axis else 1 for other in range(1, value.ndim)])
        shape = [rows.shape[1] if other == axis else size for other, size in enumerate(value.shape)]
        value = value.gather(axis, index.expand(shape))
    return value
