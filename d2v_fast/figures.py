"""The figures of a run, one record each for the monitor, d2v-report, the model card and docs/health.md. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_fast.config import CollapseConfig


@dataclass(frozen=True)
class Rule:
    """The monitor's rule for a figure.

    Attributes:
        bound: The setting of `collapse` that holds the bound.
        least: Whether the bound is a minimum; otherwise it is a maximum.
        meaning: Meaning of a broken rule, as worded in the alarm.
        remedy: What to try.
        unless: Bounds whose breach already explains a breach of this one.
        at_once: Whether the rule applies from the first step, even before `collapse.after`.
    """

    bound: str
    least: bool
    meaning: str
    remedy: str
    unless: tuple[str, ...] = ()
    at_once: bool = False

    def broken(self, value: float, config: CollapseConfig) -> bool:
        """Whether the value is on the wrong side of its bound. NaN is not, and a bound of 0 disables the rule."""
        bound = getattr(config, self.bound)
        return bound > 0 and (value < bound if self.least else value > bound)


@dataclass(frozen=True)
class Figure:
    """A figure in the log.

    Attributes:
        title: Title of its curve, and its name in docs/health.md.
        hint: How to read it.
        rule: The monitor's rule for it.
        logarithmic: Whether its curve has a logarithmic axis.
        card: Whether the model card lists it.
    """

    title: str
    hint: str = ""
    rule: Rule | None = None
    logarithmic: bool = False
    card: bool = False


SLOWER = "a lower optimizer.lr, a longer schedule.warmup or clipping by train.clip_norm"
FEW = "states shrink to a few directions"
FIGURES = {
    "loss": Figure("Loss", "May rise while the student learns, as targets get richer.", card=True),
    "cls_loss": Figure("Loss of CLS", "The part of the loss that comes from the class token."),
    "relative_loss": Figure(
        "Loss relative to a constant",
        "1 is the loss of predicting each channel's mean; 0 is perfect.",
        Rule(
            "divergence",
            False,
            "predictions are worse than a constant, the run diverges",
            f"try {SLOWER}",
            unless=("target_std", "update"),
        ),
    ),
    "position_share": Figure("Position share of the targets", "Share of their variance that position alone explains."),
    "content_loss": Figure(
        "Loss relative to position",
        "1 is the loss of predicting each position's mean.",
        Rule(
            "leak",
            True,
            "the loss is suspiciously low, as if the student saw what it predicts",
            "check that the mask reaches the student and that samples are not nearly identical, try a higher mask.prob",
            unless=("target_std",),
        ),
    ),
    "target_std": Figure(
        "Std of targets",
        "Falls towards 0 when the teacher's output becomes constant.",
        Rule("target_std", True, "targets are becoming constant", f"try a higher ema.start, {SLOWER}"),
        card=True,
    ),
    "prediction_std": Figure(
        "Std of predictions",
        "Should be below that of the targets, but far from 0.",
        Rule("prediction_std", True, "predictions are becoming constant", f"try {SLOWER}"),
        card=True,
    ),
    "feature_std": Figure("Std of local features", "Of the stem's output, the input of the transformer.", card=True),
    "feature_variation": Figure(
        "Variation of local features",
        "Std relative to root mean square; near 0 the stem is dead.",
        Rule(
            "variation",
            True,
            "the local features hardly differ, the stem is dead or dying",
            "check the data (silence? one colour?), try head.zero_init=true or a lower stem learning rate by "
            "optimizer.lr_scale",
        ),
    ),
    "student_rank": Figure(
        "Effective rank, student",
        "Number of directions that the states use; 1 means constant.",
        Rule("rank", True, f"the student's {FEW}", f"try {SLOWER}"),
    ),
    "teacher_rank": Figure(
        "Effective rank, teacher",
        "The same for the teacher's states, which are predicted.",
        Rule("rank", True, f"the teacher's {FEW}", f"try a higher ema.start, {SLOWER}"),
    ),
    "teacher_distance": Figure(
        "Distance between teacher and student",
        "Of their weights, relative to the norm of the student's.",
        Rule(
            "distance", True, "the teacher is a copy of the student", "try a higher ema.start and ema.end", unless=("update",)
        ),
    ),
    "grad_norm": Figure("Gradient norm", "Before clipping.", logarithmic=True),
    "gradient_peak": Figure(
        "Gradient peak",
        "Largest norm since the last point, as a multiple of the usual norm before.",
        Rule(
            "gradient",
            False,
            "the gradient explodes",
            f"check the data for samples without content (silence, one colour), try {SLOWER}",
            at_once=True,
        ),
        logarithmic=True,
    ),
    "update_norm": Figure("Update norm", "Change of the weights in one step.", logarithmic=True),
    "update_share": Figure(
        "Relative update",
        "The same relative to the norm of the weights, scaled to the peak learning rate.",
        Rule(
            "update",
            True,
            "the student hardly moves",
            "try a higher optimizer.lr; if it is high enough, check loss.scale and whether the gradient exploded before",
        ),
        logarithmic=True,
    ),
    "lr": Figure("Learning rate", card=True),
    "ema_decay": Figure("Teacher decay", "As scheduled.", card=True),
    "teacher_decay": Figure(
        "Measured teacher decay",
        "Share of its distance to the student that the teacher keeps in one step.",
        Rule(
            "decay",
            False,
            "the teacher does not move",
            "try a lower ema.start and ema.end; if they are below 1, check that the teacher is updated after each step",
            unless=("update",),
        ),
    ),
    "distinct_samples": Figure(
        "Share of distinct samples",
        "Of a few that are compared before the first step.",
        Rule(
            "distinct",
            True,
            "many samples are the same",
            "check the data for duplicate files and for files with the same content",
            at_once=True,
        ),
    ),
    "probe_knn": Figure("k-NN on the teacher", "Accuracy on the labelled samples of train.probe_data."),
    "samples_per_s": Figure("Samples per second"),
    "data_wait": Figure("Waiting for data", "Share of the time; near 0 is good."),
}
RULES = {name: figure.rule for name, figure in FIGURES.items() if figure.rule}
