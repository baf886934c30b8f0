"""What a run needs of a GPU's memory, without the GPU, the data or the weights: `d2v-doctor --memory --config …`.

Weights are counted on the meta device. Activations are what autograd saves in a pass over tensors that have shapes and no
numbers (FakeTensor), with what a GPU's kernels save: attention its inputs, output and no scores, dropout a byte a value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from d2v_fast.config import MODALITIES, Config, ConfigError, TokenMask, parse
from d2v_fast.data import PretrainingData
from d2v_fast.encoders import Encoder
from d2v_fast.masking import Draws, visible_positions
from d2v_fast.model import Data2Vec

GIB = 2**30
FREE = 0.92  # share of a GPU that tensors can have; the rest is for CUDA, NCCL and gaps between tensors


@dataclass
class Memory:
    """Bytes of one GPU by what they are for.

    Attributes:
        always: There as long as the run.
        passes: At most, beside it in forward and backward.
        update: At most, beside it while the weights are updated in a step that is logged.
    """

    always: dict[str, float]
    passes: dict[str, float]
    update: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.always.values()) + max(sum(self.passes.values()), sum(self.update.values()))


class Saved:
    """Bytes that autograd saves, each storage once; to be used as `with saved.counting(): …`.

    Args:
        known: Tensors that are there anyway.
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
    """Attention and dropout that save what they do on a GPU; what they compute does not matter here."""
    attend = F.scaled_dot_product_attention

    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs)  # on a CPU dropout would save the scores

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    with mock.patch.object(F, "scaled_dot_product_attention", attention), mock.patch.object(F, "dropout", dropout):
        yield


def example(config: Config, encoder: Encoder) -> dict[str, Tensor]:
    """The largest batch of a run: source without content, and a mask.

    Raises:
        ConfigError: Data of one's own, whose sizes are not known.
    """
    size, data = config.train.batch_size, config.data
    if config.own_data or config.modality == "custom":
        raise ConfigError(f"modality={config.modality}: the doctor does not know the size of batches of data of your own")
    if config.modality == "text":
        source, grid = torch.empty(size, data["block_size"], dtype=torch.int64), data["block_size"]
    elif config.modality == "audio":
        if data["batch_seconds"]:
            size = max(1, int(data["batch_seconds"] / data["max_seconds"]))
        source = torch.empty(size, round(data["max_seconds"] * data["sample_rate"]))
        grid = encoder.positions(source.shape[1])
    elif config.modality == "vision":
        source = torch.empty(size, 3, data["image_size"], data["image_size"])
        grid = encoder.positions(data["image_size"])
    else:
        shape = (data["target_length"], data["mel_bins"])
        source = torch.empty(size, *(() if encoder.reads == "spectrogram" else (1,)), *shape)
        grid = encoder.positions(data["target_length"])
    positions = math.prod(grid) if isinstance(grid, tuple) else grid
    if isinstance(config.mask, TokenMask):  # which needs tokens; as many positions are masked in the mean
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
        ConfigError: The encoder cannot be made without weights.
    """
    from d2v_fast.train.build import make_encoder, make_model

    tokens = None
    if config.modality == "text" and config.encoder.pretrained is None:
        name = config.data["tokenizer"]
        if name == "train":
            tokens = {"vocab_size": config.data["vocab_size"]}
        else:
            from d2v_fast.data.text import load_tokenizer, token_fields

            tokenizer = load_tokenizer(name)
            tokens = token_fields(tokenizer, len(tokenizer))
    config = replace(config, resume=True)  # no weights beside pretrained ones are looked for
    try:
        with torch.device("meta"):
            model = make_model(config, make_encoder(config, tokens), MODALITIES[config.modality].axes)
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"encoder: cannot be made without weights, which the count takes: {error}") from error
    if config.modality == "text" and hasattr(model.student, "mask_embedding"):
        model.student.mask_embedding.requires_grad_(False)
    return model.train()


@contextmanager
def without_numbers(model: Data2Vec, batch: dict[str, Tensor], precision: str) -> Iterator[dict[str, Tensor]]:
    """Give the model and the batch, which is yielded, shapes without numbers, on which passes run as on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        as_on_gpu(),
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"),
    ):
        model.to_empty(device="cpu")
        yield {name: mode.from_tensor(x) for name, x in batch.items()}


