"""`make gpu` without a GPU: a dry run of its commands, the memory of its cases, and the tests of tests/gpu on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from benchmarks import conftest, gpu, measure

ROOT = Path(__file__).parents[1]
GB = 1e9

if torch.cuda.is_available():
    pytest.skip("there is a GPU: make gpu", allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return gpu.build_fake_gpu(tmp_path_factory.mktemp("fake_gpu") / "fake_gpu.so")


def dry(library, *command):
    """The benchmark command on the fake GPU; returns exit code and output."""
    # pytest-benchmark writes nothing in a pytest-xdist worker.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"FAKE_GPU": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def measured(library, name, chosen, result):
    """extra_info of each case of benchmark `name` that -k `chosen` selects, by name."""
    code, output = dry(library, *gpu.benchmark(name, chosen, result, dry=True))
    assert code == 0, output
    found = json.loads(result.read_text())
    assert found["machine_info"]["dry_run"] and found["machine_info"]["gpu"] == "none"
    assert {"torch", "triton", "transformers", "driver", "python"} <= found["machine_info"].keys()
    return {entry["name"]: entry["extra_info"] for entry in found["benchmarks"]}


def test_a_case_of_the_loss_and_the_teacher_update(library, tmp_path):
    found = measured(library, "loss", "text-8x512-15 and bf16 or image-16x16x196 and fp32", tmp_path / "loss.json")
    assert sorted(found) == ["test_loss[image-16x16x196-fp32]", "test_loss[text-8x512-15%-bf16]"]
    for row in found.values():
        assert row["seconds"].keys() == row["seconds_called"].keys() and row["bytes"] < row["needed_bytes"] < 20 * GB
    (row,) = measured(library, "ema", "test_ema", tmp_path / "ema.json").values()
    assert row["bytes"] < row["needed_bytes"] < 5 * GB
    code, output = dry(library, sys.executable, "-m", "benchmarks.report", tmp_path / "ema.json")
    assert code == 1 and "written by a dry run, which measures nothing" in output


def close_to_the_measured(found):
    """The memory that a step adds matches that on an H200 and an H100."""
    files = [ROOT / "benchmarks" / "results" / name for name in ("gpu-step-h200.json", "gpu-step.json")]
    entries = [entry for file in files for entry in json.loads(file.read_text())["benchmarks"]]
    compared = 0
    for entry in entries:
        row = found.get(entry["name"], {})
        for variant, expected in entry["extra_info"]["extra_bytes"].items():
            # With the same batch. Compiled code, which only "fused" has, recomputes activations.
            if row.get("case") == entry["extra_info"]["case"] and variant != "fused":
                assert row["extra_bytes"][variant] == pytest.approx(expected, rel=0.02), (entry["name"], variant)
                compared += 1
    return compared


@pytest.mark.slow
def test_steps_fit_and_need_what_was_measured(library, tmp_path):
    found = measured(library, "step", "test_step[text-8x128]", tmp_path / "step.json")
    assert close_to_the_measured(found) == 4
    (row,) = found.values()
    assert sum(row["extra_bytes"].values()) < row["needed_bytes"] < 70 * GB
    assert row["seconds"].keys() == row["extra_bytes"].keys() == row["flops"].keys() == {"today", "an hour's work", "fused"}


@pytest.mark.slow
def test_no_case_needs_more_than_70_gb(library, tmp_path):
    chosen = dict(loss="test_loss", ema="test_ema", step="test_step or test_step_2")
    found = {}
    for name, cases in chosen.items():
        found |= measured(library, name, cases, tmp_path / f"{name}.json")
    for name, row in found.items():
        print(f"{row['needed_bytes'] / GB:6.1f} GB {name}")
    assert len(found) == 28 + 1 + 4 + 8 and max(row["needed_bytes"] for row in found.values()) < 70 * GB
    assert close_to_the_measured(found) == 14


WAITS = """
from d2v_fast import EMATeacher
update = EMATeacher.update
EMATeacher.update = lambda self, student, **pairs: (float(next(student.parameters()).sum()), update(self, student, **pairs))
"""
TOO_LARGE = """
from dataclasses import replace
from benchmarks import cases
cases.STEP_CASES[-1:] = [replace(cases.STEP_CASES[-1], gpu_batch=64)]
"""


@pytest.mark.parametrize(
    "name, chosen, mistake, message",
    [
        ("ema", "", WAITS, "aten._local_scalar_dense.default waits for the GPU"),
        pytest.param("step", "test_step[audio", TOO_LARGE, "test_step[audio-4x5s]: needs", marks=pytest.mark.slow),
    ],
)
def test_deliberate_mistakes_are_detected(name, chosen, mistake, message, library, tmp_path, monkeypatch):
    (tmp_path / "mistake.py").write_text(mistake)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    command = gpu.benchmark(name, chosen, tmp_path / "result.json", dry=True)
    code, output = dry(library, *command, "-p", "mistake")
    assert code == 1 and message in output, output


EVERY_WAIT = """
import json, torch
from tests import waits
from tests.fake_device import DEVICE
found = {}
for group in ("WAITS", "RUNS_ON"):
    for name, call in getattr(waits, group).items():
        with DEVICE:
            x, y = torch.empty(4, 3, device="cuda"), torch.empty(4, 3)
            DEVICE.strict = True
            try:
                call(x, y)
                found[f"{group} {name}"] = None
            except Exception as error:
                found[f"{group} {name}"] = f"{type(error).__name__}: {error}"
            DEVICE.strict = False
