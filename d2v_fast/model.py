"""data2vec: a student that sees a masked input predicts what its EMA teacher computes from all of it.

Baevski et al. 2022, section 3; spec section 1. Nothing here knows whether the input is text, an image or speech.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from d2v_fast.ema import EMATeacher
from d2v_fast.encoders import Encoder, LayerSource
from d2v_fast.loss import Implementation, Norm, TargetNorm, check_settings, data2vec_loss, one_of
from d2v_fast.ops.reference import LossStats

EMAScope = Literal["all", "encoder", "layers"]


@dataclass
class Data2VecOutput:
    """Loss of a batch and what is worth watching.

    Attributes:
        loss: Scalar; the sum over scored positions divided by `num_targets` where given, else by their number.
        stats: Moments of targets and predictions at the scored positions, on the device.
        features: Local features (B, T, C) of the student, detached.
        states: Of the student at masked positions (N, C), detached.
        teacher_states: Result of the teacher's last layer (B, T, C); only masked positions count.
    """

    loss: Tensor
    stats: LossStats
    features: Tensor
    states: Tensor
    teacher_states: Tensor


def regression_head(hidden_size: int, layers: int, zero_init: bool = False) -> nn.Module:
    """`layers` Linears with GELU between, twice as wide inside; none is the identity (spec 3.2, 3.3)."""
    modules: list[nn.Module] = []
    width = hidden_size
    for _ in range(layers - 1):
        modules += [nn.Linear(width, 2 * hidden_size), nn.GELU()]
        width = 2 * hidden_size
    if layers:
        modules.append(nn.Linear(width, hidden_size))
        if zero_init:
            nn.init.zeros_(modules[-1].weight)
            nn.init.zeros_(modules[-1].bias)
    return nn.Sequential(*modules)


class Data2Vec(nn.Module):
    """Student, teacher and regression head around one encoder.

    Args:
        encoder: The student. The teacher is a copy of it, made here: build before `accelerate.prepare` or DDP.
        top_k: Number of last layers whose results are averaged into the target.
        source: What a layer's result is: "ffn" before dropout and residual, "block_output" or "block_input" (spec 1.3).
        norm: Normalisation of each layer result (spec 1.2).
        target_norm: Normalisation of their average.
        beta: 0 for the squared error, else the smooth-L1 threshold.
        scale: Factor of the summed error: "auto" = 1/√C, "mean" = 1/C, or a number (spec 1.4).
        head_layers: Linears in the regression head; 0 for none.
        head_zero_init: Start the head at zero, so that first predictions are the mean of the targets and not noise.
        ema_start, ema_end, ema_anneal_steps: Decay schedule of the teacher (spec 1.5).
        ema_scope: What is averaged: "all", the "encoder" without its local features, or its "layers" (spec 1.6);
            the rest is copied from the student at each step.
        ema_copied: Further name patterns of parameters to copy.
        teacher_fp32: Run the teacher outside of autocast.
        impl: Implementation of the loss.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        top_k: int = 8,
        source: LayerSource = "ffn",
        norm: Norm = "layer",
        target_norm: TargetNorm = "none",
        beta: float = 0.0,
        scale: float | Literal["auto", "mean"] = "auto",
        head_layers: int = 1,
        head_zero_init: bool = False,
        ema_start: float = 0.999,
        ema_end: float = 0.9999,
        ema_anneal_steps: int = 30_000,
        ema_scope: EMAScope = "all",
        ema_copied: tuple[str, ...] = (),
        teacher_fp32: bool = False,
        impl: Implementation = "auto",
    ):
        super().__init__()
        one_of("source", source, LayerSource)
        one_of("ema_scope", ema_scope, EMAScope)
        if isinstance(scale, str):
            one_of("scale", scale, Literal["auto", "mean"])
        self.student = encoder
        self.teacher = EMATeacher(
            encoder,
            ema_start,
            ema_end,
            ema_anneal_steps,
            [*encoder.not_averaged(ema_scope), *(f"model.{pattern}" for pattern in ema_copied)],
        )
        encoder.check_layers(top_k, source)
        self.top_k, self.source = top_k, source
        self.head = regression_head(encoder.hidden_size, head_layers, head_zero_init)
        # A teacher whose local features are the student's own need not compute them again.
        self.shares_features = ema_scope != "all"
        self.teacher_fp32 = teacher_fp32
        scales = {"auto": encoder.hidden_size**-0.5, "mean": 1 / encoder.hidden_size}
        self.loss_settings = dict(norm=norm, target_norm=target_norm, beta=beta, scale=scales.get(scale, scale), impl=impl)
        check_settings(**self.loss_settings, reduction="mean", layout="BTC")

    def forward(
        self,
        source: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        *,
        index: Tensor | None = None,
        padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        num_targets: Tensor | float | None = None,
    ) -> Data2VecOutput:
        """One pass of student and teacher.

        Args:
            source: What the student sees, as its encoder takes it. Masked already if `target` is given.
            mask: (B, T) bool, True = masked = scored.
            target: What the teacher sees where that is another input (text: the unmasked ids); default is `source`, whose
                features are then masked for the student.
            index: (N,) int64, `mask.flatten().nonzero()`; made by the data loader so that a GPU is not waited for.
            padding_mask: (B, T) bool, True = padding.
            target_padding_mask: The same for `target`, where it differs.
            channel_mask: (B, C) bool, channels set to zero for the student.
            num_targets: Scored positions that the loss is divided by, e.g. those of all micro-batches of all ranks,
                divided by the ranks (spec 1.4).
        """
        features = self.student.embed(source)
        if target is None:
            teacher_features = features.detach() if self.shares_features else None
            student_features = self.student.mask_features(features, mask)
        else:
            teacher_features = None
            student_features = features
        if channel_mask is not None:
            student_features = student_features.masked_fill(channel_mask.unsqueeze(1), 0)
        if index is None:
            index = mask.flatten().nonzero().squeeze(1)
        layers = self.teacher_layers(
            source if target is None else target,
            teacher_features,
            padding_mask if target_padding_mask is None else target_padding_mask,
            index,
        )
        states = self.student.transform(self.student.place(student_features, padding_mask), padding_mask, rows=index).states
        predictions = self.head(states)
        loss, stats = data2vec_loss(
            predictions,
            layers,
            mask,
            padding_mask=padding_mask,
            reduction="mean" if num_targets is None else "sum",
            return_stats=True,
            **self.loss_settings,
        )
        if num_targets is not None:
            loss = loss / num_targets
        return Data2VecOutput(loss, stats, features.detach(), states.detach(), layers[-1])

    @torch.no_grad()
    def teacher_layers(
        self,
        inputs: Tensor,
        features: Tensor | None,
        padding_mask: Tensor | None,
        index: Tensor | None = None,
    ) -> list[Tensor]:
        """Results of the teacher's last K layers on the unmasked input, K × (B, T, C).

        With `index` a teacher whose last block is narrowed fills the last one only there.
        """
        teacher = self.teacher.module
        device = inputs.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not self.teacher_fp32):
            if features is None:
                features = teacher.embed(inputs)
            elif self.teacher_fp32:
                features = features.float()
            x = teacher.place(features, padding_mask)
            return teacher.transform(x, padding_mask, layers=self.top_k, source=self.source, rows=index).layers

    def update_teacher(self) -> None:
        """Move the teacher; once after each successful optimizer step."""
        self.teacher.update(self.student)
