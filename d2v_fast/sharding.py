"""Sharding over ranks: torch's `fully_shard` (FSDP2) on student and teacher, block by block.

Each rank keeps a shard of every parameter, its gradient, its moments and the teacher's copy. A block is gathered while it runs;
modules outside the blocks are gathered for the whole step.

In a checkpoint each rank writes its shards to separate safetensors files, in the format of torch.distributed.checkpoint's
HuggingFaceStorageWriter(save_distributed=True), which its HuggingFaceStorageReader reads. The writer itself is not used: it
serializes a file in memory before it writes it, so a rank would hold its shards twice; it plans in collectives, which must not
run in a thread while training continues; and its files have no checksums.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

if TYPE_CHECKING:
    from d2v_fast.model import Data2Vec

OFFSETS = "DCP_SHARDING_INFO"  # torch's key in the metadata of a file

Piece = tuple[list[int], list[int], Any]  # offsets in the full tensor, shape, open file


def shard(model: Data2Vec, device: torch.device, world: int, hybrid: bool = False) -> None:
    """Shard the parameters of a model over all ranks; create the optimizer afterwards.

    Args:
        model: The model, on `device`.
        device: Device where the model runs.
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
        # By default the first axis is sharded, which would put a token (1, 1, C) on a single rank.
        even = [axis for axis, size in enumerate(parameter.shape) if size % local == 0]
        return Shard(max(even, key=lambda axis: parameter.shape[axis])) if even and len(parameter) < local else None

    for encoder in (model.student, model.teacher.module):
        run = encoder.halves
        block: Any
        for block in dict.fromkeys(encoder.blocks):
            fully_shard(block, mesh=mesh, shard_placement_fn=along)
            if run is not None:  # another forward before which FSDP must gather the block
                block.by_halves = MethodType(run, block)
                register_fsdp_forward_method(block, "by_halves")
        if run is not None:
            encoder.halves = _by_halves
    fully_shard(model, mesh=mesh, shard_placement_fn=along)


def _by_halves(block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return block.by_halves(*args, **kwargs)


@contextmanager
def gathered(module: nn.Module, keep: bool) -> Iterator[None]:
    """Gather the module's parameters, on the CPU where `keep` is set. A collective: every rank must call it.

    `unshard` does not work here, because a `state_dict` would undo it.
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
    """Shard a full tensor that is equal on all ranks like `like`, without communication."""
    if hasattr(tensor, "placements") or not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parts(tensors: dict[str, Any], rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The share of possibly sharded tensors that a rank writes, so that all ranks together write each element once.

    Returns:
        The rank's shards, and on rank 0 the tensors that are not sharded, without copies; and the metadata of a safetensors
        file for them: their offsets in the full tensors, as HuggingFaceStorageWriter(save_distributed=True) writes them.
    """
    found: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        sharded = hasattr(tensor, "placements")
        if _in_first_replica(tensor) if sharded else rank == 0:
            found[name] = own(tensor)
            offsets[name] = {"saved_offsets": _bounds(tensor)[1] if sharded else [0] * tensor.ndim}
    return found, {OFFSETS: json.dumps(offsets)}


def read(files: Iterable[Path], like: Callable[[str], Any]) -> dict[str, Tensor]:
    """The tensors in safetensors files, joined from their shards.

    Args:
        files: All files of the tensors; those without offsets hold full tensors.
        like: Maps a name to a tensor with the wanted sharding. If its shape matches, only this rank's shard is read; otherwise
            the whole tensor is read, on the CPU.

    Raises:
        ValueError: A shard is missing or duplicated.
        SafetensorError: A file is damaged.
    """
    pieces: dict[str, list[Piece]] = {}
    with ExitStack() as stack:
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "null"))
            for name in file.keys():
                shape = file.get_slice(name).get_shape()
                begin = [0] * len(shape) if offsets is None else offsets[name]["saved_offsets"]
                pieces.setdefault(name, []).append((begin, shape, file))
        return {name: _joined(name, found, like(name)) for name, found in pieces.items()}


def _joined(name: str, pieces: list[Piece], like: Any) -> Tensor:
    """A full tensor, or this rank's shard of it if `like` is sharded, from its pieces."""
    shape = [max(ends) for ends in zip(*(map(operator.add, begin, size) for begin, size, _ in pieces), strict=True)]
    if sum(math.prod(size) for _, size, _ in pieces) != math.prod(shape):
        raise ValueError(f"the shards of {name} do not make up the whole tensor")
    sharded = hasattr(like, "placements") and list(like.shape) == shape
    if len(pieces) == 1 and not sharded:
        return pieces[0][2].get_tensor(name)
    wanted, first = _bounds(like) if sharded else (shape, [0] * len(shape))
    joined: Tensor | None = None
    for begin, size, file in pieces:
        low = list(map(max, begin, first))
        high = [min(a + m, b + n) for a, m, b, n in zip(begin, size, first, wanted, strict=True)]
        if all(map(operator.lt, low, high)):
            value = file.get_slice(name)[_slices(low, high, begin)]
            joined = torch.empty(wanted, dtype=value.dtype) if joined is None else joined
            joined[_slices(low, high, first)] = value
    if joined is None:  # more ranks than rows
        joined = torch.empty(wanted, dtype=like.dtype)
    if not sharded:
        return joined
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    return DTensor.from_local(joined.to(like.device), mesh, like.placements, shape=like.shape, stride=like.stride())


def _slices(low: list[int], high: list[int], begin: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for a, b, c in zip(low, high, begin, strict=True))


def _bounds(tensor: Any) -> tuple[list[int], list[int]]:
    """Shape of this rank's shard, and its offsets in the full tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return list(shape), list(begin)


def _in_first_replica(tensor: Any) -> bool:
    return all(
        tensor.device_mesh.get_local_rank(axis) == 0 for axis, each in enumerate(tensor.placements) if each.is_replicate()
    )
