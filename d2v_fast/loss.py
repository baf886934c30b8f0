"""The data2vec loss as a function and a module, usable without the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, Unpack, get_type_hints, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # with a default; torch needs it too

from d2v_fast.choices import Beta, Implementation, Norm, PositiveFloat, Rule, TargetNorm
from d2v_fast.ops import loss_implementation
from d2v_fast.ops.reference import LossStats

Reduction = Literal["mean", "sum"]
Layout = Literal["BTC", "TBC"]
Result = TypeVar("Result", default=Any)


class LossSettings(TypedDict, total=False):
    """The settings of `data2vec_loss`; see there for their meaning."""

    norm: Norm
    target_norm: TargetNorm
    beta: Beta
    scale: PositiveFloat | None
    reduction: Reduction
    layout: Layout
    impl: Implementation


_RULES = {name: Rule(hint) for name, hint in get_type_hints(LossSettings, include_extras=True).items()}


@overload
def data2vec_loss(
    predictions: Tensor,
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    *,
    padding_mask: Tensor | None = None,
    return_stats: Literal[False] = False,
    return_target_mean: Literal[False] = False,
    **settings: Unpack[LossSettings],
) -> Tensor: ...
@overload
def data2vec_loss(
    predictions: Tensor,
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    *,
    padding_mask: Tensor | None = None,
    return_stats: Literal[True],
    return_target_mean: Literal[False] = False,
    **settings: Unpack[LossSettings],
) -> tuple[Tensor, LossStats]: ...
@overload
def data2vec_loss(
    predictions: Tensor,
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    *,
    padding_mask: Tensor | None = None,
    return_stats: bool = False,
    return_target_mean: bool = False,
    **settings: Unpack[LossSettings],
) -> Any: ...


def data2vec_loss(
    predictions: Tensor,
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    *,
    norm: Norm = "layer",
    target_norm: TargetNorm = "none",
    beta: float = 0.0,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    reduction: Reduction = "mean",
    layout: Layout = "BTC",
    impl: Implementation = "auto",
    return_stats: bool = False,
    return_target_mean: bool = False,
) -> Tensor | tuple[Tensor | LossStats, ...]:
    """Masked regression of the normalised, averaged top-K teacher layers (data2vec section 3.3; method 1.2, 1.4).

    Args:
        predictions: (N, C), one row for each masked position in the order of `mask.flatten()`, or (B, T, C); any float dtype.
        teacher_layers: K tensors (B, T, C), or (T, B, C) with layout="TBC"; any float dtype and strides; no gradient.
        mask: (B, T) bool, True = masked = scored; or (B, M, T), M views of each sample that share its
            targets, with predictions (N, C).
        norm: Normalisation of each layer: "layer" over C, "instance" over T, "batch" over B and T, "group" over T and C.
            No affine, eps 1e-5, biased variance, at least fp32.
        target_norm: Normalisation of the average.
        beta: 0 = squared error without ½; otherwise smooth-L1 that is quadratic below `beta`, 1e-30 to 1e30.
        scale: Factor of the summed error, above 0; None = 1/√C.
        padding_mask: (B, T) bool, True = padding: excluded from the statistics over T and never scored.
        reduction: "mean" over scored positions (C is summed), or "sum".
        layout: Memory layout of the teacher layers.
        impl: "auto", "eager", "compile", "native" (CPU) or "triton" (GPU); see `d2v_fast.ops` for the choice of "auto".
        return_stats: Also return the moments of targets and predictions at the scored positions, a `LossStats`.
        return_target_mean: Also return the mean of the targets over all positions that are not padding, (B, C) in the dtype
            of the loss: the target of the CLS token in data2vec 2.0 (method 4.7).

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 predictions); or a tuple of the loss and what is requested, stats first.
        An empty mask gives 0 and zero gradients; a layer whose variance overflows gives NaN.

    Raises:
        ValueError: A shape, dtype, device or choice does not fit; the message names the argument and what was expected.
    """
    check_settings(norm=norm, target_norm=target_norm, beta=beta, scale=scale, reduction=reduction, layout=layout, impl=impl)
    if isinstance(teacher_layers, Tensor):
        shape = tuple(teacher_layers.shape)
        raise ValueError(f"teacher_layers: found one tensor {shape}, expected a sequence: [x], or x.unbind(0) of a stack")
    if not teacher_layers:
        raise ValueError("teacher_layers: found no tensor, expected at least one")
    layers = [x.transpose(0, 1) if layout == "TBC" else x for x in teacher_layers]
    _check_tensors(predictions, layers, mask, scale, padding_mask)
    loss, stats, means = loss_implementation(impl, predictions, layers)(
        predictions,
        layers,
        mask,
        norm=norm,
        target_norm=target_norm,
        beta=beta,
        scale=predictions.shape[-1] ** -0.5 if scale is None else scale,
        padding_mask=padding_mask,
        reduction=reduction,
        stats=return_stats,
        target_mean=return_target_mean,
    )
    found = (loss, *([stats] if return_stats else []), *([means] if return_target_mean else []))
    return found if len(found) > 1 else loss


def check_settings(**settings: Unpack[LossSettings]) -> None:
    """Raise a ValueError for settings of `data2vec_loss` that are invalid for any tensors."""
    for name, value in settings.items():
        _RULES[name].check(name, value)


def _check_tensors(
    predictions: Tensor, layers: list[Tensor], mask: Tensor, scale: float | None, padding_mask: Tensor | None
) -> None:
    first = layers[0]
    if first.ndim != 3:
        raise ValueError(f"teacher_layers[0]: found shape {tuple(first.shape)}, expected three dimensions")
    batch, length, channels = first.shape
    for k, layer in enumerate(layers):
        if layer.shape != first.shape:
            raise ValueError(
                f"teacher_layers[{k}]: found shape {tuple(layer.shape)}, expected {tuple(first.shape)} like the first"
            )
        if not layer.is_floating_point():
            raise ValueError(f"teacher_layers[{k}]: found dtype {layer.dtype}, expected a float dtype")
    for name, flags in (("mask", mask), ("padding_mask", padding_mask)):
        if flags is None:
            continue
        if flags.dtype != torch.bool:
            raise ValueError(f"{name}: found dtype {flags.dtype}, expected torch.bool")
        several = name == "mask" and flags.ndim == 3
        if (flags.shape[::2] if several else flags.shape) != (batch, length):
            expected = f"(B, M, T) = ({batch}, M, {length})" if several else f"(B, T) = {(batch, length)}"
            raise ValueError(f"{name}: found shape {tuple(flags.shape)}, expected {expected}")
    if not predictions.is_floating_point():
        raise ValueError(f"predictions: found dtype {predictions.dtype}, expected a float dtype")
    if predictions.ndim == 3 and predictions.shape != first.shape:
        raise ValueError(f"predictions: found shape {tuple(predictions.shape)}, expected (B, T, C) = {tuple(first.shape)}")
    if predictions.ndim == 2 and predictions.shape[1] != channels:
        raise ValueError(f"predictions: found {predictions.shape[1]} channels, expected {channels}")
    if predictions.ndim not in ((2, 3) if mask.ndim == 2 else (2,)):
        expected = "(N, C) or (B, T, C)" if mask.ndim == 2 else "(N, C) for a mask (B, M, T)"
        raise ValueError(f"predictions: found shape {tuple(predictions.shape)}, expected {expected}")
    # Counting the mask would break a compiled graph and sync with a GPU; in these cases the caller must get N right.
    countable = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if predictions.ndim == 2 and countable and len(predictions) != int(mask.sum()):
        raise ValueError(f"predictions: found {len(predictions)} rows, expected {int(mask.sum())}, the masked positions")
    for name, tensor in (("mask", mask), ("teacher_layers[0]", first), ("padding_mask", padding_mask)):
        if tensor is not None and tensor.device != predictions.device:
            raise ValueError(f"{name}: found on {tensor.device}, expected {predictions.device} like the predictions")
    if scale is None and channels == 0:
        raise ValueError("scale: found None for 0 channels, expected a number, because 1/√C is undefined")


class Data2VecLoss(nn.Module, Generic[Result]):
    """`data2vec_loss` as a module that holds the settings, checked at construction; see there for arguments and errors."""

    @overload
    def __init__(
        self: Data2VecLoss[Tensor],
        *,
        return_stats: Literal[False] = False,
        return_target_mean: Literal[False] = False,
        **settings: Unpack[LossSettings],
    ) -> None: ...
    @overload
    def __init__(
        self: Data2VecLoss[tuple[Tensor, LossStats]],
        *,
        return_stats: Literal[True],
        return_target_mean: Literal[False] = False,
        **settings: Unpack[LossSettings],
    ) -> None: ...
    @overload
    def __init__(
        self: Data2VecLoss[Any],
        norm: Norm = ...,
        target_norm: TargetNorm = ...,
        beta: float = ...,
        scale: float | None = ...,
        reduction: Reduction = ...,
        layout: Layout = ...,
        impl: Implementation = ...,
        return_stats: bool = ...,
        return_target_mean: bool = ...,
    ) -> None: ...

    def __init__(
        self,
        norm: Norm = "layer",
        target_norm: TargetNorm = "none",
        beta: float = 0.0,
        scale: float | None = None,
        reduction: Reduction = "mean",
        layout: Layout = "BTC",
        impl: Implementation = "auto",
        return_stats: bool = False,
        return_target_mean: bool = False,
    ):
        super().__init__()
        settings = LossSettings(
            norm=norm, target_norm=target_norm, beta=beta, scale=scale, reduction=reduction, layout=layout, impl=impl
        )
        check_settings(**settings)
        self.settings: dict[str, Any] = dict(**settings, return_stats=return_stats, return_target_mean=return_target_mean)

    def forward(
        self,
        predictions: Tensor,
        teacher_layers: Sequence[Tensor],
        mask: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Result:
        return data2vec_loss(predictions, teacher_layers, mask, padding_mask=padding_mask, **self.settings)

    if TYPE_CHECKING:
        __call__ = forward  # that of nn.Module takes and returns anything

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
