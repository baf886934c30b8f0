"""GPU kernels for channels-last grouped convolutions, as in the decoders and the audio positions: stride 1, one output per
position. Each group is a matrix product.

A row of the left matrix is a position; its columns are the inputs of all taps, K = taps · input channels of the group. It is
never stored: `_patches` loads its tiles from x. Groups of 24 or 48 channels waste nothing, because a tile may start and end
inside a tap; only the output channels are padded to a power of two.

| gradient of | is                                                                                                  |
|-------------|-----------------------------------------------------------------------------------------------------|
| the input   | the same convolution with the kernel flipped                                                        |
| the weight  | the left matrix, transposed, times the gradient; parts of the positions are summed in a fixed order |
| the bias    | a sum, left to torch so that a compiler can fuse it                                                 |

Shapes: x (N, H, W, C), speech and text with H = 1; M = N · H · W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2v_fast.ops import once_differentiable, triton_loss
from d2v_fast.ops.triton_loss import _jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.bfloat16, torch.float16)
PROGRAMS = 768  # for the weight gradient: two waves on an H100; fixed, so that every GPU sums in the same order
_INTERPRETED = triton and tl.constexpr(triton_loss.INTERPRETED)


@_jit
def _patches(x_ptr, start, end, i, k, height, width, C: tl.constexpr, C_IN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
             TURNED: tl.constexpr):  # fmt: skip
    """Inputs of columns k (1, K) at positions start + i, i (M, 1); zero outside the sample and at `end` and later."""
    position = start + i
    tap = k // C_IN
    down = tap // KW - KH // 2
    right = tap % KW - KW // 2
    if TURNED:
        down = -down
        right = -right
    # Unsigned division takes fewer instructions, and negative positions wrap to beyond the end.
    line = tl.cast(position, tl.uint32) // tl.cast(width, tl.uint32)
    column = position - tl.cast(line, tl.int32) * width + right
    inside = tl.cast(column, tl.uint32) < tl.cast(width, tl.uint32)
    if KH > 1:
        row = tl.cast(line % tl.cast(height, tl.uint32), tl.int32) + down
        inside = inside & (tl.cast(row, tl.uint32) < tl.cast(height, tl.uint32))
    offset = i * C + ((down * width + right) * C + k % C_IN)  # from `start`: offsets into all of x may exceed 32 bits
    x_ptr += tl.cast(start, tl.int64) * C
    return tl.load(x_ptr + offset, mask=inside & (position < end) & (k < KH * KW * C_IN), other=0)


@_jit
def _dot(a, b, total):
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@_jit(do_not_specialize=["n_positions", "height", "width"])
def _conv_kernel(
    x_ptr,  # (M, G · C_IN)
    weight_ptr,  # (G, K, C_OUT) like x
    bias_ptr,  # (G · C_OUT), read if BIAS
    y_ptr,  # (M, G · C_OUT) like x
    n_positions, height, width,
    G: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, TURNED: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = KH * KW * C_IN
    PARTS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    # Neighbouring programs share positions: a full row spans all groups.
    part = tl.program_id(0) % (G * PARTS)
    group = part // PARTS
    start = tl.program_id(0) // (G * PARTS) * BLOCK_M
    i = tl.arange(0, BLOCK_M)[:, None]
    n = part % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    x_ptr += group * C_IN
    weight_ptr += group * K * C_OUT
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        seen = _patches(x_ptr, start, n_positions, i, k[None, :], height, width, G * C_IN, C_IN, KH, KW, TURNED)
        weight = tl.load(weight_ptr + k[:, None] * C_OUT + n, mask=(k[:, None] < K) & (n < C_OUT), other=0)
        total = _dot(seen, weight, total)
    if BIAS:
        total += tl.load(bias_ptr + group * C_OUT + n, mask=n < C_OUT, other=0).to(tl.float32)
    y_ptr += tl.cast(start, tl.int64) * (G * C_OUT) + group * C_OUT
    tl.store(y_ptr + i * (G * C_OUT) + n, total.to(y_ptr.dtype.element_ty), mask=(start + i < n_positions) & (n < C_OUT))


@_jit(do_not_specialize=["n_positions", "n_each", "height", "width"])
def _weight_grad_kernel(
    x_ptr,  # (M, G · C_IN)
    grad_ptr,  # (M, G · C_OUT) like x
    sums_ptr,  # (S, G, K, C_OUT) fp32
    n_positions, n_each, height, width,
    G: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = KH * KW * C_IN
    PARTS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    part = tl.program_id(0) % (G * PARTS)
    group = part // PARTS
    block = tl.program_id(0) // (G * PARTS) % BLOCKS
    split = tl.program_id(0) // (G * PARTS * BLOCKS)
    end = tl.minimum((split + 1) * n_each, n_positions)
    i = tl.arange(0, BLOCK_M)[:, None]
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    n = part % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    x_ptr += group * C_IN
    grad_ptr += group * C_OUT
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in tl.range(split * n_each, end, BLOCK_M, num_stages=STAGES):
        seen = _patches(x_ptr, start, end, i, k[None, :], height, width, G * C_IN, C_IN, KH, KW, False)
        grad = grad_ptr + tl.cast(start, tl.int64) * (G * C_OUT) + (i * (G * C_OUT) + n)
        total = _dot(tl.trans(seen), tl.load(grad, mask=(start + i < end) & (n < C_OUT), other=0), total)
    sums_ptr += (tl.cast(split, tl.int64) * G + group) * (K * C_OUT)
    tl.store(sums_ptr + k[:, None] * C_OUT + n, total, mask=(k[:, None] < K) & (n < C_OUT))


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `conv` cannot run on inputs of this dtype on `device`, or None if it can."""
    if dtype not in DTYPES:
        return f"found {dtype}, expected {' or '.join(map(str, DTYPES))}"
    return triton_loss.obstacle(device)


