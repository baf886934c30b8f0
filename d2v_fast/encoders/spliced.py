"""Any encoder of transformers, run whole: the output of the one module that makes local features is replaced.

Nothing is known of the inside of a model. Which module it is, where extra tokens stand, what the FFN's output is and whether
visible positions can be encoded alone is found by trying, on a copy of the model with other weights and one small input.
Positions that are added later, rotary ones, relative biases, CLS and register tokens are the model's own business.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.encoders import blocks
from d2v_fast.encoders.base import Encoded, Encoder, gather

READS = {"input_ids": "text", "pixel_values": "vision", "input_values": "audio", "input_features": "spectrogram"}
NORMS_OVER_TIME = (nn.GroupNorm, nn.InstanceNorm1d, nn.BatchNorm1d)  # they mix statistics, not content
BATCH, TOKENS = 2, 13  # of what is tried; no axis of a model has such a length
FINAL = 10  # rank of a failure that no other module mends
CLOSE = 1e-4  # of two results in fp32, relative to their size


class _Reached(Exception):
    """Ends a forward at the module that was waited for; holds its result."""


class _Unfit(ValueError):
    """A module cannot be spliced; `rank` counts the tests that it has passed."""

    def __init__(self, reason: str, rank: int):
        super().__init__(reason)
        self.rank = rank


class SplicedEncoder(Encoder):
    """A model of transformers whose local features are exchanged while it runs.

    Attributes:
        reads: What it takes: text (token ids), vision (pixels), audio (waveforms) or spectrogram.
        features_name: Dotted path of the module that makes local features.
        extra: Number of tokens in front that stand for no position.
        no_padding: Why padding cannot be left out of the context; None where it can.

    Args:
        model: Takes `input_ids`, `pixel_values`, `input_values` or `input_features`; its `last_hidden_state` is (B, E + T, C).
        features: Dotted path of the module whose output is (B, T, C), (B, C, T) or (B, C, H, W); default is found by trying.
        layers, ffn: As of `Encoder`; the FFN's output is else that of the last Linear a block runs, scaled by its layer scale.

    Raises:
        ValueError: No module fits; the message says which test the best one has failed, and what can be named.
    """

    def __init__(self, model: nn.Module, features: str | None = None, layers: str | None = None, ffn: str | None = None):
        self.reads = READS[model.main_input_name]
        self._timed = self.reads in ("audio", "spectrogram")
        self.masks_features = self.reads != "text"  # text is masked in its ids
        own = ("mask_token", "masked_spec_embed")
        names = [n for n, p in model.named_parameters() if n.rpartition(".")[2] in own and p.numel() == p.shape[-1]]
        self.mask_token_name = names[0] if names else None
        super().__init__(model, layers, ffn)
        self.squeeze, self.no_padding, self._no_gather = 1, None, ...
        self._axes: dict[tuple, list[int]] = {}  # of the blocks' arguments, those that count positions
        parameters = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("attention_mask", "noise") if name in parameters}
        if not isinstance(getattr(model.config, "patch_size", None), int):
            self._takes.discard("noise")
        special = [value for name, value in model.config.to_dict().items() if name.endswith("token_id")]
        self._ids = [i for i in range(3, min(getattr(model.config, "vocab_size", None) or 0, 200)) if i not in special]
        self._find(features)
        self.extra_tokens = self.extra > 0

    # The model with other features

    def embed(self, inputs: Tensor) -> Tensor:
        return self._features_of(self._until(self.model.get_submodule(self.features_name), lambda: self._call(inputs)))

    def place_visible(self, features: Tensor, mask: Tensor, visible: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if self.training and getattr(self.blocks[0], "gradient_checkpointing", False):
            name = type(self.model).__name__
            raise ValueError(f"{name}: gradient checkpointing would run its blocks anew without what is gathered; leave it off")
        if not self.gathers:
            raise ValueError(f"{type(self.model).__name__} cannot encode the visible positions alone: {self.no_gather}")
        return gather(self._placed(features, padding_mask), visible)

    @property
    def gathers(self) -> bool:
        return self.no_gather is None

    @property
    def no_gather(self) -> str | None:
        """Why the blocks cannot run on some positions as they run on all; None where they can. Tried when first asked for."""
        if self._no_gather is ...:
            with self._copied(), torch.no_grad():
                self._no_gather = "its blocks see fewer positions" if self.squeeze > 1 else self._try_gather()
        return self._no_gather

    def transform(self, x: Tensor, padding_mask: Tensor | None = None, **wanted: Any) -> Encoded:
        encoded = super().transform(x, padding_mask, **wanted)
        if self.squeeze == 1:
            return encoded
        steps = torch.arange(x.shape[1], device=x.device) // self.squeeze  # a result stands for several positions
        return encoded._replace(layers=[result[:, steps.clamp(max=result.shape[1] - 1)] for result in encoded.layers])

    def positions(self, size: int) -> int | tuple[int, int]:
        if self.reads == "text":
            return size
        if self._per_step is None:
            return self.grid if len(self.grid) > 1 else self.grid[0]
        first, step = self._per_step
        return max(0, (size - first) // step + 1)

    def example(self, batch: int, tokens: int = TOKENS) -> Tensor:
        """Random inputs; token ids (B, T) without special ones, else as the config says."""
        if self.reads == "text":
            if not self._ids:
                raise ValueError(f"{type(self.model.config).__name__} has no vocab_size")
            return torch.tensor(self._ids)[torch.randint(len(self._ids), (batch, tokens))].to(self._kind()["device"])
        return torch.randn(batch, *self._shape, **self._kind())

    def _whole(self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None) -> Tensor:
        if visible is None:
            return self._run(x, padding_mask)
        # The extra tokens come from a run whose features do not matter; what the blocks take beside them is gathered.
        length = math.prod(self.grid) if self.grid else int(visible.max()) + 1
        padding = None
        if padding_mask is not None:
            padding = padding_mask.new_ones(len(x), length).scatter(1, visible, padding_mask)
        extra = torch.arange(self.extra, device=x.device).expand(len(x), -1)
        with self._gathering(extra, visible, length, lambda hidden: torch.cat([hidden[:, : self.extra].to(x.dtype), x], dim=1)):
            return self._run(x.new_zeros(1, 1, self._width).expand(len(x), length, -1), padding)

    def _run(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Last states (B, E + T, C) of the model, whatever its input is, with `features` (B, T, C)."""
        batch, length = features.shape[:2]
        if self.reads == "text":
            inputs = torch.full((batch, length), self._ids[0], device=features.device)
            pad = getattr(self.model.config, "pad_token_id", None)
            if padding_mask is not None and pad is not None:
                inputs = inputs.masked_fill(padding_mask, pad)
        else:
            shape = list(self._shape)
            if self._per_step is not None:
                shape[self._time] = self._per_step[0] + (length - 1) * self._per_step[1]
            elif length != math.prod(self.grid):
                expected = " × ".join(map(str, self.grid))
                raise ValueError(f"{type(self.model).__name__}: found {length} positions, expected {expected}")
            inputs = torch.zeros(1, *shape, **self._kind()).expand(batch, *shape)
        if padding_mask is not None:
            features = features.clone()  # some zero padding in place
        with ExitStack() as stack:
            features_of = self.model.get_submodule(self.features_name)
            stack.enter_context(_forward(features_of, lambda *args, **kwargs: self._as_output(features)))
            if self._stem_name is not None:
                stem = self.model.get_submodule(self._stem_name)
                stack.enter_context(_forward(stem, _once(stem.forward)))
            return self._call(inputs, padding_mask)

    def _call(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        arguments = {self.model.main_input_name: inputs}
        if padding_mask is not None:
            if self.no_padding:
                raise ValueError(f"padding_mask: {type(self.model).__name__} {self.no_padding}; crop inputs to one length")
            seen = ~padding_mask
            if self._timed and self._per_step is not None:
                first, step = self._per_step
                sizes = first + (seen.sum(1) - 1) * step
                seen = torch.arange(inputs.shape[1 + self._time], device=seen.device) < sizes[:, None]
            arguments["attention_mask"] = seen.long()
        if "noise" in self._takes:  # ViT-MAE orders patches by it
            arguments["noise"] = torch.arange(math.prod(self.grid), device=inputs.device).expand(len(inputs), -1)
        config = self.model.config
        augments = getattr(config, "apply_spec_augment", None)
        if not augments:
            return self.model(**arguments).last_hidden_state
        try:
            config.apply_spec_augment = False  # else the model masks a training input by itself
            return self.model(**arguments).last_hidden_state
        finally:
            config.apply_spec_augment = augments

    def _until(self, module: nn.Module, run: Callable[[], Any], inputs: bool = False) -> Any:
        """The output of `module`, or its first input, in a run that ends there."""

        def reached(module, args, *rest):
            raise _Reached(_first_of(args, rest[0]) if inputs else rest[-1])

        kind = module.register_forward_pre_hook if inputs else module.register_forward_hook
        hook = kind(reached, with_kwargs=True)
        try:
            run()
        except _Reached as end:
            return end.args[0]
        finally:
            hook.remove()
        raise _Unfit(f"is not run by {type(self.model).__name__}", 0)

    def _placed(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the first block gets of the positions, (B, T, C)."""
        return self._until(self.blocks[0], lambda: self._run(features, padding_mask), inputs=True)[:, self.extra :]

    def _features_of(self, output: Any) -> Tensor:
        x = blocks.first(output).permute(self._order)
        if self.grid and x.shape[1:-1] != self.grid:
            name, found, expected = self.features_name, tuple(x.shape[1:-1]), tuple(self.grid)
            raise ValueError(f"encoder.features={name}: found a grid of {found}, expected {expected} as of config.image_size")
        return x.flatten(1, -2)

    def _as_output(self, features: Tensor) -> Any:
        grid = self.grid if len(self._order) == 4 else (features.shape[1],)
        x = features.unflatten(1, grid).permute([self._order.index(axis) for axis in range(len(self._order))])
        return x if self._rest is None else (x, *[None] * self._rest)

    # The blocks with some of the positions

    @contextmanager
    def _gathering(self, extra: Tensor, visible: Tensor, length: int, enter: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The first block takes what `enter` makes of its input, and what comes along is gathered for the same rows.

        Those are the extra tokens `extra` (B, E') and behind them the positions `visible` (B, V) of `length`.
        """
        rows = torch.cat([extra, visible + self.extra], dim=1)

        def change(number: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            first = _first_path(args, kwargs)

            def replace(path: tuple, value: Tensor) -> Tensor:
                if path == first:
                    return enter(value) if number == 0 else value
                axes = self._axes.get((number, path))
                if axes is None:  # a mask that the trial did not need
                    axes = [axis for axis in (2, 3) if value.ndim == 4 and value.shape[axis] == self.extra + length]
                return _take(value, axes, rows if value.shape[axes[0]] != length else visible) if axes else value

            return _mapped(replace, args, kwargs)

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):

                def hook(block, args, kwargs, number=number):
                    return change(number, args, kwargs)

                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    # What is found by trying

    @contextmanager
    def _copied(self) -> Iterator[None]:
        """A copy with other weights in place of the model, in eval mode."""
        model = self.model
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                self.model = _other_weights(model)
                yield
        finally:
            self.model = model

    def _find(self, named: str | None) -> None:
        self._rest, self.grid, self.extra, self._width, self._per_step, self._stem_name = (
            None,
            (),
            0,
            self.hidden_size,
            None,
            None,
        )
        try:
            with self._copied():
                failures = self._try_all(named)
        except _Unfit as error:
            failures = [(named, error)]
        except Exception as error:  # each class of transformers has errors of its own
            failures = [(named, _Unfit(_described(error), FINAL))]
        if not failures:
            return
        path, why = max(failures, key=lambda failure: failure[1].rank)
        found = f"encoder.features={named}: " if named else ""
        at = f" at {path}" if path and not named else ""
        remedy = (
            "" if why.rank == FINAL else "name the module whose output is local and without positions: encoder.features=…, or "
        )
        raise ValueError(
            f"{found}{type(self.model).__name__} cannot be spliced{at}: {why}; {remedy}give it the methods embed and "
            f"contextualize, see {Path(__file__).parents[1]}/docs/encoders.md"
        )

    @torch.no_grad()
    def _try_all(self, named: str | None) -> list[tuple[str | None, _Unfit]]:
        """Set what is known of the model and return nothing, or return why no module fits."""
        inputs, states = self._inputs_that_run()
        if states.ndim != 3 or states.shape[-1] != self.hidden_size:
            raise _Unfit(f"its last states have the shape {tuple(states.shape)}, not (B, T, {self.hidden_size})", FINAL)
        states = self._skip_most(inputs)
        seen = self._outputs(inputs, named)
        if named and not any(path == named for path, _ in seen):
            raise _Unfit("is not in the model, or not run before its blocks", 0)
        failures: list[tuple[str | None, _Unfit]] = []
        for number, (path, output) in reversed(list(enumerate(seen))):
            if not named and self.masks_features and _drops(self.model.get_submodule(path)):
                continue  # features are the teacher's too, and dropout is the student's alone
            try:
                self._try(path, output, inputs, states)
            except _Unfit as error:
                failures.append((path, error))
            except Exception as error:  # a model that does not run with it
                failures.append((path, _Unfit(_described(error), 1)))
            else:
                self._stem_name = self._stem([before for before, _ in seen[:number]])
                self._learn(inputs)
                return []
        grids = [blocks.first(output) for _, output in seen]
        most = max((grid.shape[2:].numel() for grid in grids if isinstance(grid, Tensor) and grid.ndim == 4), default=0)
        if most > states.shape[1] and all(error.rank < 3 for _, error in failures):
            why = f"is hierarchical: of {most} local features {states.shape[1]} states are left, and no mask fits both"
            raise _Unfit(why, FINAL)
        return failures or [(None, _Unfit("no module before its blocks gives a feature of each position", 0))]

    def _stem(self, before: list[str]) -> str | None:
        """The module that takes the inputs of speech, if it is another one."""
        if not self._timed:
            return None
        around = [path for path in before if not f"{self.features_name}.".startswith(f"{path}.")]
        outer = [path for path in around if not any(path.startswith(f"{other}.") for other in around)]
        inner = [path for path in outer if not path.startswith(f"{self.features_name}.")]
        return inner[0] if inner else None

    def _inputs_that_run(self) -> tuple[Tensor, Tensor]:
        config, why = self.model.config, ""
        for shape in _shapes(self.reads, self.model):
            self._shape, self._time = shape, max(range(len(shape)), key=lambda axis: shape[axis], default=0)
            self.grid = ()
            try:
                inputs = self.example(BATCH)
                if "noise" in self._takes:
                    self.grid = (config.image_size // config.patch_size,) * 2
                states = self._call(inputs)
                again = self._call(inputs)
            except Exception as error:  # each class of transformers has errors of its own
                why = why or _described(error)
                continue
            if not _same(states, again):
                raise _Unfit("its states differ from call to call", FINAL)
            if len(shape) == 2:
                self.reads = "spectrogram"
            return inputs, states
        raise _Unfit(f"it does not run on {self.model.main_input_name} alone: {why}", FINAL)

    def _skip_most(self, inputs: Tensor) -> Tensor:
        """Let the blocks between the first and the last of the copy do nothing, to save time; last states without them."""
        plain: list[nn.Module] = []

        def note(block, args, output):
            if isinstance(output, Tensor):
                plain.append(block)

        with ExitStack() as stack:
            for block in list(self.blocks)[1:-1]:
                stack.callback(block.register_forward_hook(note).remove)
            states = self._call(inputs)
        try:
            for block in plain:
                block.forward = lambda *args, **kwargs: _first_of(args, kwargs)
            return self._call(inputs)
        except Exception:  # a model that asks for more than a tensor
            for block in plain:
                del block.forward
            return states

    def _outputs(self, inputs: Tensor, named: str | None) -> list[tuple[str, Any]]:
        """Outputs by path, in the order in which they come before the first block; with `named` that one's alone."""
        inside = {module for block in self.blocks for module in block.modules()}
        seen: list[tuple[str, Any]] = []
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                if path and (path == named if named else module not in inside):
                    hook = module.register_forward_hook(lambda m, args, output, path=path: seen.append((path, output)))
                    stack.callback(hook.remove)
            if named:
                self._call(inputs)
            else:
                try:
                    self._until(self.blocks[0], lambda: self._call(inputs), inputs=True)
                except _Unfit:
                    raise _Unfit(f"its blocks {self.layers_name} are not called as modules", FINAL) from None
        return seen

    def _try(self, path: str, output: Any, inputs: Tensor, states: Tensor) -> None:
        """Raise _Unfit unless this module is local and all that the model learns of its input."""
        module = self.model.get_submodule(path)
        self.features_name, self._per_step, self.grid, self._stem_name = path, None, (), None
        rest = output[1:] if isinstance(output, tuple) else ()
        if any(each is not None for each in rest):
            raise _Unfit(f"its output has {len(output)} parts", 1)
        self._rest = len(rest) or None if isinstance(output, tuple) else None
        self._order = self._order_of(blocks.first(output), module, inputs)
        x = blocks.first(output).permute(self._order)
        features = x.flatten(1, -2)
        length = features.shape[1]
        self._width = features.shape[-1]
        if x.ndim == 4:
            self.grid = tuple(x.shape[1:-1])
        elif self.reads == "vision":
            side = math.isqrt(length)
            if side * side != length:
                raise _Unfit(f"its {length} positions are no square grid", 2)
            self.grid = (side, side)
        elif self._timed:
            self._measure(inputs)
        self.extra = states.shape[1] - length
        if self.extra < 0:
            raise _Unfit(f"of {length} local features {states.shape[1]} states are left", 2)
        if not _same(self._run(features), states):
            raise _Unfit("the rest of the model depends on its input in other ways too", 3)
        self._check_local(module, inputs, features)
        self._check_order(features)
        if self.masks_features:
            self._check_positions(features)
        else:
            self._check_both_ways(features, states)

    def _order_of(self, output: Any, module: nn.Module, inputs: Tensor) -> tuple[int, ...]:
        """The axes of the batch, the positions and the channels in a module's output."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim not in (3, 4):
            found = type(output).__name__ if not isinstance(output, Tensor) else f"{output.dtype} {tuple(output.shape)}"
            raise _Unfit(f"found the output {found}, expected a tensor (B, T, C), (B, C, T) or (B, C, H, W)", 1)
        shape, channels = tuple(output.shape), self.hidden_size
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2)] if len(shape) == 3 else [(0, 2, 3, 1), (0, 1, 2, 3)]
        if isinstance(module, nn.Conv1d):
            orders.reverse()
        for order in orders:
            batch, *positions, width = (shape[axis] for axis in order)
            fits = positions == [inputs.shape[1]] if self.reads == "text" else width == channels
            if batch == len(inputs) and fits and (order != (1, 0, 2) or self.reads == "text"):
                return order
        expected = f"(B, {inputs.shape[1]}, C)" if self.reads == "text" else f"B = {len(inputs)} and C = {channels}"
        raise _Unfit(f"found the output shape {shape}, expected {expected}", 1)

    def _measure(self, inputs: Tensor) -> None:
        """Find how the number of positions follows from that of samples or frames; nothing for a model of one length."""
        fixed = len(self._embedded(self._shape[self._time]))

        def count(size: int) -> int:
            try:
                return len(self._embedded(size))
            except Exception:  # too short, or of another length than the only one
                return 0

        high = self._shape[self._time]
        if count(high - high // 4) in (0, fixed):
            self.grid = (fixed,)
            return
        sizes = []
        for wanted in (1, 2, 3):
            low, top = 0, high
            while top - low > 1:
                middle = (low + top) // 2
                low, top = (low, middle) if count(middle) >= wanted else (middle, top)
            sizes.append(top)
        first, step = sizes[1] - (sizes[2] - sizes[1]), sizes[2] - sizes[1]
        if (high - first) // step + 1 != fixed:
            raise _Unfit(f"{fixed} positions of {high} samples or frames are not as many as a convolution gives", 2)
        self._per_step = (first, step)

    def _embedded(self, size: int) -> Tensor:
        shape = list(self._shape)
        shape[self._time] = size
        return self.embed(torch.zeros(1, *shape, **self._kind()))[0]

    def _check_local(self, module: nn.Module, inputs: Tensor, features: Tensor) -> None:
        """Change the end of the input: features elsewhere stay, but for the reach of a convolution."""
        other = inputs.clone()
        if self.reads == "text":
            other[:, -1] = self._ids[self._ids.index(int(other[0, -1])) - 1]
        elif self.reads == "vision":
            other[..., -1, -1] += 10
        else:
            last = other.narrow(1 + self._time, -(-7 * self._shape[self._time] // 8), self._shape[self._time] // 8)
            last.add_(torch.randn_like(last))
        inside = {each for block in self.blocks for each in block.modules()}
        with ExitStack() as stack:
            for each in self.model.modules():
                if isinstance(each, NORMS_OVER_TIME) and each not in inside:
                    stack.enter_context(_forward(each, lambda x: x))
            moved = (self.embed(other) - self.embed(inputs)).abs().amax(-1) > 1e-6 * features.abs().max()
        count, most = int(moved.any(0).sum()), 1 if self.reads == "text" else features.shape[1] // 2
        if count > most:
            raise _Unfit(
                f"is not local: the end of the input changes {count} of {features.shape[1]} of its positions, so that a "
                "masked position would be seen by others",
                4,
            )
        if count == 0:
            raise _Unfit("does not depend on the end of the input", 4)

    def _check_order(self, features: Tensor) -> None:
        """Change one feature, with blocks that do nothing: the state that stands for it changes, and no extra token's."""
        at = features.shape[1] // 2
        other = features.clone()
        other[:, at] += torch.randn_like(other[:, at])
        with ExitStack() as stack:
            for block in self.blocks:
                hook = block.register_forward_hook(_passed_on, with_kwargs=True)
                stack.callback(hook.remove)
            moved = (self._run(other) - self._run(features)).abs().amax((0, -1)) > 1e-6 * features.abs().max()
        if not moved[self.extra + at] or moved[: self.extra].any() or (not self._timed and moved.sum() != 1):
            where = moved.nonzero().flatten().tolist()[:5]
            raise _Unfit(
                f"without its blocks, feature {at} is found in the states {where}, expected {self.extra + at} alone: extra "
                "tokens stand behind the positions, or these come in another order",
                5,
            )

    def _check_positions(self, features: Tensor) -> None:
        """Mask some positions with one vector: their states have to differ by where they are."""
        masked = features.clone()
        hidden = torch.rand(features.shape[1]) < 0.5
        hidden[:3] = torch.tensor([True, False, True])
        masked[:, hidden] = features[0, 0]
        found = self._run(masked)[:, self.extra :][:, hidden]
        if _same(found, found[:, :1].expand_as(found)):
            raise _Unfit("masked positions get equal states: positions are lost with the mask, or the model has none", 6)

    def _check_both_ways(self, features: Tensor, states: Tensor) -> None:
        def moved_by(at: int) -> Tensor:
            other = features.clone()
            other[:, at] += torch.randn_like(other[:, at])
            return (self._run(other) - states).abs().amax((0, -1)) > 1e-6 * states.abs().max()

        if not moved_by(-1)[:-1].any() and moved_by(0)[1:].any():
            raise _Unfit("is causal: a position sees none of the later ones", FINAL)

    def _learn(self, inputs: Tensor) -> None:
        """The FFN's output, what teachers copy, and whether padding is left out."""
        features = self.embed(inputs)
        if self.ffn_name is None:
            self.ffn_name = self._executed_last(features)
        length = self.extra + features.shape[1]
        for source in ("ffn", "block_output"):
            with self._captured(1, source) as captured:
                self._run(features)
            expected = (BATCH, length, self.hidden_size)
            found = tuple(captured[self.blocks[-1]].shape) if captured else None
            if found and self._timed and not self.extra and (found[0], *found[2:]) == (BATCH, self.hidden_size):
                self.squeeze = max(1, length // found[1])
                expected = (BATCH, length // self.squeeze, self.hidden_size)
            if found != expected:
                name = self.ffn_name if source == "ffn" else self.layers_name
                raise _Unfit(
                    f"{name}: found a layer's result of shape {found}, expected {expected}; name it: encoder.ffn=…",
                    FINAL,
                )
        self._learn_parameters(inputs)
        self.no_padding = self._try_padding(features)

    def _executed_last(self, features: Tensor) -> str:
        order: list[tuple[str, nn.Module]] = []
        with ExitStack() as stack:
            for path, module in self.blocks[-1].named_modules():
                if path and type(module).__name__.endswith(("Linear", "Conv1D", "LayerScale")):
                    hook = module.register_forward_hook(lambda m, a, o, path=path: order.append((path, m)))
                    stack.callback(hook.remove)
            self._run(features)
        if not order:
            raise _Unfit(f"{type(self.blocks[-1]).__name__} runs no nn.Linear: name the FFN's output, encoder.ffn=…", FINAL)
        return order[-1][0]

    def _learn_parameters(self, inputs: Tensor) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_()
            features = self.embed(inputs)
            taken: list[Tensor] = []

            def note(block, args, kwargs):
                _mapped(lambda path, value: taken.append(value), args, kwargs)
                raise _Reached

            hook = self.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
            try:
                self._run(features)
            except _Reached:
                pass
            finally:
                hook.remove()

            def reached_by(results: list[Tensor]) -> set[str]:
                results = [result for result in results if result.requires_grad]
                if not results:
                    return set()
                found = torch.autograd.grad(
                    sum(result.float().sum() for result in results),
                    list(parameters.values()),
                    allow_unused=True,
                    retain_graph=True,
                )
                return {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

            local = reached_by([features])
            positional = reached_by(taken) - local
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        if self.mask_token_name:
            local.add(self.mask_token_name)
        self.local, self.positional = tuple(sorted(local)), tuple(sorted(positional))

    def _try_padding(self, features: Tensor) -> str | None:
        """Why padding cannot be left out of the context; None if it can."""
        if "attention_mask" not in self._takes:
            return "takes no attention_mask"
        padding = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        padding[:, -max(1, features.shape[1] // 4) :] = True
        other = features + torch.randn_like(features) * padding.unsqueeze(-1)
        try:
            one, two = (self._run(each, padding)[:, self.extra :][~padding] for each in (features, other))
        except Exception as error:
            return f"does not run with its attention_mask ({type(error).__name__})"
        return None if _same(one, two) else "sees what its attention_mask covers"

    def _try_gather(self) -> str | None:
        """Why a subset of the positions cannot be encoded alone; None if it can.

        A permutation tells whether all that depends on positions moves with them, and taking each row twice, which no softmax
        notices, whether the number of rows matters. Texts are long enough to have neighbourhoods.
        """
        features = self.embed(self.example(BATCH, min(131, getattr(self.model.config, "max_position_embeddings", 131) - 4)))
        length, at = features.shape[1], features.shape[1] // 2
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                hook = block.register_forward_pre_hook(self._note_axes(number, length), with_kwargs=True)
                stack.callback(hook.remove)
            states = self._run(features)[:, self.extra :]
        other = features.clone()
        other[:, at] += torch.randn_like(other[:, at])
        placed = self._placed(features)
        moved = (self._placed(other) - placed).abs().amax((0, -1)) > 1e-6 * placed.abs().max()
        if placed.shape[1] != length or moved.sum() != 1 or not moved[at]:
            return "its positions come from a convolution or the like, which would see what is masked"

        extra = torch.arange(self.extra, device=features.device).expand(BATCH, -1)
        order = torch.stack([torch.randperm(length, device=features.device) for _ in range(BATCH)])
        some = order[:, : length // 2]

        def encoded(extra: Tensor, rows: Tensor) -> Tensor:
            both = torch.cat([extra, rows + self.extra], dim=1)[..., None].expand(-1, -1, self.hidden_size)
            with self._gathering(extra, rows, length, lambda hidden: hidden.gather(1, both)):
                return self._run(features)[:, extra.shape[1] :][:, : length // 2]

        found = self._axes
        for axes in (found, {at: each[:1] for at, each in found.items()}):  # another axis may happen to be as long
            self._axes = axes
            try:
                moves = _same(encoded(extra, order), states.gather(1, some[..., None].expand(-1, -1, self.hidden_size)))
                if moves and _same(encoded(extra, some), encoded(torch.cat([extra, extra], 1), torch.cat([some, some], 1))):
                    return None
            except Exception:  # blocks that do not run on other rows
                continue
        return "positions enter inside of its blocks, in a form that cannot be gathered"

    def _note_axes(self, number: int, length: int) -> Callable:
        def note(block, args, kwargs):
            first = _first_path(args, kwargs)

            def axes(path, value):
                if path != first:
                    found = [axis for axis, size in enumerate(value.shape) if size in (self.extra + length, length)]
                    self._axes[number, path] = found
                return value

            _mapped(axes, args, kwargs)

        return note

    def _find_layers(self) -> str:
        try:
            return super()._find_layers()
        except ValueError:
            lists = {
                name: modules
                for name, modules in self.model.named_modules()
                if isinstance(modules, nn.ModuleList) and len(modules) and "att" in _inner(modules[0])
            }
            outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
            if len(outer) == 1:
                return outer[0]
            wanted = getattr(self.model.config, "num_hidden_layers", None)
            as_many = [
                name for name, each in self.model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == wanted
            ]
            if len(as_many) == 1:
                return as_many[0]
            raise

    def _kind(self) -> dict[str, Any]:
        parameter = next(self.model.parameters())
        return dict(device=parameter.device, dtype=parameter.dtype)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _drops(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Dropout) for each in module.modules())


def _inner(block: nn.Module) -> str:
    return " ".join(name for name, _ in block.named_modules()).lower()


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE * other.abs().max())


def _other_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights hide nothing: zeros of tokens, biases and positions become other numbers."""
    probe = copy.deepcopy(model).eval().requires_grad_(False)
    if next(probe.parameters()).dtype.itemsize < 4:
        probe.float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.nan_to_num_().add_(noise * (0.1 if parameter.ndim < 2 else max(1, parameter[0].numel()) ** -0.5))
    return probe


def _shapes(reads: str, model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of an input, without the batch, that a model of this kind may take."""
    config = model.config

    def value(*names: str, default: int) -> int:
        found = [getattr(config, name, None) for name in names]
        return next((each for each in found if isinstance(each, int)), default)

    if reads == "text":
        return [()]
    if reads == "vision":
        size = getattr(config, "image_size", 64)
        high, wide = (size, size) if isinstance(size, int) else tuple(size)
        return [(value("num_channels", "in_channels", default=3), high, wide)]
    bins = value("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", default=80)
    longest = value("max_length", "max_source_positions", default=128)
    spectrograms = [(longest, bins), (bins, 2 * longest), (bins, longest), (97, bins), (bins, 97)]
    if "feature_projection_input_dim" in config.to_dict():
        spectrograms.insert(0, (97, config.feature_projection_input_dim))
    return [(4000,), *spectrograms] if model.main_input_name == "input_values" else spectrograms


def _once(forward: Callable) -> Callable:
    """A forward for a batch of equal samples, which computes one."""

    @torch.no_grad()
    def once(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        one = forward(x[:1], *args, **kwargs)
        return one.expand(len(x), *one.shape[1:])

    return once


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`forward` in place of the module's own."""
    before = vars(module).get("forward")  # accelerate may have put one there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _passed_on(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A hook by which a block does nothing."""
    x = _first_of(args, kwargs)
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _first_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _first_path(args: tuple, kwargs: dict[str, Any]) -> tuple:
    return (0,) if args else (next(iter(kwargs)),)


def _mapped(change: Callable[[tuple, Tensor], Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a block with their tensors, which may stand in tuples, changed."""

    def one(path: tuple, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(one((*path, number), each) for number, each in enumerate(value))
        return change(path, value) if isinstance(value, Tensor) else value

    return tuple(one((n,), each) for n, each in enumerate(args)), {name: one((name,), each) for name, each in kwargs.items()}


def _take(value: Tensor, axes: list[int], rows: Tensor) -> Tensor:
    """`value` at `rows` (B, V) of its `axes`; without an axis of the batch, it gets one that broadcasts over heads."""
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
