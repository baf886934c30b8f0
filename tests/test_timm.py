"""timm encoders against plain timm models; skipped, except for the error message, if timm is not installed."""

import importlib.util

import pytest
import torch
from torch import nn

from d2v_fast import Data2Vec, TargetsConfig, build_encoder
from d2v_fast.config import parse
from d2v_fast.decoders import ConvDecoder
from d2v_fast.encoders import SplicedEncoder, table
from d2v_fast.export import export_run
from d2v_fast.train import train

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=4, depth=3)
# Number of extra tokens, and whether visible positions can be encoded alone.
MODELS = {
    "vit_tiny_patch16_224": (1, True),
    "vit_base_patch16_siglip_224": (0, True),
    "vit_small_patch16_dinov3": (5, True),
    "deit3_small_patch16_224": (1, True),
    "eva02_tiny_patch14_224": (1, True),
    "beit_base_patch16_224": (1, False),
    "naflexvit_base_patch16_gap": (4, True),
}


def test_without_timm_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find(name, *rest))
    with pytest.raises(
        ValueError, match=r"encoder.model='timm/vit_tiny_patch16_224': needs timm: pip install 'd2v-fast\[timm\]'"
    ):
        build_encoder("timm/vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def make(name):
    torch.manual_seed(0)
    encoder = build_encoder(f"timm/{name}", config=SMALL).double().eval()
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder, torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_states_are_the_models(timm, name):
    encoder, x = make(name)
    extra, gathers = MODELS[name]
    assert isinstance(encoder, SplicedEncoder) and encoder.extra == extra and encoder.gathers is gathers
    plain = timm.create_model(name, num_classes=0, **SMALL).double().eval()
    plain.load_state_dict(encoder.model.timm_model.state_dict())
    expected = plain.forward_features(x)
    torch.testing.assert_close(encoder(x), expected[:, extra:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, (_, gathers) in MODELS.items() if gathers])
def test_encoding_visible_positions_equals_masking_attention_to_all_others(timm, name, monkeypatch):
    encoder, x = make(name)
    extra, length = MODELS[name][0], 16
    visible = torch.stack([torch.randperm(length)[:7].sort().values for _ in range(2)])
    seen = torch.zeros(2, extra + length, dtype=torch.bool).scatter(1, visible + extra, True)
    seen[:, :extra] = True
    mask = ~seen[:, None, extra:]
    found = encoder.transform(encoder.place_visible(encoder.embed(x), mask, visible), visible=visible).states
    attend, calls = nn.functional.scaled_dot_product_attention, []

    def among_visible(query, key, value, attn_mask=None, **kwargs):
        calls.append(attn_mask)
        return attend(query, key, value, attn_mask=seen[:, None, None], **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", among_visible)
    expected = encoder.model(x).last_hidden_state[:, extra:]
    assert calls == [None] * 3
    torch.testing.assert_close(found, expected.gather(1, visible[..., None].expand(-1, -1, 48)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_steps(timm, name):
    encoder = make(name)[0].float().train()
    data2vec = Data2Vec(encoder, targets=TargetsConfig(top_k=2))
    mask = (torch.arange(16) % 2 == 0).expand(2, -1)
    data2vec(torch.randn(2, 3, 32, 32), mask).loss.backward()
    unused = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    if MODELS[name][1]:
        data2vec = Data2Vec(encoder, ConvDecoder(48, 2, width=16, kernel=3, groups=4), targets=TargetsConfig(top_k=2))
        assert data2vec(torch.randn(2, 3, 32, 32), mask[:, None].expand(-1, 2, -1)).loss.isfinite()


def test_results_of_beit_are_scaled(timm):
    """As in transformers: the FFN's result times gamma_2."""
    encoder, x = make("beit_base_patch16_224")
    block, seen = encoder.blocks[2], []
    block.mlp.fc2.register_forward_hook(lambda m, args, output: seen.append(output))
    found = encoder.transform(encoder.embed(x), layers=1).layers[0]
    torch.testing.assert_close(found, (seen[0] * block.gamma_2)[:, 1:], rtol=0, atol=0)


def test_samvit_without_its_neck(timm):
    """Its blocks keep a grid (B, H, W, C) and attend within windows."""
    config = SMALL | dict(neck_chans=0, window_size=3, global_attn_indexes=(1,))
    torch.manual_seed(0)
    encoder = build_encoder("timm/samvit_base_patch16", config=config).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = timm.create_model("samvit_base_patch16", num_classes=0, **config).double().eval()
    plain.load_state_dict(encoder.model.timm_model.state_dict())
    seen = []
    plain.blocks[1].register_forward_hook(lambda m, args, output: seen.append(output.flatten(1, 2)))
    expected = plain.forward_features(x).flatten(2).transpose(1, 2)
    found = encoder.transform(encoder.embed(x), layers=2, source="block_output")
    torch.testing.assert_close(found.states, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.layers[0], seen[0], rtol=0, atol=1e-12)
    assert not encoder.gathers and encoder.positions(32) == (4, 4)
    model = Data2Vec(encoder.float(), targets=TargetsConfig(top_k=2))
    model(x.float(), torch.rand(2, 16) < 0.5).loss.backward()
    assert all(p.grad is not None for p in encoder.model.timm_model.patch_embed.parameters())


@pytest.mark.parametrize(
    "name, why", [("samvit_base_patch16", "its blocks have 48 channels, its last states 256"), ("resnet18", "cannot")]
)
def test_what_does_not_fit_is_explained(timm, name, why):
    config = SMALL if "vit" in name else {}
    with pytest.raises(ValueError, match=why):
        build_encoder(f"timm/{name}", config=config)


def test_a_run_whose_export_loads_in_timm(timm, tmp_path):
    run, to = tmp_path / "run", tmp_path / "exported"
    settings = [f"encoder.config.{name}={value}" for name, value in SMALL.items()]
    args = ["--config", "vision/tiny", "encoder.model=timm/vit_tiny_patch16_224", *settings, "targets.top_k=2"]
    more = ["train.steps=2", "train.workers=0", "train.batch_size=4", "train.precision=fp32", f"train.output={run}"]
    assert train(parse([*args, *more])[0]) == 0
    assert export_run(run, to) < 1e-6
    encoder = build_encoder(pretrained=str(to)).eval()
    assert encoder.reads == "vision" and encoder.positions(32) == (4, 4)
    x = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{to}", pretrained=True, num_classes=0).eval()
    assert type(theirs) is type(encoder.model.timm_model)
    torch.testing.assert_close(theirs.forward_features(x)[:, 1:], encoder(x), rtol=0, atol=1e-6)


def test_the_table(timm, capsys):
    table.main(["--timm", "vit_tiny_patch16_224", "samvit_base_patch16", "swin_tiny_patch4_window7_224", "resnet18"])
    text = capsys.readouterr().out
    assert f"Tried with timm {timm.__version__} and torch" in text
    assert "3 families, of which 2 work with data2vec 1.0 and 1 of them with 2.0" in text and "resnet" not in text
    assert "| `vit_tiny_patch16_224` | VisionTransformer | yes | yes |" in text
    assert (
        "| `samvit_base_patch16` | VisionTransformerSAM | yes | no: its blocks depend on positions or on their number" in text
    )
    assert "| `swin_tiny_patch4_window7_224` | SwinTransformer | no: no list of blocks with attention was found" in text
    families = table.families()
    assert families["eva02_*"] == "eva02_tiny_patch14_224" and families["deit3_*"] == "deit3_small_patch16_224"
    assert "resnet18" not in families and len(families) > 100
