"""One optimizer step, as a function of a state and its micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.checkpoint import Tensors
from d2v_fast.config import TrainConfig
from d2v_fast.data import Batch, to_device
from d2v_fast.diagnostics import Monitor
from d2v_fast.ema import Pairs
from d2v_fast.graphs import Graphs
from d2v_fast.model import Data2Vec
from d2v_fast.sharding import spread_as, whole
from d2v_fast.train.guards import SkippedSteps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


@dataclass
class State:
    """The state that a step reads and changes.

    Attributes:
        core: Student, teacher and head.
        model: The same, as prepared by accelerate; on several ranks it averages gradients.
        optimizer: Optimizer of the student and the head.
        scheduler: Learning rate schedule.
        accelerator: The ranks.
        monitor: Observes each output of the model.
        skipped: Counts steps that are not finite.
        arguments: Arguments of the model in addition to a batch.
        reduction: How the loss is averaged, as in `loss.reduction`.
        clip_norm: Maximum norm of the gradient, 0 = no clipping.
        graphs: Replays passes as CUDA graphs; None runs them eagerly.
        done: Number of steps so far.
        late: Whether the device itself skips steps that are not finite; the host reads the flag one step later.
        pending: The last step, while the host does not know whether it was taken.
        device, world: The accelerator's device and number of processes.
    """

    core: Data2Vec
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    monitor: Monitor
    skipped: SkippedSteps
    arguments: dict[str, Any] = field(default_factory=dict)
    reduction: Literal["global", "local"] = "global"
    clip_norm: float = 0.0
    graphs: Graphs | None = None
    done: int = 0
    late: bool = False
    pending: Pending | None = None
    device: torch.device = field(init=False)
    world: int = field(init=False)

    def __post_init__(self) -> None:
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for p in self.core.parameters() if p.requires_grad]

    @cached_property
    def pairs(self) -> Pairs:
        """What an update of the teacher moves, listed in the first step. Delete it after freezing or replacing a parameter."""
        return self.core.teacher.pairs(self.core.student)

    def tensors(self) -> Tensors:
        """Weights of student and teacher and the optimizer state, by checkpoint file and by name."""
        weights, kept = self.core.state_dict(), self.optimizer.state
        return {
            "student": {name: value for name, value in weights.items() if ".teacher." not in f".{name}"},
            "teacher": {name: value for name, value in weights.items() if ".teacher." in f".{name}"},
            "optimizer": {
                f"{name}.{key}": value
                for name, parameter in self.core.named_parameters()
                for key, value in kept.get(parameter, {}).items()
            },
        }

    def load_tensors(self, tensors: Tensors) -> None:
        """Restore the result of `tensors`. The schedules need no state, because they are functions of the step."""
        parameters = dict(self.core.named_parameters())
        numbers = {p: i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        kept: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors["optimizer"].items():
            name, _, key = name.rpartition(".")
            kept.setdefault(numbers[parameters[name]], {})[key] = spread_as(value, parameters[name])
        weights = tensors["student"] | tensors["teacher"]
        self.core.load_state_dict({name: spread_as(weights[name], x) for name, x in self.core.state_dict().items()})
        self.optimizer.load_state_dict({"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def settle(self) -> None:
        """Wait for the flag of the last step and count it as taken or skipped. Call it before reading the counts."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.wait():
            self.skipped.forget()
        else:
            self.core.teacher.step -= 1
            self.skipped.add(pending.step, pending.micro_batches, pending.loss, pending.grad_norm)


class Outcome(NamedTuple):
    """The result of a step.

    Attributes:
        loss: Loss of this rank's share, a scalar.
        grad_norm: Norm of the gradient before clipping, a scalar, the same on all ranks.
        cls_loss: The part of the loss that comes from CLS.
        finite: Whether the step was taken, () bool on the device; otherwise it was skipped.
    """

    loss: Tensor
    grad_norm: Tensor
    cls_loss: Tensor
    finite: Tensor


class Pending(NamedTuple):
    """A step whose flag the host has not read yet.

    Attributes:
        step: Its number.
        micro_batches: The entries that `SkippedSteps` needs, without tensors.
        loss, grad_norm: Those of `Outcome`.
        finite: A copy of the flag in host memory, valid after `copied`.
        copied: Event after the copy; None on a CPU.
    """

    step: int
    micro_batches: list[Batch]
    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> bool:
        """Whether the step was taken. Waits only until that step has ended."""
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.finite)


