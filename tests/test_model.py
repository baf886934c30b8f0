import copy
import pickle

import numpy as np
import pytest
import torch

from d2v_fast import Data2Vec, EMAConfig, Encoder, HeadConfig, TargetsConfig
from d2v_fast.model import regression_head
from tests import oracle
from tests.models import IMAGES, TEXTS, WAVES, Handwritten, arguments, inputs, make

FAMILIES = (*TEXTS, *IMAGES, *WAVES)


def batch(name, encoder, seed=0, size=2, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    source = inputs(name, size)
    if source.is_floating_point():
        source = source.to(next(encoder.parameters()).dtype)
    with torch.no_grad():
        length = encoder.embed(source).shape[1]
    mask = torch.rand(size, length, generator=generator) < share
    if name in TEXTS:
        return dict(source=torch.where(mask, 4, source), target=source, mask=mask)
    return dict(source=source, mask=mask)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=2, source="ffn", norm="layer", beta=4.0, scale=1.0, head_layers=2),
        dict(top_k=3, source="block_output", norm="layer", target_norm="layer", beta=2.0, scale="mean"),
        dict(top_k=2, source="ffn", norm="instance", ema_scope="encoder"),
    ],
)
def test_loss_against_the_specification(name, settings):
    """A whole step in float64: layer results from hooks on a copy of the teacher, formulas in plain loops."""
    encoder = make(name).double()
    model = Data2Vec(encoder, **arguments(**settings)).double()
    # The teacher differs from the student, except in shared weights.
    shared = encoder.not_averaged(settings.get("ema_scope", "all"))
    with torch.no_grad():
        for (n, _), q in zip(encoder.named_parameters(), model.teacher.module.parameters(), strict=True):
            if not any(n.startswith(pattern[:-1]) for pattern in shared):
                q.add_(torch.randn_like(q) * 0.02)
    data = batch(name, encoder)
    teacher = copy.deepcopy(model.teacher.module)
    found = []
    for block in teacher.blocks[-settings["top_k"] :]:
        module = (
            block
            if settings["source"] == "block_output"
            else [m for m in block.modules() if isinstance(m, torch.nn.Linear)][-1]
        )
        factor = getattr(block, "lambda_2", 1.0) if settings["source"] == "ffn" else 1.0
        module.register_forward_hook(lambda m, a, out, f=factor: found.append((out[0] if isinstance(out, tuple) else out) * f))
    with torch.no_grad():
        teacher(data.get("target", data["source"]))
    length = data["mask"].shape[1]
    layers = [x[:, x.shape[1] - length :].numpy() for x in found]
    features = encoder.embed(data["source"])
    if name not in TEXTS:
        features = torch.where(data["mask"][..., None], encoder.mask_token, features)
    predictions = model.head(encoder.contextualize(features))
    scale = {"mean": 1 / 32, "auto": 32**-0.5}.get(settings.get("scale", "auto"), settings.get("scale"))
    expected, gradient = oracle.loss(
        predictions.detach().numpy(),
        layers,
        data["mask"].numpy(),
        settings["norm"],
        settings.get("target_norm", "none"),
        settings.get("beta", 0.0),
        scale,
    )
    predictions.backward(torch.from_numpy(gradient))
    expected_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = model(**data)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected, rel=1e-10)
    for n, p in model.named_parameters():
        if n in expected_grads:
            assert (p.grad - expected_grads[n]).norm() <= 1e-9 * expected_grads[n].norm() + 1e-15, n


@pytest.mark.parametrize("name", ["roberta", "beit", "data2vec-audio"])
def test_the_teacher_sees_the_whole_input(name):
    """The teacher's last layer in a forward pass equals that of a pass without a mask."""
    encoder = make(name)
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=EMAConfig(scope="encoder")).eval()
    data = batch(name, encoder)
    expected = model.teacher_layers(data.get("target", data["source"]), None, None)[-1]
    masked = data["mask"]  # the last block of some encoders runs at these positions only
    torch.testing.assert_close(model(**data).teacher_states[masked], expected[masked], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["wav2vec2", "data2vec-audio", "hubert"])
def test_speech_feature_extractor_runs_once_per_step(name):
    encoder = make(name)
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=EMAConfig(scope="encoder"))
    data, calls = batch(name, encoder), []
    for each in (model.student, model.teacher.module):
        each.model.feature_extractor.register_forward_hook(lambda m, a, out, each=each: calls.append(each))
    model(**data)
    assert len(calls) == 1 and calls[0] is model.student


def test_hooks_in_the_teacher_see_no_gradients():
    """Not even of features that it shares with the student: a FLOP counter would look for their gradient function."""
    encoder = make("data2vec-audio")
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=EMAConfig(scope="encoder")).train()
    found = []
    for module in model.teacher.module.modules():
        module.register_forward_pre_hook(lambda _, args: found.extend(x.requires_grad for x in args if torch.is_tensor(x)))
    model(**batch("data2vec-audio", encoder))
    assert found and not any(found)


