import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.measure import rates

CPU = ("brand_raw", "arch", "l2_cache_size", "l3_cache_size")  # what is recorded of the processor
NEEDED = 70e9  # bytes of GPU memory into which every case fits


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--seconds", type=float, default=3.0, help="time for all variants of one case")
    parser.addoption("--cases-of", type=Path, metavar="FILE.json", help="only the cases of this result file")


def pytest_collection_modifyitems(config, items):
    if path := config.getoption("--cases-of"):
        names = {entry["name"] for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]}
        config.hook.pytest_deselected(items=[item for item in items if item.name not in names])
        items[:] = [item for item in items if item.name in names]


@pytest.fixture(scope="session", autouse=True)
def before(request):
    """Measure the machine's rates before the first case; those after the last case are added to the result."""
    request.config.rates = [rates(request.config.getoption("--device"))]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a case that does not fit into a GPU with less memory than the cases are made for."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        size = torch.cuda.get_device_properties(0).total_memory
        if size >= NEEDED:
            raise
        pytest.skip(f"{item.name}: does not fit into {size / 1e9:.0f} GB: {error}".partition("\n")[0])


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def seconds(request):
    return request.config.getoption("--seconds")


def pytest_benchmark_update_machine_info(config, machine_info):
    """Record what the figures depend on, but not the machine's name."""
    cpu = {key: machine_info["cpu"].get(key) for key in CPU}
    machine_info.clear()
    machine_info.update(cpu=cpu, threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__)
    machine_info["rates"] = [*config.rates, rates(config.getoption("--device"))]
    if config.getoption("--device") == "cuda":
        import transformers
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = shutil.which("nvidia-smi") and subprocess.run(query, capture_output=True, text=True).stdout.split()
        machine_info.update(gpu=torch.cuda.get_device_name(), driver=found[0] if found else "unknown")
        machine_info.update(triton=triton.__version__, transformers=transformers.__version__)


def pytest_benchmark_update_commit_info(config, commit_info):
    for key in list(commit_info):
        if key not in ("id", "time", "dirty"):
            del commit_info[key]
