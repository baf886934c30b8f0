"""What makes a model fit: blocks computed again in the backward, and weights spread over ranks."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from d2v_fast.config import parse
from d2v_fast.train import train
from d2v_fast.train.build import build
from d2v_fast.train.step import forward_backward, to_device
from tests import models, test_training, test_training_2

DROPOUT = {
    "text": "encoder.config.hidden_dropout_prob=0.1 encoder.config.attention_probs_dropout_prob=0.1",
    "vision": "encoder.config.hidden_dropout_prob=0.1 encoder.config.attention_probs_dropout_prob=0.1",
    "audio": "encoder.config.hidden_dropout=0.1 encoder.config.attention_dropout=0.1 encoder.config.activation_dropout=0.1 "
    "encoder.config.layerdrop=0.3 head.zero_init=false",
}


def made(modality, version, folder, *more, fused=False):
    args = test_training.arguments if version == 1 else test_training_2.arguments
    return build(parse(args(modality, folder, *DROPOUT[modality].split(), *more))[0], fused)


def gradients(run, batch, seed=1):
    torch.manual_seed(seed)
    loss, _ = forward_backward(run.state, to_device(batch, run.state.device), len(batch["index"]), 1)
    found = {name: p.grad for name, p in run.state.core.named_parameters() if p.grad is not None}
    run.state.optimizer.zero_grad(set_to_none=True)
    return loss, found


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("modality", DROPOUT)
def test_gradients_of_checkpointed_blocks_are_the_same_bits(modality, version, fused, tmp_path):
    run = made(modality, version, tmp_path / "run", fused=fused)
    run.state.model.train()
    (batch,) = run.feed.take(1)
    loss, expected = gradients(run, batch)
    assert not torch.equal(gradients(run, batch, seed=2)[0], loss)  # dropout is at work
    calls = []
    for block in run.state.core.student.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    run.state.core.student.checkpoint_blocks()
    again, found = gradients(run, batch)
    assert torch.equal(again, loss) and found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert len(calls) <= len(run.state.core.student.blocks)  # what hooks a block is not done twice


def torchrun(ranks, cases):
    """Run cases, [name, arguments of d2v-train, fused] each, one after the other on so many ranks."""
    Path("cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, "-m", "tests.sharded", "cases.json"], capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr


def side_by_side(modality, version, fused, *more):
    """A case with DistributedDataParallel and one that is sharded."""
    args = (test_training.arguments, test_training_2.arguments)[version - 1]
    # Of a block that one rank may leave out no other could gather its part.
    more = [*more, "head.zero_init=false", "train.log_every=1", "encoder.config.layerdrop=0"][: 3 if modality == "audio" else 2]
    name = f"{modality}-{version}-{fused}"
    return [[f"{name}-{s}", [*args(modality, f"{name}-{s}", *more), f"train.shard={s}"], fused] for s in ("false", "true")]


def assert_the_same_run(modality, version, fused):
    name = f"{modality}-{version}-{fused}"
    plain, sharded = (test_training.records(Path(f"{name}-{s}")) for s in ("false", "true"))
    assert len(plain) == len(sharded) == 4
    for a, b in zip(plain, sharded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        for key in ("grad_norm", "update_norm", "teacher_decay", "teacher_distance"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, nan_ok=True), key
    for rank in range(2):
        share = json.loads(Path(f"{name}-true/share-{rank}.json").read_text())
        assert max(share.values()) <= 0.51
    for part in ("export/model", "checkpoints/step-4/student", "checkpoints/step-4/teacher", "checkpoints/step-4/optimizer"):
        plain, sharded = (load_file(f"{name}-{s}/{part}.safetensors") for s in ("false", "true"))
        assert plain.keys() == sharded.keys()
        for key in plain:
            torch.testing.assert_close(sharded[key], plain[key], rtol=1e-4, atol=1e-6)


def test_sharded_on_two_ranks_it_is_the_same_run_and_goes_on_with_one_and_with_three(here):
    """A step is six micro-batches: 2 ranks × 3, then 1 × 6, then 3 × 2; beside one process that never stops."""
    more = ["schedule.kind=constant", "schedule.warmup=0", "train.clip_norm=1", "train.batch_size=2", "optimizer.lr=1e-3"]
    args = test_training.arguments("vision", "run", *more, "train.steps=2", "train.accumulate=3")
    args += ["train.log_every=1", "train.shard=true"]
    torchrun(2, [*side_by_side("vision", 2, True), ["run", args, False]])
    assert_the_same_run("vision", 2, True)
    go_on = ["--resume", "run", "--resume-allow", "train.steps"]
    assert train(parse([*go_on, "train.steps=3", "train.accumulate=6", "train.shard=false"])[0]) == 0
    torchrun(3, [["run", [*go_on, "train.steps=5", "train.accumulate=2", "train.shard=true"], False]])
    assert train(parse(test_training.arguments("vision", "whole", *more, "train.steps=5", "train.accumulate=6"))[0]) == 0
    for part in ("student", "teacher"):
        whole, run = (load_file(f"{name}/checkpoints/step-5/{part}.safetensors") for name in ("whole", "run"))
        assert max(float((whole[key].double() - run[key].double()).abs().max()) for key in whole) < 5e-6
    assert [record["step"] for record in test_training.records(Path("run"))] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_so_is_every_modality(here):
    every = list(itertools.product(DROPOUT, (1, 2), (False, True)))
    torchrun(2, [case for each in every for case in side_by_side(*each)])
    for each in every:
        assert_the_same_run(*each)


class Count:
    """Bytes of all tensors that autograd saves, each storage once; parameters, which are there anyway, do not count."""

    def __init__(self, parameters):
        self.known = {p.untyped_storage().data_ptr() for p in parameters}
        self.storages = {}

    def __call__(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def saved_by(encoder, x):
    count = Count(encoder.parameters())
    with saved_tensors_hooks(count, lambda tensor: tensor):
        states = encoder.transform(x).states
    del states
    return count.bytes


@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_checkpointed_layer_saves_a_fifteenth(name):
    """At a quarter of the base size's width, without dropout, which would save more. Two depths differ by their layers."""
    config = models.CONFIGS[name] | dict(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    found = {}
    for depth in (2, 4):
        encoder = models.build_encoder(name, config=config | dict(num_hidden_layers=depth)).train()
        x = torch.randn(2, 128 if encoder.reads != "vision" else 16, 192, requires_grad=True)
        found[depth] = saved_by(encoder, x)
        encoder.checkpoint_blocks()
        found[-depth] = saved_by(encoder, x)
    layer, checkpointed = (found[4] - found[2]) / 2, (found[-4] - found[-2]) / 2
    assert x.nbytes <= checkpointed <= layer / 15
