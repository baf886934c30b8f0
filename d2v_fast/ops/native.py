"""CPU kernels: finds the library built from `kernels/` and calls it through its C interface (`kernels/*.h`)."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Loss(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "views", "length", "channels", "n_layers", "n_rows")),
        ("layers", POINTER(c_void_p)),
        ("strides", POINTER(c_int64)),
        *((name, c_void_p) for name in ("predictions", "grad", "mask", "padding")),
        *((name, c_char_p) for name in ("norm", "target_norm")),
        *((name, c_int32) for name in ("layer_dtype", "prediction_dtype", "dense", "mean", "threads")),
        ("beta", c_float),
        ("scale", c_double),
        *((name, c_void_p) for name in ("loss", "factor", "count", "moments", "target_mean")),
    ]


@functools.cache
def library() -> Any:
    """The library, a `ctypes.CDLL`, or a string with the reason why there is none."""
    path = Path(__file__).with_name("libd2v_fast.so")
    if not path.exists():
        return "the C++ library is not built; `pip install .` builds it where cmake and a C++ compiler are found"
    # torch brings its own OpenMP; a second thread pool would compete with it for the cores.
    for openmp in Path(torch.__file__).parent.glob("lib/libgomp*"):
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the C++ library does not load: {error}"
    if loaded.d2v_abi() != ABI:
        return f"{path} was built from other sources (ABI {loaded.d2v_abi()}, expected {ABI}); `pip install .` again"
    loaded.d2v_isa.restype = c_char_p
    if loaded.d2v_isa() is None:
        return f"D2V_ISA={os.environ.get('D2V_ISA')!r}: expected 'avx512', 'avx2' or 'baseline', and a processor that runs it"
    loaded.d2v_loss.argtypes = [POINTER(_Loss)]
    loaded.d2v_norm_gelu.argtypes = [*[c_void_p] * 5, c_int64, c_int64, c_int32, c_float, c_int32]
    loaded.d2v_norm_gelu_backward.argtypes = [*[c_void_p] * 8, c_int64, c_int64, c_int32, c_int32]
    loaded.d2v_dropout.argtypes = [c_void_p, c_void_p, c_int64, c_int32, c_uint32, c_float, c_uint64, c_int32]
    return loaded


def obstacle(device: torch.device) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if device.type != "cpu":
        return f"it runs on cpu, found {device.type}"
    found = library()
    return found if isinstance(found, str) else None


def loss(
    predictions: Tensor,
    layers: list[Tensor],
    mask: Tensor,
    padding_mask: Tensor | None,
    norm: str,
    target_norm: str,
    beta: float,
    scale: float,
    mean: bool,
    stats: bool,
    target_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), gradient like `predictions`, its factor (), count (), moments (4, C or 0), mean target (B, C or 0).

    All but the gradient are fp32; the mask is (B, T) or (B, M, T).
    """
    predictions, mask = predictions.contiguous(), mask.contiguous()
    padding_mask = None if padding_mask is None else padding_mask.contiguous()
    batch, length, channels = layers[0].shape
    grad = torch.empty_like(predictions)
    total, factor, count = (torch.empty((), dtype=torch.float32) for _ in range(3))
    moments = torch.empty(4, channels if stats else 0, dtype=torch.float32)
    means = torch.empty(batch, channels if target_mean else 0, dtype=torch.float32)
    arguments = _Loss(
        batch=batch,
        views=mask.shape[1] if mask.ndim == 3 else 1,
        length=length,
        channels=channels,
        n_layers=len(layers),
        n_rows=len(predictions),
        layers=(c_void_p * len(layers))(*(layer.data_ptr() for layer in layers)),
        strides=(c_int64 * (3 * len(layers)))(*(stride for layer in layers for stride in layer.stride())),
        predictions=predictions.data_ptr(),
        grad=grad.data_ptr(),
        mask=mask.data_ptr(),
        padding=None if padding_mask is None else padding_mask.data_ptr(),
        layer_dtype=DTYPES[layers[0].dtype],
        prediction_dtype=DTYPES[predictions.dtype],
        dense=predictions.ndim == 3,
        norm=norm.encode(),
        target_norm=target_norm.encode(),
        mean=mean,
        threads=torch.get_num_threads(),
        beta=beta,
        scale=scale,
        loss=total.data_ptr(),
        factor=factor.data_ptr(),
        count=count.data_ptr(),
        moments=moments.data_ptr() if stats else None,
        target_mean=means.data_ptr() if target_mean else None,
    )
    failed = library().d2v_loss(arguments)
    if failed == 1:
        raise MemoryError(f"the loss of {batch} × {length} × {channels} found no memory for its workspace")
    if failed == 2:
        raise ValueError(f"predictions: found {len(predictions)} rows, expected {int(mask.sum())}, the masked positions")
    if failed == 4:
        raise ValueError(f"norm={norm}, target_norm={target_norm}: one of them is unknown to the C++ library")
    return total, grad, factor, count, moments, means


def scaled(x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """x · factor · weight, contiguous and in the dtype of x; factor and weight are () fp32."""
    return x.contiguous() * (factor * weight).item()  # torch multiplies by a Python number in fp32


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Contiguous, like x: value i is zero if the hash of (seed, i) is less than p · 2³², else x / (1 - p); 0 <= p < 1."""
    x = x.contiguous()
    y = torch.empty_like(x)
    threshold = min(round(p * 2**32), 2**32 - 1)
    library().d2v_dropout(
        x.data_ptr(), y.data_ptr(), x.numel(), DTYPES[x.dtype], threshold, 1 / (1 - p), seed % 2**64, torch.get_num_threads()
    )
    return y


def norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """GELU of the layer norm of contiguous x (N, C), like x, and mean and 1/σ of each row, (N, 2) fp32. Parameters are fp32."""
    y, stats = torch.empty_like(x), torch.empty(len(x), 2, dtype=torch.float32)
    parameters = (weight.data_ptr(), bias.data_ptr())
    library().d2v_norm_gelu(
        x.data_ptr(), *parameters, y.data_ptr(), stats.data_ptr(), *x.shape, DTYPES[x.dtype], eps, torch.get_num_threads()
    )
    return y, stats


def norm_gelu_backward(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of y, contiguous like x."""
    gradients = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    tensors = (x, grad, weight, bias, stats, *gradients)
    if library().d2v_norm_gelu_backward(
        *(tensor.data_ptr() for tensor in tensors), *x.shape, DTYPES[x.dtype], torch.get_num_threads()
    ):
        raise MemoryError(f"the backward of layer norm and GELU over {tuple(x.shape)} found no memory for its workspace")
    return gradients
