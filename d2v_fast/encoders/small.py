"""A small copy of a model for trials: one block of each kind, after a check that blocks of one kind compute the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.encoders import blocks
from d2v_fast.encoders.spliced import READS, Splice, SplicedEncoder, first_argument, first_path, map_tensors, override_forward

TOLERANCE = 1e-4  # between two fp32 results, relative to their magnitude
PER_LAYER_ATTRIBUTES = re.compile("idx|index|layer_id|layer_number|training")


class SmallEncoder(SplicedEncoder):
    """A copy of a model in eval mode, with noise added to all weights so that zero-initialised ones have an effect too.

    It keeps the first block, the last one and one of each kind. The others become no-ops with the weights of the first of their
    kind; `restore_blocks` checks that they compute the same.

    Args:
        model, layers, ffn: As for `SplicedEncoder`.
        whole: Keep all blocks.

    Attributes:
        kept: Numbers of the blocks that are kept.
        like: For each no-op, the block whose weights it has.
    """

    def __init__(self, model: Any, layers: str, ffn: str | None, whole: bool):
        all_blocks: Any = model.get_submodule(layers)
        kinds = [_kind_of(block) for block in all_blocks]
        first = [kinds.index(kind) for kind in kinds]
        self.kept = sorted(range(len(kinds)) if whole else {0, len(kinds) - 1, *first})
        self.like: dict[int, int] = {}
        self.rest: tuple | None = None  # what a block returns after its hidden states, once one has run
        copies: dict[int, Any] = {}
        for number in self.kept:
            copy.deepcopy(all_blocks[number], copies)
        for number, block in enumerate(all_blocks):
            if id(block) in copies:
                continue
            weights = dict(all_blocks[first[number]].named_parameters())
            shared = {id(p): copies[id(weights[name])] for name, p in block.named_parameters() if name in weights}
            copies[id(block)] = no_op = copy.deepcopy(block, copies | shared)
            no_op.forward = self._no_op
            self.like[number] = first[number]
        copied = copy.deepcopy(model, copies).eval().requires_grad_(False)
        if next(copied.parameters()).dtype.itemsize < 4:
            copied.float()
        generator = torch.Generator().manual_seed(0)
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.nan_to_num_().add_(noise * (0.1 if parameter.ndim < 2 else max(1, parameter[0].numel()) ** -0.5))
        super().__init__(copied, Splice(READS[model.main_input_name]), layers, ffn)

    def _no_op(self, *args: Any, **kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        return x if self.rest is None else (x, *self.rest)

    def note_rest(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of a kept block, from which no-ops learn what to return."""
        self.rest = output[1:] if isinstance(output, tuple) else None

    @contextmanager
    def skip_blocks(self, keep: nn.Module | None = None) -> Iterator[None]:
        """Turn all blocks but `keep` into no-ops."""
        with ExitStack() as stack:
            for block in self.blocks:
                if block is not keep:
                    stack.enter_context(override_forward(block, self._no_op))
            yield

    def long_example(self) -> Tensor:
        """One input; texts are long enough for local attention to matter."""
        longest = getattr(self.model.config, "max_position_embeddings", None) or 135
        return self.example(1, min(131, longest - 4))

    def restore_blocks(self) -> bool:
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
            self.call(self.long_example())

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
            if found is None or other is None or not close(found, other):
                different.append(number)
        for number in different:
            del self.blocks[number].forward, self.like[number]
        self.kept = sorted([*self.kept, *different])
        return bool(different)


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


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same up to rounding."""
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
