"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from d2v_fast.config import ConfigError, OptimizerConfig, ScheduleConfig


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors, learning rates scaled by name (method 4.8); `fused` = one pass per tensor."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    unused = set(config.lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A vector with broadcast dimensions, such as a mask token of shape (1, 1, C), is still a vector.
        vector = sum(size > 1 for size in parameter.shape) < 2 or name.endswith(".bias")
        decay = 0.0 if vector and not config.decay_1d else config.weight_decay
        matching = [pattern for pattern in config.lr_scale if fnmatchcase(name, pattern)]
        unused -= set(matching)
        scale = math.prod(config.lr_scale[pattern] for pattern in matching)
        groups.setdefault((decay, scale), []).append(parameter)
    if unused:
        raise ConfigError(f"optimizer.lr_scale: {sorted(unused)} match no parameter, such as {name}")
    # The schedule of a resumed run needs initial_lr.
    rates = {s: {"lr": config.lr * s, "initial_lr": config.lr * s} for _, s in groups}
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": d, **rates[s]} for (d, s), p in groups.items()],
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=fused or None,
    )


def warmup_steps(steps: int, config: ScheduleConfig) -> float:
    """Steps until the learning rate reaches its peak."""
    return config.warmup if config.warmup >= 1 else config.warmup * steps


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate at a step, counted from 0, as a share of the peak (method 5.1)."""
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.initial + (1 - config.initial) * (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "tri_stage":
        begin = warmup + config.hold * steps
        progress = max(0.0, step - begin) / max(1.0, steps - begin)
        return config.final ** min(1.0, progress) if config.final > 0 else 1.0 - min(1.0, progress)
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    shape = 1 - progress if config.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final + (1 - config.final) * shape
