"""A model spread over ranks: torch's `fully_shard` (FSDP2) of student and teacher, block by block.

Each rank keeps a share of every parameter, of its gradient, of its moments and of the teacher's copy. A block is gathered while
it runs; what lies around the blocks, while a step runs.
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
    """Spread the parameters of a model over all ranks; make its optimizer afterwards.

    Args:
        model: On `device`.
        device: Where it runs.
        world: Number of ranks.
        hybrid: Spread it over the ranks of each machine, and keep a copy on each machine.

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
        # By default the first axis, which of a token (1, 1, C) only one rank would get.
        even = [axis for axis, size in enumerate(parameter.shape) if size % local == 0]
        return Shard(max(even, key=lambda axis: parameter.shape[axis])) if even and len(parameter) < local else None

    for encoder in (model.student, model.teacher.module):
        run = encoder.halves
        block: Any
        for block in dict.fromkeys(encoder.blocks):
            fully_shard(block, mesh=mesh, shard_placement_fn=along)
            if run is not None:  # to torch another forward, before which the block is gathered too
                block.by_halves = MethodType(run, block)
                register_fsdp_forward_method(block, "by_halves")
        if run is not None:
            encoder.halves = _by_halves
    fully_shard(model, mesh=mesh, shard_placement_fn=along)


def _by_halves(block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return block.by_halves(*args, **kwargs)


@contextmanager
def gathered(module: nn.Module, keep: bool) -> Iterator[None]:
    """The parameters of the module whole and on the CPU, where `keep` says so; all ranks come here together.

    Not by `unshard`: a `state_dict` would undo it.
    """
    spread = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if hasattr(parameter, "full_tensor")
    ]
    found: dict[Tensor, nn.Parameter] = {}
    for parameter in dict.fromkeys(parameter for *_, parameter in spread):  # one after the other, as a GPU has no room for all
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
    """A tensor that may be spread over ranks, gathered; all ranks come here together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor: Any) -> Tensor:
    """This rank's share of a tensor that may be spread over ranks; the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def spread_as(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor spread over ranks as `like` is; all ranks have the same, and nothing is sent."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
