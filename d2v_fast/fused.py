"""What `d2v-train --fused` turns on: the same algorithm by faster means, one part a function.

bf16 computation with fp32 weights and the optimizer that updates all tensors in one pass are settings of the run; the rest is
put into the model here. Strict where speed is the point: without a fused loss for the device it stops and says why. What each
part is worth, `pytest benchmarks/test_bench_step.py -k parts` measures.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

from d2v_fast import ops
from d2v_fast.model import Data2Vec
from d2v_fast.ops import attention, conv, native
from d2v_fast.ops.dropout import replace_dropout


def fuse(model: Data2Vec, device: torch.device, parts: Iterable[str] | None = None) -> list[str]:
    """Put the fast parts into a model that was just made; returns what was done, for the log.

    Args:
        model: Student, teacher and head.
        device: Where they will run.
        parts: Names of `PARTS`; all of them by default.

    Raises:
        ValueError: No fused loss runs on this device, or the model was made with another one; the message says why.
    """
    done = [PARTS[name](model, device) for name in (PARTS if parts is None else parts)]
    return [each for each in done if each]


def _loss(model: Data2Vec, device: torch.device) -> str:
    kernel = "triton" if device.type == "cuda" else "native"
    why = ops.obstacle(kernel, device.type, torch.float32, (torch.float32,))
    if why:
        raise ValueError(f"--fused: the {kernel} loss cannot run: {why}")
    asked = model.loss_settings["impl"]
    if asked not in ("auto", kernel):
        raise ValueError(f"--fused: loss.impl={asked} asks for another loss than {kernel}; leave one of the two out")
    model.loss_settings["impl"] = kernel
    return f"loss {kernel}" + (f" ({native.library().d2v_isa().decode()})" if kernel == "native" else "")


def _last_block(model: Data2Vec, device: torch.device) -> str:
    """Nothing but the scored positions of the last block enters the loss, and of the teacher's where its norm is over C.

    With a decoder, all of the student's states are decoded, and the views together score nearly every position.
    """
    if model.sparse:
        return ""
    encoders = {"student": model.student}
    if {model.loss_settings["norm"], model.loss_settings["target_norm"]} <= {"none", "layer"}:
        encoders["teacher"] = model.teacher.module
    narrowed = {name: encoder for name, encoder in encoders.items() if encoder.halves is not None}
    for encoder in narrowed.values():
        encoder.narrow = True
    return f"last block of {' and '.join(narrowed)} at scored positions" if narrowed else ""


def _memory(model: Data2Vec, device: torch.device) -> str:
    """Stop the allocator of glibc from giving memory back.

    It unmaps every large block that is freed, and the system zeroes each page of the next one anew. Another allocator, by
    LD_PRELOAD or on another system, is left alone.
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
    found = {attention.use_fast_attention(encoder.model, device) for encoder in (model.student, model.teacher.module)}
    return f"attention {found.pop()}" if None not in found else ""


def _compile(model: Data2Vec, device: torch.device) -> str:
    """On a GPU, fuse what lies between the matrix products, the norms of convolutions, and the decoder.

    Block by block, as most are the same graph. Blocks whose halves are not known run as they are where hooks capture results.
    """
    if device.type != "cuda":
        return ""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, 64)  # with gradients, taps, padding or not, at one length and at any
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
    return f"{what} compiled, for which the first steps wait"


def _recompute(model: Data2Vec, device: torch.device) -> str:
    """Keep what products and convolutions result in for the backward of compiled modules, and compute the rest again.

    GELU, norms and casts then take no memory. Not `aggressive_recomputation`: it draws the masks of dropout anew, other ones.
    """
    if device.type != "cuda":
        return ""
    from torch._functorch import config

    config.ban_recompute_materialized_backward = False
    config.ban_recompute_used_far_apart = config.ban_recompute_long_fusible_chains = False
    return "activations and norms computed again in the backward"


PARTS = {
    "loss": _loss,
    "last block": _last_block,
    "memory": _memory,
    "convolutions": _convolutions,
    "dropout": _dropout,
    "attention": _attention,
    "compile": _compile,
    "recompute": _recompute,
}
COMPILED = ("compile", "recompute")  # left out where blocks are gathered before they run, which was never tried with them
