"""d2v-report: runs as one HTML page, which needs nothing but itself and may be made while they go on."""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d2v_fast import __version__

POINTS = 400  # of a curve; more become the mean, and the range, of their neighbours
COLORS = ("#2563b0", "#d9730d", "#2a8a4a", "#8b45b5", "#c0304f", "#12808f", "#7a6a1f", "#555555")
CURVES = {
    "loss": ("Loss", "May rise while the student learns, as targets get richer."),
    "relative_loss": ("Loss relative to a constant", "1 costs the prediction of each channel's mean, 0 is perfect."),
    "position_share": ("Position's share of the targets", "Of their variance, what position alone explains."),
    "content_loss": ("Loss relative to position", "1 costs the prediction of each position's mean."),
    "target_std": ("Std of targets", "Falls towards 0 when the teacher says the same everywhere."),
    "prediction_std": ("Std of predictions", "Below that of the targets, but far from 0."),
    "feature_std": ("Std of local features", "What the stem hands to the transformer."),
    "feature_variation": ("Variation of local features", "Their std as a share of their size; near 0 the stem is dead."),
    "student_rank": ("Effective rank, student", "Directions that the states use; 1 is a constant."),
    "teacher_rank": ("Effective rank, teacher", "The same for the states that are predicted."),
    "teacher_distance": ("Distance of teacher and student", "Of their weights, relative to the student's."),
    "grad_norm": ("Norm of the gradient", "Before clipping."),
    "gradient_peak": ("Peak of the gradient", "Largest norm since the last point, as a multiple of what was usual before."),
    "update_norm": ("Norm of the update", "What one step changes in the weights."),
    "update_share": ("Relative update", "The same as a share of the weights, scaled to the peak learning rate."),
    "lr": ("Learning rate", ""),
    "ema_decay": ("Decay of the teacher", "As the schedule has it."),
    "teacher_decay": ("Measured decay of the teacher", "What the teacher kept of its distance to the student in one step."),
    "samples_per_s": ("Samples per second", ""),
    "data_wait": ("Wait for data", "Share of the time; near 0 is good."),
}
LOGARITHMIC = {"grad_norm", "gradient_peak", "update_norm", "update_share"}


@dataclass
class Run:
    """What a run has written so far.

    Attributes:
        name: Its folder.
        log: Numbers of log.jsonl, by step.
        alarms: Steps and messages of alarms.jsonl.
        config: Settings as flat keys.
        environment: `d2v_fast.diagnostics.environment`, as of the start.
        color: Of its curves.
    """

    name: str
    log: list[dict[str, float]]
    alarms: list[tuple[int, str]]
    config: dict[str, Any]
    environment: dict[str, Any]
    color: str

    @property
    def last(self) -> dict[str, float]:
        return self.log[-1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file by step; a line that is half written is left out, and steps that a resumed run took again count
    as it took them then."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            continue
        if not 0 <= line["step"] < 2**53:
            continue
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def read_run(folder: Path, color: str) -> Run:
    """A run from its folder; only log.jsonl has to be there.

    Raises:
        ValueError: It is not, or has no complete line yet.
    """
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder}: no log.jsonl in it, expected the folder of a run")
    log = [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in read_lines(folder / "log.jsonl")]
    if not log:
        raise ValueError(f"{folder}/log.jsonl: no complete line yet; try again after the first step")
    alarms = [(line["step"], text) for line in read_lines(folder / "alarms.jsonl") for text in line.get("alarms", ())]
    config, environment = folder / "config.yaml", folder / "environment.json"
    return Run(
        str(folder),
        log,
        [alarm for alarm in alarms if alarm[0] <= log[-1]["step"]],  # later ones are from before the run was resumed
        dict(_flat(yaml.safe_load(config.read_text(encoding="utf-8")))) if config.exists() else {},
        json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        color,
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> Any:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def curve(runs: list[Run], key: str) -> str | None:
    """The figure `key` of all runs over the step as SVG, alarms as vertical lines; None where no run has it."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8, "axes.edgecolor": "#999999"}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "xtick.color": "#555555", "ytick.color": "#555555"}
    with plt.rc_context(settings):
        figure, axis = plt.subplots(figsize=(4.4, 2.1))
        figure.subplots_adjust(left=0.12, right=0.98, top=0.95, bottom=0.14)
        for run in runs:
            points = np.array([(line["step"], line[key]) for line in run.log if key in line], float).reshape(-1, 2)
            parts = np.array_split(points, min(len(points), POINTS) or 1)
            if len(points) > POINTS:
                steps, low, high = zip(*((p[:, 0].mean(), p[:, 1].min(), p[:, 1].max()) for p in parts), strict=True)
                axis.fill_between(steps, low, high, color=run.color, alpha=0.2, linewidth=0)
            means = np.array([part.mean(0) for part in parts if len(part)]).reshape(-1, 2)
            axis.plot(*means.T, color=run.color, linewidth=1.2, marker="." if len(means) == 1 else None)
            for step, _ in run.alarms:
                axis.axvline(step, color=run.color, linewidth=0.8, linestyle=":")
        values = [line[key] for run in runs for line in run.log if key in line]
        if key in LOGARITHMIC and any(0 < value < np.inf for value in values):  # others have no logarithm
            axis.set_yscale("log")
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
    return target.getvalue()[target.getvalue().index("<svg") :] if values else None


def page(runs: list[Run]) -> str:
    """The page of some runs; whatever comes from their files is escaped."""
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("d2v_fast", "."), autoescape=True).get_template("report.html")
    figures = [(*CURVES[key], svg) for key in CURVES if (svg := curve(runs, key))]
    tables = {}
    for name in ("config", "environment"):
        found = [getattr(run, name) for run in runs]
        keys = list(dict.fromkeys(key for one in found for key in one if key != "warnings"))
        rows = [(key, [str(one.get(key, "–")) for one in found]) for key in keys]
        same = [(key, values[:1]) for key, values in rows if len(set(values)) == 1]
        tables[name] = [row for row in rows if len(set(row[1])) > 1], same
    return template.render(
        runs=runs,
        figures=figures,
        tables=tables,
        version=__version__,
        now=time.strftime("%Y-%m-%d %H:%M:%S"),
        when=lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)),
    )


def main(args: list[str]) -> None:
    """The command: write the page of some runs.

    Raises:
        ValueError: A folder without a run, or no matplotlib.
    """
    parser = argparse.ArgumentParser(
        prog="d2v-report",
        description="One HTML page with the curves, alarms, settings and machine of one or more runs; they may still go on.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a run; several are laid over each other.")
    parser.add_argument("--out", type=Path, help="Where to write; default: report.html in the first run's folder.")
    arguments = parser.parse_args(args)
    runs = [read_run(folder, COLORS[i % len(COLORS)]) for i, folder in enumerate(arguments.runs)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the curves need matplotlib: pip install 'd2v-fast[report]'") from None
    out = arguments.out or arguments.runs[0] / "report.html"
    out.write_text(page(runs), encoding="utf-8")
    print(out)
