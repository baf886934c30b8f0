"""The teacher: an exponential moving average of a module, kept in fp32 (method 1.5, 1.6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # with a default; torch needs it too

from d2v_fast.config import EMAConfig
from d2v_fast.sharding import own

Student = TypeVar("Student", bound=nn.Module, default=Any)


def linear_decay(step: int, start: float, end: float, anneal_steps: int) -> float:
    """Decay of update number `step` = 1, 2, …: linear from `start` at 0 to `end` at `anneal_steps`, then constant."""
    if step >= anneal_steps:
        return end
    return start + (end - start) * step / anneal_steps


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones appear under each of their names."""
    return dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))


class Pairs(NamedTuple):
    """What a teacher's update moves, as pairs of equally long lists (teacher's tensors, student's tensors).

    Attributes:
        averaged: Parameters that are averaged.
        copied: Parameters that are copied.
        buffers: Names of the buffers, which are copied too. Modules may replace them at any time, so they are looked up anew.
    """

    averaged: tuple[list[Tensor], list[Tensor]]
    copied: tuple[list[Tensor], list[Tensor]]
    buffers: list[str]


def lerp_unless(skip: Tensor, ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
    """Move `ours` towards `theirs` by `share` if `skip` () is 0; `triton_adam.LerpUnless` does the same in two launches."""
    for y, x in zip(ours, theirs, strict=True):
        y.copy_(torch.where(skip != 0, y, y.lerp(x.to(y.dtype), share)))


class EMATeacher(nn.Module, Generic[Student]):
    """A copy of `student` that follows it: θ̄ ← τ(t)·θ̄ + (1 - τ(t))·θ after each successful optimizer step t = 1, 2, …

    The copy is fp32, in eval mode and without gradients. Trainable floating-point parameters are averaged; frozen ones, those
    named in `copied` and all buffers are copied. Nothing moves once τ(t) ≥ 1.

    Args:
        student: The module to follow; its dtype may be lower, its structure must not change.
        start: Decay τ(0).
        end: Decay τ(anneal_steps) and later.
        anneal_steps: Optimizer steps from `start` to `end`.
        copied: Name patterns (`fnmatch`) of parameters that are copied at each step instead of averaged.

    Raises:
        ValueError: A decay outside [0, 1], negative `anneal_steps`, or `copied` is not a list or matches no parameter or all.
    """

    def __init__(
        self,
        student: Student,
        start: float = EMAConfig.start,
        end: float = EMAConfig.end,
        anneal_steps: int = EMAConfig.anneal_steps,
        copied: Iterable[str] = (),
    ):
        super().__init__()
        EMAConfig(start=start, end=end, anneal_steps=anneal_steps)  # validates the arguments
        if isinstance(copied, str):
            raise ValueError(f"copied: found {copied!r}, expected a list of patterns: [{copied!r}]")
        self.start, self.end, self.anneal_steps = start, end, anneal_steps
        self.step = 0
        self.moved_by_optimizer = False  # whether the optimizer's step also averages the parameters
        self.lerp_unless: Callable[[Tensor, list[Tensor], list[Tensor], float], None] = lerp_unless
        names = [name for name, _ in student.named_parameters()]
        copied = list(copied)
        for pattern in copied:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"copied: pattern {pattern!r} matches no parameter, expected one of {names}")
        self.copied = frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in copied))
        if copied and len(self.copied) == len(names):
            raise ValueError(f"copied: found {copied}, which match every parameter, so nothing is averaged; remove a pattern")
        self.module: Student = copy.deepcopy(student).float().eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EMATeacher[Student]:
        """Stay in eval mode regardless of the surrounding module."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def decay(self, step: int) -> float:
        """τ(step), a pure function of the step."""
        return linear_decay(step, self.start, self.end, self.anneal_steps)

    @torch.no_grad()
    def update(self, student: nn.Module, skip: Tensor | None = None, pairs: Pairs | None = None) -> None:
        """Follow `student`; call once after each successful optimizer step.

        Args:
            student: The module to follow.
            skip: () fp32 on the teacher's device; unless it is 0, the teacher does not change. The host does not wait for it,
                so the step counts in any case; subtract 1 from `step` once the host knows that it was skipped.
            pairs: `pairs(student)` of an earlier call, valid as long as no parameter of the two is replaced, frozen or cast.

        Raises:
            ValueError: A parameter or buffer exists in only one of the two, has another shape, or is averaged in less than
                fp32. Then nothing changes and the step does not count.
        """
        decay = self.decay(self.step + 1)
        if decay < 1:
            averaged, (ours, theirs), buffers = self.pairs(student) if pairs is None else pairs
            ours = ours + [own(self.module.get_buffer(name)) for name in buffers]
            theirs = theirs + [own(student.get_buffer(name)) for name in buffers]
            moves = averaged[0] and not self.moved_by_optimizer
            if skip is not None:
                if moves:
                    self.lerp_unless(skip, *averaged, 1 - decay)
                for y, x in zip(ours, theirs, strict=True):
                    y.copy_(torch.where(skip != 0, y, x))
            else:
                if moves:
                    torch._foreach_lerp_(averaged[0], [x.to(y.dtype) for y, x in zip(*averaged, strict=True)], 1 - decay)
                if ours:
                    torch._foreach_copy_(ours, theirs)
        self.step += 1

    @torch.no_grad()
    def pairs(self, student: nn.Module) -> Pairs:
        """What an update moves. Listing 300 tensors takes 1.4 ms on the host; a training loop may do so once.

        Raises:
            ValueError: As for `update`.
        """
        targets, sources = _tensors(self.module), _tensors(student)
        for name in sorted(targets.keys() ^ sources.keys()):
            raise ValueError(
                f"{name}: found in the {'teacher' if name in targets else 'student'} only; pass the unwrapped student, "
                "without DistributedDataParallel or torch.compile, and with the structure it had when the teacher was created"
            )
        pairs = Pairs(([], []), ([], []), [])
        for ours, name in {
            tensor: name for name, tensor in reversed(targets.items())
        }.items():  # tied tensors under their first name
            theirs = sources[name]
            if ours.shape != theirs.shape:
                found, expected = tuple(theirs.shape), tuple(ours.shape)
                raise ValueError(f"{name}: found {found} in the student, expected {expected} as in the teacher")
            if not isinstance(ours, nn.Parameter):
                pairs.buffers.append(name)
                continue
            follows = theirs.requires_grad and name not in self.copied
            if follows and ours.dtype.itemsize < 4:
                raise ValueError(
                    f"{name}: found {ours.dtype} in the teacher, which rounds small updates away, expected torch.float32; "
                    "cast only the student, or call teacher.float() afterwards"
                )
            pair = pairs.averaged if follows else pairs.copied
            pair[0].append(own(ours))  # both are sharded in the same way
            pair[1].append(own(theirs))
        return pairs

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, anneal_steps={self.anneal_steps}, step={self.step}"
