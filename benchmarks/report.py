"""Tables and plots from the JSON that `pytest benchmarks --benchmark-json=FILE` writes, and the regression gate.

python -m benchmarks.report FILE                   the tables in Markdown
python -m benchmarks.report FILE --plot FILE.svg   and a plot
python -m benchmarks.report FILE --against OLD     exit code 1 if a ratio fell more than 15 % below that of OLD
python -m benchmarks.report --update PAGE.md ...   rewrite the tables of a page, each between two markers:
                                                   <!-- FILE.json TABLE --> ... <!-- end -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
UNMEASURED = "Not yet measured."
BASELINES = {  # variants compared with "fused", by test
    "test_ema": ("fused, unlisted", "state dict loop", "in-place loop", "foreach mul + add"),
    "test_loss": ("published", "published, compile", "gather first", "gather first, compile", "eager", "compile"),
    "test_step": ("today", "an hour's work"),
    "test_step_2": ("1.0 today", "1.0 fused", "2.0 as released, fp32", "2.0 as released, bf16"),
}
TOLERANCE = 0.15
SLOW = 0.75  # of the best rate seen on the same hardware; below it, something else was running


def read(path: Path) -> dict:
    """The contents of a result file.

    Raises:
        SystemExit: The file comes from a dry run, whose times mean nothing.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["machine_info"].get("dry_run"):
        sys.exit(f"{path}: written by a dry run, which measures nothing; run make gpu on a machine with a GPU")
    return found


def rows(path: Path, test: str) -> list[dict]:
    """The recorded results of a test, one dict per case."""
    return [entry["extra_info"] for entry in read(path)["benchmarks"] if entry["name"].partition("[")[0] == test]


def ratios(row: dict, test: str, seconds: str = "seconds") -> dict[str, float]:
    """Time of each baseline in the file relative to "fused", per target if the numbers of targets differ."""
    times = row[seconds]
    if isinstance(row.get("targets"), dict):
        times = {name: time / row["targets"][name] for name, time in times.items()}
    return {name: times[name] / times["fused"] for name in BASELINES[test] if name in times}


def share(row: dict, limit: str) -> float:
    """Achieved share of a bandwidth from the same run: `copy_bandwidth` of one long copy or `row_bandwidth` of row copies."""
    return row["bytes"] / row["seconds"]["fused"] / row[limit]


def hardware(about: dict) -> str:
    return about.get("gpu") or f"{about['cpu']['brand_raw']}, {about['threads']} threads"


def found_rates(about: dict) -> dict[str, float]:
    """The machine's rates in a run: the lower ones of those before its first case and after its last."""
    found = about.get("rates", [])
    return {name: min(rates[name] for rates in found) for name in ("copy", "fp32", "bf16") if found}


def slow_rates(path: Path) -> list[str]:
    """Rates of a run far below the best of all committed runs on the same hardware, as text."""

    def key(about: dict) -> object:  # processors of one name may differ in their caches and instructions
        return about.get("gpu") or (about["cpu"], about["threads"])

    about = read(path)["machine_info"]
    others = [read(file)["machine_info"] for file in RESULTS.glob("*.json")]
    same = [rates for other in others if key(other) == key(about) for rates in other.get("rates", [])]
    best = {name: max((rates[name] for rates in same), default=0.0) for name in found_rates(about)}
    return [
        f"{name} {rate / best[name]:.0%} of the best seen here"
        for name, rate in found_rates(about).items()
        if rate < SLOW * best[name]
    ]


def machine(path: Path) -> str:
    """What produced a file: hardware, its rates and whether they are unusually low, versions, commit."""
    info = read(path)
    about = info["machine_info"]
    parts = [hardware(about)]
    if rates := found_rates(about):
        products = f"products {rates['fp32'] / 1e9:.0f} (fp32) and {rates['bf16'] / 1e9:.0f} (bf16) GFLOP/s"
        parts.append(f"copy {rates['copy'] / 1e9:.0f} GB/s, {products}, load before {about['rates'][0]['load']:.1f}")
        if slow := slow_rates(path):
            parts.append(f"**slow run**: {', '.join(slow)}")
    parts.append(", ".join(f"{name} {about[name]}" for name in ("driver", "torch", "triton") if name in about))
    changed = " with changes" if info["commit_info"].get("dirty") else ""
    return "; ".join([*parts, f"commit {info['commit_info']['id'][:7]}{changed}"])


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *lines])