def step(state: State, micro_batches: list[Batch]) -> Outcome:
    """Forward and backward of all micro-batches, then optimizer, schedule and teacher if loss and gradient are finite.

    If `state.late`, the device itself skips the updates and the host does not wait. The host reads the flag in the next step,
    once the passes of that step are queued, or in `state.settle()`. Steps that are logged or may end the run are settled at
    once.
    """
    loss, cls_loss = _accumulate(state, micro_batches)
    grad_norm = clip(state)
    state.monitor.watch(grad_norm)
    finite = _finite(state, loss, grad_norm)
    state.settle()  # the previous step; the decay of the teacher depends on it
    if state.late and not state.monitor.due and not state.skipped.at_limit:
        _update_late(state, finite)
        named = [{key: value for key, value in batch.items() if key in ("epoch", "samples")} for batch in micro_batches]
        state.pending = Pending(state.done + 1, named, loss, grad_norm, *_to_host(finite))
    elif finite:
        state.optimizer.step()
        if not state.accelerator.optimizer_step_was_skipped:
            state.core.update_teacher(pairs=state.pairs)
        state.skipped.forget()
    else:
        # Update neither weights nor teacher: a NaN would stay in the average forever.
        state.skipped.add(state.done + 1, micro_batches, loss, grad_norm)
        if state.accelerator.scaler is not None:
            state.optimizer.step()  # lets the scaler lower its factor; it skips the update itself
    state.scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.done += 1
    return Outcome(loss, grad_norm, cls_loss, finite)


def _update_late(state: State, finite: Tensor) -> None:
    """Update weights and teacher on the device, unless the flag there is not set."""
    optimizer: Any = state.optimizer.optimizer
    optimizer.found_inf = skip = 1 - finite.float()  # torch's protocol of loss scaling
    state.optimizer.step()
    optimizer.found_inf = None
    state.core.update_teacher(skip, state.pairs)


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and the event after which it is valid."""
    copy = flag.to("cpu", non_blocking=True)  # pinned, so that nothing waits
    if flag.device.type != "cuda":
        return copy, None
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied


def _accumulate(state: State, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Accumulate the gradients; returns the loss and the part of it that comes from CLS."""
    num_targets = None
    if state.reduction == "global":
        # Known on the host; only several ranks need to communicate.
        num_targets = sum(len(batch["index"]) for batch in micro_batches)
        if state.world > 1:
            counts = torch.full((1,), float(num_targets), device=state.device)  # a copy from the host would wait
            num_targets = state.accelerator.reduce(counts, "sum")[0] / state.world
    loss, cls_loss = torch.zeros(2, device=state.device)
    for i, batch in enumerate(micro_batches):
        # Ranks exchange gradients with the last micro-batch only.
        with nullcontext() if i == len(micro_batches) - 1 else state.accelerator.no_sync(state.model):
            parts = 1 if num_targets is not None else len(micro_batches)
            inputs = to_device(batch, state.device)
            if state.graphs is None or state.monitor.due:
                share, cls_share = forward_backward(state, inputs, num_targets, parts)
            else:
                share, cls_share = state.graphs(inputs, num_targets, parts)
        loss += share
        cls_loss += cls_share
    return loss, cls_loss


def forward_backward(
    state: State, inputs: dict[str, Tensor], num_targets: Tensor | float | None, parts: int
) -> tuple[Tensor, Tensor]:
    """Run a micro-batch; returns its contribution to the step's loss, and the part of that from CLS."""
    output = state.model(**inputs, **state.arguments, num_targets=num_targets, stats=state.monitor.due)
    share = output.loss / parts
    state.accelerator.backward(share)
    return share.detach(), torch.zeros_like(share) if output.cls_loss is None else output.cls_loss / parts


def clip(state: State) -> Tensor:
    """Clip the gradient if `clip_norm` is set; returns its norm before clipping."""
    if state.clip_norm:
        return whole(state.accelerator.clip_grad_norm_(state.parameters, state.clip_norm))
    state.accelerator.unscale_gradients()
    return whole(torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None]))


def _finite(state: State, loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether loss and gradient are finite everywhere, () bool on the device."""
    finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
    if state.world > 1:  # the gradient is the same on all ranks, the loss is not
        finite = state.accelerator.reduce(finite.float(), "sum") == state.world
    return finite


def make_graphs(state: State, train: TrainConfig) -> Graphs | None:
    """CUDA graphs for one process on a GPU; None if a pass may depend on the host (layer-drop, a model's own forward)."""
    student = state.core.student
    alone = state.device.type == "cuda" and state.world == 1
    simple = train.accumulate == 1 and state.accelerator.scaler is None and student.halves is not None
    if not (train.graphs and alone and simple) or train.checkpointing or getattr(student.model.config, "layerdrop", 0) > 0:
        return None
    return Graphs(partial(forward_backward, state), state.parameters)


def can_be_late(state: State) -> bool:
    """Whether the device itself can skip a step; if so, this prepares the teacher.

    This needs a GPU with Triton, AdamW in one pass per tensor, and fp32 weights. Several ranks exchange in each step whether to
    stop, so they wait anyway. Loss scaling skips steps in its own way.
    """
    from d2v_fast.ops import triton_adam, triton_loss

    optimizer = state.optimizer.optimizer
    fused = isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    alone = state.device.type == "cuda" and state.world == 1 and state.accelerator.scaler is None
    if not (fused and alone) or triton_loss.obstacle(state.device):
        return False
    teacher = state.core.teacher
    averaged = teacher.pairs(state.core.student).averaged  # not state.pairs: a callback may still freeze parameters
    if averaged[0] and not teacher.moved_by_optimizer:
        try:
            teacher.lerp_unless = triton_adam.LerpUnless(*averaged)
        except ValueError:  # a tensor that is not fp32 or not contiguous
            return False
    return True
