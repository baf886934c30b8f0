"""The estimates of `d2v-doctor --memory` compared with the bytes alive in a step on tensors without values."""

import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2v_fast import diagnostics, memory, sharding
from d2v_fast.config import ConfigError, parse
from d2v_fast.sharding import own

torch.utils._device._device_constructors()  # cached, so call it before a fixture replaces some of them
WORLD = 8


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors, by storage, and their maximum so far.

    Args:
        tensors: Tensors that already exist.
    """

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.bytes, self.most = {}, 0, 0
        for tensor in tensors:
            self.note(tensor.untyped_storage())

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            resize(storage, size)
            self.note(storage)

        # FSDP frees and allocates gathered parameters this way, without dispatching.
        self.resizes = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self.resizes.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.resizes.stop()

    def note(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = [0, weakref.ref(storage, lambda _: self.resize(key, 0) or self.alive.pop(key))]
        self.resize(key, storage.nbytes())

    def resize(self, key, size):
        self.bytes += size - self.alive[key][0]
        self.alive[key][0] = size
        self.most = max(self.most, self.bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # wait for the operations on its shards
        out = func(*args, **kwargs or {})
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.note(each.untyped_storage())
        return out


@pytest.fixture
def ranks():
    """The first of several ranks that exchange nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def counted(config, checkpointing, ranks=1, hybrid=False):
    """Bytes on a GPU in a logged step: weights, moments and teacher; the peak in the passes; the peak in the update."""
    model = memory.model_on_meta(config)
    if checkpointing:
        model.student.checkpoint_blocks()
    if ranks > 1:
        sharding.shard(model, torch.device("cpu"), ranks, hybrid)
    model.forward = partial(memory.student_pass, model)  # called as a module, because FSDP's hooks gather parameters
    with memory.without_numbers(model, memory.example(config, model.student)) as inputs:
        with torch.no_grad():
            local = {parameter: own(parameter.detach()) for parameter in model.parameters()}
            trained = {parameter: shard for parameter, shard in local.items() if parameter.requires_grad}
            sides = [*trained.values()], [local[parameter] for parameter in model.teacher.module.parameters()]
            for shard in trained.values():
                shard.grad = torch.zeros_like(shard)
            optimizer = torch.optim.AdamW(trained.values(), foreach=False)
            optimizer.step()
        moments = [x for state in optimizer.state.values() for x in state.values()]
        optimizer.zero_grad()
        if ranks == 1:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)  # DistributedDataParallel allocates them at the start
        live = Live([*local.values(), *moments, *(p.grad for p in trained if p.grad is not None)])
        always = live.bytes
        with live:
            layers, predictions = model(inputs, config.train.precision)
            loss = (predictions - torch.zeros_like(predictions)).square().sum()
            del layers, predictions
            loss.backward()
            del loss  # whose graph holds the input and, with wav2vec2, a gradient of it
            inputs.clear()
            passes, live.most = live.most, live.bytes
            with torch.no_grad():
                for parameter, shard in trained.items():
                    shard.grad = own(parameter.grad)
                before = [[x.clone() for x in side] for side in sides]  # as the monitor does
                optimizer.step()
                model.update_teacher()
                if ranks > 1:
                    optimizer.zero_grad()
                    for parameter in trained:
                        parameter.grad = None
                difference = torch._foreach_sub(sides[0], before[0])
        del difference
        return always, passes, live.most


LARGE = "encoder.config.num_attention_heads=16 encoder.config.hidden_size={} encoder.config.num_hidden_layers={} "
LARGE += "encoder.config.intermediate_size={}"
COUNTED = {
    # More activations than parameters, as in runs that are short of memory.
    **{
        name: f"{name} train.precision=fp32 encoder.config.num_hidden_layers=6"
        for name in ("vision/tiny-2", "text/tiny", "audio/tiny")
    },
    "ViT-g/14": "vision/v2-huge14 " + LARGE.format(1408, 40, 6144),
    "XLS-R 1B": "audio/data2vec-base --config audio/wav2vec2-base encoder.config.do_stable_layer_norm=true "
    "encoder.config.layerdrop=0 encoder.config.conv_bias=true " + LARGE.format(1280, 48, 5120),
}
# Encoders that run whole, so `encoders.trial` runs first.
SMALL = "train.precision=fp32 encoder.config.hidden_size=64 encoder.config.num_hidden_layers=6 "
SMALL += "encoder.config.num_attention_heads=2 encoder.config.intermediate_size=128 encoder.model="
WHOLE = {
    "modernbert": f"text/tiny {SMALL}modernbert encoder.config.max_position_embeddings=34",
    "dinov3": f"vision/tiny {SMALL}dinov3_vit encoder.init=hf encoder.config.image_size=32 encoder.config.patch_size=4",
    "ast": f"spectrogram/tiny-2 {SMALL}audio-spectrogram-transformer encoder.config.max_length=64 "
    "encoder.config.num_mel_bins=64 encoder.config.patch_size=8 encoder.config.time_stride=8 encoder.config.frequency_stride=8",
    "timm": "vision/tiny train.precision=fp32 encoder.init=hf encoder.model=timm/vit_tiny_patch16_224 "
    "encoder.config.img_size=32 encoder.config.patch_size=4 encoder.config.embed_dim=64 "
    "encoder.config.depth=6 encoder.config.num_heads=2",
}
COUNTED |= WHOLE


