"""AdamW that also updates the EMA teacher, in one pass over memory, on a GPU.

Per weight, AdamW moves 28 bytes: it reads gradient, weight and both moments, and writes all but the gradient. A separate
teacher update moves 12, of which 4 read the weight again; here it adds 8.

`_begin_kernel` counts the steps and computes the values that depend on them. `_adamw_kernel` updates all tensors: a program
owns CHUNK elements of one tensor, whose row in a table on the device holds the addresses. Values that change from step to step
are read from the device, so a CUDA graph can replay both kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.ops.triton_loss import _jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if TYPE_CHECKING:
    from d2v_fast.model import Data2Vec

BLOCK, CHUNK = 1024, 8192


class Slot(NamedTuple):
    """A weight and the tensors that belong to it, contiguous and of its shape, fp32 by default.

    Attributes:
        group: Number of its parameter group.
        parameter: The weight.
        exp_avg, exp_avg_sq, step: AdamW's state, `step` () fp32; None until there is a gradient.
        teacher: The teacher's tensor, which moves towards the new weight; None if there is none.
    """

    group: int
    parameter: Tensor
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    step: Tensor | None = None
    teacher: Tensor | None = None


def _check(x: Tensor, parameter: Tensor) -> None:
    if (x.dtype, x.shape, x.device, x.is_contiguous()) != (torch.float32, parameter.shape, parameter.device, True):
        found = f"{x.dtype}, {tuple(x.shape)}, strides {x.stride()}, on {x.device}"
        raise ValueError(
            f"optimizer and teacher in one pass: found {found}, expected torch.float32, {tuple(parameter.shape)}, "
            f"contiguous, on {parameter.device}; optimizer.one_pass=false takes any tensor"
        )


@_jit(do_not_specialize=["n"])
def _begin_kernel(
    table_ptr,  # (N, 7) int64: addresses of weight, moments, teacher and step, 0 = none; number of elements; group
    grads_ptr,  # (N,) int64: addresses of the gradients
    numbers_ptr,  # (G, 8) fp64: lr, weight decay, log β1, log β2, 1 - β1, 1 - β2, eps, 1 - τ
    skip_ptr,  # () fp32, read if GATED: anything but 0 = skip the step
    scalars_ptr,  # (N, 2) fp32: lr / (1 - β1^t), 1 / √(1 - β2^t)
    n, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if GATED:
        n = tl.where(tl.load(skip_ptr) == 0, n, 0)
    updated = tl.load(grads_ptr + row, mask=row < n, other=0) != 0
    step_ptr = tl.load(table_ptr + row * 7 + 4, mask=updated, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=updated, other=0) + 1
    tl.store(step_ptr, step, mask=updated)
    numbers_ptr += tl.load(table_ptr + row * 7 + 6, mask=updated, other=0) * 8
    # In fp32 the first 1 - β^t would lose most of their digits.
    lr = tl.load(numbers_ptr, mask=updated, other=0)
    first = 1 - tl.exp(step.to(tl.float64) * tl.load(numbers_ptr + 2, mask=updated, other=-1))
    second = 1 - tl.exp(step.to(tl.float64) * tl.load(numbers_ptr + 3, mask=updated, other=-1))
    tl.store(scalars_ptr + row * 2, (lr / first).to(tl.float32), mask=updated)
    tl.store(scalars_ptr + row * 2 + 1, (1 / tl.sqrt(second)).to(tl.float32), mask=updated)


@_jit
def _at(address, start, TYPE: tl.constexpr, BYTES: tl.constexpr):
    """Pointer to element `start` of a tensor whose address is a multiple of BYTES."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), BYTES) + start


