"""`make gpu`: the tests and benchmarks that need a GPU, in one command.

python -m benchmarks.gpu          run tests/gpu, compute-sanitizer if it is installed, and at most 10 minutes of benchmarks of
                                  loss, EMA and step; write benchmarks/results/ and update the tables of README and docs
python -m benchmarks.gpu --full   run all tests and all cases without a limit, which takes hours
python -m benchmarks.gpu --dry    run the same commands on a fake GPU (tests/fake_device.py), with results in build/dry/ and no
                                  tables, to show on any machine that they start, select their cases and fit into 70 GB
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"
MINUTES = 10  # for all benchmarks together
SUBSET = {  # cases of each benchmark, selected by pytest's -k
    "loss": "bf16 and (text-32x512-31 or vision-128x197 or audio-16x780 or image-16x16x196)",
    "ema": "",
    "step": "test_step[text-8x128] or test_step[vision-8x224] or test_step[audio-4x5s] "
    "or (test_step_2 and released and not vision-4x8)",
}
PAGES = ("README.md", "docs/speed.md")


def build_fake_gpu(library: Path) -> Path:
    """Compile tests/fake_gpu.cpp."""
    root = Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    link = ["-I", root / "include", "-L", root / "lib", "-lc10", "-ltorch_cpu"]
    source = ROOT / "tests" / "fake_gpu.cpp"
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, *link], check=True)
    return library


def pytest(*args: str | Path, dry: bool) -> list[str]:
    fake = ["-p", "tests.fake_device"] if dry else []
    return [sys.executable, "-m", "pytest", "-q", *fake, *map(str, args)]


def tests(full: bool, dry: bool) -> dict[str, list[str]]:
    """The commands of the tests, by name."""
    chosen = ["-m", ""] if full else []
    shown = ["--collect-only"] if dry else ["-n", "4", "--dist", "worksteal"]
    commands = {"tests/gpu": pytest("tests/gpu", *chosen, *shown, dry=dry)}
    if sanitizer := shutil.which("compute-sanitizer"):
        kernels = pytest("tests/gpu/test_loss.py", "tests/gpu/test_conv.py", "-k", "two_runs", *shown[: int(dry)], dry=dry)
        # Without torch's cache each tensor is a separate allocation, and its bounds are known.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        commands["compute-sanitizer"] = [*uncached, sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *kernels]
    return commands


def benchmark(name: str, chosen: str, result: Path, dry: bool) -> list[str]:
    """The command that writes the cases of a benchmark that -k `chosen` selects to `result`."""
    options = ["--device", "cuda", "--benchmark-columns=median", f"--benchmark-json={result}", *["--seconds", "0"][: 2 * dry]]
    # Warnings are errors, so this one would end a run without results before it gives the reason.
    options += ["-W", "ignore:Not saving anything", "-k", chosen]
    return pytest(f"benchmarks/test_bench_{name}.py", *options, dry=dry)


def run(command: list[str], seconds: float | None = None) -> int:
    """Exit code of the command. After `seconds` it is interrupted, which makes pytest write its results so far."""
    print(f"\n$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped: {MINUTES} minutes of benchmarks are over; FULL=1 has no limit", flush=True)
        process.send_signal(signal.SIGINT)
        process.wait()
        return 0


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args(args)
    full, dry = arguments.full, arguments.dry
    BUILD.mkdir(exist_ok=True)
    if dry:
        os.environ["FAKE_GPU"] = str(build_fake_gpu(BUILD / "fake_gpu.so"))
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("make gpu: torch finds no GPU here; d2v-doctor may show why; make gpu DRY=1 needs none")
    failed = [name for name, command in tests(full, dry).items() if run(command)]
    if not shutil.which("compute-sanitizer"):
        print("\ncompute-sanitizer is not installed, so memory accesses were not checked")
    target = BUILD / "dry" if dry else RESULTS
    target.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * MINUTES
    for name in SUBSET:
        fresh, result = BUILD / f"gpu-{name}.json", target / f"gpu-{name}.json"
        fresh.unlink(missing_ok=True)
        command = benchmark(name, "" if full else SUBSET[name], fresh, dry)
        code = run(command, None if full or dry else max(1.0, end - time.monotonic()))
        if not fresh.exists() or not fresh.stat().st_size:  # pytest creates it empty when it starts
            failed.append(name)
            continue
        os.replace(fresh, result)
        refused = run([sys.executable, "-m", "benchmarks.report", str(result)]) != 0
        if code or refused != dry:  # the report refuses results of a dry run
            failed.append(name)
    if not dry:
        run([sys.executable, "-m", "benchmarks.report", "--update", *PAGES])
    print("\nfailed: " + ", ".join(failed) if failed else f"\nall passed; results in {target.relative_to(ROOT)}/gpu-*.json")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