def reads_rows(row: dict) -> bool:
    """Whether the norm of the case reads only masked rows."""
    return row.get("norm", "instance" if "audio" in row["case"] else "layer") == "layer"


def loss_table(path: Path, seconds: str = "seconds") -> str:
    """Loss and gradient. Other times than `seconds` come without shares of the bandwidth, which caches or launches distort."""
    found = [row for row in rows(path, "test_loss") if seconds in row]
    if not found:
        return ""
    compared, main = list(ratios(found[0], "test_loss")), seconds == "seconds"
    columns = ["case", "dtype", "ms", "GB/s", *(["of copy", "of row copy", "memory beyond gradient"] if main else [])]
    columns += [f"× {name}" for name in compared]
    lines = []
    for row in found:
        extra = (row["extra_bytes"]["fused"] - row["gradient_bytes"]) / 2**20
        shares = [
            f"{share(row, 'copy_bandwidth'):.0%}",
            f"{share(row, 'row_bandwidth'):.0%}" if reads_rows(row) else "–",
            f"{extra:.1f} MB",
        ]
        lines.append(
            [
                row["case"],
                row["dtype"].replace("float32", "fp32").replace("bfloat16", "bf16"),
                f"{row[seconds]['fused'] * 1e3:.3g}",
                f"{row['bytes'] / row[seconds]['fused'] / 1e9:.3g}",
                *(shares if main else []),
                *(f"{ratio:.1f}" for ratio in ratios(row, "test_loss", seconds).values()),
            ]
        )
    return markdown(columns, lines)


def reused_loss_table(path: Path) -> str:
    """With one input for all calls, on a CPU."""
    return loss_table(path, "seconds_reused")


def called_loss_table(path: Path) -> str:
    """With the time of launches, on a GPU."""
    return loss_table(path, "seconds_called")


def memory(row: dict, name: str) -> str:
    """Peak memory that a step adds, as text."""
    extra = row["extra_bytes"]
    return f"{extra[name] / 2**30:.1f} GB" if name in extra else "–"


def step_table(path: Path) -> str:
    lines = []
    for row in rows(path, "test_step"):
        for name, seconds in row["seconds"].items():
            cells = [
                row["case"],
                name,
                f"{seconds * 1e3:.0f}",
                f"{row['samples'] / seconds:.1f}",
                f"{row['targets'] / seconds:.0f}",
                f"{row['flops'][name] / seconds / row['matmul_rate']:.0%}",
                memory(row, name),
                f"{ratios(row, 'test_step')[name]:.1f}" if name != "fused" else "",
            ]
            lines.append(cells)
    columns = ["case", "step", "ms", "samples/s", "masked targets/s", "of bf16 matmul", "memory", "× fused"]
    return markdown(columns, lines)


def step_2_table(path: Path) -> str:
    lines = []
    for row in rows(path, "test_step_2"):
        rate = {name: row["targets"][name] / seconds for name, seconds in row["seconds"].items()}
        for name, seconds in row["seconds"].items():
            cells = [
                row["case"],
                name.replace("fused", "2.0 fused") if name == "fused" else name,
                f"{seconds * 1e3:.0f}",
                f"{rate[name]:.0f}",
                f"{row['flops'][name] / seconds / row['matmul_rate']:.0%}",
                memory(row, name),
                f"{rate['fused'] / rate[name]:.1f}" if name != "fused" else "",
            ]
            lines.append(cells)
    columns = ["case", "step", "ms", "masked targets/s", "of bf16 matmul", "memory", "targets/s of 2.0 fused, ×"]
    return markdown(columns, lines)


