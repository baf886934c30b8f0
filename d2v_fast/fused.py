"""What `d2v-train --fused` turns on: the same algorithm by faster means, one part a line.

bf16 computation with fp32 weights and the optimizer that updates all tensors in one pass are settings of the run; the rest is
put into the model here. Strict where speed is the point: without a fused loss for the device it stops and says why.
"""

from __future__ import annotations

import ctypes

import torch

from d2v_fast import ops
from d2v_fast.encoders import Encoder
from d2v_fast.model import Data2Vec
from d2v_fast.ops import attention, conv, native
from d2v_fast.ops.dropout import replace_dropout


def fuse(model: Data2Vec, device: torch.device) -> list[str]:
    """Put the fast parts into a model that was just made; returns what was done, for the log.

    Raises:
        ValueError: No fused loss runs on this device, or the model was made with another one; the message says why.
    """
    kernel = "triton" if device.type == "cuda" else "native"
    why = ops.obstacle(kernel, device.type, torch.float32, (torch.float32,))
    if why:
        raise ValueError(f"--fused: the {kernel} loss cannot run: {why}")
    asked = model.loss_settings["impl"]
    if asked not in ("auto", kernel):
        raise ValueError(f"--fused: loss.impl={asked} asks for another loss than {kernel}; leave one of the two out")
    model.loss_settings["impl"] = kernel
    done = [f"loss {kernel}"]
    narrowed = [name for name, encoder in _narrowable(model).items() if encoder.narrow_last_block()]
    if narrowed:
        done.append(f"last block of {' and '.join(narrowed)} at scored positions")
    if device.type == "cpu":
        done[0] += f" ({native.library().d2v_isa().decode()})"
        if _keep_freed_memory():
            done.append("freed memory kept")
        if conv.use(getattr(model.student.model, "feature_extractor", None)):
            done.append("convolutions as matrix products")
        if count := replace_dropout(model.student):
            done.append(f"{count} dropouts counter-based")
        if attention.use(model.student.model) and attention.use(model.teacher.module.model):
            done.append("attention explicit")
    return done


def _narrowable(model: Data2Vec) -> dict[str, Encoder]:
    """Encoders of which only the scored positions are needed."""
    settings = model.loss_settings
    per_position = settings["norm"] in ("none", "layer") and settings["target_norm"] in ("none", "layer")
    return {"student": model.student} | ({"teacher": model.teacher.module} if per_position else {})


def _keep_freed_memory() -> bool:
    """Stop the allocator of glibc from giving memory back; False where the process has another one.

    It unmaps every large block that is freed, and the system zeroes each page of the next one anew: a fifth of a step of text
    and a third of one of speech.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_max, trim_threshold = -4, -1  # malloc.h
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
