"""Saving memory: blocks recomputed in the backward, and weights sharded over ranks."""

import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel

from d2v_fast import Data2Vec, TargetsConfig, sharding, wrap
from d2v_fast.checkpoint import Checkpoint, CheckpointError
from d2v_fast.config import ConfigError, TrainConfig, parse
from d2v_fast.train import build as building
from d2v_fast.train import parallel, train
from d2v_fast.train.build import build
from d2v_fast.train.save import share
from d2v_fast.train.step import forward_backward, to_device
from d2v_fast.trained import load, read_config
from tests import models, test_spliced, test_training, test_training_2

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
    assert len(calls) <= len(run.state.core.student.blocks)  # hooks on a block do not run twice


def test_checkpointing_keeps_no_cast_weights(tmp_path):
    """In bf16, with the same gradients as without it."""
    found = {}
    for on in ("false", "true"):
        torch.manual_seed(0)
        run = made("vision", 2, tmp_path / on, "train.precision=bf16", f"train.checkpointing={on}")
        run.state.model.train()
        cached = []
        run.state.core.student.blocks[0].register_forward_pre_hook(
            lambda *_, cached=cached: cached.append(torch.is_autocast_cache_enabled())
        )
        (batch,) = run.feed.take(1)
        found[on] = gradients(run, batch)
        assert cached == [on == "false"]
    (loss, expected), (again, gradient) = found.values()
    assert torch.equal(again, loss) and gradient.keys() == expected.keys()
    assert [name for name in gradient if not torch.equal(gradient[name], expected[name])] == []