def targets_table(path: Path) -> str:
    """Masked targets per second, one line per case. Ratios are within one run; that with 1.0 gives the rate of 2.0 fused."""
    baselines = ("1.0 today", "1.0 fused", "2.0 as released, bf16")
    rates: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for row in rows(path, "test_step_2"):
        found = {name: row["targets"][name] / seconds for name, seconds in row["seconds"].items()}
        rates[row["case"]] = {**found, **rates.get(row["case"], {})}
        ratios.setdefault(row["case"], {}).update({name: found["fused"] / found[name] for name in baselines if name in found})
    shown = ("1.0 today", "1.0 fused", "fused")
    cells = [
        [case, *(f"{rates[case][name]:.0f}" for name in shown), *(f"{ratios[case][name]:.1f}" for name in baselines)]
        for case in rates
    ]
    return markdown(["masked targets/s", *shown[:-1], "2.0 fused", *(f"× {name}" for name in baselines)], cells)


def breakdown_table(path: Path) -> str:
    """Milliseconds of each part of a step; backward covers student, features and head together."""
    parts = ["embed", "teacher", "student", "head", "loss", "backward", "optimizer", "EMA"]
    lines = [
        [row["case"], name, *(f"{seconds[part] * 1e3:.1f}" for part in parts)]
        for row in rows(path, "test_step") + rows(path, "test_step_2")
        for name, seconds in row["parts"].items()
    ]
    return markdown(["ms", "step", *parts], lines) if lines else ""


def parts_table(path: Path) -> str:
    found = rows(path, "test_parts")
    columns = list(dict.fromkeys(part for row in found for part in row["parts"]))
    worth = [{part: f"{pair['without'] / pair['all'] - 1:+.0%}" for part, pair in row["parts"].items()} for row in found]
    lines = [[row["case"], *(parts.get(part, "–") for part in columns)] for row, parts in zip(found, worth, strict=True)]
    return markdown(["step without", *columns], lines)


def splicing_table(path: Path) -> str:
    lines = [
        [row["case"], *(f"{row['seconds'][way] * 1e3:.0f}" for way in ("in pieces", "whole")), f"{row['overhead']:+.1%}"]
        for row in rows(path, "test_splicing")
    ]
    return markdown(["case", "ms in pieces", "ms whole", "overhead"], lines)


def ema_table(path: Path) -> str:
    found, lines = rows(path, "test_ema"), []
    for row in found:
        seconds = row["seconds"]["fused"]
        cells = [
            row["case"],
            f"{seconds * 1e3:.1f}",
            f"{row['bytes'] / seconds / 1e9:.1f}",
            f"{share(row, 'copy_bandwidth'):.0%}",
        ]
        lines.append(cells + [f"{ratio:.1f}" for ratio in ratios(row, "test_ema").values()])
    return markdown(["case", "ms", "GB/s", "of copy", *(f"× {name}" for name in ratios(found[0], "test_ema"))], lines)


def monitor_table(path: Path) -> str:
    lines = []
    for row in rows(path, "test_monitor"):
        step, line = row["seconds_a_step"], row["seconds_a_line"]
        share = line / row["log_every"] / step
        lines.append([row["case"], f"{step * 1e3:.0f}", f"{line * 1e3:.1f}", str(row["log_every"]), f"{share:.2%}"])
    return markdown(["run", "ms per step", "ms per log line", "steps per log line", "monitor's share"], lines)


def corpora_table(path: Path) -> str:
    """The cost of reading a corpus, measured by benchmarks/corpora.py."""
    found = [(row, row["figure"]) for row in rows(path, "corpora")]
    lines = [[row["case"], f"{x:,.0f}" if x >= 100 else f"{x:.3g}", row["unit"], row["aim"]] for row, x in found]
    return markdown(["what", "figure", "unit", "aim"], lines)


# The kernels in the table of docs/speed.md: the large ones of the published recipes.
KERNELS_SHOWN = (
    *("text", "text, large", "vision", "vision, huge", "audio", "audio, 5 s"),
    *("vision, 16 views", "audio, 8 views", "text, 8 views", "text, 8 views, layer"),
    *("image decoder, base", "audio decoder", "audio positions, base"),
)
KERNELS_SMALL = ("_order_kernel", "_channel_stats_kernel", "_target_mean_kernel", "_finish_kernel", "_scale_kernel")


