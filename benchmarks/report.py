"""Tables and plots from the JSON that `pytest benchmarks --benchmark-json=FILE` writes, and the regression gate.

python -m benchmarks.report FILE                   the table in Markdown
python -m benchmarks.report FILE --plot FILE.svg   and a plot of it
python -m benchmarks.report FILE --against OLD     exit code 1 if a ratio fell more than 15 % below that of OLD
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

BASELINES = ("eager", "compile", "gather first", "gather first, compile")
TOLERANCE = 0.15


def rows(path: Path) -> list[dict]:
    return [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]


def ratios(row: dict) -> dict[str, float]:
    """How many times longer each baseline takes."""
    return {name: row["seconds"][name] / row["seconds"]["fused"] for name in BASELINES}


def share(row: dict, limit: str) -> float:
    """Achieved part of a bandwidth measured in the same run: `copy_bandwidth` of one long copy, `row_bandwidth` of the rows."""
    return row["bytes"] / row["seconds"]["fused"] / row[limit]


def machine(path: Path) -> str:
    info = json.loads(path.read_text())
    about = info["machine_info"]
    hardware = about.get("gpu") or f"{about['cpu']['brand_raw']}, {about['threads']} threads"
    versions = ", ".join(f"{name} {about[name]}" for name in ("driver", "torch", "triton") if name in about)
    return f"{hardware}; {versions}; commit {info['commit_info']['id'][:7]}"


def table(path: Path) -> str:
    columns = "case, dtype, ms, GB/s, of copy, of row copy, memory beyond gradient, × eager, × compile, "
    columns += "× gathered, × gathered compile"
    lines = [f"| {columns.replace(', ', ' | ')} |", "|---" * (columns.count(",") + 1) + "|"]
    for row in rows(path):
        seconds = row["seconds"]["fused"]
        extra = (row["extra_bytes"]["fused"] - row["gradient_bytes"]) / 2**20
        cells = [
            row["case"],
            row["dtype"].replace("float32", "fp32").replace("bfloat16", "bf16"),
            f"{seconds * 1e3:.2f}",
            f"{row['bytes'] / seconds / 1e9:.1f}",
            f"{share(row, 'copy_bandwidth'):.0%}",
            f"{share(row, 'row_bandwidth'):.0%}" if "audio" not in row["case"] else "–",
            f"{extra:.1f} MB",
            *(f"{ratio:.1f}" for ratio in ratios(row).values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        chosen = [row for row in rows(path) if row["dtype"] == dtype]
        for i, name in enumerate(BASELINES):
            heights = [ratios(row)[name] for row in chosen]
            axis.barh([y + (1.5 - i) * 0.2 for y in range(len(chosen))], heights, 0.2, label=name)
        axis.set(title=dtype, xscale="log", xlabel="times longer than the fused loss")
        axis.set_yticks(range(len(chosen)), [row["case"] for row in chosen])
        axis.axvline(1, color="black", linewidth=0.8)
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle(f"Loss and gradient on {machine(path)}", fontsize=9)
    figure.savefig(target)


def regressions(new: Path, old: Path) -> list[str]:
    """Ratios that fell, as sentences; ratios, because the speed of a machine drifts."""
    committed = {(row["case"], row["dtype"]): row for row in rows(old)}
    found = []
    for row in rows(new):
        before = committed.get((row["case"], row["dtype"]))
        for name, ratio in ratios(row).items() if before else ():
            limit = ratios(before)[name] * (1 - TOLERANCE)
            if ratio < limit:
                was = ratios(before)[name]
                found.append(f"{row['case']} {row['dtype']}: {ratio:.2f} × {name}, committed {was:.2f}, limit {limit:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    print(f"{machine(arguments.results)}\n\n{table(arguments.results)}")
    if arguments.plot:
        plot(arguments.results, arguments.plot)
    if arguments.against:
        found = regressions(arguments.results, arguments.against)
        print("\n".join(["", *(found or ["no ratio fell more than 15 %"])]))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