def _block(size: int, largest: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), largest)


def conv_tile(columns: int, channels: int) -> dict:
    """Launch table of `_conv_kernel`: its stages take 72 or 96 KB of shared memory, which consumer GPUs have."""
    return dict(BLOCK_M=128, BLOCK_N=_block(channels, 128), BLOCK_K=_block(columns, 64), STAGES=3, num_warps=8)


def weight_grad_tile(columns: int, channels: int) -> dict:
    """Launch table of `_weight_grad_kernel`: the same tiles transposed."""
    return dict(BLOCK_M=64, BLOCK_N=_block(channels, 128), BLOCK_K=_block(columns, 128), STAGES=3, num_warps=8)


def _matrices(weight: Tensor, groups: int, dtype: torch.dtype, turned: bool) -> Tensor:
    """Weight (C_out, C_in / G, kh, kw) as one matrix (K, columns) per group. If `turned`, the rows are output channels."""
    grouped = weight.unflatten(0, (groups, -1)).permute(0, 3, 4, *((1, 2) if turned else (2, 1)))
    return torch.empty(grouped.shape, dtype=dtype, device=weight.device).copy_(grouped)


torch.library.define("d2v_fast::conv", "(Tensor x, Tensor weight, Tensor? bias, int groups, bool turned) -> Tensor")
torch.library.define("d2v_fast::conv_weight_grad", "(Tensor x, Tensor grad, SymInt[] kernel, int groups) -> Tensor")


