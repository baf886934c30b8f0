"""Probe a model to find out how to run it with its local features replaced.

The trial finds the module that computes the local features, the extra tokens, the FFN output, and whether the visible
positions can be encoded alone. It runs on one small input and on a copy of the model with perturbed weights, which keeps one
block of each kind, after a check that blocks of one kind compute the same.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.encoders import blocks
from d2v_fast.encoders.base import find_layers, gather
from d2v_fast.encoders.spliced import (
    READS,
    Splice,
    SplicedEncoder,
    StopForward,
    first_argument,
    first_path,
    map_tensors,
    override_forward,
)

NORMS_OVER_TIME = (nn.GroupNorm, nn.InstanceNorm1d, nn.BatchNorm1d)  # they mix statistics, not content
BATCH = 2  # identifies the batch axis: no other axis of a model has this size
FINAL = 10  # rank of a failure that no other choice of module can fix
TOLERANCE = 1e-4  # between two fp32 results, relative to their magnitude
PER_LAYER_ATTRIBUTES = re.compile("idx|index|layer_id|layer_number|training")


class Unfit(ValueError):
    """A module cannot be spliced; `rank` is the number of tests it passed."""

    def __init__(self, reason: str, rank: int):
        super().__init__(reason)
        self.rank = rank


def splice(model: nn.Module, features: str | None = None, layers: str | None = None, ffn: str | None = None) -> SplicedEncoder:
    """Wrap a transformers model as an encoder that runs whole.

    Args:
        model: Takes `input_ids`, `pixel_values`, `input_values` or `input_features`; its `last_hidden_state` is (B, E + T, C).
        features: Dotted path of the module whose output is (B, T, C), (B, C, T) or (B, C, H, W); by default found by trial.
        layers, ffn: As for `Encoder`. The default `ffn` is the last Linear that a block runs, or the layer scale after it.

    Raises:
        ValueError: No module fits. The message gives the test that the best candidate failed and the setting to use.
    """
    layers = layers or _find_layers(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for whole in (False, True):  # some models do not run with no-op blocks
            torch.default_generator.manual_seed(0)
            trial = Trial(model, features, layers, ffn, whole)
            failures = trial.failures()
            if trial.runs:
                break
    if not failures:
        return SplicedEncoder(model, trial.splice, layers, trial.encoder.ffn_name)
    path, why = max(failures, key=lambda failure: failure[1].rank)
    found = f"encoder.features={features}: " if features else ""
    at = f" at {path}" if path and not features else ""
    remedy = "" if why.rank == FINAL else "name the module whose output is local and without positions: encoder.features=…, or "
    raise ValueError(
        f"{found}{type(model).__name__} cannot be spliced{at}: {why}; {remedy}give it the methods embed and "
        f"contextualize, see {Path(__file__).parents[1]}/docs/encoders.md"
    )


class HideKeys(TorchDispatchMode):
    """Leave keys out of each softmax over all keys; `hidden` (B, K) bool."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        batch, keys = self.hidden.shape
        if op in (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default) and args[0].shape[-1] == keys:
            # Not -inf: where nothing else is left, as in a window without visible positions, NaN would spread.
            scores = args[0].reshape(batch, -1, keys).masked_fill(self.hidden[:, None], -1e30)
            args = (scores.view_as(args[0]), *args[1:])
        return op(*args, **(kwargs or {}))


