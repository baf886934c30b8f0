"""--fused is the same algorithm: parity with the plain path, strictness, and what each part replaces."""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn

from d2v_fast import Data2Vec, EMAConfig, LossConfig, TargetsConfig, build_encoder
from d2v_fast.config import parse
from d2v_fast.decoders import ConvDecoder
from d2v_fast.fused import fuse
from d2v_fast.ops import attention, conv, native
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from tests import models
from tests.test_training import arguments, records

CPU = torch.device("cpu")
COMPARABLE = {
    "text": "encoder.config.hidden_dropout_prob=0 encoder.config.attention_probs_dropout_prob=0",
    "vision": "encoder.config.hidden_dropout_prob=0 encoder.config.attention_probs_dropout_prob=0",
    # At the preset's 2e-3 a run in bf16 is chaotic: weights changed by 1e-6 move single windows of 200 steps by 9 %.
    "audio": "optimizer.lr=3e-4",
}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def run(modality, folder, steps, precision, fused):
    more = [*COMPARABLE[modality].split(), f"train.steps={steps}", "train.log_every=10", f"train.precision={precision}"]
    trainer = build(parse([*arguments(modality, folder), *more])[0], fused)
    assert loop(trainer) == 0
    return trainer.state.core, [r["loss"] for r in records(folder)]


@pytest.mark.parametrize("modality", COMPARABLE)
@pytest.mark.parametrize(
    "steps, precision, tolerance",
    [
        (20, "fp32", 1e-5),
        (20, "bf16", 2e-2),
        pytest.param(200, "fp32", 1e-5, marks=pytest.mark.slow),
        pytest.param(200, "bf16", 2e-2, marks=pytest.mark.slow),
    ],
)
def test_fused_and_plain_run_agree(modality, steps, precision, tolerance, tmp_path):
    plain, expected = run(modality, tmp_path / "plain", steps, precision, fused=False)
    fused, losses = run(modality, tmp_path / "fused", steps, precision, fused=True)
    assert losses == pytest.approx(expected, rel=tolerance)
    for ours, theirs in ((fused.student, plain.student), (fused.teacher.module, plain.teacher.module)):
        both = zip(ours.parameters(), theirs.parameters(), strict=True)
        assert max(relative(a.detach(), b.detach()) for a, b in both if b.norm() > 0.1) < 100 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_with_dropout_the_mean_curve_is_the_same(modality, tmp_path):
    """Dropout masks differ, so means over three seeds are compared, relative to their spread."""
    rate = "encoder.config.hidden_dropout_prob=0.1 encoder.config.attention_probs_dropout_prob=0.1".split()
    curves = []
    for fused in (False, True):
        for seed in range(3):
            folder = tmp_path / f"{fused}-{seed}"
            more = [*rate, "train.steps=150", "train.log_every=15", f"train.seed={seed}"]
            loop(build(parse([*arguments(modality, folder), *more])[0], fused))
            curves.append([r["loss"] for r in records(folder)][1:])  # the first is of one step
    plain, fast = torch.tensor(curves).view(2, 3, -1)
    spread = (plain.var(0) / 3 + fast.var(0) / 3).sqrt().clamp(min=0.002 * plain.mean())
    assert ((fast.mean(0) - plain.mean(0)) / spread).abs().mean() < 1.5
    assert fast.mean() == pytest.approx(float(plain.mean()), rel=0.02)