def slow(names, fast):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", slow(COUNTED, COUNTED.keys() - {"ViT-g/14", "XLS-R 1B"}))
def test_the_estimate_equals_the_peak_of_a_step(name, checkpointing):
    """The count covers a whole step with backward and update; the estimate only runs a forward."""
    if name == "timm":
        pytest.importorskip("timm")
    config, _ = parse(["--config", *COUNTED[name].split()])
    found = memory.need(config, WORLD)
    doctor = found["train.checkpointing" if checkpointing else "neither"]
    always, passes, update = counted(config, checkpointing)
    assert always == pytest.approx(sum(doctor.always.values()), rel=1e-3)
    assert passes == pytest.approx(always + sum(doctor.passes.values()), rel=0.1)
    assert update == pytest.approx(always + sum(doctor.update.values()), rel=0.1)
    check_table(name, found, checkpointing, max(passes, update))


# More parameters than activations, so that gathered parameters matter.
WIDE = "train.batch_size=2 encoder.config.hidden_size=256 encoder.config.num_attention_heads=4 "
WIDE += "encoder.config.intermediate_size=1024 encoder.config.num_hidden_layers=6 "
SHARDED = {
    "wide": f"vision/tiny-2 {WIDE}",
    "wide text": f"text/tiny {WIDE}train.precision=fp32",
    **{name: COUNTED[name] for name in ("vision/tiny-2", "text/tiny", "audio/tiny", "ViT-g/14", "XLS-R 1B")},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", slow(SHARDED, ["wide"]))
def test_the_estimate_equals_the_peak_of_a_sharded_step(name, checkpointing, ranks):
    config, _ = parse(["--config", *SHARDED[name].split()])
    found = memory.need(config, WORLD)
    doctor = found["train.checkpointing + train.shard" if checkpointing else "train.shard"]
    always, passes, update = counted(config, checkpointing, WORLD)
    assert always == pytest.approx(sum(doctor.always.values()), rel=1e-2)
    assert passes == pytest.approx(always + sum(doctor.passes.values()), rel=0.1)
    assert update == pytest.approx(always + sum(doctor.update.values()), rel=0.1)
    check_table(name, found, 2 + checkpointing, max(passes, update))


def test_the_estimate_of_a_hybrid_run(ranks, monkeypatch):
    """Two machines with four ranks each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config, _ = parse(["--config", *SHARDED["wide"].split()])
    doctor = memory.need(config, 4)["train.shard"]
    always, passes, update = counted(config, False, WORLD, hybrid=True)
    assert always == pytest.approx(sum(doctor.always.values()), rel=1e-2)
    assert passes == pytest.approx(always + sum(doctor.passes.values()), rel=0.1)
    assert update == pytest.approx(always + sum(doctor.update.values()), rel=0.1)


def check_table(name, found, column, peak):
    """Check the row in docs/training.md, the estimates and the counts."""
    if name[0] not in "VX":
        return
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {name} "))
    computed = [each.total for each in found.values()][column]
    assert row.split("|")[2 + column] == f" {computed / memory.GIB:.1f} / {peak / memory.GIB:.1f} "


def doctor(command):
    diagnostics.doctor(["--memory", *command.split()])


def test_the_doctors_command(capsys, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    doctor("--config vision/tiny-2 --gpus 8 --gpu-memory 80")
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == "vision-tiny-2: bf16, 8 GPUs; within 10 %, without CUDA and NCCL"
    assert head.split() == "GiB per GPU neither checkpointing shard checkpointing + shard".split()
    assert rows[0].split()[0] == "weights" and rows[-1].split() == ["of", "80", *["fits"] * 4]
    doctor("--config vision/tiny-2 --gpus 1 --gpu-memory 0.001")
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["of", "0", "too", "much", "too", "much"]


def test_the_doctor_divides_a_hybrid_run_by_the_ranks_of_a_machine(capsys, monkeypatch):
    need, asked = memory.need, []
    monkeypatch.setattr(memory, "need", lambda config, ranks: asked.append(ranks) or need(config, ranks))
    doctor("--config vision/tiny-2 train.shard=hybrid --gpus 16 --machines 4 --gpu-memory 80")
    assert "16 GPUs, sharded over 4;" in capsys.readouterr().out and asked == [4]
    doctor("--config vision/tiny-2 train.shard=true --gpus 16 --machines 4 --gpu-memory 80")
    assert "16 GPUs;" in capsys.readouterr().out and asked == [4, 16]
    with pytest.raises(ConfigError, match=r"train.shard=hybrid: .* number of machines for the 16 GPUs, such as --machines 1"):
        doctor("--config vision/tiny-2 train.shard=hybrid --gpus 16")
    with pytest.raises(ConfigError, match=r"--gpus 8 --machines 3: expected the same number of GPUs on each machine"):
        doctor("--config vision/tiny-2 train.shard=hybrid --gpus 8 --machines 3")


def test_the_doctor_refuses_several_modalities():
    with pytest.raises(ConfigError, match=r"modality=several: .* those of vision or audio: a step trains one part"):
        doctor("--config several/tiny-2")
