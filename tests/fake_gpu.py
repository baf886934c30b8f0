"""Training steps on a fake GPU: tensors with shape, dtype and device, but no data.

Reading a value would synchronise with a real GPU, and mixing with host tensors would fail on one: both are errors here. Run
as `python -m tests.fake_gpu fake_gpu.so CASE …` in a separate process, because the device must be registered before a torch
without CUDA is imported. Prints JSON: the error of each case, or null.
"""

# ruff: noqa: E402
import ctypes
import importlib.util
import json
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

_torch = Path(importlib.util.find_spec("torch").origin).parent
ctypes.CDLL(str(_torch / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1])

import torch
import transformers.masking_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast import Data2Vec, EMAConfig, LossConfig, TargetsConfig, encoders, train
from d2v_fast.config import parse
from d2v_fast.data import to_device
from d2v_fast.diagnostics import Monitor
from d2v_fast.fused import PARTS, fuse
from d2v_fast.ops import attention, triton_adam, triton_loss
from d2v_fast.train.build import build
from d2v_fast.train.log import Window
from d2v_fast.train.optim import make_optimizer
from d2v_fast.train.step import can_be_late
from tests import models, test_training, test_training_2, waits

MODE = FakeTensorMode()
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
torch.cuda.get_device_capability = lambda *args: (9, 0)
torch.backends.cuda.is_flash_attention_available = lambda: True
triton_loss.obstacle = lambda device: None
attention._agrees = lambda device: True
encoders.hub._check_states = lambda encoder: None  # transformers would cache results from it, computed on real tensors
# transformers takes fake tensors for tracing and would skip the checks that read values.
transformers.masking_utils.is_tracing = lambda *args: False
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) then copies in a way that NoWaits sees


class NoWaits(TorchDispatchMode):
    """Refuse what makes the host wait: reading a value, and blocking copies, including those of indices.

    Counts the calls of the attention that takes lengths.
    """

    segmented = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.segmented += function is torch.ops.aten._flash_attention_forward.default
        if found := waits.why(function, args, kwargs):
            raise AssertionError(found)
        return function(*args, **kwargs)