def torchrun(ranks, cases, *machine):
    """Run cases, [name, arguments of d2v-train, fused], in turn on `ranks` ranks, `machine` per machine; return the log."""
    Path("cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, "-m", "tests.sharded", "cases.json", *machine], capture_output=True, text=True, timeout=500, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def two_torchruns(ranks, cases, folders=(".", ".")):
    """Run cases like `torchrun`, on two torchruns of `ranks` each, in `folders`; return exit code and log of both."""
    for folder in folders:
        Path(folder, "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=7"]
        command.append(f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    both = [
        subprocess.Popen(
            [*command, f"--nproc-per-node={count}", "-m", "tests.sharded", "cases.json"],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=folder,
        )
        for count, folder in zip(ranks, folders, strict=True)
    ]
    try:
        said = [each.communicate(timeout=240)[1] for each in both]
    finally:
        for each in both:
            each.terminate()
    return [(each.returncode, text) for each, text in zip(both, said, strict=True)]


def side_by_side(modality, version, fused, *more):
    """A case with DistributedDataParallel, and the same case sharded."""
    args = (test_training.arguments, test_training_2.arguments)[version - 1]
    # A block that one rank skips could not be gathered by the others.
    more = [*more, "head.zero_init=false", "train.log_every=1", *["encoder.config.layerdrop=0"] * (modality == "audio")]
    name = f"{modality}-{version}-{fused}"
    return [[f"{name}-{s}", [*args(modality, f"{name}-{s}", *more), f"train.shard={s}"], fused] for s in ("false", "true")]


def saved(folder, step, part):
    return Checkpoint(Path(folder, "checkpoints", f"step-{step}")).tensors(part)


def assert_the_same_run(modality, version, fused, ranks=2):
    name = f"{modality}-{version}-{fused}"
    plain, sharded = (test_training.records(Path(f"{name}-{s}")) for s in ("false", "true"))
    assert len(plain) == len(sharded) == 4
    for a, b in zip(plain, sharded, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        for key in ("grad_norm", "update_norm", "teacher_decay", "teacher_distance"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, nan_ok=True), key
    shares = [json.loads(Path(f"{name}-true/share-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(max(share.values()) <= 0.51 for share in shares)
    assert sum(share["copy"] for share in shares) == pytest.approx(1)  # each element is written once
    for part in ("student", "teacher", "optimizer", "export"):
        if part == "export":
            plain, sharded = (load_file(f"{name}-{s}/export/model.safetensors") for s in ("false", "true"))
        else:
            plain, sharded = (saved(f"{name}-{s}", 4, part) for s in ("false", "true"))
        assert plain.keys() == sharded.keys()
        for key in plain:
            torch.testing.assert_close(sharded[key], plain[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("three", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sharded_on_two_ranks_it_is_the_same_run_and_goes_on_with_one_and_with_three(three, here):
    """A step is six micro-batches: 2 ranks × 3, then 1 × 6, then 3 × 2; compared with one uninterrupted process."""
    more = ["schedule.kind=constant", "schedule.warmup=0", "train.clip_norm=1", "train.batch_size=2", "optimizer.lr=1e-3"]
    args = test_training.arguments("vision", "run", *more, "train.steps=2", "train.accumulate=3")
    args += ["train.log_every=1", "train.shard=true"]
    torchrun(2, [*side_by_side("vision", 2, True), ["run", args, False]])
    assert_the_same_run("vision", 2, True)
    weights = saved("run", 2, "student")
    encoder = load(read_config(Path("run")), Path("run"), "step-2").encoder  # as d2v-export and d2v-probe do
    assert all(torch.equal(x, weights[f"student.{name}"]) for name, x in encoder.state_dict().items())
    shutil.copytree("run", "other")
    go_on = ["--resume", "run", "--resume-allow", "train.steps"]
    assert train(parse([*go_on, "train.steps=3", "train.accumulate=6", "train.shard=false"])[0]) == 0
    if three:
        more_ranks = ["--resume-allow", "train.steps", "train.accumulate=2", "train.shard=true"]
        shards_of_two = [["other", ["--resume", "other", *more_ranks, "train.steps=3"], False]]
        torchrun(3, [["run", ["--resume", "run", *more_ranks, "train.steps=5"], False], *shards_of_two])
        for part in ("student", "teacher"):
            one, other = (saved(name, 3, part) for name in ("run", "other"))
            assert max(float((one[key].double() - other[key].double()).abs().max()) for key in one) < 5e-6
    steps = 5 if three else 3
    assert train(parse(test_training.arguments("vision", "whole", *more, f"train.steps={steps}", "train.accumulate=6"))[0]) == 0
    for part in ("student", "teacher"):
        whole, run = (saved(name, steps, part) for name in ("whole", "run"))
        assert max(float((whole[key].double() - run[key].double()).abs().max()) for key in whole) < 5e-6
    assert [record["step"] for record in test_training.records(Path("run"))] == list(range(1, steps + 1))


@pytest.mark.slow
def test_with_data_parallelism_alone_it_goes_on_with_three_and_with_one(here):
    """A step is six micro-batches: 2 ranks × 3, then 3 × 2, then 1 × 6; compared with one uninterrupted process."""
    more = ["schedule.kind=constant", "schedule.warmup=0", "train.clip_norm=1", "train.batch_size=2", "optimizer.lr=1e-3"]
    more += ["train.log_every=1"]
    torchrun(2, [["run", test_training.arguments("vision", "run", *more, "train.steps=2", "train.accumulate=3"), False]])
    go_on = ["--resume", "run", "--resume-allow", "train.steps"]
    torchrun(3, [["run", [*go_on, "train.steps=4", "train.accumulate=2"], False]])
    assert train(parse([*go_on, "train.steps=6", "train.accumulate=6"])[0]) == 0
    whole = test_training.arguments("vision", "whole", *more, "train.steps=6", "train.accumulate=6")
    assert train(parse(whole)[0]) == 0
    for part in ("student", "teacher"):
        whole, run = (saved(name, 6, part) for name in ("whole", "run"))
        assert max(float((whole[key].double() - run[key].double()).abs().max()) for key in whole) < 5e-6
    assert [record["step"] for record in test_training.records(Path("run"))] == list(range(1, 7))


@pytest.mark.slow
def test_every_modality_is_the_same_sharded(here):
    every = list(itertools.product(DROPOUT, (1, 2), (False, True)))
    torchrun(2, [case for each in every for case in side_by_side(*each)])
    for each in every:
        assert_the_same_run(*each)


@pytest.mark.slow
@pytest.mark.parametrize("modality, version", [("text", 1), ("vision", 1), ("audio", 1), ("text", 2), ("vision", 2)])
def test_a_spliced_encoder_is_the_same_sharded(modality, version, here):
    """Its forward ends early in a hook of the first block, when FSDP may already have gathered the block."""
    torchrun(2, side_by_side(modality, version, False, *test_spliced.RUNS[modality].split()))
    assert_the_same_run(modality, version, False)


@pytest.mark.slow
def test_hybrid_sharding_on_two_machines_is_the_same_run(here):
    """train.shard=hybrid on four ranks, as if each machine had two of them."""
    cases = side_by_side("vision", 2, False)
    cases[1][1][-1] = "train.shard=hybrid"
    torchrun(4, cases, "2")
    assert_the_same_run("vision", 2, False, ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("local", [1, 2])
def test_hybrid_sharding_over_two_torchruns_goes_on_with_one_process(local, here):
    """Two machines on loopback, each with `local` ranks, compared with one process with as many micro-batches per step."""
    more = ["schedule.kind=constant", "schedule.warmup=0", "train.batch_size=2", "optimizer.lr=1e-3", "train.log_every=1"]
    steps = ["train.steps=2", f"train.accumulate={4 // local}"]
    args = [*test_training.arguments("vision", "run", *more), "train.shard=hybrid", *steps]
    said = two_torchruns([local, local], [["run", args, False]])
    assert said[0][0] == said[1][0] == 0, said
    for rank in range(2 * local):
        share = json.loads(Path(f"run/share-{rank}.json").read_text())
        assert max(share.values()) <= (0.51 if local == 2 else 1)
    go_on = ["--resume", "run", "--resume-allow", "train.steps", "train.steps=4", "train.accumulate=8", "train.shard=false"]
    assert train(parse(go_on)[0]) == 0
    whole = test_training.arguments("vision", "whole", *more, "train.steps=4", "train.accumulate=8")
    assert train(parse(whole)[0]) == 0
    for part in ("student", "teacher"):
        whole, run = (saved(name, 4, part) for name in ("whole", "run"))
        assert max(float((whole[key].double() - run[key].double()).abs().max()) for key in whole) < 5e-6
    for a, b in zip(*(test_training.records(Path(name)) for name in ("whole", "run")), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.slow
def test_hybrid_sharding_of_unequal_machines_is_refused(here):
    args = [*test_training.arguments("vision", "run"), "train.shard=hybrid"]
    for code, said in two_torchruns([2, 1], [["run", args, False]]):
        assert code != 0 and "train.shard=hybrid: the machines have 2, 1 ranks" in said, said


@pytest.mark.slow
def test_sharded_in_bf16_it_trains_as_unsharded_resumes_and_exports(here):
    """With --fused, which logs what it leaves out; resumed after two of four steps, bit-identical."""
    more = ["train.precision=bf16", "train.log_every=1", "schedule.kind=constant", "schedule.warmup=0", "optimizer.lr=1e-3"]
    args = functools.partial(test_training_2.arguments, "vision")
    cases = [[name, [*args(name, *more), f"train.shard={s}"], True] for name, s in (("plain", "false"), ("whole", "true"))]
    cases.append(["run", [*args("run", *more), "train.shard=true", "train.steps=2"], True])
    cases.append(["run", ["--resume", "run", "train.steps=4", "--resume-allow", "train.steps"], True])
    said = torchrun(2, cases)
    assert said.count("nothing compiled, because of train.shard") == 3 and "resumes after step 2" in said
    plain, whole, run = (test_training.records(Path(name)) for name in ("plain", "whole", "run"))
    for a, b in zip(plain, whole, strict=True):  # bf16 has eight bits; gradients are summed in another order
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    assert [each["loss"] for each in whole] == [each["loss"] for each in run]
    for part in ("student", "teacher"):
        tensors = [saved(name, 4, part) for name in ("whole", "run")]
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    output = AutoModel.from_pretrained("run/export")(torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert output.isfinite().all()


FULL = {
    "even": torch.arange(60.0).view(6, 10),
    "uneven": torch.arange(35.0).view(7, 5),
    "short": torch.arange(2, dtype=torch.bfloat16),  # fewer rows than ranks
    "step": torch.tensor(5.0),
}
AXES = {"even": 1, "uneven": 0, "short": 0}


@contextmanager
def as_rank(rank, world, machines=1):
    """One rank's view of FULL, sharded within each machine, in a process group that exchanges nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (machines, world // machines))
        spread = {
            name: distribute_tensor(FULL[name], mesh, [Replicate(), Shard(axis)], src_data_rank=None)
            for name, axis in AXES.items()
        }
        yield FULL | spread
    finally:
        torch.distributed.destroy_process_group()


def write_parts(folder, world, machines=1):
    for rank in range(world):
        with as_rank(rank, world, machines) as tensors:
            found, metadata = sharding.parts(tensors, rank)
        if found:
            save_file({name: x.contiguous() for name, x in found.items()}, folder / f"{rank}.safetensors", metadata)
    return sorted(folder.iterdir())


@pytest.fixture
def elements(monkeypatch):
    """Counts the elements read from files."""
    counted = []

    class Slice:
        def __init__(self, found):
            self.found, self.get_shape = found, found.get_shape

        def __getitem__(self, index):
            counted.append(self.found[index].numel())
            return self.found[index]

    class File:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            self.opened = self.file.__enter__()
            self.keys, self.metadata = self.opened.keys, self.opened.metadata
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_slice(self, name):
            return Slice(self.opened.get_slice(name))

        def get_tensor(self, name):
            counted.append(self.opened.get_tensor(name).numel())
            return self.opened.get_tensor(name)

    monkeypatch.setattr(sharding, "safe_open", File)
    return counted


@pytest.mark.parametrize("world, machines", [(1, 1), (2, 1), (3, 1), (4, 2), (2, 2)])
def test_shards_load_on_any_number_of_ranks_which_read_only_theirs(world, machines, elements, tmp_path):
    files = write_parts(tmp_path, world, machines)
    assert len(files) == world // machines  # one replica writes
    whole = sharding.read(files, lambda name: None)
    assert whole.keys() == FULL.keys()
    assert all(torch.equal(whole[name], x) and whole[name].dtype == x.dtype for name, x in FULL.items())
    for readers in (1, 2, 3, 5):
        for rank in range(readers):
            elements.clear()
            with as_rank(rank, readers) as tensors:
                found = sharding.read(files, tensors.get)
                assert torch.equal(found["step"], FULL["step"])
                for name, axis in AXES.items():
                    chunks = FULL[name].chunk(readers, axis)
                    expected = chunks[rank] if rank < len(chunks) else FULL[name][:0]
                    assert torch.equal(found[name].to_local(), expected) and found[name].dtype == FULL[name].dtype
                    assert found[name].shape == FULL[name].shape and found[name].placements == tensors[name].placements
                assert sum(elements) == 1 + sum(found[name].to_local().numel() for name in AXES)


def test_plain_files_load_sharded_and_another_shape_loads_whole(tmp_path):
    save_file(FULL, tmp_path / "plain.safetensors")  # without offsets
    with as_rank(1, 2) as tensors:
        found = sharding.read([tmp_path / "plain.safetensors"], (tensors | {"uneven": tensors["even"]}).get)
        assert torch.equal(found["even"].to_local(), FULL["even"][:, 5:])
        assert type(found["uneven"]) is torch.Tensor and torch.equal(found["uneven"], FULL["uneven"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_files_too(tmp_path):
    from torch.distributed import checkpoint

    write_parts(tmp_path, 3)
    found = {name: torch.zeros_like(x) for name, x in FULL.items() if x.ndim}
    checkpoint.load(found, storage_reader=checkpoint.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(x, FULL[name]) for name, x in found.items())


def test_shards_that_are_missing_or_malformed_are_refused(tmp_path):
    files = write_parts(tmp_path, 3)
    with pytest.raises(ValueError, match="the shards of even do not make up the whole tensor"):
        sharding.read(files[1:], lambda name: None)
    with pytest.raises(ValueError, match="do not make up"):
        sharding.read([*files, files[0]], lambda name: None)
    for offsets in ("{}", '{"x": {"saved_offsets": null}}', '{"x": {"saved_offsets": [1, 2]}}', "7", "{"):
        (tmp_path / "step-1").mkdir(exist_ok=True)
        save_file({"x": torch.ones(3)}, tmp_path / "step-1" / "student-0.safetensors", {sharding.OFFSETS: offsets})
        found = Checkpoint.__new__(Checkpoint)
        found.folder, found.files = tmp_path / "step-1", {"student-0.safetensors": {}}
        with pytest.raises(CheckpointError, match=r"step-1: not a valid version 3 checkpoint: \w+Error: "):
            found.tensors("student")


FAULTY = """
import errno, os, signal, sys
from d2v_fast import Callback, checkpoint
from d2v_fast.config import parse
from d2v_fast.train import loop as loops
from d2v_fast.train.build import build

write, step, rank = checkpoint.save_file, loops.step, os.environ["RANK"]

class Written(Callback):
    def on_checkpoint(self, run, folder):
        print("written:", folder.name, os.path.exists(folder), file=sys.stderr)

def save_file(values, path, metadata=None):
    if rank == "1" and path.parent.name == "step-2.tmp":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(values, path, metadata)
    if rank == "1" and path.parent.name == "step-6.tmp":
        os.kill(os.getpid(), signal.SIGKILL)

def waiting(*args):
    run.checkpoints.wait()  # so that each checkpoint is saved in the step in which it is due
    return step(*args)

checkpoint.save_file, loops.step = save_file, waiting
run = build(parse(sys.argv[1:])[0], callbacks=[Written()])
loops.loop(run)
"""


@pytest.mark.slow
def test_a_rank_whose_disk_is_full_or_that_is_killed_while_it_writes_leaves_no_checkpoint(here):
    """Rank 1 cannot write step 2 and dies while writing step 6; step 4, between them, is complete, and one process resumes."""
    Path("faulty.py").write_text(FAULTY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "faulty.py"]
    args = test_training.arguments("vision", "run", "train.batch_size=2", "train.save_every=2", "train.steps=9")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, *args, "train.shard=true"], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode != 0 and "(exitcode: -9)" in done.stderr, done.stderr
    assert done.stderr.count("the checkpoint of step 2 could not be written: rank 1: [Errno 28] No space left on device") == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("written:")] == ["written: step-4 True"]
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-4", "step-6.tmp"]
    assert set(Checkpoint(Path("run/checkpoints/step-4")).files) == {
        *(f"{name}-{rank}.safetensors" for name in ("student", "teacher", "optimizer") for rank in (0, 1)),
        *("rng-0.safetensors", "samples-0.safetensors", "state.json"),
    }
    go_on = ["--resume", "run", "train.shard=false", "train.accumulate=2", "train.steps=5", "--resume-allow", "train.steps"]
    assert train(parse(go_on)[0]) == 0
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-4", "step-5"]


@pytest.mark.slow
def test_a_folder_that_a_rank_does_not_see_is_refused(here):
    """Two torchruns in different working folders, like two machines with separate disks."""
    args = [*test_training.arguments("vision", "run"), "train.shard=true"]
    Path("other").mkdir()
    for code, said in two_torchruns([1, 1], [["run", args, False]], [".", "other"]):
        assert code != 0 and "train.output=run: ranks 1 do not see this folder of rank 0" in said, said
    assert not list(Path("run").glob(".shared*"))


class Count:
    """Counts the bytes of tensors that autograd saves, each storage once, excluding parameters."""

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
    """At a quarter of base width, without dropout, which saves more. Two depths give the memory per layer."""
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


def ranks(*counts):
    window = {"loss": 3.0, "cls_loss": 0.0, "steps": 4, "samples": 10, "waited": 1.0, "seconds": 2.0}
    return [
        {"batches": count, "broken": [[7, "a.png"], [count, f"{count}.png"]], "window": window | {"loss": float(count)}}
        for count in counts
    ]


def test_another_number_of_ranks_has_an_equal_share_of_what_was():
    saved = ranks(12, 12)
    assert share(saved, 1, 2) is saved[1]
    assert share(ranks(12, 13), 0, 5)["batches"] == 5  # the extra batch of one rank is not repeated
    found = share(ranks(12, 14), 2, 4)
    assert found["batches"] == 6
    assert found["broken"] == [[7, "a.png"], [12, "12.png"], [14, "14.png"]]
    assert found["window"] == {"loss": 13.0, "cls_loss": 0.0, "steps": 4, "samples": 5.0, "waited": 1.0, "seconds": 2.0}
    parts = [{"parts": {"vision": one, "audio": other}} for one, other in zip(ranks(12, 14), ranks(2, 5), strict=True)]
    assert share(parts, 2, 4)["parts"] == {"vision": found, "audio": share(ranks(2, 5), 2, 4)}
    assert share(parts, 1, 2) is parts[1]


def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    vision = functools.partial(test_training.config, "vision")
    with pytest.raises(ConfigError, match=r"train.precision=fp16: sharded ranks cannot agree on a gradient scale; use bf16"):
        vision(tmp_path / "run", "train.shard=true", "train.precision=fp16")
    with pytest.raises(ConfigError, match=r"train.shard: found all, expected true or false or one of hybrid"):
        vision(tmp_path / "run", "train.shard=all")
    with pytest.raises(
        ConfigError, match=r"train.probe_every: the probe runs the teacher on one rank, but train.shard spreads"
    ):
        vision(tmp_path / "run", "train.shard=true", "train.probe_every=2")
    one = "train.shard=true: there is only one process; start several with torchrun .* or set train.shard=f"
    with pytest.raises(ConfigError, match=one):
        build(vision(tmp_path / "run", "train.shard=true"))
    run = build(test_training.config("audio", tmp_path / "audio", "encoder.config.layerdrop=0.1"))
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), autocast=nullcontext)
    monkeypatch.setattr(building, "shard", lambda core, device, world, hybrid: sharding.shard(core, device, 1))
    config = vision(tmp_path / "run", "train.shard=true")
    with pytest.raises(
        ConfigError, match=r"train.shard=true with encoder.config.layerdrop=0.1: .* so no rank may skip it; set enco"
    ):
        building._shard(run.state.core, config, run.data, accelerator)
    found = [("0", 2), ("0", 2), ("1", 1)]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: found)
    with pytest.raises(ConfigError, match=r"train.shard=hybrid: the machines have 2, 1 ranks; start the same number on each"):
        building.check_machines(3)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, False])
    with pytest.raises(ConfigError, match=r"train.output=.*audio: ranks 1 do not see this folder of rank 0"):
        run.folder.check_shared(run.accelerator)
    assert not list(run.folder.path.glob(".shared*"))


class Reaching(models.Handwritten):
    """Reads the weights of a block outside of it."""

    def contextualize(self, features, padding_mask=None):
        return super().contextualize(features @ self.blocks[0].gate.weight, padding_mask)


class Scalar(models.Handwritten):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.temperature = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize(
    "model, why", [(Reaching, "mixed torch.Tensor and DTensor"), (Scalar, "scalar parameters"), (None, "")]
)
def test_blocks_that_cannot_be_gathered_are_named(model, why, monkeypatch):
    """In a group of one process, which gathers blocks in the same way."""
    core = Data2Vec(wrap((model or models.Handwritten)(), "blocks", "mlp.2"), targets=TargetsConfig(top_k=2))
    batch = {"source": torch.randn(2, 8, 6), "mask": torch.arange(8).expand(2, 8) < 4}
    batch["index"] = batch["mask"].flatten().nonzero().squeeze(1)
    monkeypatch.setattr(building, "first_batch", lambda data: batch)
    monkeypatch.setattr(building, "shard", lambda core, device, world, hybrid: sharding.shard(core, device, 1))
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), autocast=nullcontext)
    config = SimpleNamespace(train=SimpleNamespace(shard=True))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        if model is None:
            expected = core(**batch).loss.detach()
            building._shard(core, config, None, accelerator)
            torch.testing.assert_close(core(**batch).loss.detach(), expected)
            return
        name = model.__name__
        with pytest.raises(
            ConfigError, match=f"train.shard=true: {name} cannot be sharded by its blocks: .*{why}.*; blocks must"
        ):
            building._shard(core, config, None, accelerator)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_are_started_with_a_timeout_and_without_a_second_copy_of_gradients(monkeypatch):
    asked = []
    accelerator = accelerate.Accelerator
    monkeypatch.setattr(
        accelerate, "Accelerator", lambda **kwargs: asked.extend(kwargs["kwargs_handlers"]) or accelerator(**kwargs)
    )
    parallel.start(TrainConfig(timeout_minutes=0.25))
    found = {key: value for handler in asked for key, value in handler.to_kwargs().items()}
    assert found["timeout"].total_seconds() == 15 and found["gradient_as_bucket_view"]


def test_a_full_tensor_is_spread_without_communication():
    with as_rank(1, 2) as tensors:
        for name, axis in AXES.items():
            found = sharding.spread_as(FULL[name], tensors[name])
            assert torch.equal(found.to_local(), FULL[name].chunk(2, axis)[1])
            assert found.placements == tensors[name].placements
        for tensor, like in (("even", "step"), ("uneven", "even"), ("step", "step")):  # not sharded, or of another shape
            assert sharding.spread_as(FULL[tensor], tensors[like]) is FULL[tensor]
        assert sharding.spread_as(tensors["even"], tensors["even"]) is tensors["even"]


def test_gathered_parameters_are_put_back_whatever_happens():
    """One that two modules share and one that is not sharded, in a group of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        values, bias = model["a"].weight.detach().clone(), model["a"].bias
        spread = nn.Parameter(distribute_tensor(values, init_device_mesh("cpu", (1,)), [Shard(0)]), requires_grad=False)
        model["a"].weight = model["b"].weight = spread
        with pytest.raises(KeyError):
            with sharding.gathered(model, keep=True):
                found = model["a"].weight
                assert type(found.data) is torch.Tensor and torch.equal(found, values) and not found.requires_grad
                assert model["b"].weight is found and model["a"].bias is bias
                raise KeyError
        assert model["a"].weight is spread and model["b"].weight is spread
        with sharding.gathered(model, keep=False):
            assert model["a"].weight is spread
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "hybrid, machine, axes",
    [
        (False, "2", [2, 0, 1, 2, 0]),
        (True, "2", [2, 0, 0, 0, 0]),
        (True, None, [2, 0, 1, 2, 0]),  # one machine
    ],
)
def test_which_axis_is_sharded(hybrid, machine, axes, monkeypatch):
    """The first, unless it has fewer rows than there are ranks and another one divides evenly: then the longest such."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if machine:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", machine)
    core = Data2Vec(wrap(models.Handwritten(), "blocks", "mlp.2"), targets=TargetsConfig(top_k=2))
    shapes = (1, 1, 8), (3, 5), (2, 8), (2, 4, 8), (8, 16)
    for i, shape in enumerate(shapes):
        core.register_parameter(f"own{i}", nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape)))
    full = [core.get_parameter(f"own{i}").detach().clone() for i in range(5)]
    with as_rank(1, 4):
        sharding.shard(core, torch.device("cpu"), 4, hybrid)
        local = 2 if hybrid and machine else 4
        for i, axis in enumerate(axes):
            found = core.get_parameter(f"own{i}")
            assert found.placements[-1].dim == axis and len(found.placements) == 1 + hybrid
            assert not hybrid or found.placements[0].is_replicate()
            assert torch.equal(found.to_local(), full[i].chunk(local, axis)[1])
        for encoder in (core.student, core.teacher.module):
            assert all(hasattr(p, "placements") for p in encoder.parameters())
