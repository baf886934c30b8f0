"""A pass over a batch, forward and backward, as one CUDA graph.

A step of base size launches some 1,800 kernels. On batches of the published size the host takes longer to launch them than the
GPU to run them. A graph is launched once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Run = Callable[..., tuple[Tensor, ...]]


class Recorded(NamedTuple):
    """What a graph reads and writes; the memory stays its own.

    Attributes:
        replay: Runs it.
        inputs: By name.
        outputs: What the pass returns.
        grads: Of the parameters that have one.
    """

    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    grads: list[tuple[nn.Parameter, Tensor]]


class Graphs:
    """Calls `run(inputs, *settings)`, and replays it instead for inputs whose shapes have come before.

    Args:
        run: Forward and backward of a batch on the GPU; inputs by name, settings that can be hashed. It returns tensors, reads
            nothing on the host, and finds no gradients.
        parameters: That get gradients.
        after: Calls with the same shapes before a graph is recorded; in the first of them kernels are compiled.
        most: Number of graphs, each of which keeps a set of gradients.
    """

    def __init__(self, run: Run, parameters: Sequence[nn.Parameter], after: int = 3, most: int = 4):
        self.run, self.parameters, self.after, self.most = run, list(parameters), after, most
        self.seen: Counter[Any] = Counter()
        self.recorded: dict[Any, Recorded] = {}
        self.pool: Any = None

    def __call__(self, inputs: dict[str, Tensor], *settings: Any) -> tuple[Tensor, ...]:
        """As `run`; the tensors returned are written again by the next call with these shapes."""
        key = (settings, *((name, x.shape, x.dtype) for name, x in inputs.items()))
        if key not in self.recorded:
            if len(self.seen) < 1000:  # lengths that hardly come twice would fill the memory of the host
                self.seen[key] += 1
            if self.seen[key] <= self.after or len(self.recorded) >= self.most:
                return self.run(inputs, *settings)
            try:
                self.recorded[key] = self._record(inputs, settings)
            except RuntimeError as error:
                self.most = 0
                log.warning("no CUDA graphs: a pass could not be recorded: %s", str(error).splitlines()[0])
                for parameter in self.parameters:
                    parameter.grad = None
                return self.run(inputs, *settings)
        found = self.recorded[key]
        for name, x in inputs.items():
            found.inputs[name].copy_(x, non_blocking=True)
        found.replay()
        for parameter, grad in found.grads:
            parameter.grad = grad
        return found.outputs

    def _record(self, inputs: dict[str, Tensor], settings: tuple[Any, ...]) -> Recorded:
        own = {name: x.clone() for name, x in inputs.items()}
        replay, outputs = self.capture(lambda: self.run(own, *settings))
        grads = [(p, p.grad) for p in self.parameters if p.grad is not None]
        return Recorded(replay, own, outputs, grads)

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """What replays `run`, and its outputs, which hold nothing yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins memory for the data loader, may meanwhile do what a recording may not.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = run()
        self.pool = graph.pool()
        return graph.replay, outputs