def step(name: str, precision: str, kind: str) -> None:
    """Two optimizer steps of a tiny encoder."""
    text, image, wave = (name in names for names in (models.TEXTS, models.IMAGES, models.WAVES))
    encoder = models.make(name)
    targets = TargetsConfig(top_k=2, norm="instance" if wave else "layer")
    scope = "layers" if wave else "encoder" if image else "all"
    model = Data2Vec(encoder, targets=targets, loss=LossConfig(impl="triton"), ema=EMAConfig(scope=scope)).train()
    flash = []
    package = SimpleNamespace(flash_attn_func=lambda q, k, v, p, s: flash.append(q.dtype) or q + k + v)
    installed = mock.patch("transformers.utils.is_flash_attn_2_available", lambda: kind.startswith("flash"))
    with mock.patch.dict(sys.modules, flash_attn=package), installed:
        if kind not in ("plain", "padding"):
            fuse_for_gpu(model)
    source = models.inputs(name)
    shape = encoder.embed(source).shape[:2]
    mask = torch.rand(shape) < 0.5
    batch = dict(source=source, mask=mask, index=mask.flatten().nonzero().squeeze(1))
    if text:
        batch["target"] = source
    if not image and kind not in ("plain", "flash"):
        batch["padding_mask"] = torch.arange(shape[1]) >= torch.tensor([[shape[1]], [shape[1] - 3]])
    num_targets = float(len(batch["index"]))
    on_device = {key: on_gpu(value) for key, value in batch.items()}
    if kind == "host mask":
        on_device["mask"] = MODE.from_tensor(mask)
    if kind == "host index":  # as in transformers
        for module in model.modules():
            vars(module).pop("generate_relative_position_index", None)
    if kind == "no index":
        del on_device["index"]
    move(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with MODE, NoWaits() as watched:
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                output = model(**on_device, num_targets=num_targets)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            model.update_teacher()
    # Each block of student and teacher, two steps; only without padding, in bf16 and without an attention bias.
    assert len(flash) == (12 if (precision, kind) == ("bf16", "flash") and not hasattr(encoder.blocks[0], "lambda_2") else 0)
    in_segments = precision == "bf16" and kind in ("fused", "flash padded") and not image
    assert watched.segmented == (12 if in_segments else 0)
    assert output.loss.device.type == "cuda" and all(p.device.type == "cuda" for p in model.state_dict().values() if p.ndim)


def trainer(modality: str, kind: str) -> None:
    """Steps of `d2v-train`; the first is logged. It synchronises once, to check that loss and gradient are finite.

    The flags of the others are read in the next step, through a copy and an event.
    """
    with tempfile.TemporaryDirectory() as folder:
        modality, _, version = modality.partition("-")
        arguments = test_training_2.arguments if version else test_training.arguments
        config = parse(arguments(modality, folder, "loss.impl=triton", "train.device=cpu"))[0]
        run = build(config)
        batch = run.data.unfinished([(0, i) for i in range(4)])  # as the feed copies it to a GPU
    state = run.state
    if kind == "fused":
        fuse_for_gpu(state.core)
    state.device = torch.device("cuda")
    move(state.core)
    for name in ("_begin_kernel", "_adamw_kernel"):
        setattr(triton_adam, name, Launch())
    triton_adam._address = lambda x: 0 if x is None else 16
    torch.Tensor.pin_memory = lambda x: x
    torch.cuda.device_of = lambda tensor: MODE
    made = make_optimizer(state.core, config.optimizer, fused=True, one_pass=kind == "one pass")
    state.optimizer = run.accelerator.prepare(made)
    state.scheduler = torch.optim.lr_scheduler.LambdaLR(state.optimizer.optimizer, lambda step: 1.0)
    state.monitor = Monitor(state.core, state.optimizer.optimizer, config.collapse, 4, 0, run.accelerator, None)
    torch.cuda.Event, Event.waited = Event, 0
    read = mock.Mock(return_value=True)
    train.step.Pending.wait = was_taken
    with MODE, NoWaits():
        state.late = can_be_late(state)
        assert state.late and (kind == "one pass") != isinstance(state.core.teacher.lerp_unless, triton_adam.LerpUnless)
        on_host = {k: MODE.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        on_device = run.data.finish(on_host | to_device(on_host, state.device))
        window = Window(state.device)
        for due in (True, False, False):
            state.monitor.due = due
            with mock.patch.object(FakeTensor, "__bool__", read) if due else nullcontext():
                outcome = train.step.step(state, [on_device])
            window.add(outcome, 4)
        state.settle()
    assert all(outcome[i].device.type == "cuda" for i in range(4)) and state.core.teacher.step == 3
    assert read.call_count == 1 and Event.waited == 2 and state.skipped.count == 0


class Event:
    """In place of an event of CUDA."""

    recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded
        Event.waited += 1


def was_taken(pending) -> bool:
    """`Pending.wait`, without the value."""
    assert pending.finite.device.type == "cpu"
    pending.copied.synchronize()
    return True


class Launch:
    """In place of a kernel; does nothing."""

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        return self.launch

    def launch(self, *args, **settings):
        tensors = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(x, torch.Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors)


def loss(norm: str, target_norm: str, kind: str) -> None:
    """The host side of the Triton loss; the kernel launches do nothing."""
    for name in [name for name in vars(triton_loss) if name.endswith("_kernel")]:
        setattr(triton_loss, name, Launch())
    triton_loss._uniform = list  # reads addresses
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    torch.cuda.device_of = lambda tensor: MODE
    layers = [on_gpu(torch.empty(2, 7, 64, dtype=torch.bfloat16)) for _ in range(3)]
    padding = on_gpu(torch.empty(2, 7, dtype=torch.bool))
    mask = on_gpu(torch.empty(2, 3, 7, dtype=torch.bool)) if kind == "views" else padding
    predictions = on_gpu(torch.empty(2, 7, 64) if kind == "dense" else torch.empty(5, 64))
    with MODE:
        for hidden in (None, padding):
            outputs = triton_loss.loss(predictions, layers, mask, hidden, norm, target_norm, 1.0, 0.1, True, True, True)
            assert all(output.device.type == "cuda" for output in outputs)
            torch.ops.d2v_fast.scaled(outputs[1], outputs[2], outputs[0], "triton")


def wait(group: str, name: str) -> None:
    """A call of `waits.py`."""
    x, y = on_gpu(torch.empty(4, 3)), MODE.from_tensor(torch.empty(4, 3))
    with MODE, NoWaits():
        getattr(waits, group)[name](x, y)


def fuse_for_gpu(model) -> None:
    fuse(model, torch.device("cuda"), [part for part in PARTS if part != "compile"])  # fake tensors cannot be compiled


def on_gpu(tensor):
    """An empty copy of the tensor on the fake GPU."""
    fake = FakeTensor(MODE, torch.empty_like(tensor, device="meta"), torch.device("cuda", 0))
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


def move(model) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: on_gpu(tensor) for name, tensor in tensors.items() if tensor is not None})


found = {}
for case in sys.argv[2:]:
    first, second, kind = case.split(" ", 2)
    try:
        if first == "loss":
            loss(second, *kind.split())
        elif first == "trainer":
            trainer(second, kind)
        elif first == "wait":
            wait(second, kind)
        else:
            step(first, second, kind)
        found[case] = None
    except Exception as error:
        found[case] = "".join(traceback.format_exception(error))
print(json.dumps(found))
