"""Estimate the GPU memory of a run without a GPU, data or weights: `d2v-doctor --memory --config …`.

Weights are counted on the meta device. Activations are the tensors that autograd saves in a pass over FakeTensors, which have
shapes but no values. Attention and dropout save the same as on a GPU: attention its inputs and output but no scores, dropout
one byte per value. An encoder whose blocks are not known is first built with weights, on the CPU, because `encoders.trial`
needs them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from d2v_fast.config import MODALITIES, Config, ConfigError, TokenMask, data_class, parse
from d2v_fast.data import PretrainingData, first_line
from d2v_fast.encoders import Encoder
from d2v_fast.masking import Draws, visible_positions
from d2v_fast.model import Data2Vec

if TYPE_CHECKING:
    from d2v_fast.several import SeveralConfig

GIB = 2**30
FREE = 0.92  # share of a GPU that tensors can use; the rest is for CUDA, NCCL and fragmentation
WORKING = 0.2  # what exists only while a block or the head runs, as a share of what it keeps for the backward; from counts


@dataclass
class Memory:
    """Bytes on one GPU by purpose.

    Attributes:
        always: Allocated throughout the run.
        passes: Peak in addition during forward and backward, whichever is higher.
        update: Peak in addition while the weights are updated in a logged step.
    """

    always: dict[str, float]
    passes: dict[str, float]
    update: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.always.values()) + max(sum(self.passes.values()), sum(self.update.values()))


class Saved:
    """Bytes that autograd saves, each storage counted once; use as `with saved.counting(): …`.

    Args:
        known: Tensors that are already counted.
    """

    def __init__(self, known: Iterable[Tensor]):
        self.known = {x.untyped_storage()._cdata for x in known}
        self.storages: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    def counting(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.add, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Patch attention and dropout to save the same as on a GPU; the values that they compute do not matter."""
    attend = F.scaled_dot_product_attention

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs)  # on a CPU, dropout would save the scores

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    with mock.patch.object(F, "scaled_dot_product_attention", attention), mock.patch.object(F, "dropout", dropout):
        yield


def example(config: Config, encoder: Encoder) -> dict[str, Tensor]:
    """The largest batch of a run: an uninitialised source and a mask.

    Raises:
        ConfigError: Custom data, whose sizes are not known.
    """
    if config.own_data or MODALITIES[config.modality].data is None:
        raise ConfigError(f"modality={config.modality}: the batch size of custom data is not known; train a few steps instead")
    data, built_in = config.data, cast(Any, data_class(config.modality))
    shape, grid = built_in.largest_batch(data, encoder, config.train.batch_size)
    source, size = torch.empty(shape, dtype=torch.int64 if config.is_text else torch.float32), shape[0]
    positions = math.prod(grid) if isinstance(grid, tuple) else grid
    if isinstance(config.mask, TokenMask):  # needs real tokens; this masks as many positions as it does on average
        mask = np.arange(positions) < np.full((size, 1), round(config.mask.prob * positions))
    else:
        where = (grid,) if isinstance(grid, tuple) and len(grid) > 1 else (positions, np.full(size, positions))
        mask = PretrainingData(mask=config.mask, views=data.get("views")).make_mask(Draws(0, 0, range(size)), *where)
    batch = {"source": source, "mask": torch.from_numpy(mask)}
    batch["index"] = batch["mask"].flatten().nonzero().squeeze(1)
    if data.get("views"):
        batch["visible"] = torch.from_numpy(visible_positions(mask))
    return batch


def model_on_meta(config: Config) -> Data2Vec:
    """Student, teacher and head of a run, without weights.

    Raises:
        ConfigError: The encoder cannot be built.
    """
    from d2v_fast.data.text import load_tokenizer, token_fields
    from d2v_fast.train.build import make_model

    tokens = None
    if config.is_text and config.encoder.pretrained is None:
        name = config.data["tokenizer"]
        if name == "train":
            trained = SimpleNamespace(cls_token_id=0, pad_token_id=1, sep_token_id=2)  # as `data.text` numbers them
            tokens = token_fields(trained, config.data["vocab_size"])
        else:
            tokenizer = load_tokenizer(name)
            tokens = token_fields(tokenizer, len(tokenizer))
    config = replace(config, resume=True)  # so that only pretrained weights are looked up
    try:
        encoder = _encoder_on_meta(config, tokens)
        with torch.device("meta"):
            model = make_model(config, encoder)
    except (MemoryError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"encoder: cannot be built for the estimate: {error}; train a few steps instead") from error
    if config.is_text and hasattr(model.student, "mask_embedding"):
        model.student.mask_embedding.requires_grad_(False)
    return model.train().to("meta")  # also what transformers creates with torch.Tensor(size)


