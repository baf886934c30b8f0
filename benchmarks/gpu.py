"""`make gpu`: the tests and benchmarks that need a GPU, in one command.

python -m benchmarks.gpu          run tests/gpu, compute-sanitizer if it is installed, and at most 10 minutes of benchmarks of
                                  loss, EMA and step; write benchmarks/results/ and update the tables of README and docs
python -m benchmarks.gpu --full   run all tests and all cases without a limit, which takes hours
python -m benchmarks.gpu --dry    run the same commands on a fake GPU (tests/fake_device.py), with results in build/dry/ and no
                                  tables, to show on any machine that they start, select their cases and fit into 70 GB

It needs a driver, a C compiler and Python's headers, but no CUDA toolkit. On a GPU with less than 70 GB, cases that do not fit
are skipped. It uses the first GPU; CUDA_VISIBLE_DEVICES=1 selects another.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"
MINUTES = 10  # for all benchmarks together
PATIENCE = 30  # minutes for each command of the tests, which take about 5; a kernel that hangs would wait forever
GRACE = 120.0  # seconds to write results after an interrupt
SUBSET = {  # cases of each benchmark, selected by pytest's -k; most of their time is spent compiling
    "loss": "bf16 and (text-32x512-31 or audio-16x780 or image-16x16x196)",
    "ema": "",
    "step": "test_step[text-8x128] or test_step[vision-8x224] or test_step[audio-4x5s] or test_step_2[vision-2x16-released]",
}
SECONDS = 1  # of each case of the subset
PAGES = ("README.md", "docs/speed.md")


def build_fake_gpu(library: Path) -> Path:
    """Compile tests/fake_gpu.cpp."""
    root = Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    link = ["-I", root / "include", "-L", root / "lib", "-lc10", "-ltorch_cpu"]
    source = ROOT / "tests" / "fake_gpu.cpp"
    if not shutil.which("g++"):
        sys.exit("make gpu DRY=1: found no g++, which compiles tests/fake_gpu.cpp: install it")
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, *link], check=True)
    return library


def obstacle() -> str:
    """Why the tests and benchmarks cannot run on the GPU, with a remedy, or ""."""
    import torch

    if not torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = shutil.which(query[0]) and subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        if not torch.version.cuda:
            return (
                f"torch {torch.__version__} in {sys.prefix} is a build without CUDA; install one with CUDA there, by "
                "the command of PyTorch's installation page, and run make gpu again"
            )
        if not driver:
            return "nvidia-smi finds no GPU: install NVIDIA's driver, or docker run --gpus all"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return f"torch finds no GPU with CUDA_VISIBLE_DEVICES={hidden!r}: unset it"
        return (
            f"torch finds no GPU: driver {driver} is too old for its CUDA {torch.version.cuda}; update the driver, or "
            f"install a build of torch for an older CUDA in {sys.prefix}"
        )
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"{name} has compute capability {capability[0]}.{capability[1]}, expected at least 8.0, which has bf16"
    if not find_spec("triton"):
        return f"triton is not installed in {sys.prefix}: pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton and torch.compile need a C compiler: install gcc"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"Triton needs Python.h of Python {sysconfig.get_python_version()}: install python3-dev or python3-devel"
    return ""


def machine() -> str:
    """The GPU in use, and the versions."""
    import torch

    used, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    others = f", the first of {count}; CUDA_VISIBLE_DEVICES selects another" if count > 1 else ""
    return f"{used.name}, {used.total_memory / 1e9:.0f} GB{others}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def load_fake_gpu(library: str | Path) -> None:
    """Register the fake GPU in place of torch's own. Must be called before torch is imported."""
    folder = Path(find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):  # only builds with CUDA have the second
        if (folder / name).exists():
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def pytest(*args: str | Path, dry: bool) -> list[str]:
    fake = ["-p", "tests.fake_device"] if dry else []
    return [sys.executable, "-m", "pytest", "-q", *fake, *map(str, args)]