class Trial:
    """Fills in `self.splice` by trial; `self.encoder` runs the copy of the model with it.

    Args:
        model, layers, ffn: As for `splice`.
        named: Its `features`.
        whole: Keep all blocks in the copy.
    """

    def __init__(self, model: Any, named: str | None, layers: str, ffn: str | None, whole: bool):
        self.named, self.whole, self.runs, self.splice = named, whole, False, Splice(READS[model.main_input_name])
        self.rest: tuple | None = None  # what a block returns after its hidden states, once one has run
        self.encoder = SplicedEncoder(self._copy(model, layers), self.splice, layers, ffn)
        self.blocks = self.encoder.blocks
        self.inside = {module for block in self.blocks for module in block.modules()}

    def failures(self) -> list[tuple[str | None, Unfit]]:
        """Fill in `splice` and return an empty list, or return why each module failed."""
        try:
            return self._search()
        except Unfit as error:
            return [(self.named, error)]
        except Exception as error:  # model classes raise all kinds of errors
            return [(self.named, Unfit(_describe(error), FINAL))]

    def _search(self) -> list[tuple[str | None, Unfit]]:
        inputs, states, seen, results = self._run_once()
        if self._restore_blocks():
            inputs, states, seen, results = self._run_once()
        if states.ndim != 3 or states.shape[-1] != self.encoder.hidden_size:
            expected = f"(B, T, {self.encoder.hidden_size})"
            raise Unfit(f"its last states have the shape {tuple(states.shape)}, not {expected}", FINAL)
        if self.named and not any(path == self.named for path, _ in seen):
            raise Unfit("is not in the model or does not run before its blocks", 0)
        failures: list[tuple[str | None, Unfit]] = []
        for number, (path, output) in reversed(list(enumerate(seen))):
            module = self.encoder.model.get_submodule(path)
            has_dropout = any(isinstance(child, nn.Dropout) for child in module.modules())
            if has_dropout and self.encoder.masks_features and not self.named:
                continue  # the teacher may share the features, and dropout is for the student only
            try:
                self._check(path, output, inputs, states)
            except Unfit as error:
                failures.append((path, error))
            except Exception as error:  # the model does not run with this module replaced
                failures.append((path, Unfit(_describe(error), 1)))
            else:
                self.splice.stem = self._find_stem([before for before, _ in seen[:number]])
                self._inspect(inputs[:1], states.shape[1], results)
                return []
        width = results.get("", (self.encoder.hidden_size,))[-1]
        if width != self.encoder.hidden_size:
            raise Unfit(f"its blocks have {width} channels, its last states {self.encoder.hidden_size}", FINAL)
        grids = [blocks.first(output) for _, output in seen]
        most = max((grid.shape[2:].numel() for grid in grids if isinstance(grid, Tensor) and grid.ndim == 4), default=0)
        if most > states.shape[1] and all(error.rank < 3 for _, error in failures):
            why = f"is hierarchical: {most} local features become {states.shape[1]} states, so no mask fits both"
            raise Unfit(why, FINAL)
        return failures or [(None, Unfit("no module before its blocks returns one feature per position", 0))]

    # A small copy

    def _copy(self, model: nn.Module, layers: str) -> nn.Module:
        """A copy in eval mode, with noise added to all weights so that zero-initialised ones have an effect too.

        It keeps the first block, the last one and one of each kind. The others become no-ops with the weights of the first of
        their kind; `_restore_blocks` checks that they compute the same.
        """
        all_blocks: Any = model.get_submodule(layers)
        kinds = [_kind_of(block) for block in all_blocks]
        like = [kinds.index(kind) for kind in kinds]
        self.kept = sorted({0, len(kinds) - 1, *like})
        if self.whole:
            self.kept = list(range(len(kinds)))
        copies: dict[int, Any] = {}
        for number in self.kept:
            copy.deepcopy(all_blocks[number], copies)
        self.like: dict[int, int] = {}  # for each no-op, the block whose weights it has
        for number, block in enumerate(all_blocks):
            if id(block) in copies:
                continue
            weights = dict(all_blocks[like[number]].named_parameters())
            shared = {id(p): copies[id(weights[name])] for name, p in block.named_parameters() if name in weights}
            copies[id(block)] = no_op = copy.deepcopy(block, copies | shared)
            no_op.forward = self._no_op
            self.like[number] = like[number]
        copied = copy.deepcopy(model, copies).eval().requires_grad_(False)
        if next(copied.parameters()).dtype.itemsize < 4:
            copied.float()
        generator = torch.Generator().manual_seed(0)
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.nan_to_num_().add_(noise * (0.1 if parameter.ndim < 2 else max(1, parameter[0].numel()) ** -0.5))
        return copied

    def _no_op(self, *args: Any, **kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        return x if self.rest is None else (x, *self.rest)

    @contextmanager
    def _skip_blocks(self, keep: nn.Module | None = None) -> Iterator[None]:
        """Turn all blocks but `keep` into no-ops."""
        with ExitStack() as stack:
            for block in self.blocks:
                if block is not keep:
                    stack.enter_context(override_forward(block, self._no_op))
            yield

    # The tests

    def _run_once(self) -> tuple[Tensor, Tensor, list[tuple[str, Any]], dict[str, tuple[int, ...]]]:
        """Run the model on the first input shape that it accepts.

        Returns:
            The inputs; the model's states; the outputs of the modules that ran before the blocks, in execution order; and the
            output shapes of the last block ("") and of the modules in it that may end an FFN, in execution order.
        """
        encoder, config, why = self.encoder, self.encoder.model.config, ""
        outside = [(path, m) for path, m in encoder.model.named_modules() if path and m not in self.inside]
        last = [("", self.blocks[-1])]
        if encoder.ffn_name is None:
            ends = ("Linear", "Conv1D", "LayerScale")
            last += [(path, m) for path, m in self.blocks[-1].named_modules() if path and type(m).__name__.endswith(ends)]
        else:
            last.append((encoder.ffn_name, encoder._ffn(self.blocks[-1])))
        if self.named:
            outside = [(path, m) for path, m in encoder.model.named_modules() if path == self.named]
        for shape in _shapes(self.splice.reads, encoder.model):
            self.splice.shape, self.splice.grid = shape, ()
            seen: list[Any] = []
            results: dict[str, Any] = {}
            called: set[Any] = set()

            def outer(path: str, output: Any, seen=seen, called=called) -> None:
                if self.named or not called:
                    seen.append((path, _clone(output)))

            def inner(path: str, output: Any, results=results) -> None:
                results.pop(path, None)
                results[path] = tuple(blocks.flat(blocks.first(output)).shape)

            with ExitStack() as stack:
                for hook, modules in ((outer, outside), (inner, last)):
                    for path, m in modules:
                        handle = m.register_forward_hook(lambda m, a, output, hook=hook, path=path: hook(path, output))
                        stack.callback(handle.remove)
                for block in self.blocks:
                    handle = block.register_forward_pre_hook(lambda block, args, called=called: called.add(block))
                    stack.callback(handle.remove)
                stack.callback(self.blocks[0].register_forward_hook(self._note_rest).remove)
                try:
                    if "noise" in encoder.takes:
                        self.splice.grid = (config.image_size // config.patch_size,) * 2
                    inputs = encoder.example(BATCH)
                    states = encoder.call(inputs)
                except Exception as error:  # model classes raise all kinds of errors
                    why = why or _describe(error)
                    continue
            if len(called) < len(set(self.blocks)):
                raise Unfit(f"its blocks {encoder.layers_name} are not called as modules", FINAL)
            self.runs = True
            if len(shape) == 2:
                self.splice.reads = "spectrogram"
            return inputs, states, seen, results
        raise Unfit(f"it does not run on {encoder.model.main_input_name} alone: {why}", FINAL)

    def _note_rest(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.rest = output[1:] if isinstance(output, tuple) else None

    def _restore_blocks(self) -> bool:
        """Turn no-ops that do not compute the same as the block of their kind back into blocks; return whether there were any.

        Blocks of one class may differ only by layer index, or by the arguments that the model passes to them, as for local and
        global attention. Each no-op runs once, on the input of the block of its kind, with its own other arguments.
        """
        calls: dict[int, tuple[tuple, dict[str, Any]]] = {}

        def note(number: int, args: tuple, kwargs: dict[str, Any]) -> None:
            calls[number] = map_tensors(lambda path, value: value.clone(), args, kwargs)

        with ExitStack() as stack:
            for number in {*self.like, *self.like.values()}:
                block = self.blocks[number]
                hook = block.register_forward_pre_hook(lambda m, a, k, number=number: note(number, a, k), with_kwargs=True)
                stack.callback(hook.remove)
            self.encoder.call(self._long_example())

        def result(number: int, kind: int) -> Tensor | None:
            first, x = first_path(*calls[number]), first_argument(*calls[kind])
            args, kwargs = map_tensors(lambda path, value: x.clone() if path == first else value, *calls[number])
            block: Any = self.blocks[number]
            try:
                return blocks.first(type(block).forward(block, *args, **kwargs))
            except Exception:  # such as blocks that need more results of earlier blocks
                return None

        expected = {kind: result(kind, kind) for kind in self.like.values()}
        different = []
        for number, kind in self.like.items():
            found, other = result(number, kind), expected[kind]
            if found is None or other is None or not _close(found, other):
                different.append(number)
        for number in different:
            del self.blocks[number].forward, self.like[number]
        self.kept = sorted([*self.kept, *different])
        return bool(different)

    def _long_example(self) -> Tensor:
        """One input; texts are long enough for local attention to matter."""
        longest = getattr(self.encoder.model.config, "max_position_embeddings", None) or 135
        return self.encoder.example(1, min(131, longest - 4))

    def _check(self, path: str, output: Any, inputs: Tensor, states: Tensor) -> None:
        """Raise Unfit unless this module is local and the model reads its input through this module only."""
        splice, module = self.splice, self.encoder.model.get_submodule(path)
        splice.features, splice.per_step, splice.grid, splice.stem = path, None, (), None
        rest = output[1:] if isinstance(output, tuple) else ()
        if any(item is not None for item in rest):
            raise Unfit(f"its output has {len(output)} parts", 1)
        splice.rest = len(rest) or None if isinstance(output, tuple) else None
        splice.order = self._order_of(blocks.first(output), module, inputs)
        x = blocks.first(output).permute(splice.order)[:1]
        features, inputs, states = x.flatten(1, -2), inputs[:1], states[:1]
        length, splice.width = features.shape[1:]
        if x.ndim == 4:
            splice.grid = tuple(x.shape[1:-1])
        elif splice.reads == "vision":
            side = math.isqrt(length)
            if side * side != length:
                raise Unfit(f"its {length} positions do not form a square grid", 2)
            splice.grid = (side, side)
        elif splice.timed:
            self._measure()
        splice.extra = states.shape[1] - length
        if splice.extra < 0:
            raise Unfit(f"{length} local features become {states.shape[1]} states", 2)
        if not _close(self.encoder.run(features), states):
            if not _close(self.encoder.call(inputs), states):
                raise Unfit("its states differ from call to call", FINAL)
            raise Unfit("the rest of the model also depends on its input in other ways", 3)
        self._check_local(inputs)
        self._check_order(features)
        if self.encoder.masks_features:
            self._check_positions(features)
        else:
            self._check_bidirectional(features)

    def _order_of(self, output: Any, module: nn.Module, inputs: Tensor) -> tuple[int, ...]:
        """Batch, position and channel axes of a module's output."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim not in (3, 4):
            found = type(output).__name__ if not isinstance(output, Tensor) else f"{output.dtype} {tuple(output.shape)}"
            raise Unfit(f"found the output {found}, expected a tensor (B, T, C), (B, C, T) or (B, C, H, W)", 1)
        shape, channels, text = tuple(output.shape), self.encoder.hidden_size, self.splice.reads == "text"
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2)] if len(shape) == 3 else [(0, 2, 3, 1), (0, 1, 2, 3)]
        if isinstance(module, nn.Conv1d):
            orders.reverse()
        for order in orders:
            batch, *positions, width = (shape[axis] for axis in order)
            fits = positions == [inputs.shape[1]] if text else width == channels
            if batch == len(inputs) and fits and (order != (1, 0, 2) or text):
                return order
        expected = f"(B, {inputs.shape[1]}, C)" if text else f"B = {len(inputs)} and C = {channels}"
        raise Unfit(f"found the output shape {shape}, expected {expected}", 1)

    def _measure(self) -> None:
        """Find how the number of positions depends on the number of samples or frames, unless the length is fixed."""

        def count(size: int) -> int:
            shape = list(self.splice.shape)
            shape[self.splice.time] = size
            return self.encoder.embed(torch.zeros(1, *shape, **self.encoder.kind())).shape[1]

        def try_count(size: int) -> int:
            try:
                return count(size)
            except Exception:  # too short, or not the one length that the model takes
                return 0

        high = self.splice.shape[self.splice.time]
        fixed = count(high)
        if try_count(high - high // 4) in (0, fixed):
            self.splice.grid = (fixed,)
            return
        sizes = []
        for wanted in (1, 2, 3):
            low, top = 0, high
            while top - low > 1:
                middle = (low + top) // 2
                low, top = (low, middle) if try_count(middle) >= wanted else (middle, top)
            sizes.append(top)
        first, step = sizes[1] - (sizes[2] - sizes[1]), sizes[2] - sizes[1]
        if (high - first) // step + 1 != fixed:
            raise Unfit(f"{fixed} positions from {high} samples or frames do not match any convolution", 2)
        self.splice.per_step = (first, step)

    def _check_local(self, inputs: Tensor) -> None:
        """Change the end, the start and the middle of the input: only features there may change.

        Text is changed at one token, other inputs in an eighth of each axis. There, features of neighbouring positions may
        change too, and those within the reach of the convolutions that compute them.
        """
        splice, reaches, changes = self.splice, [0.0], {"end": 1.0, "start": 0.0, "middle": 0.5}

        def note(conv: Any, args: tuple) -> None:
            each = zip(args[0].shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=False)
            reaches.append(max(0.0, *((dilation * (kernel - 1) + 1 - step) / size for size, kernel, step, dilation in each)))

        others = inputs.repeat(len(changes), *[1] * (inputs.ndim - 1))
        for other, at in zip(others, changes.values(), strict=True):
            part = other
            for axis in range(-min(2, other.ndim), 0):
                width = max(1, other.shape[axis] // 8)
                part = part.narrow(axis, round(at * (other.shape[axis] - width)), width)
            if splice.reads == "text":
                part.fill_(self.encoder.ids[self.encoder.ids.index(int(part)) - 1])
            else:
                part.add_(torch.randn_like(part))
        with ExitStack() as stack:
            # Norms over positions are replaced by norms over channels, because without any a deep stem would overflow.
            for module in self.encoder.model.modules():
                if isinstance(module, NORMS_OVER_TIME) and module not in self.inside:
                    stack.enter_context(override_forward(module, lambda x: nn.functional.normalize(x, dim=1)))
                elif isinstance(module, nn.Conv1d | nn.Conv2d) and module not in self.inside:
                    stack.callback(module.register_forward_pre_hook(note).remove)
            plain, *changed = self.encoder.embed(torch.cat([inputs, others]))
        length, reach = len(plain), sum(reaches)
        grid = splice.grid or (length,)
        cells = torch.tensor(grid)
        for (where, at), features in zip(changes.items(), changed, strict=True):
            found = _differing(features, plain)
            count, index = int(found.sum()), found.cpu().view(grid).nonzero()
            if splice.reads == "text":
                far = index != round(at * (length - 1))
            else:
                first, last = (at * 7 / 8 - reach) * cells - 1, (at * 7 / 8 + 1 / 8 + reach) * cells + 1
                far = (index + 1 <= first) | (index >= last)
            if far.any() or (count > max(1, length // 2) and where != "middle"):
                raise Unfit(
                    f"is not local: the {where} of the input changes {count} of its {length} positions, so masked content "
                    "would leak into visible positions",
                    4,
                )
            if count == 0:
                raise Unfit(f"does not depend on the {where} of the input", 4)

    def _check_order(self, features: Tensor) -> None:
        """Change the first, a middle and the last feature with the blocks skipped: only their own states must change."""
        extra, last = self.splice.extra, features.shape[1] - 1
        each = (0, last // 2) if self.splice.timed else (0, last // 2, last)  # SEW drops an odd last frame
        with self._skip_blocks():
            *changes, plain = self.encoder.run(torch.cat([*(_perturb(features, at) for at in each), features]))
        for at, states in zip(each, changes, strict=True):
            changed = _differing(states, plain)
            if not changed[extra + at] or changed[:extra].any() or (not self.splice.timed and changed.sum() != 1):
                where = changed.nonzero().flatten().tolist()[:5]
                raise Unfit(
                    f"without its blocks, feature {at} ends up in states {where}, expected only {extra + at}: extra "
                    "tokens come after or among the positions, or the positions are reordered",
                    5,
                )

    def _check_positions(self, features: Tensor) -> None:
        """Set some positions to the same mask vector: their states must still differ."""
        masked = features.clone()
        hidden = torch.rand(features.shape[1]) < 0.5
        hidden[:3] = torch.tensor([True, False, True])
        masked[:, hidden] = features[0, 0]

        def differ() -> bool:
            found = self.encoder.run(masked)[:, self.splice.extra :][:, hidden]
            return not _close(found, found[:, :1].expand_as(found))

        with self._skip_blocks():
            added = differ()
        if not added and not differ():
            raise Unfit("masked positions get equal states: masking removes the positions, or the model has none", 6)

    def _check_bidirectional(self, features: Tensor) -> None:
        """Change the first and the last feature: in a causal block only the first one affects other positions."""
        three = torch.cat([features, _perturb(features, 0), _perturb(features, -1)])
        causal = []
        for number in self.kept:
            with self._skip_blocks(keep=self.blocks[number]):
                plain, first, last = self.encoder.run(three)
            if _differing(first, plain)[1:].any() and not _differing(last, plain)[:-1].any():
                causal.append(number)
        if causal:
            who = "is causal" if len(causal) == len(self.kept) else f"has causal blocks, such as {causal[0]}"
            remedy = "set encoder.bidirectional=true to make its attention bidirectional"
            if getattr(self.encoder.model.config, "is_causal", True) is False:
                remedy = "config.is_causal = false, which encoder.bidirectional sets, does not change that"
            raise Unfit(f"{who}: positions do not see later ones; {remedy}", FINAL)

    # What else the encoder needs, once the module is found

    def _find_stem(self, before: list[str]) -> str | None:
        """The module that takes the raw audio input, if it is not the features module."""
        if not self.splice.timed:
            return None
        around = [path for path in before if not f"{self.splice.features}.".startswith(f"{path}.")]
        outer = [path for path in around if not any(path.startswith(f"{other}.") for other in around)]
        inner = [path for path in outer if not path.startswith(f"{self.splice.features}.")]
        return inner[0] if inner else None

    def _inspect(self, inputs: Tensor, length: int, results: dict[str, tuple[int, ...]]) -> None:
        """Find the FFN output, the parameters that teachers copy, and whether padding and masked positions can be left out."""
        encoder, width = self.encoder, self.encoder.hidden_size
        if encoder.ffn_name is None:
            names = [path for path in results if path]
            if not names:
                kind = type(self.blocks[-1]).__name__
                raise Unfit(f"{kind} runs no nn.Linear: name the FFN's output with encoder.ffn=…", FINAL)
            encoder.ffn_name = names[-1]
        for path in (encoder.ffn_name, ""):
            expected, found = (BATCH, length, width), results.get(path)
            if found and self.splice.timed and not self.splice.extra and (found[0], *found[2:]) == (BATCH, width):
                self.splice.squeeze = max(1, length // found[1])
                expected = (BATCH, length // self.splice.squeeze, width)
            if found != expected:
                name, remedy = path or encoder.layers_name, "name the right module with encoder.ffn=…"
                raise Unfit(f"{name}: found a layer result of shape {found}, expected {expected}; {remedy}", FINAL)
        self._find_parameters(inputs)
        self.splice.no_padding = self._why_no_padding(encoder.embed(inputs))
        self.splice.no_gather = "its blocks see fewer positions" if self.splice.squeeze > 1 else self._why_no_gather()

    def _find_parameters(self, inputs: Tensor) -> None:
        """Find the parameters of the features, and those of what is added to them before the blocks."""
        encoder, block_inputs = self.encoder, []
        parameters = dict(encoder.model.named_parameters())

        def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            map_tensors(lambda path, value: block_inputs.append(value), args, kwargs)
            raise StopForward

        def parameters_of(results: list[Tensor]) -> set[str]:
            results = [result for result in results if result.requires_grad]
            if not results:
                return set()
            total: Any = sum(result.float().sum() for result in results)
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=True)
            return {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        with torch.enable_grad():
            encoder.model.requires_grad_(True)
            features = encoder.embed(inputs)
            try:
                encoder.run(features)
            except StopForward:
                pass
            local = parameters_of([features])
            positional = parameters_of(block_inputs) - local
            encoder.model.requires_grad_(False)
        hook.remove()
        if encoder.mask_token_name:
            local.add(encoder.mask_token_name)
        self.splice.local, self.splice.positional = tuple(sorted(local)), tuple(sorted(positional))

    def _why_no_padding(self, features: Tensor) -> str | None:
        """Why padding cannot be excluded from the context; None if it can."""
        if "attention_mask" not in self.encoder.takes:
            return "takes no attention_mask"
        padding = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        padding[:, -max(1, features.shape[1] // 4) :] = True
        other = features + torch.randn_like(features) * padding.unsqueeze(-1)
        try:
            states = self.encoder.run(torch.cat([features, other]), padding.expand(2, -1))[:, self.splice.extra :]
        except Exception as error:
            return f"does not run with its attention_mask ({type(error).__name__})"
        return None if _close(*states[:, ~padding[0]]) else "attends to padding despite its attention_mask"

    def _why_no_gather(self) -> str | None:
        """Why a subset of the positions cannot be encoded alone; None if it can.

        Random positions, encoded alone and out of order, must get the states that they get among all with the others hidden
        from attention.
        """
        encoder, splice = self.encoder, self.splice
        features = encoder.embed(self._long_example())
        length, at = features.shape[1], features.shape[1] // 2
        placed = encoder.placed(torch.cat([_perturb(features, at), features]))
        changed = _differing(*placed)
        if placed.shape[1] != length or changed.sum() != 1 or not changed[at]:
            return "its positions come from a convolution or similar, which would see masked content"

        subset = torch.stack([torch.randperm(length, device=features.device)[: length // 2] for _ in range(BATCH)])
        rows = torch.cat([torch.arange(splice.extra, device=features.device).expand(BATCH, -1), subset + splice.extra], dim=1)
        hidden = torch.ones(BATCH, splice.extra + length, dtype=torch.bool, device=features.device).scatter(1, rows, False)
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                hook = block.register_forward_pre_hook(self._note_axes(number, length), with_kwargs=True)
                stack.callback(hook.remove)
            with sdpa_kernel(SDPBackend.MATH), HideKeys(hidden):
                expected = _gather_rows(encoder.run(features.expand(BATCH, -1, -1)), rows)
        x, found = gather(placed[1:], subset), splice.axes
        for axes in (found, {key: value[:1] for key, value in found.items()}):  # another axis may happen to have the same size
            splice.axes = axes
            try:
                if _close(encoder._whole(x, None, subset), expected):
                    return None
            except Exception:  # blocks that do not run on other rows
                continue
        return "its blocks depend on positions or on their number, or its attention is not a softmax"

    def _note_axes(self, number: int, length: int) -> Callable:
        """Hook that records which axes of a block's arguments index positions."""

        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            first, lengths = first_path(args, kwargs), (self.splice.extra + length, length)

            def axes(path: tuple, value: Tensor) -> None:
                if path != first:
                    self.splice.axes[number, path] = [axis for axis, size in enumerate(value.shape) if size in lengths]

            map_tensors(axes, args, kwargs)

        return note


def _find_layers(model: nn.Module) -> str:
    """`find_layers`, or the only outermost list of modules with attention, or the only list of num_hidden_layers modules."""
    try:
        return find_layers(model)
    except ValueError:
        lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        attend = [name for name, m in lists.items() if "att" in " ".join(n for n, _ in m[0].named_modules()).lower()]
        outer = [name for name in attend if not any(name.startswith(f"{other}.") for other in attend)]
        expected = getattr(model.config, "num_hidden_layers", None)
        matching = [name for name, m in lists.items() if len(m) == expected]
        for found in (outer, matching):
            if len(found) == 1:
                return found[0]
        raise


def _kind_of(block: nn.Module) -> str:
    """Equal for blocks that differ only in layer index and weights."""
    kinds = []
    for name, module in block.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if (value is None or isinstance(value, bool | int | str | tuple)) and not PER_LAYER_ATTRIBUTES.search(name)
        }
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        kinds.append((name, type(module), plain, shapes))
    return repr(kinds)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def _clone(output: Any) -> Any:
    """A copy of a module's output that later in-place operations do not change."""
    if isinstance(output, tuple):
        return tuple(_clone(item) for item in output)
    return output.clone() if isinstance(output, Tensor) else output


def _perturb(features: Tensor, at: int) -> Tensor:
    """Features (1, T, C) with noise added at position `at`."""
    other = features.clone()
    other[:, at] += torch.randn_like(other[:, at])
    return other


def _gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, T, C) at `rows` (B, V)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """Whether two results (T, C) differ at each position, (T,) bool."""
    return (one - other).abs().amax(-1) > 1e-6 * other.abs().max()


def _shapes(reads: str, model: Any) -> list[tuple[int, ...]]:
    """Input shapes, without the batch, that the model may take."""
    config = model.config

    def value(*names: str, default: int) -> int:
        found = [getattr(config, name, None) for name in names]
        return next((number for number in found if isinstance(number, int)), default)

    if reads == "text":
        return [()]
    if reads == "vision":
        size = getattr(config, "image_size", 64)
        high, wide = (size, size) if isinstance(size, int) else tuple(size)
        return [(value("num_channels", "in_channels", default=3), high, wide)]
    bins = value("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", default=80)
    longest = value("max_length", "max_source_positions", default=128)
    spectrograms: list[tuple[int, ...]] = [(longest, bins), (bins, 2 * longest), (bins, longest), (97, bins), (bins, 97)]
    if "feature_projection_input_dim" in config.to_dict():
        spectrograms.insert(0, (97, config.feature_projection_input_dim))
    return [(4000,), *spectrograms] if model.main_input_name == "input_values" else spectrograms