def student_pass(model: Data2Vec, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The teacher's results and the student's predictions: a pass up to the loss."""
    features = model.student.embed(batch["source"])
    shared = features.detach() if model.shares_features else None
    layers = model.teacher_layers(batch["source"], shared, None, None if model.sparse else batch["index"])
    if model.student.masks_features and not model.sparse:
        features = model.student.mask_features(features, batch["mask"])
    predicted = model.predict(batch["source"], features, batch["mask"], batch["index"], batch.get("visible"))
    return layers, predicted.predictions


def activations(config: Config, checkpointing: bool) -> tuple[Data2Vec, dict[str, float]]:
    """The model, and bytes that a forward pass leaves for the backward, by what they are of."""
    model = model_on_meta(config)
    if checkpointing:
        model.student.checkpoint_blocks()
    batch = example(config, model.student)
    with without_numbers(model, batch, config.train.precision) as inputs:
        saved = Saved([*model.parameters(), *model.buffers()])
        with saved.counting():
            layers, predictions = student_pass(model, inputs)
        results = Saved([])
        for layer in layers:
            results.add(layer)
        loss = 3 * predictions.numel() * 4  # targets, errors and the gradient of the predictions
    return model, {"activations": saved.bytes, "teacher's results": results.bytes, "loss": loss}


def size(tensors: Iterable[Tensor]) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def need(config: Config, ranks: int = 1) -> dict[str, Memory]:
    """What a run needs on each of its GPUs, by the settings that change it: as it is, with checkpointing, sharded, with both.

    Args:
        config: Its settings.
        ranks: Number of GPUs.

    Raises:
        ConfigError: An encoder or data that cannot be counted.
    """
    model, plain = activations(config, checkpointing=False)
    _, again = activations(config, checkpointing=True)
    again["a block computed again"] = (plain["activations"] - again["activations"]) / len(model.student.blocks)
    found = {}
    for shards in (1, ranks) if ranks > 1 else (1,):
        for passes in (plain, again):
            names = ["train.checkpointing"] * (passes is again) + ["train.shard"] * (shards > 1)
            found[" + ".join(names) or "neither"] = _memory(model, passes, shards)
    return found


def _memory(model: Data2Vec, passes: dict[str, float], ranks: int) -> Memory:
    trained = size(p for p in model.parameters() if p.requires_grad)
    teacher, every = size(model.teacher.module.parameters()), size(model.parameters())
    always = {"weights": every - teacher, "gradients": trained, "optimizer": 2 * trained, "teacher": teacher}
    # The monitor keeps the weights of before, and takes differences.
    update = {"weights of before": every - teacher + teacher, "differences": every - teacher}
    if ranks > 1:
        always, update = ({name: value / ranks for name, value in part.items()} for part in (always, update))
        blocks = [size(block.parameters()) for block in (*model.student.blocks, *model.teacher.module.blocks)]
        around = every - sum(blocks)
        # What lies around the blocks with its gradient; two blocks, one while the other comes, as received and as used, and
        # their gradients as computed and as sent.
        passes = passes | {"gathered": around + around * trained / every + 6 * max(blocks)}
    return Memory(always, passes, update)


def table(found: dict[str, Memory], gpu: float) -> str:
    """What `need` gives, in GiB, beside the GiB of a GPU."""
    every = found.values()
    lines = [["GiB a GPU", *(name.replace("train.", "") for name in found)]]
    for name in dict.fromkeys(name for each in every for name in (*each.always, *each.passes)):
        lines.append([name, *(_gib((each.always | each.passes).get(name)) for each in every)])
    lines.append(["or in the update", *(_gib(sum(each.update.values())) for each in every)])
    lines.append(["together", *(_gib(each.total) for each in every)])
    lines.append([f"of {gpu:.0f}", *("fits" if each.total <= FREE * gpu * GIB else "too much" for each in every)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([f"{line[0]:{widths[0]}}", *cell[1:]]) for line, cell in zip(lines, cells, strict=True))


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / GIB:.1f}"


def main(args: list[str]) -> None:
    """d2v-doctor --memory: print `table`."""
    parser = argparse.ArgumentParser(prog="d2v-doctor --memory", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="Of the run; default: those here.")
    here = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80
    parser.add_argument("--gpu-memory", type=float, default=here, help="GiB of each; default: as here, or 80.")
    known, rest = parser.parse_known_args(args)
    config, _ = parse(rest)
    plural = "s" * (known.gpus > 1)
    print(f"{config.name}: {config.train.precision}, {known.gpus} GPU{plural}; to 10 %, without what CUDA and NCCL take")
    print(table(need(config, known.gpus), known.gpu_memory))