def tests(full: bool, dry: bool) -> dict[str, list[str]]:
    """The commands of the tests, by name."""
    chosen = ["-m", ""] if full else []
    shown = ["--collect-only"] if dry else ["-n", "4", "--dist", "worksteal"]
    commands = {"tests/gpu": pytest("tests/gpu", *chosen, *shown, dry=dry)}
    if sanitizer := shutil.which("compute-sanitizer"):
        files = (f"tests/gpu/test_{name}.py" for name in ("loss", "conv", "adam"))
        kernels = pytest(*files, "-k", "two_runs", *shown[: int(dry)], dry=dry)
        # Without torch's cache each tensor is a separate allocation, and its bounds are known.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        commands["compute-sanitizer"] = [*uncached, sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *kernels]
    return commands


def benchmark(name: str, chosen: str, result: Path, dry: bool) -> list[str]:
    """The command that writes the cases of a benchmark that -k `chosen` selects to `result`."""
    options = ["--device", "cuda", "--benchmark-columns=median", f"--benchmark-json={result}"]
    if dry or chosen:
        options += ["--seconds", str(0 if dry else SECONDS)]
    # Warnings are errors, so these would end a run without results, or an interrupted one with a traceback.
    options += ["-W", "ignore:Not saving anything", "-W", "ignore:Benchmark fixture was not used", "-rs", "-k", chosen]
    return pytest(f"benchmarks/test_bench_{name}.py", *options, dry=dry)


def run(command: list[str], seconds: float | None = None) -> int | None:
    """Exit code of the command. After `seconds` it is interrupted, which makes pytest write its results so far: None."""
    print(f"\n$ {' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {(seconds or 0) / 60:.0f} minutes; FULL=1 has no limit", flush=True)
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        print(f"killed, because it did not end within {GRACE:.0f} s", flush=True)
        process.kill()
        process.wait()
    return None


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args(args)
    full, dry = arguments.full, arguments.dry
    BUILD.mkdir(exist_ok=True)
    if dry:
        os.environ["FAKE_GPU"] = str(build_fake_gpu(BUILD / "fake_gpu.so"))
    elif why := obstacle():
        sys.exit(f"make gpu: {why}. make gpu DRY=1 needs no GPU")
    else:
        print(machine())
    patience = None if full or dry else 60.0 * PATIENCE
    failed = [name for name, command in tests(full, dry).items() if run(command, patience) != 0]
    if not shutil.which("compute-sanitizer"):
        print("\ncompute-sanitizer, a part of the CUDA toolkit, is not installed: memory accesses were not checked")
    target = BUILD / "dry" if dry else RESULTS
    target.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * MINUTES
    stopped = []
    for name in SUBSET:
        fresh, result = BUILD / f"gpu-{name}.json", target / f"gpu-{name}.json"
        fresh.unlink(missing_ok=True)
        command = benchmark(name, "" if full else SUBSET[name], fresh, dry)
        code = run(command, None if full or dry else max(1.0, end - time.monotonic()))
        if code is None:
            stopped.append(name)
        if not fresh.exists() or not fresh.stat().st_size:  # pytest creates it empty when it starts
            failed.append(name)
            continue
        os.replace(fresh, result)
        refused = run([sys.executable, "-m", "benchmarks.report", str(result)]) != 0
        if code or refused != dry:  # the report refuses results of a dry run
            failed.append(name)
    if not dry:
        run([sys.executable, "-m", "benchmarks.report", "--update", *PAGES])
    where = f"results in {target.relative_to(ROOT)}/gpu-*.json"
    print(f"\nfailed, see above: {', '.join(failed)}; {where}" if failed else f"\nall passed; {where}")
    if stopped:
        print(f"without the cases of {', '.join(stopped)} that did not fit into {MINUTES} minutes")
    if failed and not dry:
        print("each command after a $ can be run alone; git checkout README.md docs benchmarks/results discards the figures")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
