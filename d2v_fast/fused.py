"""What `d2v-train --fused` turns on: the same algorithm by faster means, one part a line.

bf16 computation with fp32 weights and the optimizer that updates all tensors in one pass are settings of the run; the rest is
put into the model here. Strict where speed is the point: without a fused loss for the device it stops and says why.
"""

from __future__ import annotations

import torch

from d2v_fast import ops
from d2v_fast.model import Data2Vec
from d2v_fast.ops import attention, native
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
    if device.type == "cpu":
        done[0] += f" ({native.library().d2v_isa().decode()})"
        if count := replace_dropout(model.student):
            done.append(f"{count} dropouts counter-based")
        if attention.use(model.student.model):
            done.append("attention explicit where it trains")
    return done
