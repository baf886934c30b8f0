"""The optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from d2v_fast.config import ConfigError, OptimizerConfig, ScheduleConfig, TrainConfig

log = logging.getLogger(__name__)


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig, fused: bool = False, one_pass: bool = False) -> Optimizer:
    """AdamW or LAMB without weight decay on vectors, learning rates scaled by name (method 4.8).

    Args:
        model: On the device where it is trained.
        config: The settings.
        fused: Run AdamW in one pass per tensor. On a GPU, LAMB is NVIDIA apex's if apex is installed.
        one_pass: Run an AdamW that also updates the teacher; `one_pass_obstacle` tells whether it can.

    Raises:
        ConfigError: A pattern of `lr_scale` matches no parameter.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    unused = set(config.lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A vector with broadcast dimensions, such as a mask token of shape (1, 1, C), is still a vector. The factors of ALiBi
        # may have a row for each layer.
        vector = sum(size > 1 for size in parameter.shape) < 2 or name.endswith((".bias", ".alibi_scale"))
        decay = 0.0 if vector and not config.decay_1d else config.weight_decay
        matching = [pattern for pattern in config.lr_scale if fnmatchcase(name, pattern)]
        unused -= set(matching)
        scale = math.prod(config.lr_scale[pattern] for pattern in matching)
        groups.setdefault((decay, scale), []).append(parameter)
    if unused:
        raise ConfigError(f"optimizer.lr_scale: {sorted(unused)} match no parameter, such as {name}")
    # The schedule of a resumed run needs initial_lr.
    rates = {s: {"lr": config.lr * s, "initial_lr": config.lr * s} for _, s in groups}
    described = [{"params": p, "weight_decay": d, **rates[s]} for (d, s), p in groups.items()]
    betas, eps = (config.betas[0], config.betas[1]), config.eps
    if one_pass:
        from d2v_fast.ops.triton_adam import AdamWOnePass

        return AdamWOnePass(described, cast(Any, model), betas=betas, eps=eps)
    if config.kind == "adamw":
        return torch.optim.AdamW(described, betas=betas, eps=eps, fused=fused or None)
    if _on_gpu(model):
        obstacle = apex_obstacle()
        if not obstacle:
            log.info("LAMB runs as apex's FusedLAMB")
            # An infinite norm turns off its own clipping; train.clip_norm clips.
            return _apex_lamb()(described, betas=betas, eps=eps, max_grad_norm=math.inf)
        log.info("LAMB runs as torch operations: %s", obstacle)
    return Lamb(described, betas=betas, eps=eps)


def _on_gpu(model: torch.nn.Module) -> bool:
    return all(parameter.is_cuda for parameter in model.parameters())


def one_pass_obstacle(model: torch.nn.Module, config: OptimizerConfig, train: TrainConfig, fused: bool) -> str | None:
    """Why the optimizer cannot update the teacher in the same pass, or None if it can."""
    if not fused:
        return "it needs --fused"
    if config.kind != "adamw":
        return f"it needs optimizer.kind=adamw, found {config.kind}"
    if train.shard or train.precision == "fp16":
        return f"it does not support {'train.shard' if train.shard else 'train.precision=fp16'}"
    if not hasattr(model, "teacher"):
        return "several modalities share the blocks of their teachers"
    from d2v_fast.ops import triton_loss

    return triton_loss.obstacle(next(model.parameters()).device)


class Lamb(Optimizer):
    """LAMB (You et al. 2019, algorithm 2): AdamW's update of each tensor, scaled to the norm of the tensor.

    As in the authors' training of BERT, tensors without weight decay are not scaled. A tensor of zeros is not scaled either.
    The state of a parameter has AdamW's form: `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        params: Parameters or groups, each with `lr` and `weight_decay`.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
    """

    def __init__(self, params: Any, betas: tuple[float, float], eps: float):
        super().__init__(params, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters with gradients; returns the result of `closure`."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(parameters, **group)
        return result

    def _update(
        self, parameters: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_: Any
    ) -> None:
        for p in parameters:
            if p not in self.state:
                # The step stays on the host, where it is read.
                self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states, grads = [self.state[p] for p in parameters], [cast(Tensor, p.grad) for p in parameters]
        steps, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, grads, 1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])

        corrections = [[1 - beta ** int(step) for step in steps] for beta in betas]
        roots = torch._foreach_div(squares, corrections[1])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, eps)
        updates = torch._foreach_div(means, corrections[0])
        torch._foreach_div_(updates, roots)
        if weight_decay:
            torch._foreach_add_(updates, parameters, alpha=weight_decay)
            weights, lengths = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
            ratios = torch.where((weights > 0) & (lengths > 0), weights / lengths, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-lr)


def _apex_lamb() -> Any:
    """apex's FusedLAMB, with the state of `Lamb`, so that a run resumes with or without apex."""
    from apex.optimizers import FusedLAMB

    class ApexLamb(FusedLAMB):
        """apex counts steps by group, and not in the state."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                step = torch.tensor(float(group["step"]))
                for parameter in group["params"]:
                    if parameter in self.state:
                        self.state[parameter]["step"] = step
            return result

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                group["step"] = max((int(self.state[p]["step"]) for p in group["params"] if p in self.state), default=0)

        def zero_grad(self, set_to_none: bool = True) -> None:
            Optimizer.zero_grad(self, set_to_none)

    return ApexLamb


def apex_obstacle() -> str:
    """Why NVIDIA apex cannot be used, or "". The package named apex on PyPI is unrelated and never imported."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "apex is not installed"
    if not found.origin or not Path(found.origin).with_name("optimizers").exists():
        try:
            version = f" {importlib.metadata.version('apex')}"
        except importlib.metadata.PackageNotFoundError:
            version = ""
        return f"apex{version} is not NVIDIA's: pip uninstall apex"
    try:
        importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")  # its kernels, which a build may leave out
    except Exception as error:
        return f"apex cannot be imported: {error}"
    return ""


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