@_jit
def _update(p, grad, mean, square, teacher, start, size, numbers_ptr, scalars_ptr, UNIT: tl.constexpr,
            BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Elements `start` to `start` + CHUNK of a tensor of `size`, a multiple of UNIT."""
    shrink = (1 - tl.load(numbers_ptr) * tl.load(numbers_ptr + 1)).to(tl.float32)
    share1 = tl.load(numbers_ptr + 4).to(tl.float32)
    share2 = tl.load(numbers_ptr + 5).to(tl.float32)
    eps = tl.load(numbers_ptr + 6).to(tl.float32)
    share = tl.load(numbers_ptr + 7).to(tl.float32)
    rate = tl.load(scalars_ptr)
    root = tl.load(scalars_ptr + 1)
    end = tl.minimum(size - start, CHUNK).to(tl.int32) // UNIT * UNIT
    p_ptr = _at(p, start, tl.float32, 4 * UNIT)
    for first in range(0, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < end
        w = tl.load(p_ptr + i, mask=inside)
        if grad != 0:
            mean_ptr = _at(mean, start, tl.float32, 4 * UNIT)
            square_ptr = _at(square, start, tl.float32, 4 * UNIT)
            g = tl.load(_at(grad, start, tl.float32, 4 * UNIT) + i, mask=inside)
            m = tl.load(mean_ptr + i, mask=inside)
            v = tl.load(square_ptr + i, mask=inside)
            m += share1 * (g - m)
            v += share2 * (g * g - v)
            w = w * shrink - rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
            tl.store(mean_ptr + i, m, mask=inside)
            tl.store(square_ptr + i, v, mask=inside)
            tl.store(p_ptr + i, w, mask=inside)
        if teacher != 0:
            teacher_ptr = _at(teacher, start, tl.float32, 4 * UNIT)
            t = tl.load(teacher_ptr + i, mask=inside)
            tl.store(teacher_ptr + i, t + share * (w - t), mask=inside)


@_jit
def _adamw_kernel(
    table_ptr,  # (N, 7) int64, as above
    grads_ptr,  # (N,) int64
    numbers_ptr,  # (G, 8) fp64
    scalars_ptr,  # (N, 2) fp32
    skip_ptr,  # () fp32, read if GATED
    row_ptr,  # (P,) int32: the tensor of a program
    first_ptr,  # (N,) int32: the first program of a tensor
    GATED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.load(row_ptr + tl.program_id(0))
    start = (tl.program_id(0) - tl.load(first_ptr + row)).to(tl.int64) * CHUNK
    grad = tl.load(grads_ptr + row)
    table_ptr += row * 7
    p = tl.load(table_ptr)
    mean = tl.load(table_ptr + 1)
    square = tl.load(table_ptr + 2)
    teacher = tl.load(table_ptr + 3)
    size = tl.load(table_ptr + 5)
    numbers_ptr += tl.load(table_ptr + 6) * 8
    scalars_ptr += row * 2
    aligned = ((p | grad | mean | square | teacher | size * 4) & 15) == 0
    if GATED:
        size = tl.where(tl.load(skip_ptr) == 0, size, 0)
    if aligned:  # 16 bytes at a time
        _update(p, grad, mean, square, teacher, start, size, numbers_ptr, scalars_ptr, 4, BLOCK, CHUNK)
    else:
        _update(p, grad, mean, square, teacher, start, size, numbers_ptr, scalars_ptr, 1, BLOCK, CHUNK)


class OnePass:
    """Updates weights in two launches, regardless of the number of tensors.

    `fill` copies gradients' addresses and learning rates to the device, and `launch` updates the weights. A CUDA graph contains
    only `launch`; call `fill` before each replay.

    Args:
        slots: The weights; at least one.

    Raises:
        ValueError: A tensor has another dtype, shape or device, or is not contiguous.
    """

    def __init__(self, slots: Sequence[Slot]):
        for slot in slots:
            for x in (slot.parameter, slot.exp_avg, slot.exp_avg_sq, slot.teacher):
                if x is not None:
                    _check(x, slot.parameter)
        rows = [
            [*map(_address, (s.parameter, s.exp_avg, s.exp_avg_sq, s.teacher, s.step)), s.parameter.numel(), s.group]
            for s in slots
        ]
        programs = [triton.cdiv(slot.parameter.numel(), CHUNK) for slot in slots]
        rows_of = [row for row, count in enumerate(programs) for _ in range(count)]
        first = [0, *accumulate(programs)][:-1]
        device = slots[0].parameter.device
        tables = [torch.tensor(rows), *(torch.tensor(x, dtype=torch.int32) for x in (rows_of, first))]
        self.table, *self.programs = (_pinned(x, device).to(device, non_blocking=True) for x in tables)
        self.grads = torch.zeros(len(slots), dtype=torch.int64, device=device)
        self.numbers = torch.zeros(1 + max(slot.group for slot in slots), 8, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(len(slots), 2, device=device)
        self.addresses: list[int] = []

    def fill(self, grads: Sequence[Tensor | None], groups: Sequence[dict[str, Any]], share: float) -> None:
        """Copy the values that a step needs to the device, without waiting for it.

        Args:
            grads: Contiguous gradient of each weight, kept by the caller until the launch; None skips weight and state.
            groups: Parameter groups of `torch.optim.AdamW`.
            share: 1 - τ, the share of the new weight in the teacher.
        """
        addresses = [_address(grad) for grad in grads]
        if addresses != self.addresses:
            self.addresses = addresses
            self.grads.copy_(_pinned(torch.tensor(addresses), self.grads.device), non_blocking=True)
        numbers = []
        for group in groups:
            betas = group["betas"]
            logs = (math.log(beta) if beta else -math.inf for beta in betas)
            numbers.append([group["lr"], group["weight_decay"], *logs, *(1 - beta for beta in betas), group["eps"], share])
        self.numbers.copy_(_pinned(torch.tensor(numbers, dtype=torch.float64), self.numbers.device), non_blocking=True)

    def launch(self, skip: Tensor | None = None) -> None:
        """Update everything, unless `skip`, () fp32 on the device, is not 0."""
        given = (self.table, self.grads, self.numbers)
        skipped = self.scalars if skip is None else skip
        gated = dict(GATED=skip is not None)
        count = len(self.grads)
        with torch.cuda.device_of(self.table):
            _begin_kernel[(triton.cdiv(count, 128),)](*given, skipped, self.scalars, count, BLOCK=128, **gated)
            _adamw_kernel[(len(self.programs[0]),)](
                *given, self.scalars, skipped, *self.programs, BLOCK=BLOCK, CHUNK=CHUNK, **gated
            )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    """x in memory that can be copied to `device` without waiting; torch does not reuse it before the copy is done."""
    return x.pin_memory() if device.type == "cuda" else x


class LerpUnless:
    """Updates a teacher in two launches, unless a flag on the device is set; equivalent to `ema.lerp_unless`.

    Args:
        ours: Tensors of the teacher; at least one.
        theirs: The student's tensors that they follow.

    Raises:
        ValueError: As for `OnePass`.
    """

    def __init__(self, ours: list[Tensor], theirs: list[Tensor]):
        self.addresses: list[tuple[int, int]] = []
        self.group = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 0.0}  # not used without gradients
        self._prepare(ours, theirs)

    def __call__(self, skip: Tensor, ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
        """Move `ours` towards `theirs` by `share` if `skip`, () fp32, is 0."""
        self._prepare(ours, theirs)
        self.one_pass.fill([None] * len(ours), [self.group], share)
        self.one_pass.launch(skip)

    def _prepare(self, ours: list[Tensor], theirs: list[Tensor]) -> None:
        addresses = [(_address(x), x.numel()) for x in (*ours, *theirs)]
        if addresses != self.addresses:
            self.one_pass = OnePass([Slot(0, x, teacher=y) for y, x in zip(ours, theirs, strict=True)])
            self.addresses = addresses


class AdamWOnePass(torch.optim.AdamW):
    """AdamW whose step also updates the teacher. Groups and state are those of `torch.optim.AdamW(fused=True)`.

    `model.update_teacher()` afterwards counts the step and copies the tensors that are not averaged.

    Args:
        params: Parameters or groups; all fp32, contiguous, on one GPU.
        model: Student and teacher.
        settings: Settings of AdamW.
    """

    def __init__(self, params: Any, model: Data2Vec, **settings: Any):
        super().__init__(params, fused=True, **settings)
        self.model = model
        self.one_pass: OnePass | None = None
        model.teacher.moved_by_optimizer = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters with gradients, and of the teacher; returns the result of `closure`."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads = [None if p.grad is None else p.grad.contiguous() for p in parameters]
        new = [p for p, grad in zip(parameters, grads, strict=True) if grad is not None and p not in self.state]
        for p in new:
            step = torch.zeros((), device=p.device)
            self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if new or self.one_pass is None:
            self.one_pass = OnePass(self._slots())
        teacher = self.model.teacher
        self.one_pass.fill(grads, self.param_groups, 1 - teacher.decay(teacher.step + 1))
        self.one_pass.launch(getattr(self, "found_inf", None))
        return result

    def _slots(self) -> list[Slot]:
        ours, theirs = self.model.teacher.pairs(self.model.student).averaged
        teachers = dict(zip(theirs, ours, strict=True))
        return [
            Slot(number, p, **self.state.get(p, {}), teacher=teachers.get(p))
            for number, group in enumerate(self.param_groups)
            for p in group["params"]
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as AdamW does, including that of an unfused AdamW, which counts steps on the host."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = True
        for p, state in self.state.items():
            state["step"] = state["step"].to(p.device)
        self.one_pass = None