def test_gradients_reach_the_student_only():
    encoder = make("data2vec-audio")
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=EMAConfig(scope="encoder"))
    model(**batch("data2vec-audio", encoder)).loss.backward()
    assert not any(p.grad is not None for p in model.teacher.parameters())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("name", ["roberta", "beit", "vit", "data2vec-audio"])
def test_each_masked_position_has_equal_weight_across_ranks_and_micro_batches(name):
    """2 ranks × 2 micro-batches with unequal masks give the gradient of one big batch (method 1.4)."""
    encoder = make(name)
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2)).double()
    parts = [batch(name, encoder, seed, 2, share) for seed, share in enumerate((0.2, 0.8, 0.5, 0.4))]
    whole = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    model(**whole).loss.backward()
    expected_grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ranks, count = 2, sum(int(part["mask"].sum()) for part in parts)
    for part in parts:
        # Data-parallel training averages the gradients of the ranks.
        (model(**part, num_targets=count / ranks).loss / ranks).backward()
    for p, grad in zip(model.parameters(), expected_grads, strict=True):
        if grad is not None:
            assert (p.grad - grad).norm() <= 1e-9 * grad.norm() + 1e-15


def test_padding_does_not_change_the_loss():
    encoder = make("roberta")
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2, norm="instance")).eval()
    data = batch("roberta", encoder)
    padded = {k: torch.nn.functional.pad(v, (0, 5), value=1 if k != "mask" else 0) for k, v in data.items()}
    padding = torch.arange(17).expand(2, 17) >= 12
    assert model(**padded, padding_mask=padding).loss.item() == pytest.approx(model(**data).loss.item(), rel=1e-5)


def test_target_padding_mask_hides_tokens_from_the_teacher_only():
    """For text with teacher_input=masked_only; the reference is transformers with that attention mask."""
    model = Data2Vec(make("roberta"), targets=TargetsConfig(top_k=1)).eval()
    data = batch("roberta", model.student)
    mask, found = data["mask"], []
    plain = copy.deepcopy(model.teacher.module.model)
    plain.encoder.layer[-1].output.dense.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        plain(data["target"], attention_mask=mask.long())
        plain(data["target"])
    states = model(**data, target_padding_mask=~mask).teacher_states
    torch.testing.assert_close(states[mask], found[0][mask])
    assert not torch.allclose(states[mask], found[1][mask])


def test_channel_masks_reach_the_student_only():
    encoder = make("data2vec-audio")
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=EMAConfig(scope="encoder")).eval()
    data = batch("data2vec-audio", encoder)
    channels = torch.zeros(2, 32, dtype=torch.bool)
    plain = model(**data, channel_mask=channels)
    channels[:, :16] = True
    masked = model(**data, channel_mask=channels)
    assert plain.loss == model(**data).loss and masked.loss != plain.loss
    assert torch.equal(masked.stats.target.mean, plain.stats.target.mean)


def test_a_given_index_gives_the_same_loss():
    encoder = make("beit")
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2)).eval()
    data = batch("beit", encoder)
    index = data["mask"].flatten().nonzero().squeeze(1)
    assert model(**data, index=index).loss == model(**data).loss
    assert model(**data, index=index.flip(0)).loss != model(**data).loss  # predictions in this order


def test_teacher_moves_only_in_update_teacher():
    ema = EMAConfig(start=0.5, end=0.5, anneal_steps=1, scope="layers")
    model = Data2Vec(make("roberta"), targets=TargetsConfig(top_k=2), ema=ema)
    block, embedding = "model.encoder.layer.0.output.dense.weight", "model.embeddings.word_embeddings.weight"
    student, teacher = dict(model.student.named_parameters()), dict(model.teacher.module.named_parameters())
    old = teacher[block].clone()
    with torch.no_grad():
        for p in student.values():
            p.add_(1.0)
    for _ in range(3):
        model(**batch("roberta", model.student))
    assert torch.equal(teacher[block], old), "a forward pass moved the teacher"
    model.update_teacher()
    assert torch.allclose(teacher[block], old + 0.5) and torch.equal(teacher[embedding], student[embedding])


def test_parameters_named_in_ema_copied_are_copied():
    ema = EMAConfig(start=0.5, end=0.5, copied=["encoder.layer.0.*"])
    model = Data2Vec(make("roberta"), targets=TargetsConfig(top_k=2), ema=ema)
    student, teacher = (dict(m.named_parameters()) for m in (model.student, model.teacher.module))
    with torch.no_grad():
        for p in student.values():
            p.add_(1.0)
    model.update_teacher()
    for name, p in teacher.items():
        behind = 0.0 if name.startswith("model.encoder.layer.0.") else 0.5
        assert torch.allclose(student[name] - p, torch.tensor(behind), atol=1e-6), name


