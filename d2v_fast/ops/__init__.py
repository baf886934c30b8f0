"""The implementations of the loss, and the choice between them.

| impl    | runs on      | what it is                                                              |
|---------|--------------|-------------------------------------------------------------------------|
| eager   | everywhere   | `reference.py`, plain PyTorch under autograd; the only one with float64 |
| compile | everywhere   | the same through `torch.compile`                                        |
| native  | CPU          | `kernels/loss.cpp` through `native.py`                                  |
| triton  | CUDA         | `triton_loss.py`; on a CPU with TRITON_INTERPRET=1                      |

"auto" selects one of the last two where it can run, otherwise eager, and logs the choice once.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2v_fast.ops import reference
from d2v_fast.ops.reference import LossStats, Moments

logger = logging.getLogger(__name__)

KERNELS = {"native": "d2v_fast.ops.native", "triton": "d2v_fast.ops.triton_loss"}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Everything that a kernel computes in one pass. The gradient is `grad` · `factor`: a kernel may leave scale and count to
# `factor`, because 1/(√C·N) would push an fp16 gradient below its normal range.
torch.library.define(
    "d2v_fast::loss",
    "(Tensor predictions, Tensor[] layers, Tensor mask, Tensor? padding_mask, str norm, str target_norm, float beta, "
    "float scale, bool mean, bool stats, bool target_mean, str impl) -> "
    "(Tensor loss, Tensor grad, Tensor factor, Tensor count, Tensor moments, Tensor target_mean)",
)
torch.library.define("d2v_fast::scaled", "(Tensor x, Tensor factor, Tensor weight, str impl) -> Tensor")


@torch.library.impl("d2v_fast::loss", "CompositeExplicitAutograd")
def _loss(predictions, layers, mask, padding_mask, norm, target_norm, beta, scale, mean, stats, target_mean, impl):
    kernel = importlib.import_module(KERNELS[impl]).loss
    return kernel(predictions, layers, mask, padding_mask, norm, target_norm, beta, scale, mean, stats, target_mean)


@torch.library.register_fake("d2v_fast::loss")
def _loss_fake(predictions, layers, mask, padding_mask, norm, target_norm, beta, scale, mean, stats, target_mean, impl):
    loss, factor, count = (predictions.new_empty((), dtype=torch.float32) for _ in range(3))
    grad = torch.empty_like(predictions, memory_format=torch.contiguous_format)
    batch, _, channels = layers[0].shape
    moments = predictions.new_empty((4, channels if stats else 0), dtype=torch.float32)
    means = predictions.new_empty((batch, channels if target_mean else 0), dtype=torch.float32)
    return loss, grad, factor, count, moments, means


@torch.library.impl("d2v_fast::scaled", "CompositeExplicitAutograd")
def _scaled(x, factor, weight, impl):
    return importlib.import_module(KERNELS[impl]).scaled(x, factor, weight)


@torch.library.register_fake("d2v_fast::scaled")
def _scaled_fake(x, factor, weight, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def once_differentiable(backward: Callable) -> Callable:
    """Make a double backward raise instead of dropping terms, for kernels without a second derivative.

    torch's own decorator does not raise if the incoming gradient has no graph, which is the case for a loss.
    """

    @functools.wraps(backward)
    def once(ctx, *grads):
        with torch.no_grad():
            found = backward(ctx, *grads)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph; unknown while tracing
            words = b'the kernels have no second derivative; use impl="eager" for the loss, and no --fused'
            later = torch._C._functions.DelayedError(words, 1)
            found = tuple(later(x.detach().requires_grad_()) if isinstance(x, Tensor) else x for x in found)
        return found

    return once


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions, layers, mask, *settings):
        loss, grad, factor, count, *rest = torch.ops.d2v_fast.loss(predictions, layers, mask, *settings)
        ctx.save_for_backward(grad, factor)
        ctx.impl = settings[-1]
        ctx.mark_non_differentiable(count, *rest)
        ctx.set_materialize_grads(False)
        return loss, count, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad, factor = ctx.saved_tensors
        # Reading a scalar is free on a CPU; a pass over the gradient is not.
        on_host = not torch.compiler.is_compiling() and factor.device.type == "cpu"
        done = on_host and factor.item() * grad_loss.item() == 1
        return (grad if done else torch.ops.d2v_fast.scaled(grad, factor, grad_loss, ctx.impl), *[None] * 11)


def _fused_loss(
    impl: str,
    predictions: Tensor,
    layers: Sequence[Tensor],
    mask: Tensor,
    *,
    norm: str,
    target_norm: str,
    beta: float,
    scale: float,
    padding_mask: Tensor | None,
    reduction: str,
    stats: bool,
    target_mean: bool,
) -> tuple[Tensor, LossStats | None, Tensor | None]:
    settings = (padding_mask, norm, target_norm, beta, scale, reduction == "mean", stats, target_mean, impl)
    loss, count, moments, means = _FusedLoss.apply(predictions, list(layers), mask, *settings)
    found = LossStats(Moments(count, *moments[:2]), Moments(count, *moments[2:])) if stats else None
    return loss, found, means if target_mean else None


@functools.cache
def _compiled() -> Callable:
    return torch.compile(reference.data2vec_loss, dynamic=True)


@functools.cache
def _log_choice(impl: str, device: str, why: str) -> None:
    logger.info("data2vec loss on %s: %s%s", device, impl, why)


def obstacle(kernel: str, device: str, dtype: torch.dtype, layer_dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the kernel cannot run on tensors of these dtypes and this type of device, or None if it can."""
    unknown = {str(d) for d in (dtype, *layer_dtypes) if d not in KERNEL_DTYPES}
    if unknown:
        return f"found {', '.join(sorted(unknown))}, expected {', '.join(str(d) for d in KERNEL_DTYPES)}"
    if len(set(layer_dtypes)) > 1:
        return "the teacher layers differ in dtype"
    return importlib.import_module(KERNELS[kernel]).obstacle(torch.device(device))


@torch.compiler.assume_constant_result  # device and dtypes are fixed within a graph
def choose(impl: str, device: str, dtype: torch.dtype, layer_dtypes: tuple[torch.dtype, ...]) -> str:
    """Resolve `impl`; "auto" gives the fastest implementation that works on such tensors.

    Raises:
        ValueError: `impl` cannot run on such tensors.
    """
    if impl == "auto":
        kernel = "triton" if device == "cuda" else "native"
        why = obstacle(kernel, device, dtype, layer_dtypes)
        _log_choice("eager" if why else kernel, device, f" ({kernel}: {why})" if why else "")
        return "eager" if why else kernel
    why = obstacle(impl, device, dtype, layer_dtypes) if impl in KERNELS else None
    if why:
        raise ValueError(f"impl={impl!r} cannot run: {why}; impl='auto' falls back to 'eager'")
    return impl


def loss_implementation(impl: str, predictions: Tensor, layers: Sequence[Tensor]) -> Callable:
    """The function that computes the loss of these tensors; see `choose`."""
    layer_dtypes = tuple(layer.dtype for layer in layers)
    chosen = choose(impl, predictions.device.type, predictions.dtype, layer_dtypes)
    if chosen in KERNELS:
        return functools.partial(_fused_loss, chosen)
    return _compiled() if chosen == "compile" else reference.data2vec_loss
