"""Each setting of the model has its effect, and a pass returns the documented values."""

import pytest
import torch

from d2v_fast import Encoder, build_encoder
from d2v_fast.masking import visible_positions
from d2v_fast.train.build import make_model
from tests.models import CONFIGS, Handwritten
from tests.test_model_2 import Placed, random_masks
from tests.tiny import inputs, make, make_config, views

VIEWS = ("text/tiny-2", "vision/tiny-2", "audio/tiny-2", "spectrogram/tiny-2")
WEIGHT = "model.encoder.layers.1.feed_forward.output_dense.weight"


def in_place(preset, *settings):
    """A float64 model of data2vec 1.0, and a batch."""
    config, model = make(preset, *settings)
    torch.manual_seed(2)
    source = inputs(config)
    with torch.no_grad():
        mask = torch.rand(model.student.embed(source).shape[:2]) < 0.5
    batch = dict(source=source.masked_fill(mask, 3), target=source) if config.modality == "text" else dict(source=source)
    return model.double(), {n: x.double() if x.is_floating_point() else x for n, x in batch.items()} | dict(mask=mask)


def sparse(preset, *settings):
    """A float64 model of data2vec 2.0 without noise, and a batch."""
    config, model = make(preset, "head.noise=0", *settings)
    torch.manual_seed(2)
    source = inputs(config)
    mask = views(config, model, source)
    return model.double(), dict(source=source.double() if source.is_floating_point() else source, mask=mask)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_decay_follows_the_settings():
    _, model = make("audio/tiny", "ema.scope=all", "ema.start=.5", "ema.end=.75", "ema.anneal_steps=4")
    student, teacher = dict(model.student.named_parameters())[WEIGHT], dict(model.teacher.module.named_parameters())[WEIGHT]
    with torch.no_grad():
        student.add_(1.0)
    behind = 1.0
    for step in range(1, 7):
        model.update_teacher()
        behind *= 0.5 + 0.25 * min(step, 4) / 4
        torch.testing.assert_close(student - teacher, torch.full_like(student, behind), rtol=1e-4, atol=1e-6)


def test_a_flag_skips_an_update_of_the_teacher():
    _, model = make("audio/tiny", "ema.scope=all", "ema.start=.5", "ema.end=.5")
    student, teacher = dict(model.student.named_parameters())[WEIGHT], dict(model.teacher.module.named_parameters())[WEIGHT]
    before = teacher.clone()
    with torch.no_grad():
        student.add_(1.0)
    model.update_teacher(torch.tensor(1.0))
    assert torch.equal(teacher, before)
    model.update_teacher(torch.tensor(0.0))
    torch.testing.assert_close(teacher, before + 0.5)


def test_the_head_has_its_layers_and_starts_as_asked():
    _, model = make("audio/tiny", "head.layers=3")
    shapes = [tuple(each.weight.shape) for each in model.head if isinstance(each, torch.nn.Linear)]
    assert shapes == [(64, 32), (64, 64), (32, 64)] and model.head[-1].weight.any()
    for start, batch in (in_place("vision/tiny", "head.zero_init=true"), sparse("vision/tiny-2", "head.zero_init=true")):
        stats = start(**batch).stats
        assert not stats.prediction.mean.any() and not stats.prediction.m2.any() and stats.target.m2.all()


def test_the_implementation_is_the_one_asked_for():
    """float64 shows it, because no kernel supports it."""
    model, batch = in_place("vision/tiny", "loss.impl=native")
    with pytest.raises(ValueError, match=r"impl='native' cannot run: found torch\.float64"):
        model(**batch)


@pytest.mark.parametrize("preset", ["text/tiny", "vision/tiny", "audio/tiny"])
def test_output_in_place(preset):
    model, batch = in_place(preset)
    output, mask = model(**batch), batch["mask"]
    features = model.student.embed(batch["source"])
    close(output.features, features)
    if preset != "text/tiny":
        features = torch.where(mask[..., None], model.student.mask_token, features)
    states = model.student.contextualize(features)[mask]
    close(output.states, states)
    close(output.stats.prediction.mean, model.head(states).mean(0))
    with torch.no_grad():
        close(output.teacher_states[mask], model.teacher_layers(batch.get("target", batch["source"]), None, None)[-1][mask])
    detached(output)
    assert output.cls_loss is None


def detached(output):
    assert output.loss.requires_grad
    for name, value in vars(output).items():
        assert name in ("loss", "stats") or value is None or not value.requires_grad, name
    assert not output.stats.prediction.mean.requires_grad


@pytest.mark.parametrize("preset", VIEWS)
def test_output_of_views(preset):
    cls = preset not in ("text/tiny-2", "audio/tiny-2")
    model, batch = sparse(preset, *["loss.cls_weight=2"] * cls)
    output, mask = model(**batch), batch["mask"]
    features = model.student.embed(batch["source"])
    close(output.features, features)
    visible = torch.from_numpy(visible_positions(mask.numpy()))
    encoded = model.student.transform(model.student.place_visible(features, mask, visible), visible=visible)
    close(output.states, encoded.states.flatten(0, 1))
    detached(output)
    assert output.states.shape == (visible.numel(), 32) and (output.cls_loss is not None) == cls


