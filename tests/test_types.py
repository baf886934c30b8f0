"""The types of the public names, and errors for the same mistakes at run time."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from torch import nn

import d2v_fast
from d2v_fast import Data2VecLoss, EMATeacher, build_encoder, data2vec_loss
from d2v_fast.choices import Range, Rule
from d2v_fast.config import EMAConfig, LossConfig, OptimizerConfig, TargetsConfig, TrainConfig
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
from d2v_fast.ops.reference import LossStats

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


scalar: Tensor = Data2VecLoss(beta=1)(predictions, layers, mask)
pair: tuple[Tensor, LossStats] = Data2VecLoss(return_stats=True)(predictions, layers, mask)
total: Tensor = model(predictions, mask).loss
positional: Data2VecLoss = Data2VecLoss("layer", "none", 2.0)
followed: EMATeacher = teacher


class Mine(Callback):
    every_rank = True


Data2VecLoss(norm="group", impl="eager")
SpanMask(length_kind="normal")

Data2VecLoss(nrm="layer")  # E: call-overload
EMATeacher(modle=nn.Linear(2, 2))  # E: call-arg
Data2VecLoss(norm="layr")  # E: call-overload
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
build_encoder("vit", init="sincoss")  # E: arg-type
Data2VecLoss()(predictions, layers)  # E: call-arg
Data2VecLoss()(predictions, layers, mask, padding=mask)  # E: call-arg
count: int = Data2VecLoss()(predictions, layers, mask)  # E: assignment
Data2VecLoss(return_stats=True)(predictions, layers, mask).backward()  # E: attr-defined
model(predictions)  # E: call-arg
model(predictions, mask).los  # E: attr-defined
encoder(predictions, masks=mask)  # E: call-arg
ConvDecoder(32)(predictions, 4)  # E: arg-type
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
        (lambda: build_encoder("vit", init="sincoss"), "init: found 'sincoss', expected one of 'hf', .*; did you mean sincos"),
        (lambda: TrainConfig(trackers=["wandb", "wnadb"]), "trackers: found 'wnadb', expected .*'trackio'; did you mean wandb"),
    ],
)
def test_wrong_words_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("makes", "message"),
    [
        (
            [lambda: EMAConfig(start=2), lambda: EMATeacher(nn.Linear(1, 1), start=2)],
            r"start: found 2, expected a number in [0, 1]",
        ),
        (
            [lambda: LossConfig(beta=1e-40), lambda: Data2VecLoss(beta=1e-40)],
            "beta: found 1e-40, expected 0 or a number in [1e-30, 1e30]",
        ),
        (
            [lambda: LossConfig(beta=2e30), lambda: Data2VecLoss(beta=2e30)],
            "beta: found 2e+30, expected 0 or a number in [1e-30, 1e30]",
        ),
        ([lambda: LossConfig(scale=0), lambda: Data2VecLoss(scale=0)], "scale: found 0, expected a number above 0"),
        ([lambda: OptimizerConfig(betas=(0.9, 1.0))], "betas: found 1.0, expected a number in [0, 1)"),
        ([lambda: OptimizerConfig(lr_scale={"a": 0.5, "b": -1})], "lr_scale: found -1, expected at least 0"),
        ([lambda: OptimizerConfig(lr="1e-3")], "lr: found '1e-3', expected a number above 0"),
        ([lambda: TrainConfig(epochs=0)], "epochs: found 0, expected a number above 0"),
        ([lambda: TrainConfig(steps=None)], "steps: found None, expected at least 1"),
        ([lambda: SpanMask(prob=1)], "prob: found 1, expected a number in (0, 1)"),
    ],
)
def test_wrong_numbers_are_refused_at_construction(makes, message):
    for make in makes:
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message


def test_the_loss_has_the_same_defaults_everywhere():
    function, module = (inspect.signature(each).parameters for each in (data2vec_loss, Data2VecLoss))
    for name, parameter in module.items():
        assert function[name].default == parameter.default, name
    for name, value in [*vars(TargetsConfig()).items(), *vars(LossConfig()).items()]:
        if name in function and name not in ("scale", "reduction"):  # other words for the same
            assert function[name].default == value, name


Share = Annotated[float, Range("[0, 1]")]


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Share | None, (None, 0, 1.0), ("0.5", 2, [0.5])),
        (Annotated[int | None, Range("[1, inf)")], (None, 1), (0, "1")),
        (Share | Literal["auto"], ("auto", 0.5), ("aut", None, 2)),
        (bool | Literal["hybrid"], (True, "hybrid"), ("hybird", None)),
        (list[Literal["a", "b"]], ([], ["a"], ("b", "a")), (["a", "c"], [None])),
        (tuple[Literal["a", "b"], ...], (("a", "b"),), (("a", "c"),)),
        (list[Share] | None, (None, [0, 1]), ([0, 2], ["a"])),
        (dict[str, Share], ({}, {"a": 1}), ({"a": 1, "b": 2}, {"a": "b"})),
        (dict[str, list[Share]], ({"a": [0, 1]},), ({"a": [0, 2]},)),
        (Share | str, (0.5, "half"), (2,)),
        (list[str | dict[str, int]], ([{"a": -1}], "anything"), ()),
    ],
)
def test_words_and_numbers_in_any_annotation(hint, good, bad):
    for value in good:
        Rule(hint).check("x", value)
    for value in bad:
        with pytest.raises(ValueError, match=r"^x: found .*, expected "):
            Rule(hint).check("x", value)