def kernel_figure(row: dict, name: str) -> str:
    """A figure as text; a dash for an unrolled loop and for a kernel that was not compiled for this GPU."""
    return "–" if name not in row or (name == "loop" and not row[name]) else str(row[name])


def kernels_table(path: Path, everything: bool = False) -> str:
    """Resources of the GPU kernels, as benchmarks/kernels.py compiles them; one figure if it is the same for all GPUs."""
    kernels: dict[tuple, dict[int, dict]] = {}
    for row in rows(path, "kernels"):
        small = row["kernel"] in KERNELS_SMALL or row["turned"] or (row["stats"] and row["case"] != "text")
        if everything or (row["case"] in KERNELS_SHOWN and not small):
            key = row["case"], row["kernel"].strip("_").removesuffix("_kernel"), row["stats"], row["turned"]
            kernels.setdefault(key, {})[row["arch"]] = row
    architectures = sorted({arch for found in kernels.values() for arch in found})
    lines = []
    for (case, kernel, stats, turned), found in kernels.items():
        values = [[kernel_figure(found.get(arch, {}), name) for arch in architectures] for name in KERNEL_FIGURES]
        cells = [each[0] if len(set(each)) == 1 else " / ".join(each) for each in values]
        lines.append([f"{case}{', statistics' * stats}{', input gradient' * turned}", kernel, *cells])
    return markdown(["recipe", "kernel", *KERNEL_FIGURES.values()], lines)


KERNEL_FIGURES = dict(
    warps="warps", registers="registers", shared="shared memory, B", spills="spills, B", loop="instructions per loop"
)


def calls_table(path: Path, before: Path | None = None) -> str:
    """Calls of the loss and their main kernel on sm_90, before → after.

    Compares NAME-before.json with NAME.json, or all calls of two given files.
    """
    files = before or path.with_name(f"{path.stem}-before{path.suffix}"), path
    if not files[0].exists():
        return ""
    columns = dict(forward="launches, forward", backward="backward", MB="MB") | KERNEL_FIGURES
    then, now = found = [calls(file) for file in files]
    lines = []
    for case, stats in now:
        shown = before or (case in KERNELS_SHOWN and (case == "text" or not stats))
        if shown and (case, stats) in then:
            pairs = [dict.fromkeys(each[case, stats][name] for each in found) for name in columns]
            lines.append([f"{case}{', statistics' * stats}", *map(" → ".join, pairs)])
    return markdown(["recipe", *columns.values()], lines) if lines else ""


def calls(path: Path) -> dict[tuple, dict[str, str]]:
    """Figures of each call of the loss and of its main kernel on sm_90, as text, by recipe and statistics.

    A kernel that several recipes share is recorded under the first of them; the other recipes are left out.
    """
    recorded = {(row["case"], row["stats"]): row for row in rows(path, "calls")}
    found = {}
    for row in rows(path, "kernels"):
        key = row["case"], row["stats"]
        if row["arch"] == 90 and key in recorded and row["kernel"] not in KERNELS_SMALL:
            call = recorded[key]
            found[key] = {name: str(call[name]) for name in ("forward", "backward")} | dict(MB=f"{call['bytes'] / 1e6:.1f}")
            found[key] |= {name: kernel_figure(row, name) for name in KERNEL_FIGURES}
    return found


TABLES = {
    "calls": [calls_table],
    "corpora": [corpora_table],
    "kernels": [kernels_table],
    "test_ema": [ema_table],
    "test_loss": [loss_table, reused_loss_table, called_loss_table],
    "test_monitor": [monitor_table],
    "test_step": [step_table, breakdown_table],
    "test_step_2": [step_2_table, breakdown_table],
    "test_parts": [parts_table],
    "test_splicing": [splicing_table],
}
NAMED = {each.__name__.removesuffix("_table"): each for tables in TABLES.values() for each in (*tables, targets_table)}
NAMED["machine"] = machine


