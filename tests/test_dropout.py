"""The fast dropout compared with a second transcription of its hash and with statistics, and inside module wrappers."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import RobertaConfig, RobertaModel

from d2v_fast.ops import native
from d2v_fast.ops.dropout import Dropout, dropout, replace_dropout
from tests.models import CONFIGS

needs_library = pytest.mark.skipif(isinstance(native.library(), str), reason="the C++ library is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def splitmix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def hashes(seed: int, n: int) -> np.ndarray:
    words = []
    for block in range(-(-n // 4096)):
        keys = splitmix((splitmix(seed % 2**64) + (block + 1) * 0x9E3779B97F4A7C15) % 2**64)
        x = (np.arange(4096, dtype=np.uint64) + keys % 2**32) % 2**32
        x = ((x ^ x >> 17) * 0xED5AD4BB + (keys >> 32)) % 2**32
        x = (x ^ x >> 11) * 0xAC4C1B51 % 2**32
        x = (x ^ x >> 15) * 0x31848BAB % 2**32
        words.append(x ^ x >> 14)
    return np.concatenate(words)[:n] if words else np.empty(0, np.uint64)


def op(x, p, seed):
    return torch.ops.d2v_fast.dropout(x, p, torch.tensor(seed))


def kept(seed, p, n) -> np.ndarray:
    return op(torch.ones(n), p, seed).numpy() > 0


def wide_sweep():
    """Large enough for two blocks on each of five threads, and not a multiple of anything."""
    return torch.randn(3, 31_337).add_(0.1)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def moved(a, b) -> float:
    """Share of values that are zero in one and not in the other."""
    return ((a == 0) != (b == 0)).float().mean().item()


@needs_library
@pytest.mark.parametrize("p", [2.0**-31, 0.05, 0.1, 0.5, 0.999, 1 - 2.0**-50])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789123456789])
@pytest.mark.parametrize("n", [1, 15, 16, 4095, 4096, 4097, 50_001])
def test_the_mask_against_a_second_transcription(n, seed, p):
    np.testing.assert_array_equal(kept(seed, p, n), hashes(seed, n) >= min(round(p * 2**32), 2**32 - 1))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_tails_of_every_dtype(dtype):
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for n in [*range(101), 4096, 5000]:
        x = torch.randn(n).to(dtype)
        mask = torch.from_numpy(hashes(7, n) >= round(0.3 * 2**32))
        expected = torch.where(mask, x.float() * np.float32(1 / (1 - 0.3)), 0.0).to(dtype)
        assert same(op(x, 0.3, 7), expected)
    if dtype != torch.float32:  # infinities, NaN, subnormals; dropped values are zero
        x = everything.view(dtype)
        mask = torch.from_numpy(hashes(7, 2**16) >= round(0.3 * 2**32))
        expected = torch.where(mask, x.float() * np.float32(1 / (1 - 0.3)), 0.0).to(dtype)
        torch.testing.assert_close(op(x, 0.3, 7), expected, rtol=0, atol=0, equal_nan=True)


@needs_library
def test_nothing_is_written_past_the_end():
    for n in range(1, 40):
        buffer = torch.full((64,), 5.0)
        native.library().d2v_dropout(torch.ones(n).data_ptr(), buffer.data_ptr(), n, 0, 2**31, 2.0, 1, 1)
        assert (buffer[:n] != 5).all() and (buffer[n:] == 5).all()


@needs_library
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_rate_is_exact(p):
    n = 10_000_000
    mask = kept(3, p, n)
    bound = 4.5 * (n * p * (1 - p)) ** 0.5
    assert abs(n - mask.sum() - n * p) < bound
    for period in (16, 64, 768, 4096):  # no lane, column or position in a block is dropped more often
        rows = mask[: n // period * period].reshape(-1, period)
        z = (rows.sum(0) - len(rows) * (1 - p)) / (len(rows) * p * (1 - p)) ** 0.5
        assert abs(z).max() < 5.5 and abs(z.var() - 1) < 8 * (2 / period) ** 0.5


@needs_library
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_correlation_between_positions(p):
    n = 2**22
    total = np.zeros(n // 2)
    for seed in range(6):
        mask = kept(seed, p, n) - (1 - p)
        lags = np.fft.irfft(abs(np.fft.rfft(mask)) ** 2)[1 : n // 2 + 1] / (p * (1 - p) * n**0.5)  # standard normal each
        assert abs(lags).max() < 6.5 and abs(lags[:64]).max() < 5 and abs(lags[767]) < 4.5
        total += lags
    assert abs(total).max() / 6**0.5 < 6.3


@needs_library
def test_patterns_of_neighbours_are_equally_frequent():
    mask = np.concatenate([kept(seed, 0.5, 2**20) for seed in range(8)])
    for stride in (1, 768, 4096):
        columns = mask[: len(mask) // (stride * 8) * stride * 8].reshape(-1, 8, stride)
        counts = np.bincount((columns * (1 << np.arange(8))[:, None]).sum(1).ravel(), minlength=256)
        chi = ((counts - counts.mean()) ** 2).sum() / counts.mean()
        assert abs(chi - 255) < 5 * (2 * 255) ** 0.5


@needs_library
def test_no_correlation_between_seeds():
    seeds = [*range(64), *(1 << i for i in range(6, 63)), *range(-32, 0)]
    n = 2**17
    for p in (0.1, 0.5):
        masks = np.stack([kept(seed, p, n) for seed in seeds]).astype(np.float32) - (1 - p)
        correlations = masks @ masks.T / (p * (1 - p) * n**0.5)
        assert abs(correlations - np.diag(correlations.diagonal())).max() < 6
        # Nor is one mask a shifted copy of another.
        spectra = np.fft.rfft(masks[:12])
        for i in range(1, 12):
            assert abs(np.fft.irfft(spectra[0] * spectra[i].conj())).max() / (p * (1 - p) * n**0.5) < 6.5


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_and_variance(p, dtype):
    n = 1_000_000
    y = dropout(torch.full((1000, 1000), 0.7).to(dtype), p).double()
    assert abs(y.mean() - 0.7) < 0.7 * (5 * (p / (1 - p) / n) ** 0.5 + torch.finfo(dtype).eps)
    assert y.var().item() == pytest.approx(0.49 * p / (1 - p), rel=0.02)
    y = dropout(torch.randn(1000, 1000).to(dtype), p).double()  # E[y²] = E[x²] / (1 - p)
    assert y.square().mean().item() == pytest.approx(1 / (1 - p), rel=0.02)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_has_the_mask_of_the_output(dtype):
    x = wide_sweep().to(dtype).requires_grad_()
    y = dropout(x, 0.3)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert grad.dtype == dtype and moved(y, grad) == 0
    assert same(grad.unique(), torch.tensor([0.0, np.float32(1 / 0.7)]).to(dtype))
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad(y, x, weights)
    assert same(grad, torch.where(y != 0, weights.float() * np.float32(1 / 0.7), 0.0).to(dtype))


@needs_library
def test_the_gradient_of_strided_inputs_and_the_second_one():
    x = torch.randn(40, 30, requires_grad=True)
    y = dropout(x.t(), 0.5)
    (y.t() * 3).sum().backward()  # the incoming gradient is an expanded scalar, transposed
    assert moved(x.grad.t(), y) == 0
    z = dropout(x, 0.5)
    (grad,) = torch.autograd.grad((z**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.where(z != 0, 8.0, 0.0))


@needs_library
def test_strided_inputs():
    x = torch.randn(12, 50, 64)
    for view in (x.transpose(0, 1), x[:, ::3, 1:], x.flip(2), x[0, 0].expand(7, 64), x.permute(2, 0, 1)):
        torch.manual_seed(1)
        y = dropout(view, 0.3)
        torch.manual_seed(1)
        assert y.is_contiguous() and same(y, dropout(view.contiguous(), 0.3))


@needs_library
def test_the_input_is_not_modified():
    x = torch.randn(1000)
    before = x.clone()
    dropout(x, 0.5)
    assert same(x, before)


@needs_library
def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(op(wide_sweep().fill_(1.1).to(dtype), 0.1, 5))
            assert same(results[0], results[1]) and same(results[0], results[2])
    finally:
        torch.set_num_threads(before)


ON_ANOTHER_ISA = """
import ctypes, hashlib, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.d2v_isa.restype = ctypes.c_char_p
pointer, i32 = ctypes.c_void_p, ctypes.c_int32
library.d2v_dropout.argtypes = [pointer, pointer, ctypes.c_int64, i32, ctypes.c_uint32, ctypes.c_float, ctypes.c_uint64, i32]
digest = hashlib.sha256()
rng = np.random.default_rng(0)
for dtype, size in ((0, 4), (1, 2), (2, 2)):
    for n in (1, 17, 33, 4100, 65536):
        x = rng.integers(0, 256, n * size, dtype=np.uint8)
        if size == 4:
            x = rng.normal(size=n).astype(np.float32)
        y = np.empty_like(x)
        library.d2v_dropout(x.ctypes.data, y.ctypes.data, n, dtype, 1 << 30, 4 / 3, 2**63 + 11, 1)
        digest.update(y.tobytes())
