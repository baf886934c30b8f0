"""What makes a model fit: blocks computed again in the backward, and weights spread over ranks."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from d2v_fast.config import parse
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
