"""d2v-report: runs as one HTML page, which needs nothing but itself and may be made while they go on."""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2v_fast import __version__
from d2v_fast.config import ConfigError, load_yaml

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
    "probe_knn": ("k-NN on the teacher", "Accuracy on the labelled samples of train.probe_data."),
    "samples_per_s": ("Samples per second", ""),
    "data_wait": ("Wait for data", "Share of the time; near 0 is good."),
}
LARGEST = 1e39  # no figure of a run in fp32 is larger
LOGARITHMIC = {"grad_norm", "gradient_peak", "update_norm", "update_share"}


@dataclass
class Run:
    """What a run has written so far.

    Attributes:
        name: Its folder.
        log: Numbers of log.jsonl, by step.
        color: Of its curves.
        alarms: Steps and messages of alarms.jsonl.
        config: Settings as flat keys.
        environment: `d2v_fast.diagnostics.environment`, as of the start.
        warnings: Those of the environment.
        probes: As `read_probes` gives them.
        unread: Why a file was left out.
    """

    name: str
    log: list[dict[str, float]]
    color: str
    alarms: list[tuple[int, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

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


def read_probes(path: Path) -> list[dict[str, Any]]:
    """The results in a probe.json: `data`, `name`, `limit`, `step` and, by encoder and measure, `results`.

    Raises:
        ConfigError: The file holds something else.
    """
    if not path.is_file():
        return []
    try:
        probes = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(probes, list) and all(_is_probe(probe) for probe in probes)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        whole = False
    if not whole:
        raise ConfigError(f"{path}: holds no results of d2v-probe, or damaged ones; move it away")
    return probes


def _is_probe(probe: dict[str, Any]) -> bool:
    kinds = {"data": str, "name": str | None, "limit": int, "step": int | None}
    rows = list(probe["results"].values())
    measures = [math.isfinite(value) for row in rows for value in row.values()]
    same = all(row.keys() == rows[0].keys() for row in rows)
    return bool(measures) and all(measures) and same and all(isinstance(probe[key], kind) for key, kind in kinds.items())


def measure(name: str, value: float) -> str:
    """A measure of a probe as it is shown."""
    return f"{value:.3f}" if name == "nats" else f"{value:.1%}"


def parts(run: Path) -> list[Path]:
    """Folders of the parts of a run of several modalities; none of another run."""
    logs = [] if (run / "log.jsonl").is_file() or not (run / "config.yaml").is_file() else sorted(run.glob("*/log.jsonl"))
    return [log.parent for log in logs]


def read_run(folder: Path, color: str) -> Run:
    """A run from its folder; only log.jsonl has to be there, and what is damaged of the rest is named in `unread`.

    Raises:
        ValueError: It is not, or has no complete line yet.
    """
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder}: no log.jsonl in it, expected the folder of a run")
    log = [{k: v for k, v in line.items() if _can_be_drawn(v)} for line in read_lines(folder / "log.jsonl")]
    if not log:
        raise ValueError(f"{folder}/log.jsonl: no complete line yet; try again after the first step")
    run = Run(str(folder), log, color)

    def read(name: str, how: Callable[[Path], Any]) -> Any:
        try:
            return how(folder / name) if (folder / name).is_file() else None
        except Exception as error:
            run.unread.append(f"{name}: {' '.join(str(error).split())}")

    run.alarms = read("alarms.jsonl", lambda path: _alarms(path, log[-1]["step"])) or []
    run.config = read("config.yaml", lambda path: dict(_flat(load_yaml(path.read_text(encoding="utf-8"))))) or {}
    run.environment, run.warnings = read("environment.json", _environment) or ({}, [])
    run.probes = read("probe.json", read_probes) or []
    return run


def _can_be_drawn(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (abs(value) < LARGEST or value != value)


def _alarms(path: Path, last: int) -> list[tuple[int, str]]:
    lines = [line for line in read_lines(path) if line["step"] <= last]  # later ones are from before the run was resumed
    return [(line["step"], str(text)) for line in lines for text in line.get("alarms") or ()]


def _environment(path: Path) -> tuple[dict[str, str], list[str]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__}, expected what d2v-doctor prints")
    return {k: str(v) for k, v in found.items() if k != "warnings"}, [str(text) for text in found.get("warnings") or ()]


def _flat(settings: Any, prefix: str = "") -> Any:
    if not isinstance(settings, dict):
        raise ValueError(f"found {type(settings).__name__}, expected settings")
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
        keys = list(dict.fromkeys(key for one in found for key in one))
        rows = [(key, [str(one.get(key, "–")) for one in found]) for key in keys]
        same = [(key, values[:1]) for key, values in rows if len(set(values)) == 1]
        tables[name] = [row for row in rows if len(set(row[1])) > 1], same
    probes: dict[str, list] = {}  # the same data side by side
    for run in runs:
        for probe in run.probes:
            title = " ".join(filter(None, (probe["data"], probe["name"]))) + f", at most {probe['limit']}"
            probes.setdefault(title, []).append((run, probe["step"], probe["results"]))
    return template.render(
        runs=runs,
        figures=figures,
        tables=tables,
        probes=probes,
        measure=measure,
        version=__version__,
        when=_clock,
        now=time.time(),
    )


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # no such day
        return ""


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
    folders = [folder for run in arguments.runs for folder in parts(run) or [run]]
    runs = [read_run(folder, COLORS[i % len(COLORS)]) for i, folder in enumerate(folders)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the curves need matplotlib: pip install 'd2v-fast[report]'") from None
    out = arguments.out or arguments.runs[0] / "report.html"
    try:
        out.write_text(page(runs), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{out}: cannot be written, --out names another place: {error.strerror}") from error
    print(out)