print(json.dumps(found))
"""


def test_all_that_waits_is_detected(library):
    code, output = dry(library, sys.executable, "-c", EVERY_WAIT)
    assert code == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert {name: how for name, how in found.items() if name.startswith("RUNS_ON") and how is not None} == {}
    pattern = r"AssertionError: aten\.\S+ (waits for the GPU|copies from the host)"
    assert [name for name, how in found.items() if name.startswith("WAITS") and not re.fullmatch(pattern, how or "")] == []


SMALL_CASES = "test_step or graphs or test_conv and float64 and 1-3 or test_loss and (synchronise or float64 and 64-13)"


@pytest.mark.parametrize("chosen", ["test_training and not graphs", pytest.param(SMALL_CASES, marks=pytest.mark.slow)])
def test_the_tests_of_a_gpu_run_on_a_cpu(chosen):
    """Tests that a CPU can run use Triton's interpreter; the others are only collected."""
    environment = os.environ | {"TEST_DEVICE": "cpu", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands of `make gpu`, without running them; its folders are empty. `commands.codes` sets exit codes."""

    class Commands(list):
        codes: ClassVar[dict[str, int | None]] = {}

        def run(self, command, seconds=None):
            self.append((" ".join(command[1:]), seconds))
            for option in command:
                if option.startswith("--benchmark-json="):
                    name = option.rpartition("-")[2].removesuffix(".json")
                    code = self.codes.get(name, 0)
                    Path(option.partition("=")[2]).write_text("" if code else f"new {name}")
                    return code
            return 0

    found = Commands()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "run", found.run)
    monkeypatch.setattr(gpu, "obstacle", lambda: "")
    monkeypatch.setattr(gpu, "machine", lambda: "a GPU")
    return found


def test_the_commands(commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 0 and "all passed" in capsys.readouterr().out
    (tests, patience), *rest, (update, _) = commands
    assert 0 < patience <= 3600
    rest = [command for command, _ in rest]
    assert tests.startswith("-m pytest -q tests/gpu -n 4") and update.endswith("--update README.md docs/speed.md")
    for name, (run, report) in zip(gpu.SUBSET, zip(rest[::2], rest[1::2], strict=True), strict=True):
        assert f"benchmarks/test_bench_{name}.py --device cuda" in run and run.endswith(f"-k {gpu.SUBSET[name]}")
        assert report == f"-m benchmarks.report {tmp_path / 'results' / f'gpu-{name}.json'}"
        assert (tmp_path / "results" / f"gpu-{name}.json").read_text() == f"new {name}"
    assert all(0 < seconds <= 600 for command, seconds in commands if "benchmark-json" in command)
    del commands[:]
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(SystemExit):
        gpu.main(["--full"])
    (tests, _), (sanitizer, _), *rest = commands
    assert "-m pytest -q tests/gpu -m  -n 4" in tests and all(seconds is None for _, seconds in commands)
    assert sanitizer.startswith("PYTORCH_NO_CUDA_MEMORY_CACHING=1 /bin/compute-sanitizer --tool memcheck --error-exitcode 1")
    assert "tests/gpu/test_loss.py tests/gpu/test_conv.py tests/gpu/test_adam.py -k two_runs" in sanitizer
    assert not any("text-8x128" in command for command, _ in rest)


def test_a_benchmark_that_fails_leaves_the_results_before_it(commands, tmp_path, capsys):
    (tmp_path / "results" / "gpu-ema.json").write_text("old")
    commands.codes = {"ema": 1}
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 1 and "failed, see above: ema;" in capsys.readouterr().out
    found = {file.name: file.read_text() for file in (tmp_path / "results").iterdir()}
    assert found == {"gpu-loss.json": "new loss", "gpu-ema.json": "old", "gpu-step.json": "new step"}


def test_benchmarks_that_take_too_long_are_named(commands, tmp_path, capsys):
    commands.codes = {"loss": None, "step": None}
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "all passed; results in results/gpu-*.json" in said
    assert "without the cases of loss, step that did not fit into 10 minutes" in said


def test_tests_that_take_too_long_have_failed(commands, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda command, seconds=None: None if "tests/gpu" in command else commands.run(command))
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 1 and "failed, see above: tests/gpu;" in capsys.readouterr().out


def test_a_benchmark_is_interrupted_when_time_is_over(tmp_path, capfd):
    written = tmp_path / "written"
    code = f"""
import time
try:
    open({str(written)!r}, "w").close()
    time.sleep(600)
except KeyboardInterrupt:
    print("results so far")
"""
    assert gpu.run([sys.executable, "-c", code], seconds=3) is None and written.exists()
    assert "results so far" in capfd.readouterr().out
    assert gpu.run([sys.executable, "-c", "import sys; sys.exit(3)"], seconds=60) == 3


def test_what_does_not_end_is_killed(capfd, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    assert gpu.run([sys.executable, "-c", code], seconds=3) is None
    assert "killed, because it did not end within" in capfd.readouterr().out


@pytest.fixture
def box(monkeypatch, tmp_path):
    """A machine on which everything is found; the tests take something away."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: SimpleNamespace(stdout="535.54.03\n535.54.03\n"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    return monkeypatch


def test_with_everything_there_is_no_obstacle(box):
    assert gpu.obstacle() == ""


def test_each_obstacle_has_a_remedy(box, tmp_path):
    def changed(message, *changes):
        with box.context() as patch:
            for owner, name, value in changes:
                patch.setattr(owner, name, value)
            assert re.search(message, gpu.obstacle()), gpu.obstacle()

    def without(*names):
        return gpu.shutil, "which", lambda name: None if name in names else f"/bin/{name}"

    no_gpu = (torch.cuda, "is_available", lambda: False)
    changed(r"is a build without CUDA; install one with CUDA", no_gpu, (torch.version, "cuda", None))
    changed(r"nvidia-smi finds no GPU: install NVIDIA's driver, or .*--gpus all", no_gpu, without("nvidia-smi"))
    nothing = (gpu.subprocess, "run", lambda command, **_: SimpleNamespace(stdout=""))
    changed(r"nvidia-smi finds no GPU", no_gpu, nothing)
    changed(r"driver 535\.54\.03 is too old for its CUDA 13\.0; update the driver, or install", no_gpu)
    changed(r"compute capability 7\.5, expected at least 8\.0", (torch.cuda, "get_device_capability", lambda: (7, 5)))
    changed(r"triton is not installed", (gpu, "find_spec", lambda name: None))
    changed(r"need a C compiler: install gcc", without("gcc", "clang"))
    (tmp_path / "Python.h").unlink()
    changed(r"needs Python\.h of Python 3\.\d+: install python3-dev")
    box.setenv("CUDA_VISIBLE_DEVICES", "1")
    changed(r"with CUDA_VISIBLE_DEVICES='1': unset it", no_gpu)


@pytest.mark.parametrize("count, others", [(1, ""), (2, ", the first of 2; CUDA_VISIBLE_DEVICES selects another")])
def test_the_machine_is_named(count, others, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    properties = SimpleNamespace(name="A GPU", total_memory=int(24e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu.machine().startswith(f"A GPU, 24 GB{others}; torch {torch.__version__}, CUDA ")


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"make gpu: torch .* is a build without CUDA.*make gpu DRY=1 needs no GPU"):
        gpu.main([])


def test_without_a_compiler_a_dry_run_says_so(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"DRY=1: found no g\+\+.*install it"):
        gpu.main(["--dry"])


class TooLarge:
    """Does not fit into a GPU, when it is made or when it is used."""

    def __init__(self, at_once):
        self.step = self.fail
        if at_once:
            self.fail()

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_case_that_does_not_fit_is_skipped_on_a_small_gpu(at_once, monkeypatch):
    def case():
        worker = measure.Worker(TooLarge, at_once)
        try:
            worker("step")
        finally:
            worker.close()

    size = [24e9]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=size[0]))
    with pytest.raises(pytest.skip.Exception, match=r"^case: does not fit into 24 GB: CUDA out of memory\. .*9 GiB\.$"):
        through(conftest.pytest_runtest_call, case)
    size[0] = 80e9
    with pytest.raises(torch.OutOfMemoryError):
        through(conftest.pytest_runtest_call, case)


def through(wrapper, case):
    """Call `case` inside the hook, as pytest does."""
    hook = wrapper(SimpleNamespace(name="case"))
    next(hook)
    try:
        case()
    except Exception as error:
        hook.throw(error)


@pytest.mark.slow
def test_a_dry_run_from_end_to_end(tmp_path, monkeypatch):
    """With a stand-in for compute-sanitizer that runs its command."""
    (tmp_path / "compute-sanitizer").write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n$ ") == 8 and "all passed; results in build/dry" in done.stdout
