"""No step waits for the GPU or mixes devices; checked without a GPU by `fake_gpu.py`."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch

from benchmarks.gpu import build_fake_gpu
from tests import models, waits
from tests.gate import NORMS

if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu", allow_module_level=True)

FLASH = [
    *product(("roberta", "beit", "vit", "data2vec-audio"), ("bf16",), ("flash",)),
    ("roberta", "bf16", "flash padded"),
    ("roberta", "fp32", "flash"),
]
CASES = [
    *(f"{name} {precision} {kind}" for name, precision, kind in product(models.CONFIGS, ("fp32", "bf16"), ("plain", "fused"))),
    *(f"{name} {precision} {kind}" for name, precision, kind in FLASH),
    *(f"trainer {modality} {kind}" for modality, kind in product(("text", "vision", "audio"), ("plain", "fused", "one pass"))),
    *(f"trainer {modality}-2 fused" for modality in ("text", "vision", "audio")),
    *(f"loss {norm} {target} {kind}" for norm, target, kind in product(NORMS, NORMS[:3], ("rows", "dense", "views"))),
    *(f"wait RUNS_ON {name}" for name in waits.RUNS_ON),
]
MISTAKES = {  # deliberate mistakes and the expected error
    "beit fp32 host mask": "aten.where.self copies from the host",
    "beit fp32 host index": "aten.index.Tensor copies from the host",
    "roberta fp32 no index": "aten.nonzero.default waits for the GPU",
    "wav2vec2 fp32 padding": "aten._local_scalar_dense.default waits for the GPU",
} | {f"wait WAITS {name}": ("waits for the GPU", "copies from the host") for name in waits.WAITS}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    library = build_fake_gpu(tmp_path_factory.mktemp("fake_gpu") / "fake_gpu.so")
    command = [sys.executable, "-m", "tests.fake_gpu", library, *CASES, *MISTAKES]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_steps_never_synchronise_or_mix_devices(case, found):
    assert found[case] is None, found[case]


@pytest.mark.parametrize("case, how", MISTAKES.items())
def test_deliberate_synchronisation_is_detected(case, how, found):
    assert any(text in (found[case] or "") for text in ((how,) if isinstance(how, str) else how)), found[case]
