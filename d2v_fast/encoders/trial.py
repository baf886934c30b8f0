"""Finding by trying what has to be known of a model so that it runs whole with other features.

Which module makes local features, where extra tokens stand, what the FFN's output is and whether visible positions can be
encoded alone: each is tried on one small input, on a copy of the model with other weights, in which one block stands for all
of its kind.
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

from d2v_fast.encoders import blocks
from d2v_fast.encoders.base import find_layers
from d2v_fast.encoders.spliced import READS, Reached, Splice, SplicedEncoder, first_of, first_path, forward_of, mapped

NORMS_OVER_TIME = (nn.GroupNorm, nn.InstanceNorm1d, nn.BatchNorm1d)  # they mix statistics, not content
BATCH = 2  # tells the axis of the batch; no other axis of a model has such a length
FINAL = 10  # rank of a failure that no other module mends
CLOSE = 1e-4  # of two results in fp32, relative to their size
NUMBERS_OF_A_LAYER = re.compile("idx|index|layer_id|layer_number|training")


class Unfit(ValueError):
    """A module cannot be spliced; `rank` counts the tests that it has passed."""

    def __init__(self, reason: str, rank: int):
        super().__init__(reason)
        self.rank = rank


def splice(model: nn.Module, features: str | None = None, layers: str | None = None, ffn: str | None = None) -> SplicedEncoder:
    """A model of transformers as an encoder that runs whole.

    Args:
        model: Takes `input_ids`, `pixel_values`, `input_values` or `input_features`; its `last_hidden_state` is (B, E + T, C).
        features: Dotted path of the module whose output is (B, T, C), (B, C, T) or (B, C, H, W); default is found by trying.
        layers, ffn: As of `Encoder`; the FFN's output is else that of the last Linear a block runs, scaled by its layer scale.

    Raises:
        ValueError: No module fits; the message says which test the best one has failed, and what can be named.
    """
    layers = layers or _find_layers(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for whole in (False, True):  # some models do not run with blocks that do nothing
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


class Trial:
    """What is tried, each thing by changing `splice`, with which `encoder` runs the copy.

    Args:
        model, named, layers, ffn: As of `splice`.
        whole: Keep all blocks in the copy.
    """

    def __init__(self, model: nn.Module, named: str | None, layers: str, ffn: str | None, whole: bool):
        self.named, self.whole, self.runs, self.splice = named, whole, False, Splice(READS[model.main_input_name])
        self.rest: tuple | None = None  # what a block returns beside its result, once one has run
        self.encoder = SplicedEncoder(self._copy(model, layers), self.splice, layers, ffn)
        self.blocks = self.encoder.blocks
        self.inside = {module for block in self.blocks for module in block.modules()}

    def failures(self) -> list[tuple[str | None, Unfit]]:
        """Fill in `splice` and return nothing, or return why no module fits."""
        try:
            return self._try_all()
        except Unfit as error:
            return [(self.named, error)]
        except Exception as error:  # each class of transformers has errors of its own
            return [(self.named, Unfit(_described(error), FINAL))]

    def _try_all(self) -> list[tuple[str | None, Unfit]]:
        inputs, states, seen, results = self._run_once()
        if states.ndim != 3 or states.shape[-1] != self.encoder.hidden_size:
            expected = f"(B, T, {self.encoder.hidden_size})"
            raise Unfit(f"its last states have the shape {tuple(states.shape)}, not {expected}", FINAL)
        if self.named and not any(path == self.named for path, _ in seen):
            raise Unfit("is not in the model, or not run before its blocks", 0)
        failures: list[tuple[str | None, Unfit]] = []
        for number, (path, output) in reversed(list(enumerate(seen))):
            module = self.encoder.model.get_submodule(path)
            drops = any(isinstance(each, nn.Dropout) for each in module.modules())
            if drops and self.encoder.masks_features and not self.named:
                continue  # features are the teacher's too, and dropout is the student's alone
            try:
                self._try(path, output, inputs, states)
            except Unfit as error:
                failures.append((path, error))
            except Exception as error:  # a model that does not run with it
                failures.append((path, Unfit(_described(error), 1)))
            else:
                self.splice.stem = self._stem([before for before, _ in seen[:number]])
                self._learn(inputs[:1], states.shape[1], results)
                return []
        grids = [blocks.first(output) for _, output in seen]
        most = max((grid.shape[2:].numel() for grid in grids if isinstance(grid, Tensor) and grid.ndim == 4), default=0)
        if most > states.shape[1] and all(error.rank < 3 for _, error in failures):
            why = f"is hierarchical: of {most} local features {states.shape[1]} states are left, and no mask fits both"
            raise Unfit(why, FINAL)
        return failures or [(None, Unfit("no module before its blocks gives a feature of each position", 0))]

    # A small copy

    def _copy(self, model: nn.Module, layers: str) -> nn.Module:
        """In eval mode, with weights that hide nothing: zeros of tokens, biases and positions become other numbers.

        Of the blocks the first, the last and one of each kind are there; the others do nothing.
        """
        all_blocks = model.get_submodule(layers)
        kinds = [_kind_of(block) for block in all_blocks]
        self.kept = sorted({0, len(kinds) - 1, *(kinds.index(kind) for kind in kinds)})
        if self.whole:
            self.kept = list(range(len(kinds)))
        left_out = {id(block): self._stand_in(block) for number, block in enumerate(all_blocks) if number not in self.kept}
        copied = copy.deepcopy(model, left_out).eval().requires_grad_(False)
        if next(copied.parameters()).dtype.itemsize < 4:
            copied.float()
        generator = torch.Generator().manual_seed(0)
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.nan_to_num_().add_(noise * (0.1 if parameter.ndim < 2 else max(1, parameter[0].numel()) ** -0.5))
        return copied

    def _stand_in(self, block: nn.Module) -> nn.Module:
        """A block of the same attributes, without parts, which does nothing."""
        other = type(block).__new__(type(block))
        nn.Module.__init__(other)
        vars(other).update({name: value for name, value in vars(block).items() if name not in vars(other)})
        other.forward = self._do_nothing
        return other

    def _do_nothing(self, *args: Any, **kwargs: Any) -> Any:
        x = first_of(args, kwargs)
        return x if self.rest is None else (x, *self.rest)

    @contextmanager
    def _idle(self, but: nn.Module | None = None) -> Iterator[None]:
        """No block does anything, but this one."""
        with ExitStack() as stack:
            for block in self.blocks:
                if block is not but:
                    stack.enter_context(forward_of(block, self._do_nothing))
            yield

    # What is tried

    def _run_once(self) -> tuple[Tensor, Tensor, list[tuple[str, Any]], dict[str, tuple[int, ...]]]:
        """Inputs that the model takes; its states; what its modules give before the blocks, in their order; and the shapes of
        what the last block gives ("") and the modules in it that may end an FFN, in their order."""
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
            seen, results, called = [], {}, set()

            def outer(path: str, output: Any, seen=seen, called=called) -> None:
                if self.named or not called:
                    seen.append((path, _kept(output)))

            def inner(path: str, output: Any, results=results) -> None:
                results.pop(path, None)
                results[path] = tuple(blocks.first(output).shape)

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
                except Exception as error:  # each class of transformers has errors of its own
                    why = why or _described(error)
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

    def _try(self, path: str, output: Any, inputs: Tensor, states: Tensor) -> None:
        """Raise Unfit unless this module is local and all that the model learns of its input."""
        splice, module = self.splice, self.encoder.model.get_submodule(path)
        splice.features, splice.per_step, splice.grid, splice.stem = path, None, (), None
        rest = output[1:] if isinstance(output, tuple) else ()
        if any(each is not None for each in rest):
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
                raise Unfit(f"its {length} positions are no square grid", 2)
            splice.grid = (side, side)
        elif splice.timed:
            self._measure()
        splice.extra = states.shape[1] - length
        if splice.extra < 0:
            raise Unfit(f"of {length} local features {states.shape[1]} states are left", 2)
        if not _same(self.encoder.run(features), states):
            if not _same(self.encoder.call(inputs), states):
                raise Unfit("its states differ from call to call", FINAL)
            raise Unfit("the rest of the model depends on its input in other ways too", 3)
        self._check_local(inputs)
        self._check_order(features)
        if self.encoder.masks_features:
            self._check_positions(features)
        else:
            self._check_both_ways(features)

    def _order_of(self, output: Any, module: nn.Module, inputs: Tensor) -> tuple[int, ...]:
        """The axes of the batch, the positions and the channels in a module's output."""
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
        """Find how the number of positions follows from that of samples or frames; nothing for a model of one length."""

        def count(size: int) -> int:
            shape = list(self.splice.shape)
            shape[self.splice.time] = size
            return self.encoder.embed(torch.zeros(1, *shape, **self.encoder.kind())).shape[1]

        def try_count(size: int) -> int:
            try:
                return count(size)
            except Exception:  # too short, or of another length than the only one
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
            raise Unfit(f"{fixed} positions of {high} samples or frames are not as many as a convolution gives", 2)
        self.splice.per_step = (first, step)

    def _check_local(self, inputs: Tensor) -> None:
        """Change the end of the input: features elsewhere stay, but for the reach of a convolution."""
        other, splice = inputs.clone(), self.splice
        if splice.reads == "text":
            ids = self.encoder.ids
            other[:, -1] = ids[ids.index(int(other[0, -1])) - 1]
        elif splice.reads == "vision":
            other[..., -1, -1] += 10
        else:
            size = splice.shape[splice.time]
            last = other.narrow(1 + splice.time, -(-7 * size // 8), size // 8)
            last.add_(torch.randn_like(last))
        with ExitStack() as stack:
            for each in self.encoder.model.modules():
                if isinstance(each, NORMS_OVER_TIME) and each not in self.inside:
                    stack.enter_context(forward_of(each, lambda x: x))
            one, two = self.encoder.embed(torch.cat([inputs, other]))
        count, length = int(_moved(two, one).sum()), len(one)
        if count > (1 if splice.reads == "text" else length // 2):
            raise Unfit(
                f"is not local: the end of the input changes {count} of {length} of its positions, so that a "
                "masked position would be seen by others",
                4,
            )
        if count == 0:
            raise Unfit("does not depend on the end of the input", 4)

    def _check_order(self, features: Tensor) -> None:
        """Change one feature, with blocks that do nothing: the state that stands for it changes, and no extra token's."""
        at, extra = features.shape[1] // 2, self.splice.extra
        with self._idle():
            moved = _moved(*self.encoder.run(torch.cat([_changed(features, at), features])))
        if not moved[extra + at] or moved[:extra].any() or (not self.splice.timed and moved.sum() != 1):
            where = moved.nonzero().flatten().tolist()[:5]
            raise Unfit(
                f"without its blocks, feature {at} is found in the states {where}, expected {extra + at} alone: extra "
                "tokens stand behind the positions, or these come in another order",
                5,
            )

    def _check_positions(self, features: Tensor) -> None:
        """Mask some positions with one vector: their states have to differ by where they are."""
        masked = features.clone()
        hidden = torch.rand(features.shape[1]) < 0.5
        hidden[:3] = torch.tensor([True, False, True])
        masked[:, hidden] = features[0, 0]

        def differ() -> bool:
            found = self.encoder.run(masked)[:, self.splice.extra :][:, hidden]
            return not _same(found, found[:, :1].expand_as(found))

        with self._idle():
            added = differ()
        if not added and not differ():
            raise Unfit("masked positions get equal states: positions are lost with the mask, or the model has none", 6)

    def _check_both_ways(self, features: Tensor) -> None:
        """Change the first and the last feature: a block that passes on only the first one's change is causal."""
        three = torch.cat([features, _changed(features, 0), _changed(features, -1)])
        causal = []
        for number in self.kept:
            with self._idle(but=self.blocks[number]):
                plain, first, last = self.encoder.run(three)
            if _moved(first, plain)[1:].any() and not _moved(last, plain)[:-1].any():
                causal.append(number)
        if causal:
            who = "is causal" if len(causal) == len(self.kept) else f"has causal blocks, such as {causal[0]}"
            remedy = "encoder.bidirectional=true lets its attention see them"
            if getattr(self.encoder.model.config, "is_causal", True) is False:
                remedy = "config.is_causal = false, which encoder.bidirectional sets, does not change that"
            raise Unfit(f"{who}: a position sees none of the later ones; {remedy}", FINAL)

    # What is learned of a model whose features are known

    def _stem(self, before: list[str]) -> str | None:
        """The module that takes the inputs of speech, if it is another one."""
        if not self.splice.timed:
            return None
        around = [path for path in before if not f"{self.splice.features}.".startswith(f"{path}.")]
        outer = [path for path in around if not any(path.startswith(f"{other}.") for other in around)]
        inner = [path for path in outer if not path.startswith(f"{self.splice.features}.")]
        return inner[0] if inner else None

    def _learn(self, inputs: Tensor, length: int, results: dict[str, tuple[int, ...]]) -> None:
        """The FFN's output, what teachers copy, whether padding is left out, and whether positions can be."""
        encoder, width = self.encoder, self.encoder.hidden_size
        if encoder.ffn_name is None:
            names = [path for path in results if path]
            if not names:
                kind = type(self.blocks[-1]).__name__
                raise Unfit(f"{kind} runs no nn.Linear: name the FFN's output, encoder.ffn=…", FINAL)
            encoder.ffn_name = names[-1]
        for path in (encoder.ffn_name, ""):
            expected, found = (BATCH, length, width), results.get(path)
            if found and self.splice.timed and not self.splice.extra and (found[0], *found[2:]) == (BATCH, width):
                self.splice.squeeze = max(1, length // found[1])
                expected = (BATCH, length // self.splice.squeeze, width)
            if found != expected:
                name, remedy = path or encoder.layers_name, "name it: encoder.ffn=…"
                raise Unfit(f"{name}: found a layer's result of shape {found}, expected {expected}; {remedy}", FINAL)
        self._learn_parameters(inputs)
        self.splice.no_padding = self._try_padding(encoder.embed(inputs))
        self.splice.no_gather = "its blocks see fewer positions" if self.splice.squeeze > 1 else self._try_gather()

    def _learn_parameters(self, inputs: Tensor) -> None:
        encoder, taken = self.encoder, []
        parameters = dict(encoder.model.named_parameters())

        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            mapped(lambda path, value: taken.append(value), args, kwargs)
            raise Reached

        def reached_by(results: list[Tensor]) -> set[str]:
            results = [result for result in results if result.requires_grad]
            if not results:
                return set()
            total = sum(result.float().sum() for result in results)
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=True)
            return {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

        hook = self.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
        with torch.enable_grad():
            encoder.model.requires_grad_(True)
            features = encoder.embed(inputs)
            try:
                encoder.run(features)
            except Reached:
                pass
            local = reached_by([features])
            positional = reached_by(taken) - local
            encoder.model.requires_grad_(False)
        hook.remove()
        if encoder.mask_token_name:
            local.add(encoder.mask_token_name)
        self.splice.local, self.splice.positional = tuple(sorted(local)), tuple(sorted(positional))

    def _try_padding(self, features: Tensor) -> str | None:
        """Why padding cannot be left out of the context; None if it can."""
        if "attention_mask" not in self.encoder.takes:
            return "takes no attention_mask"
        padding = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        padding[:, -max(1, features.shape[1] // 4) :] = True
        other = features + torch.randn_like(features) * padding.unsqueeze(-1)
        try:
            states = self.encoder.run(torch.cat([features, other]), padding.expand(2, -1))[:, self.splice.extra :]
        except Exception as error:
            return f"does not run with its attention_mask ({type(error).__name__})"
        return None if _same(*states[:, ~padding[0]]) else "sees what its attention_mask covers"

    def _try_gather(self) -> str | None:
        """Why a subset of the positions cannot be encoded alone; None if it can.

        A permutation tells whether all that depends on positions moves with them, and taking each row twice, which no softmax
        notices, whether the number of rows matters. Texts are long enough to have neighbourhoods.
        """
        encoder, splice = self.encoder, self.splice
        longest = getattr(encoder.model.config, "max_position_embeddings", None) or 135
        features = encoder.embed(encoder.example(1, min(131, longest - 4)))
        length, at = features.shape[1], features.shape[1] // 2
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                hook = block.register_forward_pre_hook(self._note_axes(number, length), with_kwargs=True)
                stack.callback(hook.remove)
            states = encoder.run(features)[:, splice.extra :]
        placed = encoder.placed(torch.cat([_changed(features, at), features]))
        moved = _moved(*placed)
        if placed.shape[1] != length or moved.sum() != 1 or not moved[at]:
            return "its positions come from a convolution or the like, which would see what is masked"

        extra = torch.arange(splice.extra, device=features.device)[None]
        order = torch.stack([torch.randperm(length, device=features.device) for _ in range(BATCH)])  # each sample has its own
        some = order[:1, : length // 2]

        def encoded(extra: Tensor, rows: Tensor) -> Tensor:
            extra = extra.expand(len(rows), -1)
            both = torch.cat([extra, rows + splice.extra], dim=1)
            with encoder.gathering(extra, rows, length, lambda hidden: _rows(hidden, both)):
                return encoder.run(features.expand(len(rows), -1, -1))[:, extra.shape[1] :]

        found = splice.axes
        for axes in (found, {at: each[:1] for at, each in found.items()}):  # another axis may happen to be as long
            splice.axes = axes
            try:
                if not _same(encoded(extra, order), _rows(states.expand(BATCH, -1, -1), order)):
                    continue
                once = encoded(extra, some)
            except Exception:  # blocks that do not run on other rows
                continue
            try:
                twice = encoded(extra.repeat(1, 2), some.repeat(1, 2))
            except Exception:
                if splice.extra:  # blocks that know how many extra tokens there are
                    return None
                continue
            if _same(once, twice[:, : length // 2]):
                return None
        return "positions enter inside of its blocks, in a form that cannot be gathered"

    def _note_axes(self, number: int, length: int) -> Callable:
        """Note which axes of a block's arguments count positions."""

        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            first, lengths = first_path(args, kwargs), (self.splice.extra + length, length)

            def axes(path: tuple, value: Tensor) -> None:
                if path != first:
                    self.splice.axes[number, path] = [axis for axis, size in enumerate(value.shape) if size in lengths]

            mapped(axes, args, kwargs)

        return note


def _find_layers(model: nn.Module) -> str:
    """As of models whose family is known; else the only outer list of modules with attention, or of the config's number."""
    try:
        return find_layers(model)
    except ValueError:
        lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each)}
        attend = [name for name, each in lists.items() if "att" in " ".join(n for n, _ in each[0].named_modules()).lower()]
        outer = [name for name in attend if not any(name.startswith(f"{other}.") for other in attend)]
        wanted = getattr(model.config, "num_hidden_layers", None)
        as_many = [name for name, each in lists.items() if len(each) == wanted]
        for found in (outer, as_many):
            if len(found) == 1:
                return found[0]
        raise


def _kind_of(block: nn.Module) -> str:
    """Equal for blocks that are alike but for their numbers and weights."""
    kinds = []
    for name, module in block.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if (value is None or isinstance(value, bool | int | str | tuple)) and not NUMBERS_OF_A_LAYER.search(name)
        }
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        kinds.append((name, type(module), plain, shapes))
    return repr(kinds)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE * other.abs().max())


def _kept(output: Any) -> Any:
    """A module's output, safe from what is done to it in place."""
    if isinstance(output, tuple):
        return tuple(_kept(each) for each in output)
    return output.clone() if isinstance(output, Tensor) else output


def _changed(features: Tensor, at: int) -> Tensor:
    """Features (1, T, C), with another one at this position."""
    other = features.clone()
    other[:, at] += torch.randn_like(other[:, at])
    return other


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, T, C) at `rows` (B, V)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _moved(one: Tensor, other: Tensor) -> Tensor:
    """Positions (T,) at which two results (T, C) differ."""
    return (one - other).abs().amax(-1) > 1e-6 * other.abs().max()


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
