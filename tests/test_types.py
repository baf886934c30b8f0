"""What a type checker sees of the public names, and the same mistakes at run time."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import d2v_fast
from d2v_fast.config import LossConfig, TargetsConfig
from d2v_fast.masking import SpanMask, TokenMask

ROOT = Path(__file__).parents[1]

# As a user would write it, checked with --strict; `# E: code` marks the lines where an error is expected, and nowhere else.
PROGRAM = """
import numpy as np
import torch
from torch import Tensor, nn

import d2v_fast
from d2v_fast import Callback, ConvDecoder, Data2Vec, Data2VecLoss, EMATeacher, Encoder, LossConfig, TargetsConfig
from d2v_fast import build_encoder, data2vec_loss, wrap
from d2v_fast.data import PretrainingData
from d2v_fast.masking import SpanMask

predictions, layers, mask = torch.randn(1, 4), [torch.randn(1, 2, 4)], torch.ones(1, 2, dtype=torch.bool)
loss: Tensor = data2vec_loss(predictions, layers, mask, norm="instance", beta=2)
loss.backward()  # type: ignore[no-untyped-call]  # torch's own
value, stats = data2vec_loss(predictions, layers, mask, return_stats=True)
spread: Tensor = stats.target.std
encoder: Encoder = wrap(nn.Linear(2, 2), layers="blocks")
teacher = EMATeacher(nn.Linear(2, 2), anneal_steps=10)
width: int = teacher.module.in_features
model = Data2Vec(build_encoder("vit"), ConvDecoder(32, axes=2), targets=TargetsConfig(top_k=2), loss=LossConfig(beta=1))
first: Encoder = model.teacher.module
output: Tensor = model.predict(predictions, predictions, mask, mask).predictions
data = PretrainingData(mask=SpanMask())
data.grid, data.lengths = (4, 6), np.array([3, 2])
sides: int | tuple[int, ...] | None = data.grid


class Mine(Callback):
    every_rank = True


Data2VecLoss(norm="group", impl="eager")
SpanMask(length_kind="normal")

Data2VecLoss(nrm="layer")  # E: call-arg
EMATeacher(modle=nn.Linear(2, 2))  # E: call-arg
Data2VecLoss(norm="layr")  # E: arg-type
data2vec_loss(predictions, layers, mask, norm="layr")  # E: call-overload
data2vec_loss(predictions, layers)  # E: call-overload
TargetsConfig(source="fnn")  # E: arg-type
Data2Vec(build_encoder("vit"), top_k=2)  # E: call-arg
Data2Vec(build_encoder("vit"), LossConfig())  # E: arg-type
Data2Vec("vit")  # E: arg-type
ConvDecoder(32, axis=2)  # E: call-arg
SpanMask(length_kind="gauss")  # E: arg-type
d2v_fast.Data2VecLos()  # E: attr-defined
wrong: str = Data2Vec.check  # E: attr-defined
encoder.positions(size="224")  # E: arg-type
data.grid = "4 x 6"  # E: assignment
data.lengths = [3, 2]  # E: assignment
SpanMask(length="3")  # E: arg-type
"""
CONFIG = """
[mypy]
strict = True
[mypy-d2v_fast.*]
ignore_errors = True
[mypy-transformers.*]
follow_imports = skip
[mypy-accelerate.*,datasets.*,flash_attn.*,fsspec.*,joblib.*,pyarrow.*,sklearn.*,soundfile.*,soxr.*,tqdm.*,triton.*,yaml.*]
ignore_missing_imports = True
"""


def test_a_type_checker_finds_misspelt_arguments_and_wrong_words(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    cache = ROOT / ".mypy_cache" / "tests"  # a first run reads all of torch
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        tmp_path / "mypy.ini",
        "--cache-dir",
        cache,
        tmp_path / "program.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {(int(line), code) for line, code in re.findall(r"program\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)}
    lines = enumerate(PROGRAM.splitlines(), start=1)
    expected = {(number, line.rpartition("# E: ")[2]) for number, line in lines if "# E: " in line}
    assert found == expected, done.stdout


def test_type_checkers_see_each_public_name_where_it_is():
    tree = ast.parse(Path(d2v_fast.__file__).read_text(encoding="utf-8"))
    (checked,) = (node.body for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname: node.module for node in checked for alias in node.names} == d2v_fast._HOME


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SpanMask(length_kind="norml"),
            "length_kind: found 'norml', expected one of 'static', 'uniform', 'normal', 'p",
        ),
        (lambda: SpanMask(same_count="mim"), "same_count: found 'mim', .*; did you mean min"),
        (lambda: TokenMask(loss_on="mask"), "loss_on: found 'mask', expected one of 'selected', 'mask_token'"),
        (lambda: TargetsConfig(norm="layr"), "norm: found 'layr', expected one of 'none', 'layer', .*; did you mean layer"),
        (lambda: LossConfig(scale="meen"), "scale: found 'meen', expected one of 'auto', 'mean'; did you mean mean"),
        (lambda: TargetsConfig(source="fnn"), "source: found 'fnn', expected one of 'ffn', "),
    ],
)
def test_wrong_words_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
