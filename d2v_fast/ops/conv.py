"""Channels-last convolutions: cuDNN or Triton on a GPU, matrix products for speech on a CPU.

On a CPU the samples of a batch are concatenated into one long waveform, each starting at a multiple of the stack's stride. A
convolution then takes ceil(kernel / stride) matrix products on views of its input, without a copy; layer norm and GELU are one
pass over memory (`kernels/norm_gelu.cpp`). Frames that mix two samples are computed and discarded.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops import native, once_differentiable, triton_conv


def _pieces(x: Tensor, kernel: int, stride: int, written: bool = False) -> list[tuple[slice, Tensor]]:
    """Frames (L', kernel·C) of contiguous x (L, C) in pieces of at most `stride` taps: a list of (columns, view).

    With one channel there is a single piece, which is a copy unless it will be `written` to.
    """
    length, channels = x.shape
    frames = (length - kernel) // stride + 1
    if channels == 1 and not written:  # copying such short rows is faster than reading them twice
        return [(slice(0, kernel), x.squeeze(1).unfold(0, kernel, stride).contiguous())]
    pieces = []
    for tap in range(0, kernel, stride):
        columns = slice(tap * channels, min(tap + stride, kernel) * channels)
        shape, strides = (frames, columns.stop - columns.start), (stride * channels, 1)
        pieces.append((columns, x.as_strided(shape, strides, x.storage_offset() + columns.start)))
    return pieces


class _Convolution(torch.autograd.Function):
    """x (L, C), weight (C', C, kernel), bias (C') or None → (L', C') in the dtype of x, whatever that of the parameters."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        kernel = weight.shape[2]
        matrix = torch.empty(len(weight), kernel, x.shape[1], dtype=x.dtype).copy_(weight.permute(0, 2, 1)).flatten(1)
        ctx.save_for_backward(x, matrix, weight, bias)
        ctx.stride = stride
        (columns, view), *rest = _pieces(x, kernel, stride)
        y = F.linear(view, matrix[:, columns], None if bias is None else bias.to(x.dtype))
        for columns, view in rest:
            y.addmm_(view, matrix[:, columns].t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, matrix, weight, bias = ctx.saved_tensors
        kernel = weight.shape[2]
        grad = grad.contiguous()
        grad_matrix = torch.empty_like(matrix)
        for columns, view in _pieces(x, kernel, ctx.stride):
            torch.mm(grad.t(), view, out=grad_matrix[:, columns])
        grad_weight = torch.empty_like(weight)
        grad_weight.permute(0, 2, 1).copy_(grad_matrix.view(len(weight), kernel, -1))
        grad_bias = None if bias is None else grad.sum(0, dtype=bias.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            (columns, view), *rest = _pieces(grad_x, kernel, ctx.stride, written=True)
            torch.mm(grad, matrix[:, columns], out=view)
            grad_x[len(grad) * ctx.stride :] = 0
            for columns, view in rest:
                view.addmm_(grad, matrix[:, columns])
        return grad_x, grad_weight, grad_bias, None


class _NormGelu(torch.autograd.Function):
    """GELU of the layer norm of x (L, C) of fp32, bf16 or fp16; weight and bias (C) fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, stats = native.norm_gelu(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, stats = ctx.saved_tensors
        return *native.norm_gelu_backward(x, grad.contiguous(), weight, bias, stats), None


def norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GELU of the layer norm of x (L, C), like x. The kernel needs a CPU and fp32 parameters; torch handles other cases."""
    if x.device.type == "cpu" and x.dtype in native.DTYPES and weight.dtype == bias.dtype == torch.float32:
        return _NormGelu.apply(x, weight, bias, eps)
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))


# Base class of mixins for type checkers; at run time the other base class is the module.
if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class FeatureEncoder(_Module):
    """The forward of a feature encoder of transformers (Data2VecAudio, Wav2Vec2, HuBERT), by matrix products."""

    conv_layers: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self).__bases__[1],), vars(self)  # pickle cannot find a class created at run time

    def forward(self, waveforms: Tensor) -> Tensor:
        """Features (B, C, T) of waveforms (B, S); a ValueError if S is shorter than one frame's receptive field."""
        if waveforms.device.type != "cpu" or not len(waveforms):  # the model has been moved to another device
            return super().forward(waveforms)
        batch, samples = waveforms.shape
        convolutions = [layer.conv for layer in self.conv_layers]
        stride, reach = 1, 1  # of the whole stack: hop and receptive field in samples
        for conv in convolutions:
            reach += (conv.kernel_size[0] - 1) * stride
            stride *= conv.stride[0]
        if samples < reach:
            raise ValueError(
                f"waveforms: found {samples} samples, expected at least {reach}, the receptive field of one frame; pad them"
            )
        kept = (samples - reach) // stride + 1
        read = (kept - 1) * stride + reach  # values beyond this may be arbitrary
        frames = -(-samples // stride)  # per sample, including those that reach into the next
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else convolutions[0].weight.dtype
        x = waveforms.new_zeros(batch * frames * stride + max(0, reach - stride), dtype=dtype)
        x[: batch * frames * stride].view(batch, -1)[:, :read] = waveforms[:, :read]
        x = x.unsqueeze(1)
        for layer in self.conv_layers:
            x = _Convolution.apply(x, layer.conv.weight, layer.conv.bias, layer.conv.stride[0])
            norm = getattr(layer, "layer_norm", None)
            x = F.gelu(x) if norm is None else norm_gelu(x, norm.weight, norm.bias, norm.eps)
        return x.view(batch, frames, -1)[:, :kept].transpose(1, 2)


def use_matrix_products(extractor: Any) -> bool:
    """Switch a feature encoder to matrix products. Returns False, without a change, for other layers or without the library."""
    layers = getattr(extractor, "conv_layers", [])
    if native.obstacle(torch.device("cpu")) or not layers or not all(_fits(layer) for layer in layers):
        return False
    if not isinstance(extractor, FeatureEncoder):
        extractor.__class__ = _fast(extractor.__class__)
    return True


@functools.cache
def _fast(kind: Any) -> type:
    return type(kind.__name__, (FeatureEncoder, kind), {})


def _made(kind: Any) -> nn.Module:
    """An empty module of this kind for pickle to fill, fast if the library is available."""
    fast: Any = kind if native.obstacle(torch.device("cpu")) else _fast(kind)
    return fast.__new__(fast)


class ChannelsLast1d(nn.Conv1d):
    """A convolution that reads and writes (B, T, C) in memory, like the surrounding norms and products.

    `F.conv1d` copies such an input into another order, and cuDNN's kernels copy it back.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        along = ((0, *self.padding), (1, *self.dilation))
        return F.conv2d(x, self.weight.unsqueeze(2), self.bias, (1, *self.stride), *along).squeeze(2)


class _Grouped(_Module):
    """A grouped convolution by `triton_conv` where it can run; cuDNN spends most of its time on layout transforms."""

    weight: Tensor
    bias: Tensor | None
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if triton_conv.obstacle(x.device, dtype):
            return super().forward(x)
        one_axis = x.ndim == 3
        x, weight = (x.unsqueeze(2), self.weight.unsqueeze(2)) if one_axis else (x, self.weight)
        y = triton_conv.conv(x.to(dtype).movedim(1, -1), weight, self.bias, self.groups).movedim(-1, 1)
        return y.squeeze(2) if one_axis else y


class Grouped1d(_Grouped, nn.Conv1d):
    pass


class Grouped2d(_Grouped, nn.Conv2d):
    pass


def use_channels_last(module: nn.Module) -> bool:
    """Switch dense 1-D and grouped convolutions to channels last. Returns False if there are none."""
    changed = 0
    each: Any
    for each in module.modules():
        if type(each) not in (nn.Conv1d, nn.Conv2d) or each.padding_mode != "zeros" or isinstance(each.padding, str):
            continue
        one_axis = isinstance(each, nn.Conv1d)
        same = set(each.stride) == set(each.dilation) == {1} and all(
            kernel % 2 and padding == kernel // 2 for kernel, padding in zip(each.kernel_size, each.padding, strict=True)
        )
        if each.groups > 1 and same:
            each.__class__ = Grouped1d if one_axis else Grouped2d
        elif each.groups == 1 and one_axis:
            each.__class__ = ChannelsLast1d
        else:
            continue
        changed += 1
    return changed > 0


def layers(model: nn.Module) -> list[nn.Module]:
    """The convolution + norm + GELU modules of a speech model of transformers; empty for other models."""
    local = getattr(getattr(model, "feature_extractor", None), "conv_layers", ())
    positional = getattr(getattr(model, "encoder", None), "pos_conv_embed", None)
    return [*local, *([] if positional is None else [positional])]


def _fits(layer: nn.Module) -> bool:
    conv, norm, activation = (getattr(layer, name, None) for name in ("conv", "layer_norm", "activation"))
    return (
        type(conv) is nn.Conv1d
        and (conv.padding, conv.dilation, conv.groups) == ((0,), (1,), 1)
        and conv.kernel_size >= conv.stride
        and (norm is None or (type(norm) is nn.LayerNorm and norm.bias is not None))
        and (type(activation) is nn.GELU or type(activation).__name__ == "GELUActivation")
        and getattr(activation, "approximate", "none") == "none"
    )