@torch.library.impl("d2v_fast::conv", "CompositeExplicitAutograd")
def _conv(x, weight, bias, groups, turned):
    """y of contiguous x; if `turned`, the gradient of x from that of y."""
    matrices = _matrices(weight, groups, x.dtype, turned)
    _, kh, kw, c_in, c_out = matrices.shape
    y = x.new_empty((*x.shape[:3], groups * c_out))
    tile = conv_tile(kh * kw * c_in, c_out)
    positions = x.shape[:3].numel()
    programs = triton.cdiv(positions, tile["BLOCK_M"]) * groups * triton.cdiv(c_out, tile["BLOCK_N"])
    if programs:
        with torch.cuda.device_of(x):
            _conv_kernel[(programs,)](
                x,
                matrices,
                matrices if bias is None else bias,
                y,
                positions,
                x.shape[1],
                x.shape[2],
                G=groups,
                C_IN=c_in,
                C_OUT=c_out,
                KH=kh,
                KW=kw,
                TURNED=turned,
                BIAS=bias is not None,
                **tile,
            )
    return y


@torch.library.register_fake("d2v_fast::conv")
def _conv_fake(x, weight, bias, groups, turned):
    return x.new_empty((*x.shape[:3], weight.shape[1] * groups if turned else weight.shape[0]))


@torch.library.impl("d2v_fast::conv_weight_grad", "CompositeExplicitAutograd")
def _conv_weight_grad(x, grad, kernel, groups):
    """The gradient (C_out, C_in / G, kh, kw) of the weight in fp32, from contiguous x and gradient of y."""
    (kh, kw), c_in, c_out = kernel, x.shape[3] // groups, grad.shape[3] // groups
    columns = kh * kw * c_in
    tile = weight_grad_tile(columns, c_out)
    programs = groups * triton.cdiv(c_out, tile["BLOCK_N"]) * triton.cdiv(columns, tile["BLOCK_K"])
    positions = x.shape[:3].numel()
    blocks = triton.cdiv(positions, tile["BLOCK_M"])
    each = triton.cdiv(blocks, max(PROGRAMS // programs, 1))
    splits = triton.cdiv(blocks, max(each, 1))
    sums = x.new_empty((splits, groups, kh, kw, c_in, c_out), dtype=torch.float32)
    if splits:
        with torch.cuda.device_of(x):
            _weight_grad_kernel[(programs * splits,)](
                x,
                grad,
                sums,
                positions,
                each * tile["BLOCK_M"],
                x.shape[1],
                x.shape[2],
                G=groups,
                C_IN=c_in,
                C_OUT=c_out,
                KH=kh,
                KW=kw,
                **tile,
            )
    return sums.sum(0).permute(0, 4, 3, 1, 2).flatten(0, 1).contiguous()


@torch.library.register_fake("d2v_fast::conv_weight_grad")
def _conv_weight_grad_fake(x, grad, kernel, groups):
    return x.new_empty((grad.shape[3], x.shape[3] // groups, *kernel), dtype=torch.float32)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups):
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.groups = groups
        return torch.ops.d2v_fast.conv(x, weight, bias, groups, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.d2v_fast.conv(grad, weight, None, ctx.groups, True)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.ops.d2v_fast.conv_weight_grad(x, grad, weight.shape[2:], ctx.groups).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 1, 2), dtype=torch.float32).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Convolution of stride 1 whose output has the positions of its input; an even kernel reaches further left.

    Args:
        x: (N, H, W, C_in) bf16 or fp16, copied if not contiguous; H = 1 for one axis.
        weight: (C_out, C_in / groups, kh, kw), cast to the dtype of x; its gradient has the weight's dtype.
        bias: (C_out,) or None.
        groups: Number of channel groups.

    Returns:
        (N, H, W, C_out) in the dtype of x, summed in fp32.

    Raises:
        ValueError: It cannot run on these tensors (see `obstacle`), or the shapes do not fit.
    """
    if why := obstacle(x.device, x.dtype):
        raise ValueError(f"conv cannot run: {why}; torch.nn.functional.conv2d takes any tensor")
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] * groups != x.shape[3] or weight.shape[0] % groups:
        found = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, groups={groups}"
        raise ValueError(f"conv: found {found}, expected (N, H, W, C_in), (C_out, C_in / groups, kh, kw), groups dividing both")
    return _Conv.apply(x, weight, bias, groups)
