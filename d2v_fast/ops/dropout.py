"""Counter-based dropout for CPUs: `kernels/dropout.cpp`, whose mask is a function of (seed, position).

On a CPU torch draws masks one number after the other. Here the numbers are hashes of positions, computed sixteen at a time. The
backward computes them again, so no mask is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops import native

# The seed is a tensor, so that a compiled graph draws a new seed at every call.
torch.library.define("d2v_fast::dropout", "(Tensor x, float p, Tensor seed) -> Tensor")


@torch.library.impl("d2v_fast::dropout", "CPU")
def _dropout(x, p, seed):
    return native.dropout(x, p, seed.item())


@torch.library.register_fake("d2v_fast::dropout")
def _dropout_fake(x, p, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.save_for_backward(seed)
        ctx.p = p
        return torch.ops.d2v_fast.dropout(x, p, seed)

    @staticmethod
    def backward(ctx, grad):
        return _Dropout.apply(grad, ctx.p, *ctx.saved_tensors), None, None


@torch.compiler.assume_constant_result
def _built() -> bool:
    return not isinstance(native.library(), str)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """`F.dropout`: each value becomes 0 with probability p, else x / (1 - p).

    Args:
        x: Any shape. The kernel takes fp32, bf16 and fp16 on a CPU; torch handles everything else.
        p: Probability of a zero, exact to 2^-33.
        training: If false, x is returned unchanged.

    Returns:
        Like x, and contiguous. The mask depends on the state of torch's CPU generator and on the shape, not on the dtype, the
        number of threads or the processor. Dropped values are zero even where x is infinite or NaN.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or x.layout != torch.strided or x.dtype not in native.DTYPES or not 0 < p < 1 or not _built():
        return F.dropout(x, p)
    seed = torch.randint(2**63 - 1, (), device="cpu")
    return _Dropout.apply(x, p, seed)


class Dropout(nn.Dropout):
    """`nn.Dropout` through `dropout`; torch handles in-place dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.inplace else dropout(x, self.p, self.training)


def replace_dropout(module: nn.Module) -> int:
    """Turn every `nn.Dropout` in the module, but no instance of a subclass, into a `Dropout`; return their number."""
    found = [child for child in module.modules() if type(child) is nn.Dropout]
    for child in found:
        child.__class__ = Dropout  # the same object, so settings, hooks and references stay
    return len(found)