def _encoder_on_meta(config: Config, tokens: dict[str, int] | None) -> Encoder:
    from d2v_fast.train.build import make_encoder

    # Without values, only known blocks and custom classes are certain to run in the same way.
    with suppress(Exception), torch.device("meta"):
        encoder = make_encoder(config, tokens)
        if encoder.halves is not None or type(encoder) is Encoder:
            return encoder
    return make_encoder(config, tokens).to("meta")


@contextmanager
def without_numbers(model: Data2Vec, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Turn the model into fake tensors on which passes run as on a GPU, and yield the batch as fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, as_on_gpu():
        model.to_empty(device="cpu")
        yield {name: mode.from_tensor(x) for name, x in batch.items()}


def student_pass(model: Data2Vec, batch: dict[str, Tensor], precision: str) -> tuple[list[Tensor], Tensor]:
    """The teacher's layer results and the student's predictions: the forward pass up to the loss."""
    # As in a run, train.checkpointing keeps no cast weights. Without it autograd saves them anyway.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32", cache_enabled=False):
        features = model.student.embed(batch["source"])
        shared = features if model.shares_features else None
        layers = model.teacher_layers(batch["source"], shared, None, None if model.sparse else batch["index"])
        if model.student.masks_features and not model.sparse:
            features = model.student.mask_features(features, batch["mask"])
        predicted = model.predict(batch["source"], features, batch["mask"], batch["index"], batch.get("visible"))
    return layers, predicted.predictions


def activations(config: Config, checkpointing: bool) -> tuple[Data2Vec, dict[str, float]]:
    """The model, and the bytes that a forward pass keeps for the backward, by kind; "features" are those before the blocks.

    Raises:
        ConfigError: The encoder does not run on tensors without values.
    """
    model = model_on_meta(config)
    if checkpointing:
        model.student.checkpoint_blocks()
    batch = example(config, model.student)
    with without_numbers(model, batch) as inputs:
        saved = Saved([*model.parameters(), *model.buffers()])
        before = {"blocks": 0, "head": 0}
        for name, module in (("blocks", model.student.blocks[0]), ("head", model.head)):
            module.register_forward_pre_hook(lambda *_, name=name: before.update({name: saved.bytes}))
        try:
            with saved.counting():
                layers, predictions = student_pass(model, inputs, config.train.precision)
        except Exception as error:  # model classes raise all kinds of errors
            name = type(model.student.model).__name__
            raise ConfigError(
                f"encoder: {name} does not run on tensors without values: {first_line(error)}; train a few steps instead"
            ) from error
        results = Saved([])
        for layer in layers:
            results.add(layer)
    return model, {
        "features": before["blocks"],
        "blocks": before["head"] - before["blocks"],
        "head": saved.bytes - before["head"],
        "teacher's results": results.bytes,
        "loss": 3 * predictions.numel() * 4,  # targets, errors and the gradient of the predictions
    }


def size(tensors: Iterable[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def need(config: Config | SeveralConfig, ranks: int = 1) -> dict[str, Memory]:
    """Memory per GPU, by the settings that change it: as configured, with checkpointing, sharded, and both.

    Args:
        config: Settings of the run.
        ranks: Number of GPUs that a model is sharded over: all of them, or with train.shard=hybrid those of one machine.

    Raises:
        ConfigError: The memory of this encoder or data, or of several modalities, cannot be estimated.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            "modality=several: only the memory of one modality is estimated; give --config the settings of one part, such as "
            f"those of {' or '.join(config.parts)}: a step trains one part at a time"
        )
    model, plain = activations(config, checkpointing=False)
    _, checkpointed = activations(config, checkpointing=True)
    recomputed = (plain["blocks"] - checkpointed["blocks"]) / len(model.student.blocks)
    found = {}
    for shards in (1, ranks) if ranks > 1 else (1,):
        for kept in (plain, checkpointed):
            names = ["train.checkpointing"] * (kept is checkpointed) + ["train.shard"] * (shards > 1)
            found[" + ".join(names) or "neither"] = _memory(model, kept, recomputed * (kept is checkpointed), shards)
    return found


def _memory(model: Data2Vec, kept: dict[str, float], recomputed: float, ranks: int) -> Memory:
    trained = size(p for p in model.parameters() if p.requires_grad)
    teacher, total = size(model.teacher.module.parameters()), size(model.parameters())
    always = {"weights": total - teacher, "gradients": trained, "optimizer": 2 * trained, "teacher": teacher}
    # The monitor keeps the previous weights and computes differences.
    update = {"previous weights": total, "differences": total - teacher}
    forward = {
        "activations": kept["features"] + kept["blocks"] + kept["head"],
        "teacher's results": kept["teacher's results"],
        "loss": kept["loss"],
        "working memory": WORKING * kept["head"],
    }
    block = kept["blocks"] / len(model.student.blocks)
    backward = {"activations": kept["features"] + kept["blocks"], "working memory": WORKING * (block + recomputed)}
    if recomputed:
        backward["a recomputed block"] = recomputed
    if ranks > 1:
        always, update = ({name: value / ranks for name, value in part.items()} for part in (always, update))
        # The gradients of a block replace its activations.
        gradients = always.pop("gradients") - kept["blocks"]
        if gradients > 0:
            backward["gradients"] = gradients
        student, teachers = ([size(block.parameters()) for block in x.blocks] for x in (model.student, model.teacher.module))
        outside = total - sum(student) - sum(teachers)
        # Parameters outside the blocks stay gathered. The backward of a block holds its parameters, those of the next one, its
        # gradients and, if it is not the first one, those of the previous one, whose activations are freed.
        sent = max(0, max(student) - block)
        forward["gathered"] = outside
        backward["gathered"] = outside + trained - sum(student) + 3 * max(student) + sent
    return Memory(always, max(forward, backward, key=lambda part: sum(part.values())), update)


def table(found: dict[str, Memory], gpu: float) -> str:
    """The result of `need` in GiB, compared with the GiB of one GPU."""
    columns = found.values()
    lines = [["GiB per GPU", *(name.replace("train.", "") for name in found)]]
    for name in dict.fromkeys(name for memory in columns for name in (*memory.always, *memory.passes)):
        lines.append([name, *(_gib((memory.always | memory.passes).get(name)) for memory in columns)])
    lines.append(["or in the update", *(_gib(sum(memory.update.values())) for memory in columns)])
    lines.append(["total", *(_gib(memory.total) for memory in columns)])
    lines.append([f"of {gpu:.0f}", *("fits" if memory.total <= FREE * gpu * GIB else "too much" for memory in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([f"{line[0]:{widths[0]}}", *cell[1:]]) for line, cell in zip(lines, cells, strict=True))


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / GIB:.1f}"


def main(args: list[str]) -> None:
    """d2v-doctor --memory: print `table`."""
    parser = argparse.ArgumentParser(prog="d2v-doctor --memory", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--memory", action="store_true")
    default = max(1, torch.cuda.device_count())
    parser.add_argument("--gpus", type=int, default=default, help="Number of GPUs; default: all on this machine.")
    parser.add_argument("--machines", type=int, help="Number of machines; needed for train.shard=hybrid.")
    here = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80
    parser.add_argument("--gpu-memory", type=float, default=here, help="GiB per GPU; default: that of the GPU here, or 80.")
    known, rest = parser.parse_known_args(args)
    config, _ = parse(rest)
    ranks = shards(known.gpus, known.machines, config.train.shard == "hybrid")
    plural = "s" * (known.gpus > 1)
    found = need(config, ranks)
    hybrid = f", sharded over {ranks}" if ranks < known.gpus else ""
    print(f"{config.name}: {config.train.precision}, {known.gpus} GPU{plural}{hybrid}; within 10 %, without CUDA and NCCL")
    print(table(found, known.gpu_memory))


def shards(gpus: int, machines: int | None, hybrid: bool) -> int:
    """Number of GPUs that train.shard shards a model over. Raises ConfigError if it is not known."""
    if gpus < 1 or (machines is not None and (machines < 1 or gpus % machines)):
        raise ConfigError(f"--gpus {gpus} --machines {machines}: expected the same number of GPUs on each machine")
    if hybrid and machines is None:
        raise ConfigError(
            f"train.shard=hybrid: shards a model within each machine; give the number of machines for the {gpus} GPUs, such as "
            "--machines 1"
        )
    return gpus // machines if hybrid and machines else gpus
