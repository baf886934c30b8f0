"""A call launches few kernels, and none needs more shared memory than a GPU has; `stub_driver.py` checks it without a GPU."""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from benchmarks import kernels  # noqa: E402
from tests import stub_driver  # noqa: E402
from tests.gate import NORMS  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu", allow_module_level=True)
if not (shutil.which("gcc") and Path(sysconfig.get_paths()["include"], "Python.h").exists()):
    pytest.skip("Triton cannot build its launcher: no gcc or no Python.h", allow_module_level=True)

DEVICES = {  # compute capability, bytes of shared memory that a block may have
    "RTX 4090": (89, 99 << 10),
    "A100": (80, 163 << 10),
    "H100": (90, 227 << 10),
    "none such": (80, 32 << 10),
}
GPUS = list(DEVICES)[:3]
# The cases with the most shared memory, for each kernel, and the launches of a call.
FAST = (
    *("text", "text, stats", "text, 8 views, layer", "vision, 16 views, stats"),
    *("audio, fp32", "vision instance 768 float32", "audio batch 1280 bfloat16", "batch 4096 bfloat16"),
    *("image decoder, base", "step"),
)
ADAM_KERNELS = ("_begin_kernel", "_adamw_kernel")
ALL_KERNELS = {*kernels.LOSS_KERNELS, *kernels.CONV_KERNELS, *ADAM_KERNELS}
LAYER_NORM = ("text", "text, stats", "text, 8 views, layer")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs cases on a device, each set once: launches by case, see `stub_driver.py`."""
    folder = tmp_path_factory.mktemp("stub_driver")
    library, include = folder / "libcuda.so.1", Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", include, "-o", library]
    subprocess.run([*command, Path(__file__).with_name("stub_driver.c")], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict(TRITON_LIBCUDA_PATH=str(folder), TRITON_CACHE_DIR=str(folder / "cache"))

    @functools.cache
    def launch(device, names):
        arch, shared_memory = DEVICES[device]
        command = [sys.executable, "-m", "tests.stub_driver", library, str(arch), str(shared_memory), *names]
        run = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        return json.loads(run.stdout.splitlines()[-1])

    return launch


def fits(found, shared_memory):
    """Asserts that all cases could be launched; returns the kernels."""
    assert {name: launches for name, launches in found.items() if isinstance(launches, str)} == {}
    launches = [launch for each in found.values() for part in each.values() for launch in part if len(launch) > 1]
    assert max(shared for *_, shared in launches) <= shared_memory
    return {kernel for kernel, *_ in launches}


@pytest.mark.parametrize("device", GPUS)
def test_every_kernel_fits_the_device(launched, device):
    assert fits(launched(device, FAST), DEVICES[device][1]) == ALL_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("device", GPUS)
def test_every_recipe_fits_the_device(launched, device):
    assert fits(launched(device, tuple(stub_driver.recipes())), DEVICES[device][1]) == ALL_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("device", GPUS)
def test_every_norm_fits_the_device(launched, device, norm):
    fits(launched(device, tuple(stub_driver.cases_of(norm))), DEVICES[device][1])


def test_a_device_with_less_memory_refuses(launched):
    found = launched("none such", ("image decoder, base",))
    assert "OutOfResources: out of resource: shared memory" in found["image decoder, base"]


@pytest.mark.parametrize("case", LAYER_NORM)
def test_the_loss_of_layer_norm_is_three_launches_and_one(launched, case):
    found = launched("H100", FAST)[case]
    names = {part: [launch[0] for launch in launches] for part, launches in found.items()}
    assert names == dict(forward=["_order_kernel", "_loss_rows_kernel", "_finish_kernel"], backward=["_scale_kernel"])


def test_a_step_of_the_optimizer_is_two_launches_and_so_is_the_teacher_alone(launched):
    found = launched("H100", FAST)["step"]
    names = {part: [launch[0] for launch in launches if len(launch) > 1] for part, launches in found.items()}
    assert names == dict(forward=2 * list(ADAM_KERNELS), backward=list(ADAM_KERNELS))
