"""What makes the host wait for a GPU, and what does not: examples, and the rule by which the fake GPUs recognise it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
ASSIGNMENTS = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# Calls with x (4, 3) on the GPU and y (4, 3) on the host.
WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "item": lambda x, y: x.sum().item(),
    "float": lambda x, y: float(x.sum()),
    "bool": lambda x, y: bool(x.any()),
    "tolist": lambda x, y: x.tolist(),
    "equal": lambda x, y: torch.equal(x, x + 1),
    "nonzero": lambda x, y: x.nonzero(),
    "where": lambda x, y: torch.where(x > 0),
    "mask": lambda x, y: x[x > 0],
    "masked select": lambda x, y: torch.masked_select(x, x > 0),
    "tensor to a mask": lambda x, y: x.__setitem__(x > 0, x.sum()),
    "repeats": lambda x, y: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device), 0),
    "to the host": lambda x, y: x.cpu(),
    "number to the host": lambda x, y: x.sum().cpu(),
    "from the host": lambda x, y: y.to(x.device),
    "number from the host": lambda x, y: y.sum().to(x.device),
    "copy_": lambda x, y: x.copy_(y),
    "new tensor": lambda x, y: torch.tensor([1.0, 2.0], device=x.device),
    "new number": lambda x, y: torch.tensor(1.0, device=x.device),
    "index from the host": lambda x, y: x[torch.tensor([0, 1])],
    "list": lambda x, y: x[[0, 1]],
}
RUNS_ON: dict[str, Callable[[Tensor, Tensor], object]] = {
    "number of the host": lambda x, y: x * 2 + y.sum(),
    "from the host": lambda x, y: y.to(x.device, non_blocking=True),
    "copy_": lambda x, y: x.copy_(y, non_blocking=True),
    "to the host": lambda x, y: x.sum().to("cpu", non_blocking=True),
    "number to a mask": lambda x, y: x.__setitem__(x > 0, 0.0),
    "masked_fill": lambda x, y: x.masked_fill(x > 0, 0.0),
    "where": lambda x, y: torch.where(x > 0, x, 0.0),
    "slices": lambda x, y: x[0, 1:] + x[None, -1, ..., 1:],
    "repeats": lambda x, y: x.repeat_interleave(2, 0),
    "nonzero_static": lambda x, y: torch.nonzero_static(x > 0, size=3),
    "new": lambda x, y: torch.full((2,), 1.0, device=x.device) + torch.arange(2, device=x.device),
    "assertion": lambda x, y: torch._assert_async((x == x).all(), "x has a NaN"),
}


def why(function: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """Why an operation of torch makes the host wait, "" if it does not."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    # A kernel takes a number of the host as an argument; a copy of one waits all the same.
    devices = {x.device.type for x in tensors if x.ndim or function in COPIES}
    if kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    blocking = not kwargs.get("non_blocking", function is aten.copy_.default and args[2:] == (True,))
    if {"cpu", "cuda"} <= devices and blocking:
        to_host = function in COPIES and torch.device(kwargs.get("device", args[0].device)).type == "cpu"
        return f"{function} waits for the GPU" if to_host else f"{function} copies from the host"
    if all(x.device.type == "cpu" for x in tensors):
        return ""
    if function is aten.index.Tensor or function in ASSIGNMENTS:
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        filled = function in ASSIGNMENTS and args[2].ndim == 0 and args[2].device.type == "cpu"
        reads = masked and not filled
    else:
        reads = bool(READS & set(function.tags)) and kwargs.get("output_size") is None
    return f"{function} waits for the GPU" if reads else ""