def test_regression_head_layers_and_formula():
    assert len(list(regression_head(8, 0).parameters())) == 0
    assert [tuple(p.shape) for p in regression_head(8, 1).parameters()] == [(8, 8), (8,)]
    assert [tuple(p.shape) for p in regression_head(8, 2).parameters()] == [(16, 8), (16,), (8, 16), (8,)]
    assert [m.out_features for m in regression_head(8, 3) if hasattr(m, "out_features")] == [16, 16, 8]
    head, x = regression_head(8, 2), torch.randn(3, 8)
    (a, a_bias), (b, b_bias) = [(m.weight, m.bias) for m in head if hasattr(m, "weight")]
    inner = x @ a.T + a_bias
    gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    assert torch.allclose(head(x), gelu @ b.T + b_bias, atol=1e-6)
    assert (regression_head(8, 2, zero_init=True)(torch.randn(3, 8)) == 0).all()


def test_the_regression_head_is_that_of_the_config():
    model = Data2Vec(make("roberta"), HeadConfig(layers=2, zero_init=True), targets=TargetsConfig(top_k=2))
    assert [tuple(p.shape) for p in model.head.parameters()] == [(64, 32), (64,), (32, 64), (32,)]
    assert (model.head(torch.randn(3, 32)) == 0).all() and not model.sparse


def test_a_head_of_kind_conv_asks_for_a_decoder():
    message = r"predictor: found HeadConfig\(kind='conv'\), .*; expected a decoder, such as ConvDecoder\("
    with pytest.raises(ValueError, match=message):
        Data2Vec(make("roberta"), HeadConfig(kind="conv"))


def test_dropout_and_layerdrop_touch_the_student_only():
    encoder = make("wav2vec2")
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    encoder.model.config.layerdrop = 1.0
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=3), ema=EMAConfig(scope="encoder")).train()
    data = batch("wav2vec2", encoder)
    first, second = model(**data), model(**data)  # a dropped teacher layer would have no result to record
    assert torch.equal(first.teacher_states, second.teacher_states) and not torch.equal(first.states, second.states)


@pytest.mark.parametrize(
    "setting, named",
    [
        (dict(source="ffn_output"), "source: found 'ffn_output', expected one of 'ffn', 'block_output', 'block_input'"),
        (dict(ema_scope="encoders"), "scope: found 'encoders', expected one of 'all', 'encoder', 'layers'; did you"),
        (dict(norm="layer_norm"), "norm: found 'layer_norm'"),
        (dict(target_norm="batch"), "target_norm: found 'batch'"),
        (dict(scale="max"), "scale: found 'max', expected one of 'auto', 'mean'"),
        (dict(scale=0), "scale: found 0"),
        (dict(beta=-1), "beta: found -1"),
        (dict(impl="cuda"), "impl: found 'cuda'"),
        (dict(ema_start=2), "start: found 2"),
        (dict(top_k=9), "top_k: found 9"),
    ],
)
def test_invalid_settings_raise_with_name_value_and_choices(setting, named):
    with pytest.raises(ValueError) as error:
        Data2Vec(Encoder(Handwritten(), layers="blocks", ffn="mlp.2"), **arguments(**dict(top_k=2) | setting))
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["roberta", "beit", "data2vec-audio"])
def test_bf16_loss_is_close_to_fp32(name):
    encoder = make(name)
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=EMAConfig(scope="all"))
    data = batch(name, encoder)
    exact = model(**data).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**data).loss
        model.teacher_fp32 = True
        mixed = model(**data)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.03)
    full = model(**data).stats.target.mean
    assert torch.equal(mixed.stats.target.mean, full), "the teacher did not run in fp32"


def test_an_fp32_teacher_accepts_bf16_features():
    targets = TargetsConfig(top_k=2, teacher_fp32=True)
    model = Data2Vec(make("data2vec-audio"), targets=targets, ema=EMAConfig(scope="encoder")).eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch("data2vec-audio", model.student))
    assert output.features.dtype == torch.bfloat16 and output.teacher_states.dtype == torch.float32


def test_a_custom_encoder_learns():
    torch.manual_seed(0)
    model = Data2Vec(
        Encoder(Handwritten(), layers="blocks", ffn="mlp.2"),
        targets=TargetsConfig(top_k=2),
        ema=EMAConfig(start=0.9, end=0.99, anneal_steps=50),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    x = torch.randn(8, 16, 6).cumsum(1)
    losses = []
    for _ in range(60):
        loss = model(x, torch.rand(8, 16) < 0.4).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("name", ["roberta", "beit", "data2vec-audio"])
def test_a_whole_model_can_be_pickled(name):
    model = Data2Vec(make(name), targets=TargetsConfig(top_k=2)).eval()
    given = batch(name, model.student)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**given).loss, model(**given).loss)