@pytest.mark.parametrize("preset", ["audio/tiny", *VIEWS])
@pytest.mark.parametrize("divisor", [None, 7.0])
def test_moments_are_left_out_on_request(preset, divisor):
    cls = preset in ("vision/tiny-2", "spectrogram/tiny-2")
    model, batch = (in_place if preset == "audio/tiny" else sparse)(preset, *["loss.cls_weight=2"] * cls)
    output, plain = model(**batch, num_targets=divisor), model(**batch, num_targets=divisor, stats=False)
    assert plain.stats is None and output.stats is not None and plain.loss == output.loss
    assert plain.cls_loss == output.cls_loss and (plain.cls_loss is not None) == cls


@pytest.mark.parametrize("preset", VIEWS)
def test_given_positions_are_used(preset):
    """Without dropout the order of visible positions does not change the loss; that of the predictions does."""
    model, batch = sparse(preset)
    expected = model(**batch)
    visible = torch.from_numpy(visible_positions(batch["mask"].numpy())).flip(1)
    index = batch["mask"].flatten().nonzero().squeeze(1)
    output = model(**batch, visible=visible, index=index)
    close(output.loss, expected.loss)
    close(output.states.view(len(visible), -1, 32).flip(1), expected.states.view(len(visible), -1, 32))
    assert not torch.allclose(model(**batch, index=index.flip(0)).loss, expected.loss)


def test_the_grid_is_asked_for_with_the_last_side_of_the_inputs():
    sizes = []

    class Sized(Placed):
        def positions(self, size):
            sizes.append(size)
            return 2, 8

    model = make_model(make_config("vision/tiny-2"), Encoder(Sized(), "blocks", "mlp.2"))
    assert model(torch.randn(2, 16, 6), random_masks(2, 2, 16, 9)).loss.isfinite()
    assert set(sizes) == {6}


def test_the_reason_why_an_encoder_cannot_leave_positions_out():
    config = make_config("text/tiny-2")
    encoder = Encoder(Handwritten(), "blocks")
    with pytest.raises(ValueError, match="alone: it adds positions inside its blocks, or in a forward that has no built-in"):
        make_model(config, encoder)
    encoder.no_gather = "its blocks depend on positions"
    with pytest.raises(ValueError, match="the visible positions alone: its blocks depend on positions; use roberta"):
        make_model(config, encoder)


@pytest.mark.parametrize("preset", ["text/tiny", "vision/tiny", "audio/tiny", "text/tiny-2", "audio/tiny-2"])
def test_the_teacher_computes_in_the_precision_asked_for(preset):
    _, batch = (sparse if preset.endswith("2") else in_place)(preset)
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    settings = ("targets.source=ffn", "ema.scope=all")
    (_, model), (_, exact) = make(preset, *settings), make(preset, *settings, "targets.teacher_fp32=true")
    plain = model(**batch).teacher_states
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).teacher_states.dtype == torch.bfloat16
        found = exact(**batch).teacher_states
    assert plain.dtype == found.dtype == torch.float32
    masked = batch["mask"].any(1) if batch["mask"].ndim == 3 else batch["mask"]
    torch.testing.assert_close(found[masked], plain[masked], rtol=1e-5, atol=1e-6)


def test_a_separate_target_image_reaches_the_teacher_in_place():
    """For every EMA scope; the image is already masked."""
    for scope in ("all", "encoder", "layers"):
        model, batch = in_place("vision/tiny", f"ema.scope={scope}")
        source, mask = batch["source"], batch["mask"]
        output, of_other = model(source, mask, source.flip(3)), model(source.flip(3), mask)
        close(output.teacher_states[mask], of_other.teacher_states[mask])
        close(output.states, model.student(source)[mask])


@pytest.mark.parametrize("target_norm", ["none", "instance"])
def test_a_padded_batch_of_speech_equals_its_samples_one_by_one(target_norm):
    """With the mask vector at masked frames; otherwise as in test_model_2.py."""
    encoder = build_encoder("wav2vec2", config=CONFIGS["wav2vec2"] | dict(feat_extract_norm="layer"))
    config = make_config("audio/tiny", "targets.norm=instance", f"targets.target_norm={target_norm}")
    model, sizes = make_model(config, encoder).double(), [400, 250, 320]
    lengths = [model.student.positions(size) for size in sizes]
    whole = torch.randn(3, 400, dtype=torch.float64)
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    mask = (torch.rand(3, max(lengths)) < 0.5) & ~padding
    for row, size in enumerate(sizes):
        whole[row, size:] = 0

    def run(source, mask, padding):
        model.zero_grad()
        output = model(source, mask, padding_mask=padding)
        output.loss.backward()
        return output.loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = run(whole, mask, padding)
    alone = [run(whole[i : i + 1, :n], mask[i : i + 1, :t], None) for i, (n, t) in enumerate(zip(sizes, lengths, strict=True))]
    weights = mask.sum(1).double() / mask.sum()
    close(loss, sum(w * each for w, (each, _) in zip(weights, alone, strict=True)))
    for found, *each in zip(gradients, *(gradient for _, gradient in alone), strict=True):
        wanted = sum(w * gradient for w, gradient in zip(weights, each, strict=True))
        assert (found - wanted).norm() <= 1e-8 * wanted.norm() + 1e-11


def test_masked_channels_are_zero_for_the_student():
    """This happens after masking, so the mask vector is zero there too."""
    model, batch = in_place("audio/tiny")
    channels, mask = torch.rand(2, 32) < 0.5, batch["mask"]
    features = torch.where(mask[..., None], model.student.mask_token, model.student.embed(batch["source"]))
    expected = model.student.contextualize(torch.where(channels[:, None], 0.0, features))[mask]
    close(model(**batch, channel_mask=channels).states, expected)
