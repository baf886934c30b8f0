"""Sharding over ranks: torch's `fully_shard` (FSDP2) on student and teacher, block by block.

Each rank keeps a shard of every parameter, its gradient, its moments and the teacher's copy. A block is gathered while it runs;
modules outside the blocks are gathered for the whole step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from d2v_fast.model import Data2Vec


def shard(model: Data2Vec, device: torch.device, world: int, hybrid: bool = False) -> None:
    """Shard the parameters of a model over all ranks; create its optimizer afterwards.

    Args:
        model: On `device`.
        device: Where it runs.
        world: Number of ranks.
        hybrid: Shard within each machine and replicate across machines.

    Raises:
        ValueError: torch cannot shard a parameter; scalars are an example.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if hybrid else world
    shape, names = ((world // local, local), ("machines", "ranks")) if hybrid else ((world,), ("ranks",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)

    def along(parameter: nn.Parameter) -> Shard | None:
        # The default is the first axis, which would give a token (1, 1, C) to a single rank.
        even = [axis for axis, size in enumerate(parameter.shape) if size % local == 0]
        return Shard(max(even, key=lambda axis: parameter.shape[axis])) if even and len(parameter) < local else None

    for encoder in (model.student, model.teacher.module):
        run = encoder.halves
        block: Any
        for block in dict.fromkeys(encoder.blocks):
            fully_shard(block, mesh=mesh, shard_placement_fn=along)
            if run is not None:  # a second forward, before which FSDP gathers the block too
                block.by_halves = MethodType(run, block)
                register_fsdp_forward_method(block, "by_halves")
        if run is not None:
            encoder.halves = _by_halves
    fully_shard(model, mesh=mesh, shard_placement_fn=along)


def _by_halves(block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return block.by_halves(*args, **kwargs)


@contextmanager
def gathered(module: nn.Module, keep: bool) -> Iterator[None]:
    """With `keep`, the module's parameters gathered on the CPU. A collective: every rank must call it.

    `unshard` does not work here: a `state_dict` would undo it.
    """
    spread = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if hasattr(parameter, "full_tensor")
    ]
    found: dict[Tensor, nn.Parameter] = {}
    for parameter in dict.fromkeys(parameter for *_, parameter in spread):  # one at a time, because a GPU may not hold them all
        full = whole(parameter.detach())
        if keep:
            found[parameter] = nn.Parameter(full.cpu(), parameter.requires_grad)
    try:
        for owner, name, parameter in spread:
            setattr(owner, name, found.get(parameter, parameter))
        yield
    finally:
        for owner, name, parameter in spread:
            setattr(owner, name, parameter)


def whole(tensor: Any) -> Tensor:
    """A possibly sharded tensor, gathered. A collective: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor: Any) -> Tensor:
    """This rank's shard of a possibly sharded tensor, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def spread_as(tensor: Tensor, like: Any) -> Tensor:
    """A full tensor, equal on all ranks, sharded like `like` without communication."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
