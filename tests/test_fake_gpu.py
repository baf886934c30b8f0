"""Nothing in a step waits for the GPU or mixes devices, seen without a GPU: `fake_gpu.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_gpu import CASES, KERNELS, MISTAKES, TRAINERS

if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu", allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    library = tmp_path_factory.mktemp("fake_gpu") / "fake_gpu.so"
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("fake_gpu.cpp")
    link = ["-I", root / "include", "-L", root / "lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, *link], check=True)
    run = subprocess.run([sys.executable, "-m", "tests.fake_gpu", library], check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CASES, *TRAINERS, *KERNELS])
def test_no_wait_and_one_device(case, found):
    assert found[case] is None, found[case]


@pytest.mark.parametrize("case, how", MISTAKES.items())
def test_it_would_be_noticed(case, how, found):
    assert how in found[case]