def updated(page: str) -> str:
    """The page with each table regenerated from the file that its first marker names; `UNMEASURED` where there is none.

    Raises:
        KeyError: A marker names an unknown table.
    """

    def table(mark: re.Match) -> str:
        make, path = NAMED[mark[3]], RESULTS / mark[2]
        return f"{mark[1]}\n{make(path) if path.exists() else UNMEASURED}\n{mark[4]}"

    return re.sub(r"(<!-- (\S+\.json) (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)


def plot_loss(path: Path, plt: Any) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    names = list(ratios(rows(path, "test_loss")[0], "test_loss"))
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        chosen = [row for row in rows(path, "test_loss") if row["dtype"] == dtype]
        for i, name in enumerate(names):
            heights = [ratios(row, "test_loss")[name] for row in chosen]
            width = 0.8 / len(names)
            axis.barh([y + ((len(names) - 1) / 2 - i) * width for y in range(len(chosen))], heights, width, label=name)
        axis.set(title=dtype, xscale="log", xlabel="times longer than the fused loss")
        axis.set_yticks(range(len(chosen)), [row["case"] for row in chosen])
        axis.axvline(1, color="black", linewidth=0.8)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.suptitle(f"Loss and gradient on {machine(path)}", fontsize=9)
    return figure


def plot_sweep(path: Path, plt: Any) -> Any:
    found = rows(path, "test_sweep")
    figure, axes = plt.subplots(1, len(found), figsize=(11, 3.5), layout="constrained")
    for axis, row in zip(axes, found, strict=True):
        sizes = [int(size) for size in row["seconds"]]
        axis.plot(sizes, [seconds * 1e3 for seconds in row["seconds"].values()], marker="o")
        axis.set(xlabel=row["axis"], ylabel="ms", ylim=(0, None), xlim=(0, None))
    figure.suptitle(f"A fused step of text as one size grows, on {machine(path)}", fontsize=9)
    return figure


PLOTS = {"test_loss": plot_loss, "test_sweep": plot_sweep}


def plot(path: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    draw = next(draw for test, draw in PLOTS.items() if rows(path, test))
    draw(path, plt).savefig(target)


def regressions(new: Path, old: Path) -> list[str]:
    """Ratios that fell, as text; ratios rather than times, because the machine's speed drifts."""
    found = []
    for test in BASELINES:
        for seconds in ("seconds", "seconds_reused", "seconds_called"):
            committed: dict[tuple, float] = {
                (row["case"], row.get("dtype"), name): ratio
                for row in rows(old, test)
                if seconds in row
                for name, ratio in ratios(row, test, seconds).items()
            }
            for row in rows(new, test):
                for name, ratio in ratios(row, test, seconds).items() if seconds in row else ():
                    was = committed.get((row["case"], row.get("dtype"), name), 0.0)
                    if ratio < (limit := was * (1 - TOLERANCE)):
                        case = " ".join(filter(None, (row["case"], row.get("dtype"), seconds.partition("_")[2])))
                        found.append(f"{case}: {ratio:.2f} × {name}, committed {was:.2f}, limit {limit:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="PAGE.md")
    arguments = parser.parse_args()
    for page in arguments.update:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    if arguments.results is None:
        return
    print(machine(arguments.results))
    shown = [each for test, tables in TABLES.items() if rows(arguments.results, test) for each in tables]
    for table in dict.fromkeys(shown):
        if text := table(arguments.results):
            print(f"\n{text}")
    if arguments.plot:
        plot(arguments.results, arguments.plot)
    if arguments.against:
        if slow := slow_rates(arguments.results):
            sys.exit(f"not compared, the machine was slow: {', '.join(slow)}; try again when it is idle")
        found = regressions(arguments.results, arguments.against)
        print("\n".join(["", *(found or ["no ratio fell more than 15 %"])]))
        if found:
            print("noise? measure these alone on an idle machine: make bench-check ONLY=CASE")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