@pytest.mark.parametrize("name", [name for name in models.CONFIGS if name != "data2vec-vision"])
@pytest.mark.parametrize("padded", [False, True])
def test_explicit_attention_is_attention(name, padded, monkeypatch):
    encoder = models.make(name).eval()
    ours = copy.deepcopy(encoder)
    assert attention.use_fast_attention(ours.model, CPU) == "explicit"
    calls = []
    monkeypatch.setattr(attention, "fast_dropout", lambda x, p: calls.append(p) or x)
    features = encoder.embed(models.inputs(name)).detach()
    padding = None
    if padded and name not in models.IMAGES:
        padding = torch.zeros(features.shape[:2], dtype=torch.bool)
        padding[1, -4:] = True
    kept = slice(None) if padding is None else ~padding
    expected, found = (e.contextualize(features, padding)[kept] for e in (encoder, ours))
    assert len(calls) == len(ours.blocks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for a, b in zip(ours.parameters(), encoder.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad.norm() > 1e-4:
            assert relative(a.grad, b.grad) < 1e-4


def test_attention_that_cannot_be_replaced_is_left():
    assert attention.use_fast_attention(models.make("data2vec-vision").model, CPU) is None
    assert attention.use_fast_attention(models.Handwritten(), CPU) is None


def attend_in_turn(query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None):
    """torch's operator for sequences of different lengths in plain torch, one sequence after the other: (rows, H, D)."""
    assert cu_q is cu_k and cu_q.dtype == torch.int32 and cu_q[0] == 0 and cu_q[-1] == len(query)
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    sizes = cu_q.diff().tolist()
    assert max(sizes) <= max_q == max_k and dropout == 0 and not causal and not debug
    attended = []
    for q, k, v in zip(*(x.split(sizes) for x in (query, key, value)), strict=True):
        weights = torch.einsum("qhd,khd->hqk", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
        attended.append(torch.einsum("hqk,khd->qhd", weights.softmax(-1), v))
    return torch.cat(attended), None, None, None, None


@pytest.fixture
def segmented(monkeypatch):
    """A GPU of the right kind, with a stand-in for torch's operator; counts its calls."""
    calls = []

    def attend(*args, **kwargs):
        calls.append(args)
        return attend_in_turn(*args, **kwargs)

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", attend)
    agrees = attention._agrees.__wrapped__  # the result is cached

    def agrees_here(device):
        result = agrees(CPU)
        calls.clear()
        return result

    monkeypatch.setattr(attention, "_agrees", agrees_here)
    return calls


def on_the_right(lengths, longest):
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", [*models.TEXTS, *models.WAVES])
@pytest.mark.parametrize("kernel", [True, False])
def test_attention_in_segments_is_attention(name, kernel, segmented, monkeypatch):
    monkeypatch.setattr(attention, "_has_kernel", lambda query: kernel)
    encoder = models.make(name).double().eval()
    ours = copy.deepcopy(encoder)
    assert attention.use_fast_attention(ours.model, CPU) and attention.use_segments(ours.model, torch.device("cuda"))
    inputs = models.inputs(name, batch=3)
    features = encoder.embed(inputs if name in models.TEXTS else inputs.double()).detach()
    length = features.shape[1]
    padding = on_the_right([length, 1, length - 4], length)
    expected, found = (e.contextualize(features, padding)[~padding] for e in (encoder, ours))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(segmented) == (len(ours.blocks) if kernel else 0)
    for states in (expected, found):
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    for a, b in zip(ours.parameters(), encoder.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-7, atol=1e-9)
    whole = torch.zeros_like(padding)
    torch.testing.assert_close(ours.contextualize(features, whole), encoder.contextualize(features), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.contextualize(features), encoder.contextualize(features), rtol=1e-9, atol=1e-9)


def no_kernel(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    "operator, reason",
    [(lambda *rows, **options: (1.1 * rows[2],), "results differ"), (no_kernel, "no kernel image")],
    ids=["wrong", "missing"],
)
def test_segments_are_not_used_where_they_fail(operator, reason, segmented, monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    model = models.make("roberta").model
    assert attention.use_fast_attention(model, CPU) and not attention.use_segments(model, torch.device("cuda"))
    assert reason in caplog.text and model.config._attn_implementation == attention.NAME


def test_the_kernels_are_compared_once_for_each_device(monkeypatch):
    real, calls = attention.attention, []
    monkeypatch.setattr(attention, "attention", lambda *args: calls.append(args[1].device) or real(*args))
    attention._agrees.cache_clear()
    assert attention._agrees(CPU) and attention._agrees(torch.device("cpu"))
    assert calls == [CPU] * 2  # in segments and with a mask
    attention._agrees.cache_clear()


def test_boundaries_of_segments():
    found = attention.segments(attention_mask=~on_the_right([3, 1, 5], 5))
    assert found.tolist() == [0, 3, 5, 6, 10, 15, 15] and found.dtype == torch.int32


@pytest.mark.parametrize("padding", [[True, False, False], [False, True, False]])
def test_padding_elsewhere_is_an_error(padding):
    with pytest.raises(RuntimeError, match="padding must be on the right"):
        attention.segments(attention_mask=~torch.tensor([padding]))


@pytest.mark.parametrize("name", ["roberta", "wav2vec2"])
@pytest.mark.parametrize("norm", ["layer", "instance"])
def test_a_step_in_segments_is_the_same(name, norm, segmented):
    targets, loss = TargetsConfig(top_k=2, norm=norm), LossConfig(impl="eager")
    plain, fused = (Data2Vec(models.make(name), targets=targets, loss=loss).train() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    done = fuse(fused, torch.device("cuda"), ["last block", "attention", "padding"])
    assert done[-1] == "attention without padding"
    inputs = models.inputs(name)
    positions = plain.student.embed(inputs).shape[1]
    padding = on_the_right([positions, positions - 4], positions)
    mask = (torch.rand(2, positions) < 0.5) & ~padding
    target = inputs if name in models.TEXTS else None
    for _ in range(2):
        same_step(plain, fused, source=inputs, mask=mask, target=target, padding_mask=padding)
    assert len(segmented) == 2 * 6


def test_segments_compile_without_a_break(monkeypatch):
    """On the meta device, with torch's own operator and its gradient."""
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    torch._dynamo.reset()
    compiled = torch.compile(attention.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (12, 20):
        layers = [torch.empty(3, length, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        boundaries = torch.empty(7, device="meta", dtype=torch.int32)
        output, _ = compiled(nn.Module(), *(x.transpose(1, 2) for x in layers), boundaries, dropout=0.1)
        assert output.shape == (3, length, 2, 16) and output.is_contiguous()
        output.sum().backward()
        assert all(x.grad.shape == x.shape for x in layers)


@pytest.mark.parametrize("teacher_input, used", [("full", True), ("masked_only", False)])
def test_padding_that_may_be_anywhere_is_masked(teacher_input, used, tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr("d2v_fast.train.build.fuse", lambda model, device, names: parts.extend(names) or [])
    build(parse([*arguments("text", tmp_path), f"data.teacher_input={teacher_input}"])[0], fused=True)
    assert ("padding" in parts) is used and "attention" in parts


@pytest.mark.parametrize("capability, available", [((7, 5), True), ((9, 0), False)])
def test_without_the_kernels_padding_is_masked(capability, available, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = Data2Vec(models.make("roberta"), targets=TargetsConfig(top_k=2))
    assert fuse(model, torch.device("cuda"), ["attention", "padding"]) == ["attention sdpa"]
    assert model.student.model.config._attn_implementation == attention.NAME


SMALL = models.COMMON | dict(vocab_size=60, max_position_embeddings=40)


@pytest.mark.parametrize(
    "kind, config, expected",
    [
        (transformers.GPT2Model, transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2), None),
        (transformers.BertModel, transformers.BertConfig(**SMALL, is_decoder=True), None),
        (transformers.LlamaModel, transformers.LlamaConfig(**SMALL | dict(num_attention_heads=4, num_key_value_heads=2)), None),
        # Causal by an argument of its forward, and with a bias that is no mask.
        (transformers.CLIPTextModel, transformers.CLIPTextConfig(**SMALL), "explicit"),
        (transformers.T5EncoderModel, transformers.T5Config(vocab_size=60, d_model=32, d_kv=16, num_heads=2), "explicit"),
    ],
)
def test_other_models_attend_as_before(kind, config, expected):
    model, ids = kind(config).eval(), torch.randint(5, 60, (2, 12))
    before = model(ids).last_hidden_state
    assert attention.use_fast_attention(model, CPU) == expected
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-4, atol=1e-5)


def test_a_query_without_keys_gives_finite_values():
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    output, _ = attention.attention(nn.Module(), query, query, query, torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    output.sum().backward()
    assert output.isfinite().all() and query.grad.isfinite().all()


@pytest.fixture
def compiled(monkeypatch):
    """Counts compiled graphs, with a fast backend because only their number matters."""
    import torch._dynamo
    import torch._functorch.config
    from torch._dynamo.utils import counters

    config, functorch = torch._dynamo.config, torch._functorch.config
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(attention, "LONG", 4)  # the teacher attends through torch, as both do on a GPU
    torch._dynamo.reset()
    counters.clear()
    # Both restore on exit the values set here.
    with config.patch(recompile_limit=config.recompile_limit), functorch.patch(RECOMPUTED):
        yield counters
    torch._dynamo.reset()


RECOMPUTED = {f"ban_recompute_{what}": True for what in ("materialized_backward", "used_far_apart", "long_fusible_chains")}


def both_ways(name, source="ffn"):
    """A plain model, and the same model fused as on a GPU: blocks compiled, the last one narrowed, our attention."""
    targets, loss = TargetsConfig(top_k=2, source=source), LossConfig(impl="eager")
    plain, fused = (Data2Vec(models.make(name), targets=targets, loss=loss).train() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    assert fuse(fused, torch.device("cuda"), ["last block", "attention", "compile"])[-1].startswith("6 blocks")
    return plain, fused


def same_step(plain, fused, **batch):
    outputs = [model(**batch) for model in (plain, fused)]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    for output, model in zip(outputs, (plain, fused), strict=True):
        model.zero_grad()
        output.loss.backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None and theirs.grad.norm() > 1e-4:
            assert relative(ours.grad, theirs.grad) < 1e-4
    for model in (plain, fused):
        model.update_teacher()


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("source", ["ffn", "block_output", "block_input"])
def test_compiled_blocks_return_the_same(name, source, compiled):
    plain, fused = both_ways(name, source)
    inputs = models.inputs(name)
    mask = torch.rand(plain.student.embed(inputs).shape[:2]) < 0.5
    for _ in range(2):
        same_step(plain, fused, source=inputs, mask=mask, target=inputs if name in models.TEXTS else None)
    assert not compiled["graph_break"]
    # Six of blocks: plain, tapped and the narrowed last one, each of student and teacher. Two of each convolution.
    assert compiled["stats"]["unique_graphs"] <= 6 + 2 * len(conv.layers(plain.student.model))


def test_lengths_and_padding_compile_a_few_times(compiled):
    plain, fused = both_ways("roberta")
    counts = []
    for length in range(9, 29):
        ids = torch.randint(5, 60, (2, length))
        mask = torch.rand(2, length) < 0.5
        padding = torch.arange(length) >= torch.tensor([[length], [length - 2]])
        same_step(plain, fused, source=ids, target=ids, mask=mask & ~padding, padding_mask=padding if length % 2 else None)
        counts.append(compiled["stats"]["unique_graphs"])
    assert counts[-1] == counts[12] <= 16
    assert not compiled["graph_break"]


@pytest.mark.parametrize("name, grid", [("vit", (4, 4)), ("data2vec-audio", None)])
def test_a_compiled_decoder_predicts_the_same(name, grid, compiled):
    axes = len(grid or (1,))
    plain, fused = (
        Data2Vec(models.make(name), ConvDecoder(32, axes, width=32, groups=4), targets=TargetsConfig(top_k=2)).train()
        for _ in range(2)
    )
    fused.load_state_dict(plain.state_dict())
    assert "and the decoder compiled" in fuse(fused, torch.device("cuda"), ["convolutions", "compile"])[-1]
    source = models.inputs(name)
    positions = plain.student.embed(source).shape[1]
    for hidden in (2, 3):
        mask = torch.zeros(len(source), 2, positions, dtype=torch.bool)
        mask[:, 0, :hidden] = mask[:, 1, -hidden:] = True
        outputs = []
        for model in (plain, fused):
            torch.manual_seed(0)  # of the noise
            outputs.append(model(source, mask))
            model.zero_grad()
            outputs[-1].loss.backward()
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
        for (parameter, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), parameter
            assert theirs.grad is None or theirs.grad.norm() < 1e-4 or relative(ours.grad, theirs.grad) < 1e-4, parameter
    assert not compiled["graph_break"]


def with_dropout(name, parts, bf16=True):
    """A model of four blocks fused as on a GPU, and its step, which always draws the same masks."""
    torch.manual_seed(0)
    config = {field: 0.1 if "drop" in field else value for field, value in models.CONFIGS[name].items()}
    config |= dict(layerdrop=0.0) if name in models.WAVES else {}
    config |= dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    model = Data2Vec(
        build_encoder(name, config=config),
        targets=TargetsConfig(top_k=2),
        loss=LossConfig(impl="eager"),
        ema=EMAConfig(scope="encoder"),
    ).train()
    fuse(model, torch.device("cuda"), parts)
    inputs = models.inputs(name, batch=64)
    mask = torch.rand(model.student.embed(inputs).shape[:2]) < 0.5

    def step():
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(inputs, mask, inputs if name in models.TEXTS else None).loss

    return model, step


def saved_for_backward(model, step):
    """Bytes that autograd saves, excluding the weights."""
    torch._dynamo.reset()
    step().backward()  # compiles
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = step()  # its graph keeps storages alive, so no address is reused
    loss.backward()
    return sum(size for address, size in saved.items() if address not in weights)


@pytest.mark.parametrize("name", ["roberta", "beit", "data2vec-audio"])
def test_a_compiled_model_saves_less_for_the_backward(name, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile.func, backend="aot_eager_decomp_partition"))
    parts = ["last block", "attention", "compile"]
    plain, compiling, recomputing = (saved_for_backward(*with_dropout(name, p)) for p in ([], parts, [*parts, "recompute"]))
    assert recomputing < 0.6 * plain
    assert recomputing < 0.9 * compiling


@pytest.mark.slow  # compiles with inductor, where dropout draws its own random numbers
@pytest.mark.parametrize("name", ["roberta", "beit", "data2vec-audio"])
def test_recomputation_gives_the_same_gradients(name, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile.func)
    gradients = []
    for parts in (["compile"], ["compile", "recompute"]):
        torch._dynamo.reset()
        model, step = with_dropout(name, parts, bf16=False)
        step().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert relative(gradients[1], gradients[0]) < 1e-3


def test_on_a_cpu_nothing_is_compiled():
    model = Data2Vec(models.make("roberta"), targets=TargetsConfig(top_k=2))
    assert fuse(model, CPU, ["compile", "recompute"]) == []
    assert model.student.blocks[0]._compiled_call_impl is None


def test_what_fuse_replaces():
    model = Data2Vec(models.make("data2vec-audio"), targets=TargetsConfig(top_k=2))
    done = fuse(model, CPU)
    for encoder in (model.student, model.teacher.module):
        assert encoder.model.config._attn_implementation == attention.NAME
    assert model.loss_settings["impl"] == "native" and done[0].startswith("loss native")
    assert isinstance(model.student.model.feature_extractor, conv.FeatureEncoder)
    assert not any(type(m) is nn.Dropout for m in model.student.modules())
    assert "last block of student and teacher at scored positions" in done


def test_statistics_over_time_need_all_of_the_teacher():
    done = fuse(Data2Vec(models.make("data2vec-audio"), targets=TargetsConfig(top_k=2, norm="instance")), CPU)
    assert "last block of student at scored positions" in done


def test_without_a_fused_loss_the_error_says_why(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: "the C++ library is not built")
    with pytest.raises(ValueError, match="--fused: the native loss cannot run: the C\\+\\+ library is not built"):
        fuse(Data2Vec(models.make("roberta"), targets=TargetsConfig(top_k=2)), CPU)


def test_two_settings_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match=r"--fused: found loss\.impl=eager, expected native"):
        fuse(Data2Vec(models.make("roberta"), targets=TargetsConfig(top_k=2), loss=LossConfig(impl="eager")), CPU)


@pytest.mark.parametrize(
    "processor, precision",
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32"), ({"avx2": True}, "fp32")],
    ids=str,
)
def test_fused_means_bf16_where_the_processor_has_it(processor, precision, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: processor)
    given = ["--config", "audio/tiny", "--fused"]
    config, _ = parse(given)
    assert config.train.precision == precision and f"precision: {precision}" in config.yaml
    assert parse([*given, "train.device=cpu"])[0].train.precision == precision
    for set_otherwise in ("fp32", "bf16"):
        assert parse([*given, f"train.precision={set_otherwise}"])[0].train.precision == set_otherwise
    assert parse(given[:2])[0].train.precision == "fp32"
    assert parse(["--config", "vision/tiny"])[0].train.precision == precision  # the preset says auto


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("gpu", [True, False])
def test_fused_means_bf16_where_the_gpu_has_it(gpu, device, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": not gpu})
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: gpu and not including_emulation)
    config, _ = parse(["--config", "audio/tiny", "--fused", f"train.device={device}"])
    assert config.train.precision == ("bf16" if gpu else "fp32")


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_without_instructions_for_it_is_warned_of(bf16, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": bf16})
    for precision in ("bf16", "fp32"):
        build(parse([*arguments("vision", tmp_path / precision), f"train.precision={precision}"])[0])
    assert caplog.text.count("bf16 is slow: this cpu has no bf16 instructions; use train.precision=fp32") == (not bf16)


def test_a_fused_run_is_repeated_by_its_config(tmp_path):
    config, fused = parse([*arguments("vision", tmp_path / "run"), "--fused"])
    assert fused
    (tmp_path / "config.yaml").write_text(config.yaml)
    assert parse(["--config", str(tmp_path / "config.yaml")])[1] is True


@pytest.mark.parametrize("length, explicit", [(attention.LONG, True), (attention.LONG + 1, False)])
def test_long_inputs_without_gradients_are_left_to_torch(length, explicit, monkeypatch):
    query = torch.randn(1, 2, length, 8)
    calls = []
    monkeypatch.setattr(attention, "fast_dropout", lambda x, p: calls.append(p) or x)
    with torch.no_grad():
        output, _ = attention.attention(nn.Module(), query, query, query, None)
    assert len(calls) == explicit
    expected = nn.functional.scaled_dot_product_attention(query, query, query).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, kept", [("roberta", False), ("wav2vec2", False), ("vit", True)])
def test_attention_that_plans_for_each_shape_is_off_where_lengths_vary(name, kept):
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        fuse(Data2Vec(models.make(name), targets=TargetsConfig(top_k=2)), torch.device("cuda"), ["attention"])
        assert torch.backends.cuda.cudnn_sdp_enabled() is kept
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
