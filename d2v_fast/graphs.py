"""Forward and backward of a batch as one CUDA graph.

A step at base size launches about 1,800 kernels. At the published batch sizes the host takes longer to launch them than the GPU
takes to run them. A graph is a single launch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Run = Callable[..., tuple[Tensor, ...]]


class Recorded(NamedTuple):
    """A recorded graph and the memory that it reads and writes.

    Attributes:
        replay: Runs the graph.
        inputs: Input tensors by name.
        outputs: Output tensors of the pass.
        grads: (parameter, gradient) of each parameter that has a gradient.
    """

    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    grads: list[tuple[nn.Parameter, Tensor]]


class Graphs:
    """Calls `run(inputs, *settings)`, or replays its graph for inputs of repeated shapes.

    Args:
        run: Forward and backward of a batch on the GPU; inputs by name, hashable settings. It returns tensors, never
            synchronises with the host, and starts with gradients set to None.
        parameters: The parameters that get gradients.
        after: Calls with the same shapes before a graph is recorded; kernels are compiled in the first of them.
        most: Maximum number of graphs; each keeps a set of gradients.
    """

    def __init__(self, run: Run, parameters: Sequence[nn.Parameter], after: int = 3, most: int = 4):
        self.run, self.parameters, self.after, self.most = run, list(parameters), after, most
        self.seen: Counter[Any] = Counter()
        self.recorded: dict[Any, Recorded] = {}
        self.pool: Any = None

    def __call__(self, inputs: dict[str, Tensor], *settings: Any) -> tuple[Tensor, ...]:
        """As `run`; the next call with these shapes overwrites the returned tensors."""
        key = (settings, *((name, x.shape, x.dtype) for name, x in inputs.items()))
        found = self.recorded.get(key) or self._record(key, inputs, settings)
        if found is None:
            return self.run(inputs, *settings)
        for name, x in inputs.items():
            found.inputs[name].copy_(x, non_blocking=True)
        found.replay()
        for parameter, grad in found.grads:
            parameter.grad = grad
        return found.outputs

    def _record(self, key: Any, inputs: dict[str, Tensor], settings: tuple[Any, ...]) -> Recorded | None:
        """The pass, recorded now; None if it has to run eagerly."""
        if len(self.seen) < 1000:  # otherwise lengths that hardly repeat would fill host memory
            self.seen[key] += 1
        if self.seen[key] <= self.after or len(self.recorded) >= self.most:
            return None
        own = {name: x.clone() for name, x in inputs.items()}
        try:
            replay, outputs = self.capture(lambda: self.run(own, *settings))
        except RuntimeError as error:
            self.most = 0
            log.warning("no CUDA graphs: a pass could not be recorded: %s", str(error).splitlines()[0])
            for parameter in self.parameters:
                parameter.grad = None
            return None
        grads = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self.recorded[key] = found = Recorded(replay, own, outputs, grads)
        return found

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """A callable that replays `run`, and its outputs, which are not filled yet."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        random = generator.get_state()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # Other threads, such as the data loader's pin-memory thread, may make calls that a global capture forbids.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = run()
        except RuntimeError:
            # After a failed capture torch stays on its stream, and its generator and allocator in capture: no random number
            # could be drawn, and memory that two streams used, such as a batch, would never be free again.
            torch.cuda.set_stream(stream)
            fresh = torch.Generator(generator.device)
            fresh.set_state(random)
            generator.graphsafe_set_state(fresh)
            self.recorded.clear()  # the graphs before it draw from the generator in capture
            with suppress(RuntimeError):  # the capture itself ended without an error
                torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)
                torch._C._cuda_releasePool(stream.device_index, self.pool)
            raise
        return graph.replay, outputs
