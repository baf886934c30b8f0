"""data2vec: a student that sees a masked input predicts what its EMA teacher computes from the whole input.

Baevski et al. 2022, section 3, and for 2.0 Baevski et al. 2023; method 1 and 4. The input may be text, an image,
speech or anything else with positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from d2v_fast.config import EMAConfig, HeadConfig, LossConfig, TargetsConfig
from d2v_fast.decoders import ConvDecoder, regression_head
from d2v_fast.ema import EMATeacher, Pairs
from d2v_fast.encoders import Encoder
from d2v_fast.loss import data2vec_loss
from d2v_fast.masking import visible_positions
from d2v_fast.ops.reference import LossStats, errors
from d2v_fast.predictors import Predicted, in_place, visible_only


@dataclass
class Data2VecOutput:
    """Loss of a batch and the tensors that the monitor reads.

    Attributes:
        loss: Scalar; the sum over scored positions divided by `num_targets` if given, else by their number.
        stats: Moments of targets and predictions at the scored positions, on the device; None if not requested.
        features: Local features (B, T, C) of the student, detached.
        states: Student states (rows, C) at the masked positions, or with a decoder at the visible ones; detached.
        teacher_states: Result of the teacher's last layer (B, T, C); without a decoder only masked positions are valid.
        cls_loss: The part of `loss` that comes from the extra token, detached; None if there is none.
    """

    loss: Tensor
    stats: LossStats | None
    features: Tensor
    states: Tensor
    teacher_states: Tensor
    cls_loss: Tensor | None = None


class Data2Vec(nn.Module):
    """Student, teacher and predictor around one encoder.

    With a `HeadConfig` as predictor it is data2vec 1.0. With a decoder it is data2vec 2.0: the student encodes the visible
    positions of several masked views of each sample, and the decoder predicts the rest. `HeadConfig.pretrained` and
    `LossConfig.reduction` only have an effect in d2v-train.

    Args:
        encoder: The student. The teacher is a copy made here, so create the model before `accelerate.prepare` or DDP.
        predictor: Settings of a regression head of kind linear (method 3.2, 3.3), or a decoder (method 4.5).
        targets: What the student predicts (method 1.2, 1.3).
        loss: How predictions are scored (method 1.4). With a decoder, `cls_weight` is the weight of the loss that trains the
            first extra token (CLS) to predict the mean of the targets over all positions (method 4.7).
        ema: How the teacher follows the student (method 1.5, 1.6).

    Raises:
        ValueError: Settings do not fit the encoder, or `predictor` is a `HeadConfig` of kind conv, which lacks the axes.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: HeadConfig | ConvDecoder = HeadConfig(),
        *,
        targets: TargetsConfig = TargetsConfig(),
        loss: LossConfig = LossConfig(),
        ema: EMAConfig = EMAConfig(),
    ):
        super().__init__()
        head: nn.Module
        if isinstance(predictor, HeadConfig):
            if predictor.kind != "linear":
                raise ValueError(
                    f"predictor: found HeadConfig(kind={predictor.kind!r}), which does not know the axes of the positions; "
                    "expected a decoder, such as ConvDecoder(encoder.hidden_size, axes=2) for images"
                )
            if loss.cls_weight:
                raise ValueError(
                    f"cls_weight: found {loss.cls_weight} without a decoder; the loss of CLS is a part of data2vec 2.0"
                )
            head = regression_head(encoder.hidden_size, predictor.layers, predictor.zero_init)
        else:
            check_gathers(encoder)
            if loss.cls_weight and not encoder.extra_tokens:
                name = type(encoder.model).__name__
                raise ValueError(f"cls_weight: found {loss.cls_weight}, but {name} has no CLS token to train; expected 0")
            if encoder.masks_features:
                encoder.mask_token.requires_grad_(False)  # unused: masked positions are not encoded
            head = predictor
        self.sparse = not isinstance(predictor, HeadConfig)
        self.student = encoder
        self.teacher = EMATeacher(
            encoder,
            ema.start,
            ema.end,
            ema.anneal_steps,
            [*encoder.not_averaged(ema.scope), *(f"model.{pattern}" for pattern in ema.copied)],
        )
        encoder.check_layers(targets.top_k, targets.source)
        self.top_k, self.source = targets.top_k, targets.source
        self.head = head
        self.cls_weight, self.cls_reduction = loss.cls_weight, loss.cls_reduction
        # A teacher with the student's local features need not recompute them, except for text, where they include dropout.
        self.shares_features = ema.scope != "all" and encoder.masks_features
        self.teacher_fp32 = targets.teacher_fp32
        scales: dict[Any, float] = {"auto": encoder.hidden_size**-0.5, "mean": 1 / encoder.hidden_size}
        self.loss_settings: dict[str, Any] = dict(
            norm=targets.norm,
            target_norm=targets.target_norm,
            beta=loss.beta,
            scale=scales.get(loss.scale, loss.scale),
            impl=loss.impl,
        )

    def forward(
        self,
        source: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        *,
        index: Tensor | None = None,
        visible: Tensor | None = None,
        padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        num_targets: Tensor | float | None = None,
        stats: bool = True,
    ) -> Data2VecOutput:
        """One pass of student and teacher.

        Args:
            source: The student's input. Without a decoder, if `target` is given, it must already be masked.
            mask: (B, T) bool, True = masked = scored; with a decoder (B, M, T), M views of each sample.
            target: The teacher's input if it differs (for text without a decoder, the unmasked ids); default is `source`.
            index: (N,) int64, `mask.flatten().nonzero()`; precomputed by the data loader to avoid a GPU sync.
            visible: (B·M, V) int64, `masking.visible_positions(mask, padding_mask)`; precomputed for the same reason.
            padding_mask: (B, T) bool, True = padding.
            target_padding_mask: Padding mask of `target`, if it differs.
            channel_mask: (B, C) bool, channels set to zero for the student.
            num_targets: Number of scored positions to divide the loss by, such as the total over all micro-batches and ranks
                divided by the number of ranks (method 1.4).
            stats: Compute the moments. On a GPU they take registers, which slows the loss down.

        Raises:
            ValueError: The mask does not fit the model, or views have different numbers of visible positions.
        """
        if mask.ndim != (3 if self.sparse else 2):
            expected = "(B, M, T), M views of each sample" if self.sparse else "(B, T); several views need a decoder"
            raise ValueError(f"mask: found shape {tuple(mask.shape)}, expected {expected}")
        if index is None:
            index = mask.flatten().nonzero().squeeze(1)
        features = self.student.embed(source)
        if (len(mask), mask.shape[-1]) != features.shape[:2]:
            sizes = f"found {(len(mask), mask.shape[-1])} samples and positions, expected {tuple(features.shape[:2])}"
            raise ValueError(f"mask: {sizes}, those of the encoder's features; its positions(size) must return that number")
        layers = self.teacher_layers(
            source if target is None else target,
            # Detached even though the teacher runs without gradients: hooks in it, such as a FLOP counter's, look for them.
            features.detach() if self.shares_features and target is None else None,
            padding_mask if target_padding_mask is None else target_padding_mask,
            None if self.sparse else index,
        )
        student_features = features
        if target is None and not self.sparse:  # else the source is masked already, or only the visible positions are encoded
            student_features = self.student.mask_features(features, mask)
        if channel_mask is not None:
            student_features = student_features.masked_fill(channel_mask.unsqueeze(1), 0)
        predicted = self.predict(source, student_features, mask, index, visible, padding_mask)
        found = data2vec_loss(
            predicted.predictions,
            layers,
            mask,
            padding_mask=padding_mask,
            reduction="mean" if num_targets is None else "sum",
            return_stats=stats,
            return_target_mean=bool(self.cls_weight),
            **self.loss_settings,
        )
        loss, *mean = found if isinstance(found, tuple) else (found,)
        moments = mean.pop(0) if stats else None
        cls_loss = None
        if self.cls_weight:
            cls_loss = self._cls_loss(predicted.extra, *mean)
            if num_targets is not None:
                cls_loss = cls_loss * len(index)
            loss = loss + cls_loss
        if num_targets is not None:
            loss = loss / num_targets
            cls_loss = None if cls_loss is None else cls_loss / num_targets
        return Data2VecOutput(
            loss,
            moments,
            features.detach(),
            predicted.states.detach(),
            layers[-1],
            None if cls_loss is None else cls_loss.detach(),
        )

    if TYPE_CHECKING:
        __call__ = forward  # that of nn.Module takes and returns anything

    def predict(
        self,
        source: Tensor,
        features: Tensor,
        mask: Tensor,
        index: Tensor,
        visible: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Predicted:
        """The student's predictions; arguments as in `forward`, `features` (B, T, C) already masked for the student."""
        if not self.sparse:
            return in_place(self.student, self.head, features, index, padding_mask)
        if visible is None:
            found = visible_positions(mask.cpu().numpy(), None if padding_mask is None else padding_mask.cpu().numpy())
            visible = torch.from_numpy(found).to(mask.device)
        positions = self.student.positions(source.shape[-1])
        # With one axis the mask gives the grid, also for modules whose inputs are neither tokens nor waveforms.
        grid = positions if isinstance(positions, tuple) else (mask.shape[-1],)
        decoder = cast(ConvDecoder, self.head)
        return visible_only(self.student, decoder, features, mask, index, visible, grid, padding_mask)

    def _cls_loss(self, extra: Any, mean: Tensor) -> Tensor:
        """Weighted error of each view's first extra token relative to the mean target (B, C) of its sample (method 4.7)."""
        error = extra[:, 0].to(mean.dtype) - mean.repeat_interleave(len(extra) // len(mean), 0)
        values = errors(error, self.loss_settings["beta"]).sum(1) * self.loss_settings["scale"]
        return self.cls_weight * getattr(values, self.cls_reduction)()

    @torch.no_grad()
    def teacher_layers(
        self,
        inputs: Tensor,
        features: Tensor | None,
        padding_mask: Tensor | None,
        index: Tensor | None = None,
    ) -> list[Tensor]:
        """Results of the teacher's last K layers on the unmasked input, K × (B, T, C).

        With `index`, a teacher with a narrowed last block fills the last result only at these positions.
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

    def update_teacher(self, skip: Tensor | None = None, pairs: Pairs | None = None) -> None:
        """Update the teacher; call once after each successful optimizer step. Arguments are those of `EMATeacher.update`."""
        self.teacher.update(self.student, skip, pairs)


def check_gathers(encoder: Encoder) -> None:
    """Raise ValueError unless the encoder can run on the visible positions alone."""
    if not encoder.gathers:
        name = type(encoder.model).__name__
        why = getattr(encoder, "no_gather", None) or (
            "it adds positions inside its blocks, or in a forward that has no built-in support"
        )
        raise ValueError(
            f"encoder: {name} cannot encode the visible positions alone: {why}; use roberta, modernbert, vit, dinov3_vit, "
            "beit, data2vec2-vision, wav2vec2, data2vec2-audio or another of docs/encoders.md, give a module of your own the "
            "method place(features), or leave the decoder out for data2vec 1.0: head.kind=linear, data.views=null"
        )
