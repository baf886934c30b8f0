"""`make gpu` without a GPU: a dry run of its commands, the memory of its cases, and the tests of tests/gpu on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import gpu

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
        assert "fused, graph" in row["seconds"] and row["bytes"] < row["needed_bytes"] < 20 * GB
    (row,) = measured(library, "ema", "test_ema", tmp_path / "ema.json").values()
    assert row["bytes"] < row["needed_bytes"] < 5 * GB
    code, output = dry(library, sys.executable, "-m", "benchmarks.report", tmp_path / "ema.json")
    assert code == 1 and "written by a dry run, which measures nothing" in output


def close_to_the_measured(found):
    """The memory that a step adds matches that on an H200 (benchmarks/results/gpu-step.json)."""
    entries = json.loads((ROOT / "benchmarks" / "results" / "gpu-step.json").read_text())["benchmarks"]
    compared = 0
    for entry in entries:
        row = found.get(entry["name"], {})
        for variant, expected in entry["extra_info"]["extra_bytes"].items():
            if row.get("case") == entry["extra_info"]["case"]:  # with the same batch
                assert row["extra_bytes"][variant] == pytest.approx(expected, rel=0.02), (entry["name"], variant)
                compared += 1
    return compared


@pytest.mark.slow
def test_steps_fit_and_need_what_was_measured(library, tmp_path):
    found = measured(library, "step", "test_step[text-8x128]", tmp_path / "step.json")
    assert close_to_the_measured(found) == 2
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
    assert close_to_the_measured(found) == 8


WAITS = """
from d2v_fast import EMATeacher
update = EMATeacher.update
EMATeacher.update = lambda self, student: (float(next(student.parameters()).sum()), update(self, student))
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
        codes: ClassVar[dict[str, int]] = {}

        def run(self, command, seconds=None):
            self.append((" ".join(command[1:]), seconds))
            for option in command:
                if option.startswith("--benchmark-json="):
                    name = option.rpartition("-")[2].removesuffix(".json")
                    Path(option.partition("=")[2]).write_text("" if self.codes.get(name) else f"new {name}")
                    return self.codes.get(name, 0)
            return 0

    found = Commands()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "run", found.run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return found


def test_the_commands(commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 0 and "all passed" in capsys.readouterr().out
    tests, *rest, update = (command for command, _ in commands)
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
    assert not any("text-8x128" in command for command, _ in rest)


def test_a_benchmark_that_fails_leaves_the_results_before_it(commands, tmp_path, capsys):
    (tmp_path / "results" / "gpu-ema.json").write_text("old")
    commands.codes = {"ema": 1}
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 1 and "failed: ema" in capsys.readouterr().out
    found = {file.name: file.read_text() for file in (tmp_path / "results").iterdir()}
    assert found == {"gpu-loss.json": "new loss", "gpu-ema.json": "old", "gpu-step.json": "new step"}


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
    assert gpu.run([sys.executable, "-c", code], seconds=3) == 0 and written.exists()
    assert "results so far" in capfd.readouterr().out
    assert gpu.run([sys.executable, "-c", "import sys; sys.exit(3)"], seconds=60) == 3


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match=r"make gpu: torch finds no GPU here.*make gpu DRY=1 needs none"):
        gpu.main([])


@pytest.mark.slow
def test_a_dry_run_from_end_to_end(tmp_path, monkeypatch):
    """With a stand-in for compute-sanitizer that runs its command."""
    (tmp_path / "compute-sanitizer").write_text('#!/bin/sh\nshift 4\nexec "$@"\n')
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n$ ") == 8 and "all passed; results in build/dry" in done.stdout