print((library.d2v_isa() or b"none").decode(), digest.hexdigest())
"""


def on_isa(isa: str | None) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "D2V_ISA"} | ({"D2V_ISA": isa} if isa else {})
    command = [sys.executable, "-c", ON_ANOTHER_ISA, native.library()._name]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()


@needs_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    found, digest = on_isa(isa)
    if found != isa:
        pytest.skip(f"{isa} does not run here")
    assert digest == on_isa(None)[1]


def test_a_seed_repeats_and_calls_differ():
    x = torch.ones(300, 300)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert moved(first, second) == pytest.approx(0.5, abs=0.01)
    torch.set_rng_state(state)
    assert same(dropout(x, 0.5), first) and same(dropout(x, 0.5), second)
    torch.manual_seed(4)
    third = dropout(x, 0.5)
    torch.manual_seed(4)
    assert same(dropout(x, 0.5), third) and moved(third, first) > 0.4


@needs_library
def test_what_is_not_dropped_draws_nothing():
    x = torch.randn(5, 6)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x
    assert same(torch.get_rng_state(), state)


def test_everything_dropped_and_nothing_there():
    x = torch.randn(5, 6, requires_grad=True)
    y = dropout(x, 1.0)
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all()
    for shape in ((0,), (3, 0, 2)):
        x = torch.randn(shape, requires_grad=True)
        dropout(x, 0.5).sum().backward()
        assert x.grad.shape == shape
    assert dropout(torch.tensor(2.0), 0.5).item() in (0.0, 4.0)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="dropout probability"):
            dropout(torch.ones(3), p)


def refuse(*_):
    raise AssertionError("the kernel ran")


@pytest.mark.parametrize("x", [torch.ones(50, 50, dtype=torch.float64), torch.ones(50, 50, device="meta")])
def test_other_tensors_are_left_to_torch(x, monkeypatch):
    monkeypatch.setattr(native, "dropout", refuse)
    torch.manual_seed(2)
    y = dropout(x, 0.5)
    torch.manual_seed(2)
    assert y.dtype == x.dtype and y.device == x.device
    assert x.is_meta or same(y, F.dropout(x, 0.5))


def test_without_the_library_torch_runs(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: "the C++ library is not built")
    x = torch.ones(50, 50)
    torch.manual_seed(2)
    y = dropout(x, 0.5)
    torch.manual_seed(2)
    assert same(y, F.dropout(x, 0.5))


@needs_library
def test_the_operator_is_well_formed():
    for x in (torch.randn(4, 5), torch.randn(4, 5).t(), torch.randn(0), torch.randn(17, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.d2v_fast.dropout, (x, 0.3, torch.tensor(1)))


@needs_library
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_draws_anew(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dropout(x, 0.5) * 2, fullgraph=True, backend=backend)
    x = torch.ones(200, 200, requires_grad=True)
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    assert moved(first, second) == pytest.approx(0.5, abs=0.02)
    assert (first == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    first.sum().backward()
    assert moved(x.grad, first) == 0 and x.grad.max() == 4
    torch.manual_seed(3)
    assert same(compiled(x), first)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(64, 64), Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.linear(x))


@needs_library
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    block, x = Residual(), torch.randn(30, 64)
    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        torch.manual_seed(5)
        y = run(leaf)
        torch.rand(3)  # the state has moved on before the backward
        (y**2).sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@needs_library
def test_autocast_no_grad_and_inference_mode():
    block, x = Residual(), torch.randn(300, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = block.linear(x)
        y = block.drop(hidden)
    assert y.dtype == torch.bfloat16 and (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    y.float().sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not block(x).requires_grad


class Odd(nn.Dropout):
    pass


def test_replace_touches_only_plain_dropout():
    shared = nn.Dropout(0.2)
    pair = nn.Sequential(shared, nn.Dropout(0.4, inplace=True))
    model = nn.ModuleDict(dict(a=shared, b=pair, odd=Odd(0.3), two=nn.Dropout2d(0.1), own=Dropout(0.6)))
    model["b"].eval()
    before = {name: (module.__class__, dict(vars(module))) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    assert replace_dropout(model) == 2 and replace_dropout(model) == 0
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        kind, state = before[name]
        assert type(module) is (Dropout if kind is nn.Dropout else kind) and vars(module) == state
    clone = copy.deepcopy(model)
    assert type(clone["a"]) is Dropout and clone["a"] is clone["b"][0] and clone["a"].p == 0.2
    x = torch.ones(100)
    clone["b"][1].train()
    assert clone["b"][1](x) is x and (x == 0).any()  # in place, as requested
    alone = nn.Dropout(0.5)
    assert replace_dropout(alone) == 1 and type(alone) is Dropout


def test_replace_in_a_model():
    torch.manual_seed(0)
    config = RobertaConfig(**CONFIGS["roberta"] | dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    model = RobertaModel(config, add_pooling_layer=False)
    ids = torch.randint(5, 50, (8, 20))
    expected = model.eval()(ids).last_hidden_state
    keys, plain = list(model.state_dict()), sum(type(m) is nn.Dropout for m in model.modules())
    assert replace_dropout(model) == plain > 4
    assert not any(type(m) is nn.Dropout for m in model.modules()) and list(model.state_dict()) == keys
    assert same(model(ids).last_hidden_state, expected)
    # Dropout comes last in the embeddings, so their mean over many masks equals the embeddings without dropout.
    clean = model.embeddings(ids)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model.embeddings(ids) for _ in range(400)])
    assert (draws == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert ((draws.mean(0) - clean) / (clean.abs() * (0.1 / 0.9 / 400) ** 0.5)).std().item() == pytest.approx(1, abs=0.1)
    model(ids).last_hidden_state.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
