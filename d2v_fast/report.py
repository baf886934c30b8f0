"""d2v-report: one self-contained HTML page about one or more runs, finished or still running."""

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
from d2v_fast.figures import FIGURES
from d2v_fast.files import ALARMS, CONFIG, ENVIRONMENT, LOG, PROBES

POINTS = 400  # per curve; longer curves are binned and drawn as mean and range
COLORS = ("#2563b0", "#d9730d", "#2a8a4a", "#8b45b5", "#c0304f", "#12808f", "#7a6a1f", "#555555")
LARGEST = 1e39  # larger than any fp32 value


@dataclass
class Run:
    """What a run has written so far.

    Attributes:
        name: Folder of the run.
        log: Numeric entries of log.jsonl, by step.
        color: Color of its curves.
        alarms: Steps and messages of alarms.jsonl.
        config: Settings with dotted keys.
        environment: `d2v_fast.diagnostics.environment` at the start of the run.
        warnings: Warnings of the environment report.
        probes: Results of `read_probes`.
        unread: Files left out, with the reason.
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
    """Objects of a .jsonl file by step.

    A partly written line is left out. When a resumed run repeats steps, the later lines replace the earlier ones.
    """
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
        valid = isinstance(probes, list) and all(_is_probe(probe) for probe in probes)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        valid = False
    if not valid:
        raise ConfigError(f"{path}: holds no results of d2v-probe, or damaged ones; move or delete it")
    return probes


def _is_probe(probe: dict[str, Any]) -> bool:
    kinds = {"data": str, "name": str | None, "limit": int, "step": int | None}
    rows = list(probe["results"].values())
    measures = [math.isfinite(value) for row in rows for value in row.values()]
    same = all(row.keys() == rows[0].keys() for row in rows)
    return bool(measures) and all(measures) and same and all(isinstance(probe[key], kind) for key, kind in kinds.items())


def measure(name: str, value: float) -> str:
    """Format a measure of a probe."""
    return f"{value:.3f}" if name == "nats" else f"{value:.1%}"


def parts(run: Path) -> list[Path]:
    """Folders of the parts of a run of several modalities; empty for any other run."""
    logs = [] if (run / LOG).is_file() or not (run / CONFIG).is_file() else sorted(run.glob(f"*/{LOG}"))
    return [log.parent for log in logs]


def read_run(folder: Path, color: str) -> Run:
    """Read a run from its folder; only log.jsonl is required, and other damaged files are listed in `unread`.

    Raises:
        ValueError: log.jsonl is missing or has no complete line yet.
    """
    if not (folder / LOG).is_file():
        raise ValueError(f"{folder}: has no log.jsonl; expected the folder of a run")
    log = [{k: v for k, v in line.items() if _can_be_drawn(v)} for line in read_lines(folder / LOG)]
    if not log:
        raise ValueError(f"{folder}/log.jsonl: no complete line yet; try again after the first step")
    run = Run(str(folder), log, color)

    def read(name: str, how: Callable[[Path], Any]) -> Any:
        try:
            return how(folder / name) if (folder / name).is_file() else None
        except Exception as error:
            run.unread.append(f"{name}: {' '.join(str(error).split())}")

    run.alarms = read(ALARMS, lambda path: _alarms(path, log[-1]["step"])) or []
    run.config = read(CONFIG, lambda path: dict(_flat(load_yaml(path.read_text(encoding="utf-8"))))) or {}
    run.environment, run.warnings = read(ENVIRONMENT, _environment) or ({}, [])
    run.probes = read(PROBES, read_probes) or []
    return run


def _can_be_drawn(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (abs(value) < LARGEST or value != value)


def _alarms(path: Path, last: int) -> list[tuple[int, str]]:
    lines = [line for line in read_lines(path) if line["step"] <= last]  # later ones date from before the run was resumed
    return [(line["step"], str(text)) for line in lines for text in line.get("alarms") or ()]


def _environment(path: Path) -> tuple[dict[str, str], list[str]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__}, expected the output of d2v-doctor")
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
    """Figure `key` of all runs over the step as SVG, with alarms as vertical lines; None if no run has it."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8, "axes.edgecolor": "#999999"}
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
        if FIGURES[key].logarithmic and any(0 < value < np.inf for value in values):  # a log axis needs a positive value
            axis.set_yscale("log")
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
    return target.getvalue()[target.getvalue().index("<svg") :] if values else None


def page(runs: list[Run]) -> str:
    """HTML page of some runs; all text from their files is escaped."""
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("d2v_fast", "."), autoescape=True).get_template("report.html")
    figures = [(figure.title, figure.hint, svg) for key, figure in FIGURES.items() if (svg := curve(runs, key))]
    tables = {}
    for name in ("config", "environment"):
        found = [getattr(run, name) for run in runs]
        keys = list(dict.fromkeys(key for one in found for key in one))
        rows = [(key, [str(one.get(key, "–")) for one in found]) for key in keys]
        same = [(key, values[:1]) for key, values in rows if len(set(values)) == 1]
        tables[name] = [row for row in rows if len(set(row[1])) > 1], same
    probes: dict[str, list] = {}  # by data set, to compare runs
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
    except (ValueError, OverflowError, OSError):  # out of range
        return ""


def main(args: list[str]) -> None:
    """The command d2v-report.

    Raises:
        ValueError: A folder is not a run, matplotlib is missing, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="d2v-report",
        description="Write one HTML page with the curves, alarms, settings and machine of one or more runs, finished or not.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a run; several share each plot.")
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
        raise ValueError(f"{out}: cannot be written, choose another with --out: {error.strerror}") from error
    print(out)
