"""The fast implementations that `d2v-train --fused` turns on: the same algorithm, one function per part.

The run's settings add bf16 computation with fp32 weights and an optimizer that updates all tensors in one pass; everything else
is applied to the model here. If no fused loss runs on the device, this raises an error instead of running slowly.
`pytest benchmarks/test_bench_step.py -k parts` measures the effect of each part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

from d2v_fast import ops
from d2v_fast.encoders import Encoder
from d2v_fast.model import Data2Vec
from d2v_fast.ops import attention, conv, native
from d2v_fast.ops.dropout import replace_dropout


def fuse(model: Data2Vec, device: torch.device, parts: Iterable[str] | None = None) -> list[str]:
    """Apply the fast parts to a new model; returns what was applied, for the log.

    Args:
        model: Student, teacher and head.
        device: Device on which they will run.
        parts: Names from `PARTS`; all of them by default. "padding" needs masks whose padding is on the right.

    Raises:
        ValueError: No fused loss runs on this device, or `loss.impl` names a different one; the message gives the reason.
    """
    done = [PARTS[name](model, device) for name in (PARTS if parts is None else parts)]
    return [applied for applied in done if applied]


def _loss(model: Data2Vec, device: torch.device) -> str:
    kernel = "triton" if device.type == "cuda" else "native"
    why = ops.obstacle(kernel, device.type, torch.float32, (torch.float32,))
    if why:
        raise ValueError(f"--fused: the {kernel} loss cannot run: {why}")
    impl = model.loss_settings["impl"]
    if impl not in ("auto", kernel):
        raise ValueError(f"--fused: found loss.impl={impl}, expected {kernel} on this device; drop --fused or loss.impl")
    model.loss_settings["impl"] = kernel
    return f"loss {kernel}" + (f" ({native.library().d2v_isa().decode()})" if kernel == "native" else "")


def _last_block(model: Data2Vec, device: torch.device) -> str:
    """Compute the student's last block at scored positions only; the teacher's too if its norms are over C.

    No other position enters the loss. With a decoder nothing is saved: it decodes all of the student's states, and the views
    together score nearly every position.
    """
    if model.sparse:
        return ""
    encoders: dict[str, Encoder] = {"student": model.student}
    if {model.loss_settings["norm"], model.loss_settings["target_norm"]} <= {"none", "layer"}:
        encoders["teacher"] = model.teacher.module
    narrowed = {name: encoder for name, encoder in encoders.items() if encoder.halves is not None}
    for encoder in narrowed.values():
        encoder.narrow = True
    return f"last block of {' and '.join(narrowed)} at scored positions" if narrowed else ""


def _memory(model: Data2Vec, device: torch.device) -> str:
    """Stop glibc's allocator from returning memory to the system.

    By default it unmaps every large block that is freed, and the system must zero the pages of the next one. Other allocators,
    preloaded or on other systems, are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type != "cpu" or mallopt is None:
        return ""
    mmap_max, trim_threshold = -4, -1  # malloc.h
    return "freed memory kept" if mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) else ""


def _convolutions(model: Data2Vec, device: torch.device) -> str:
    if device.type == "cuda":
        return "convolutions channels last" if conv.use_channels_last(model) else ""
    used = device.type == "cpu" and conv.use_matrix_products(getattr(model.student.model, "feature_extractor", None))
    return "convolutions as matrix products" if used else ""


def _dropout(model: Data2Vec, device: torch.device) -> str:
    count = replace_dropout(model.student) + replace_dropout(model.head) if device.type == "cpu" else 0
    return f"{count} dropouts counter-based" if count else ""


def _attention(model: Data2Vec, device: torch.device) -> str:
    if device.type == "cuda" and model.student.reads in ("text", "audio"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and lengths vary from batch to batch
    found = {attention.use_fast_attention(encoder.model, device) for encoder in (model.student, model.teacher.module)}
    return f"attention {found.pop()}" if None not in found else ""


def _padding(model: Data2Vec, device: torch.device) -> str:
    """Use attention in segments instead of a padding mask, which must have all padding on the right.

    Only for blocks that are known to pass on the mask unchanged. Images, cropped speech and packed text have no padding.
    """
    encoders = [each for each in (model.student, model.teacher.module) if each.halves and each.reads in ("text", "audio")]
    used = [attention.use_segments(encoder.model, device) for encoder in encoders]
    return "attention without padding" if any(used) else ""


def _compile(model: Data2Vec, device: torch.device) -> str:
    """On a GPU, compile the blocks, the norms of convolutions and the decoder, to fuse the work between matrix products.

    Each block is compiled separately, because most share one graph. A teacher's blocks with unknown halves stay eager, because
    hooks capture their results.
    """
    if device.type != "cuda":
        return ""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, 64)  # variants: gradients, taps, padding, fixed or dynamic length
    encoders = (model.student, model.teacher.module)
    modules = [block for encoder in encoders if encoder.halves or encoder is model.student for block in encoder.blocks]
    what = f"{len(modules)} blocks"
    for encoder in encoders:
        encoder.compile_halves()
    convolutions = [module for encoder in encoders for module in conv.layers(encoder.model)]
    if convolutions:
        what += f" and {len(convolutions)} convolutions"
    if model.sparse:
        modules.append(model.head)
        what += " and the decoder"
    for module in (*convolutions, *modules):
        module.compile()
    return f"{what} compiled, which makes the first steps slow"


def _recompute(model: Data2Vec, device: torch.device) -> str:
    """Save only the results of matrix products and convolutions for the backward of compiled modules; recompute the rest.

    GELU, norms and casts then take no memory. `aggressive_recomputation` would draw new dropout masks in the backward.
    """
    if device.type != "cuda":
        return ""
    from torch._functorch import config

    config.ban_recompute_materialized_backward = False
    config.ban_recompute_used_far_apart = config.ban_recompute_long_fusible_chains = False
    return "activations and norms recomputed in the backward"


PARTS = {
    "loss": _loss,
    "last block": _last_block,
    "memory": _memory,
    "convolutions": _convolutions,
    "dropout": _dropout,
    "attention": _attention,
    "padding": _padding,
    "compile": _compile,
    "recompute": _recompute,
}
COMPILED = ("compile", "recompute")  # left out for sharded models: untested with blocks that are gathered before they run
