"""The correctness gate of the fused loss: cases, results of an implementation, and the allowed error."""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from d2v_fast import data2vec_loss
from d2v_fast.choices import Norm

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NORMS = get_args(Norm)
ZERO = 1e-12  # smallest norm to divide by: layers of 1e-30 give targets whose moments are rounding noise


class Case(NamedTuple):
    norm: str = "layer"
    target_norm: str = "none"
    beta: float = 0.0
    dense: bool = False
    layout: str = "BTC"  # or TBC, or strided (channel stride 2)
    dtype: torch.dtype = FP32
    dtype_z: torch.dtype = FP32
    k: int = 3
    channels: int = 64
    length: int = 13
    padded: bool = False
    masked: float = 0.5
    location: float = 0.0  # |mean| / σ of the layers
    location_z: float = 0.0  # the same for the predictions
    batch: int = 2
    reduction: str = "mean"
    magnitude: float = 1.0  # factor of the layers
    magnitude_z: float = 1.0  # the same for the predictions
    views: int = 0  # M of a mask (B, M, T); 0 = (B, T)
    expanded: bool = False  # the same mask for all views, stored once

    def __str__(self):
        short = [str(value).removeprefix("torch.") for value in self]
        return "-".join(short).replace("bfloat", "bf").replace("float", "fp").replace("True", "1").replace("False", "0")


def inputs(case: Case, device="cpu") -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
    """Predictions, layers (B, T, C) in the memory layout of the case, mask, padding; padded positions hold NaN.

    With several views, the first position is masked in none and the second in all.
    """
    random = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    shape = case.batch, case.length, case.channels
    mask = torch.rand(shape[:2], **random) < case.masked
    padding = None
    if case.padded:
        time, sample = torch.arange(case.length, device=device), torch.arange(case.batch, device=device)
        padding = time.expand(shape[:2]) >= case.length - 3 * sample[:, None]
    shape_z = shape
    if case.views:
        mask = torch.rand(case.batch, 1 if case.expanded else case.views, case.length, **random) < case.masked
        mask[..., :1], mask[..., 1:2] = False, True
        mask = mask.expand(-1, case.views, -1)
        shape_z = *mask.shape, case.channels
    z = ((torch.randn(shape_z, **random) + case.location_z) * case.magnitude_z).to(case.dtype_z)
    layers = [torch.randn(shape, **random) * 2 + 0.5 + 2 * case.location for _ in range(case.k)]
    layers = [(x * case.magnitude).to(case.dtype) for x in layers]
    for x in layers if case.padded else ():
        x[padding] = float("nan")
    if case.padded:
        z[padding.unsqueeze(1).expand_as(mask) if case.views else padding] = float("nan")
    if case.layout == "TBC":
        layers = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in layers]
    if case.layout == "strided":
        layers = [torch.stack([x, x + 1], -1)[..., 0] for x in layers]
    return z if case.dense else z[mask], layers, mask, padding


def outcome(case: Case, impl: str, device="cpu", exact=False) -> dict[str, Tensor]:
    """Loss and gradient with and without moments, the moments, and the mean target, from `impl`; in float64 if `exact`."""
    z, layers, mask, padding = inputs(case, device)
    if exact:
        z, layers = z.double(), [x.double() for x in layers]
    z.requires_grad_()
    settings = dict(norm=case.norm, target_norm=case.target_norm, beta=case.beta, padding_mask=padding)
    settings |= dict(reduction=case.reduction, impl=impl)
    if case.layout == "TBC":
        settings["layout"], layers = "TBC", [x.transpose(0, 1) for x in layers]
    plain = data2vec_loss(z, layers, mask, **settings)
    (plain_gradient,) = torch.autograd.grad(plain, z)
    loss, stats = data2vec_loss(z, layers, mask, return_stats=True, **settings)
    (1.5 * loss).backward()
    loss_with_mean, means = data2vec_loss(z, layers, mask, return_target_mean=True, **settings)
    scored = mask if padding is None else mask & ~(padding.unsqueeze(1) if case.views else padding)
    moments = {}
    for name, part in stats._asdict().items():
        std = (part.m2 / part.count.clamp(min=1)).sqrt()
        moments |= {name: torch.cat([part.mean, std]), f"{name} m2": part.m2}  # error relative to the std
    return dict(
        loss=loss.detach(),
        gradient=z.grad,
        plain_loss=plain.detach(),
        plain_gradient=plain_gradient,
        unscored=z.grad[~scored] if case.dense else z.grad[~scored[mask]],
        count=stats.target.count,
        loss_with_mean=loss_with_mean.detach(),
        target_mean=torch.cat([means, torch.ones_like(means)]),  # the mean is 0 under norms over T
        **moments,
    )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp(min=ZERO))


def faults(found: dict, eager: dict, exact: dict, tolerance: float = 2e-6, rounding: float = 0.0) -> list[str]:
    """Failed checks: error above 2 × that of eager PyTorch + `tolerance`, cosine, shape or dtype. Empty = gate passed.

    Args:
        rounding: Extra tolerance for gradients.
    """
    wrong = []
    for name, truth in exact.items():
        value = found[name]
        if value.shape != eager[name].shape or value.dtype != eager[name].dtype:
            wrong.append(f"{name}: {value.shape} {value.dtype}, eager has {eager[name].shape} {eager[name].dtype}")
            continue
        error, limit = relative(value, truth), 2 * relative(eager[name], truth) + tolerance
        limit += rounding if "gradient" in name else 0
        a, b = value.double().flatten(), truth.flatten()
        cosine = float(a @ b / (a.norm() * b.norm())) if b.norm() > ZERO else 1.0
        if not error <= limit or not cosine > 0.9999:  # "not" also catches NaN
            wrong.append(f"{name}: error {error:.1e}, allowed {limit:.1e}, cosine {cosine:.6f}")
    if found["unscored"].any():
        wrong.append("the gradient is not 0 where nothing is scored")
    return wrong


def gate(case: Case, impl: str, device="cpu", rounding: float | None = None) -> list[str]:
    """Failed checks of `impl` for one case.

    Where squares overflow fp32, the loss must be right or not finite, and a finite gradient must be right.

    Args:
        rounding: Extra tolerance for gradients; None = half a unit in the last place, because the kernels round once before
            the factor of the backward pass and once after it.
    """
    # fp32 sums lose a digit over many rows or for values 300 σ away from 0.
    tolerance = 2e-5 if case.location or case.location_z or case.length * max(case.views, 1) > 1000 else 2e-6
    if rounding is None:
        rounding = {BF16: 2**-8, FP16: 2**-11}.get(case.dtype_z, 0.0)
    exact = outcome(case, "eager", device, exact=True)
    found = outcome(case, impl, device)
    if max(case.magnitude, case.magnitude_z) > 1e17 and not found["loss"].isfinite():
        exact = {name: exact[name] for name in ("gradient", "plain_gradient") if found[name].isfinite().all()}
    return faults(found, outcome(case, "eager", device), exact, tolerance, rounding)
