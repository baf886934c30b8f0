"""Checkpoints of other projects: loaded models compute the same as the original blocks, transcribed here from method 3."""

import argparse
import os
import sys
import types
import zipfile

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from d2v_fast import cli
from d2v_fast.config import ConfigError, parse
from d2v_fast.convert import from_data2vec_pytorch, from_fairseq, load_checkpoint
from d2v_fast.export import import_checkpoint
from d2v_fast.model import regression_head
from d2v_fast.train.build import make_encoder, make_model
from tests.models import CONFIGS

C, HEADS, FFN, LAYERS = 32, 4, 48, 3
CONVS = "[(16, 10, 5)] + [(16, 3, 2)] * 2 + [(16,2,2)]"
STRIDES = [5, 2, 2, 2]
# Each checkpoint gives its number of heads where its version of fairseq keeps it.
AUDIO = {
    "model": {"encoder_attention_heads": HEADS, "conv_feature_layers": CONVS, "layer_norm_first": False},
    "task": {"normalize": True},
}
TEXT = {"model": {"transformer": {"encoder": {"attention_heads": HEADS}, "decoder": {"attention_heads": 1}}}}


def draw(shapes):
    generator = torch.Generator().manual_seed(3)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, width=C):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def fairseq_block(prefix):
    shapes = norm(f"{prefix}.self_attn_layer_norm") | norm(f"{prefix}.final_layer_norm")
    for name in "qkv":
        shapes |= linear(f"{prefix}.self_attn.{name}_proj", C, C)
    return (
        shapes
        | linear(f"{prefix}.self_attn.out_proj", C, C)
        | linear(f"{prefix}.fc1", FFN, C)
        | linear(f"{prefix}.fc2", C, FFN)
    )


def audio_state():
    shapes = {}
    for i, (inputs, kernel) in enumerate(((1, 10), (16, 3), (16, 3), (16, 2))):
        shapes |= {f"feature_extractor.conv_layers.{i}.0.weight": (16, inputs, kernel)}
        shapes |= norm(f"feature_extractor.conv_layers.{i}.2.1", 16)
    shapes |= norm("layer_norm", 16) | linear("post_extract_proj", C, 16) | {"mask_emb": (C,)} | norm("encoder.layer_norm")
    for j in range(5):
        shapes |= {f"encoder.pos_conv.{j}.0.weight": (C, C // 16, 7), f"encoder.pos_conv.{j}.0.bias": (C,)}
    for i in range(LAYERS):
        shapes |= fairseq_block(f"encoder.layers.{i}")
    return draw(shapes | linear("final_proj.0", C, C))


def text_state():
    top = "encoder.sentence_encoder"
    shapes = {f"{top}.embed_tokens.weight": (70, C), f"{top}.embed_positions.weight": (34, C)} | norm(
        f"{top}.layernorm_embedding"
    )
    for i in range(LAYERS):
        shapes |= fairseq_block(f"{top}.layers.{i}")
    shapes |= linear("encoder.regression_head.0", 2 * C, C) | linear("encoder.regression_head.2", C, 2 * C)
    return draw(shapes | linear("encoder.lm_head.dense", C, C) | {f"{top}.version": (1,)})


def vision_state():
    shapes = {
        "cls_token": (1, 1, C),
        "mask_token": (1, 1, C),
        "patch_embed.proj.weight": (C, 3, 4, 4),
        "patch_embed.proj.bias": (C,),
    }
    shapes |= {"rel_pos_bias.relative_position_bias_table": (7 * 7 + 3, HEADS)} | norm("norm") | linear("lm_head", C, C)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | linear(f"{block}.attn.proj", C, C)
        shapes |= {f"{block}.attn.qkv.weight": (3 * C, C), f"{block}.attn.q_bias": (C,), f"{block}.attn.v_bias": (C,)}
        shapes |= linear(f"{block}.mlp.fc1", FFN, C) | linear(f"{block}.mlp.fc2", C, FFN)
        shapes |= {f"{block}.gamma_1": (C,), f"{block}.gamma_2": (C,)}
    return draw(shapes) | {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}


def port_state():
    """The same weights under the names of the fairseq port."""
    names = {"cls_token": "cls_emb", "mask_token": "mask_emb", "patch_embed.proj": "patch_embed.conv", "lm_head": "final_proj"}
    state = {}
    for key, value in vision_state().items():
        if key.startswith(("blocks", "norm", "rel_pos_bias")):
            key = "encoder." + key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    return state


# The original blocks


def layer_norm(x, state, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def project(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attend(q, k, v, bias=0.0):
    q, k, v = (x.unflatten(-1, (HEADS, C // HEADS)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (C // HEADS) ** 0.5 + bias, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def post_norm_block(x, state, prefix):
    q, k, v = (project(x, state, f"{prefix}.self_attn.{name}_proj") for name in "qkv")
    x = layer_norm(x + project(attend(q, k, v), state, f"{prefix}.self_attn.out_proj"), state, f"{prefix}.self_attn_layer_norm")
    inner = F.gelu(project(x, state, f"{prefix}.fc1"))
    return layer_norm(x + project(inner, state, f"{prefix}.fc2"), state, f"{prefix}.final_layer_norm")


def audio(wave, state):
    x = wave.unsqueeze(1)
    for i, stride in enumerate(STRIDES):
        x = F.conv1d(x, state[f"feature_extractor.conv_layers.{i}.0.weight"], stride=stride)
        x = F.gelu(layer_norm(x.transpose(1, 2), state, f"feature_extractor.conv_layers.{i}.2.1").transpose(1, 2))
    x = project(layer_norm(x.transpose(1, 2), state, "layer_norm"), state, "post_extract_proj")
    positions = x.transpose(1, 2)
    for j in range(5):
        weight, bias = state[f"encoder.pos_conv.{j}.0.weight"], state[f"encoder.pos_conv.{j}.0.bias"]
        positions = F.conv1d(positions, weight, bias, padding=3, groups=16)
        positions = F.gelu(F.layer_norm(positions.transpose(1, 2), (C,)).transpose(1, 2))
    x = layer_norm(x + positions.transpose(1, 2), state, "encoder.layer_norm")
    for i in range(LAYERS):
        x = post_norm_block(x, state, f"encoder.layers.{i}")
    return x


def embed_tokens(ids, state, prefix):
    x = state[f"{prefix}.embed_tokens.weight"][ids] + state[f"{prefix}.embed_positions.weight"][2 : 2 + ids.shape[1]]
    return layer_norm(x, state, f"{prefix}.layernorm_embedding")


def text(ids, state):
    x = embed_tokens(ids, state, "encoder.sentence_encoder")
    for i in range(LAYERS):
        x = post_norm_block(x, state, f"encoder.sentence_encoder.layers.{i}")
    return x


def relative_bias(table, side=4):
    """Row of the table for each pair of query and key, the extra token first (method 3.3)."""
    index = torch.empty(side * side + 1, side * side + 1, dtype=torch.int64)
    for i in range(side * side):
        for j in range(side * side):
            rows, columns = i // side - j // side, i % side - j % side
            index[i + 1, j + 1] = (rows + side - 1) * (2 * side - 1) + columns + side - 1
    index[0, :], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1
    return table[index].permute(2, 0, 1)


def vision(pixels, state, eps=1e-6):
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    bias = relative_bias(state["rel_pos_bias.relative_position_bias_table"])
    for i in range(LAYERS):
        p = f"blocks.{i}"
        q, k, v = (layer_norm(x, state, f"{p}.norm1", eps) @ state[f"{p}.attn.qkv.weight"].T).split(C, dim=-1)
        mixed = attend(q + state[f"{p}.attn.q_bias"], k, v + state[f"{p}.attn.v_bias"], bias)
        x = x + state[f"{p}.gamma_1"] * project(mixed, state, f"{p}.attn.proj")
        inner = F.gelu(project(layer_norm(x, state, f"{p}.norm2", eps), state, f"{p}.mlp.fc1"))
        x = x + state[f"{p}.gamma_2"] * project(inner, state, f"{p}.mlp.fc2")
    return layer_norm(x, state, "norm", eps)


IDS, WAVE, PIXELS = torch.randint(3, 70, (2, 12)), torch.randn(2, 900), torch.randn(2, 3, 16, 16)
CASES = {
    "audio": (audio_state, AUDIO, audio, WAVE, "Data2VecAudioModel"),
    "text": (text_state, TEXT, text, IDS, "Data2VecTextModel"),
    "vision": (vision_state, {}, vision, PIXELS, "Data2VecVisionModel"),
}


def save(state, cfg=None, args=None, ema="_ema"):
    model = dict(state)
    model[ema] = {"layers.0.fc1.weight": torch.zeros(2, 2)}
    torch.save({"args": args, "cfg": cfg, "model": model, "extra_state": {"epoch": 3}, "task_state": {}}, "checkpoint.pt")
    return "checkpoint.pt"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestFairseq:
    @pytest.mark.parametrize("case", CASES)
    def test_computes_what_the_original_does(self, case):
        state, cfg, original, inputs, cls = CASES[case]
        model = from_fairseq(save(state(), cfg)).model
        assert type(model).__name__ == cls
        with torch.no_grad():
            torch.testing.assert_close(model(inputs).last_hidden_state, original(inputs, state()), rtol=1e-4, atol=1e-5)

    def test_the_port_of_the_vision_code(self):
        model = from_fairseq(save(port_state())).model
        with torch.no_grad():
            expected = vision(PIXELS, vision_state(), eps=1e-5)
            torch.testing.assert_close(model(PIXELS).last_hidden_state, expected, rtol=1e-4, atol=1e-5)

    def test_mask_tokens_come_along(self):
        assert torch.equal(from_fairseq(save(audio_state(), AUDIO)).model.masked_spec_embed, audio_state()["mask_emb"])
        assert torch.equal(from_fairseq(save(vision_state())).model.embeddings.mask_token, vision_state()["mask_token"])

    def test_half_precision_becomes_fp32(self):
        halves = {key: value.half() for key, value in text_state().items()}
        assert {p.dtype for p in from_fairseq(save(halves, TEXT)).model.parameters()} == {torch.float32}

    def test_settings_in_a_namespace(self):
        args = argparse.Namespace(encoder_attention_heads=HEADS, conv_feature_layers=CONVS, normalize=False)
        released = from_fairseq(save(audio_state(), args=args))
        assert released.model.config.num_attention_heads == HEADS and released.settings["normalize"] is False

    def test_settings_of_omegaconf(self, monkeypatch):
        """omegaconf's objects as they appear in a pickle; it is not installed here."""
        monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

        def fake_class(module, name):
            cls = type(name, (), {"__module__": module})
            made = types.ModuleType(module)
            setattr(made, name, cls)
            monkeypatch.setitem(sys.modules, module, made)
            return cls

        config, node = fake_class("omegaconf.dictconfig", "DictConfig"), fake_class("omegaconf.nodes", "AnyNode")

        def wrapped(value, parent=None):
            made = (config if isinstance(value, dict) else node)()
            inner = {k: wrapped(v, made) for k, v in value.items()} if isinstance(value, dict) else value
            vars(made).update({"_content" if isinstance(value, dict) else "_val": inner, "_parent": parent})
            return made

        file = save(audio_state(), wrapped(AUDIO))
        for module in ("omegaconf", "omegaconf.dictconfig", "omegaconf.nodes"):
            monkeypatch.delitem(sys.modules, module)
        released = from_fairseq(file)
        assert released.model.config.num_attention_heads == HEADS and released.settings["task.normalize"] is True

    def test_missing_and_unknown_weights_are_named(self):
        state = text_state()
        extra = state | {"encoder.sentence_encoder.layer_norm.weight": torch.ones(C)}
        with pytest.raises(ValueError, match=r"holds encoder\.sentence_encoder\.layer_norm\.weight|holds layer_norm\.weight"):
            from_fairseq(save(extra, TEXT))
        del state["encoder.sentence_encoder.layers.1.fc2.bias"]
        with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.output\.dense\.bias"):
            from_fairseq(save(state, TEXT))
        state = vision_state() | {"norm.weight": torch.ones(5)}
        with pytest.raises(ValueError, match=r"mismatched: .*layernorm"):
            from_fairseq(save(state))

    def test_an_unknown_number_of_heads_is_assumed_with_a_warning(self, caplog):
        assert from_fairseq(save(text_state())).model.config.num_attention_heads == 1
        assert "does not give its number of attention heads; assuming 1" in caplog.text

    @pytest.mark.parametrize(
        "state, cfg, message",
        [
            ({"something.weight": torch.ones(1)}, {}, "not a pre-trained data2vec model"),
            ({"feature_extractor.conv_layers.0.0.weight": torch.ones(1)}, {}, "no positional convolution of several layers"),
            (audio_state(), {"model": AUDIO["model"] | {"layer_norm_first": True}}, "normalises after each block"),
            (audio_state(), {"model": AUDIO["model"] | {"conv_feature_layers": "__import__('os')"}}, "expected a sum of lists"),
        ],
    )
    def test_unsupported_architectures_are_refused(self, state, cfg, message):
        with pytest.raises(ValueError, match=message):
            from_fairseq(save(state, cfg))

    def test_exports_with_processor_and_card(self):
        assert import_checkpoint(save(audio_state(), AUDIO), "out", "fairseq") == 0
        from transformers import AutoFeatureExtractor, AutoModel

        assert AutoFeatureExtractor.from_pretrained("out").do_normalize
        assert "checkpoint.pt of fairseq" in open("out/README.md").read()
        with torch.no_grad():
            expected = audio(WAVE, audio_state())
            torch.testing.assert_close(AutoModel.from_pretrained("out")(WAVE).last_hidden_state, expected, rtol=1e-4, atol=1e-5)

    def test_text_and_vision_under_their_other_names(self):
        from transformers import BeitModel, RobertaModel

        assert import_checkpoint(save(text_state(), TEXT), "text", "fairseq", "roberta") <= 1e-6
        assert import_checkpoint(save(vision_state()), "vision", "fairseq", "beit") <= 1e-6
        with torch.no_grad():
            for model, original, inputs, state in (
                (RobertaModel.from_pretrained("text"), text, IDS, text_state()),
                (BeitModel.from_pretrained("vision"), vision, PIXELS, vision_state()),
            ):
                torch.testing.assert_close(model(inputs).last_hidden_state, original(inputs, state), rtol=1e-4, atol=1e-5)


class TestCommand:
    @pytest.fixture
    def export(self, monkeypatch, capsys):
        def export(*args):
            monkeypatch.setattr(sys, "argv", ["d2v-export", *args])
            monkeypatch.setattr(sys, "path", [*sys.path])
            with pytest.raises(SystemExit) as exit:
                cli.export()
            return exit.value.code or capsys.readouterr().out

        return export

    def test_text_with_and_without_a_tokenizer(self, export):
        file = save(text_state(), TEXT)
        output = export("--from", "fairseq", file, "--to", "out")
        assert output.startswith('out: AutoModel.from_pretrained("out") has the weights of checkpoint.pt')
        assert "--tokenizer NAME" in output
        vocabulary = {word: i for i, word in enumerate(("<s>", "<pad>", "</s>", "<mask>", "yes"))}
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocabulary, "<pad>")),
            cls_token="<s>", pad_token="<pad>", sep_token="</s>", mask_token="<mask>",
        )  # fmt: skip
        words.save_pretrained("words")
        assert "--tokenizer NAME" not in export("--from", "fairseq", file, "--to", "more", "--tokenizer", "words")
        assert AutoTokenizer.from_pretrained("more").convert_tokens_to_ids("yes") == 4
        words.add_tokens([f"word{i}" for i in range(70)])
        words.save_pretrained("words")
        message = export("--from", "fairseq", file, "--to", "last", "--tokenizer", "words")
        assert message == "d2v-export: --tokenizer words: its 75 tokens exceed the model's 70"

    def test_refusals_are_one_line(self, export):
        message = export("--from", "fairseq", save({"something.weight": torch.ones(1)}), "--to", "out")
        assert message.startswith("d2v-export: checkpoint.pt: not a pre-trained data2vec model") and "\n" not in message
        assert not os.path.exists("out")


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class TestPickles:
    @pytest.mark.parametrize("function, argument", [(os.system, "touch struck"), (eval, "open('struck', 'w')")])
    def test_code_is_named_and_never_run(self, function, argument):
        torch.save({"model": {}, "args": argparse.Namespace(seed=Hostile(function, argument))}, "hostile.pt")
        with pytest.raises(ValueError, match=rf"holds \w+\.{function.__name__}, which .* may run code; not loaded"):
            load_checkpoint("hostile.pt")
        assert not os.path.exists("struck")

    def test_classes_of_fairseq_are_not_imported(self, monkeypatch):
        """This includes a class that is installed and would run code when unpickled."""
        module = types.ModuleType("fairseq.meters")

        class Meter:
            def __setstate__(self, state):
                open("struck", "w")

        Meter.__module__, Meter.__qualname__ = "fairseq.meters", "Meter"
        module.Meter = Meter
        monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
        monkeypatch.setitem(sys.modules, "fairseq.meters", module)
        meter = Meter()
        meter.total = 3
        torch.save({"model": {}, "meter": meter}, "meter.pt")
        assert type(load_checkpoint("meter.pt")["meter"]).__name__ == "_Inert"
        assert not os.path.exists("struck")

    @pytest.mark.parametrize("pickled", [b"", b".", b"N.", b"\x80\x02h\x05.", b"\x80\x02K\x01K\x02\x86R.", b"(" * 9 + b"}s."])
    def test_damaged_ones(self, pickled):
        """Some of these files raise errors that torch does not expect."""
        with zipfile.ZipFile("damaged.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3")
        with pytest.raises(ValueError, match=r"^damaged\.pt: (cannot be read as a checkpoint: \w+: .|found a NoneType)"):
            load_checkpoint("damaged.pt")

    @pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(0), torch.zeros(1).expand(10**15), torch.zeros(3, 3)])
    @pytest.mark.parametrize("key", ["embed_tokens.weight", "embed_positions.weight", "layers.0.fc1.bias"])
    def test_unusable_weights(self, key, value):
        state = text_state() | {f"encoder.sentence_encoder.{key}": value}
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
            import_checkpoint(save(state, TEXT), "out", "fairseq")
        assert not os.path.exists("out")

    def test_a_name_that_asks_for_a_billion_layers(self):
        state = text_state() | {"encoder.sentence_encoder.layers.999999999.fc1.bias": torch.zeros(FFN)}
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: its weights are not those of Data2VecTextModel: missing"):
            from_fairseq(save(state, TEXT))

    @pytest.mark.parametrize("heads", ["many", -1, 0.1, 7, [1]])
    def test_unusable_settings(self, heads):
        cfg = {"model": {"encoder_attention_heads": heads}}
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
            import_checkpoint(save(text_state(), cfg), "out", "fairseq")

    def test_other_files_are_refused(self):
        open("a.pt", "w").write("text")
        with pytest.raises(ValueError, match=r"a\.pt: not a file written by torch\.save"):
            load_checkpoint("a.pt")
        torch.save([1], "b.pt")
        with pytest.raises(ValueError, match=r"b\.pt: found a list"):
            load_checkpoint("b.pt")


class TestData2VecPytorch:
    @pytest.fixture
    def roberta(self):
        from transformers import RobertaConfig, RobertaModel

        model = RobertaModel(
            RobertaConfig(**CONFIGS["roberta"], type_vocab_size=1, layer_norm_eps=1e-5)
        ).eval()  # with a pooler, as AutoModel creates it in that project
        model.config.save_pretrained("config")
        head = torch.nn.Sequential(torch.nn.Linear(C, 2 * C), torch.nn.GELU(), torch.nn.Linear(2 * C, C))
        whole = {f"encoder.encoder.{k}": v for k, v in model.state_dict().items()}
        whole |= {f"regression_head.{k}": v for k, v in head.state_dict().items()}
        optimizer = torch.optim.Adam(model.parameters())
        torch.save({"data2vec": whole, "encoder": model.state_dict(), "optimizer": optimizer.state_dict()}, "20.pt")
        return model, head

    def test_exports(self, roberta):
        from transformers import RobertaModel

        assert import_checkpoint("20.pt", "out", "data2vec-pytorch", encoder="config") == 0
        ids = torch.randint(5, 60, (2, 10))
        with torch.no_grad():
            found = RobertaModel.from_pretrained("out")(ids).last_hidden_state
            torch.testing.assert_close(found, roberta[0](ids).last_hidden_state)

    def test_training_continues(self, roberta, caplog):
        """d2v-train continues from encoder and head."""
        import_checkpoint("20.pt", "out", "data2vec-pytorch", encoder="config")
        settings = ["--config", "text/tiny", "encoder.pretrained=out", "head.pretrained=out", "head.layers=2"]
        config, _ = parse(settings)
        model = make_model(config, make_encoder(config)).eval()
        assert "the teacher was not saved and starts as a copy of the student" in caplog.text
        encoder, head = roberta
        ids, states = torch.randint(5, 60, (2, 10)), torch.randn(3, C)
        with torch.no_grad():
            expected = encoder(ids).last_hidden_state
            torch.testing.assert_close(model.student(ids), expected)
            torch.testing.assert_close(model.teacher.module(ids), expected)
            torch.testing.assert_close(model.head(states), head(states))
        for setting in ("head.layers=1", "head.pretrained=nowhere"):
            config, _ = parse([*settings, setting])
            with pytest.raises(ConfigError, match=r"^head\.pretrained="):
                make_model(config, make_encoder(config))

    def test_a_head_of_one_layer(self, roberta):
        checkpoint = torch.load("20.pt", weights_only=True)
        linear = {
            "encoder.encoder.x": torch.ones(1),
            "regression_head.weight": torch.ones(C, C),
            "regression_head.bias": torch.ones(C),
        }
        torch.save(checkpoint | {"data2vec": linear}, "audio.pt")
        regression_head(C, 1).load_state_dict(from_data2vec_pytorch("audio.pt", "config")[1])

    def test_other_files_and_encoders_are_refused(self, roberta):
        with pytest.raises(ValueError, match="expected 'data2vec', 'encoder' and 'optimizer'"):
            from_data2vec_pytorch(save(text_state()), "config")
        with pytest.raises(ValueError, match=r"neither a folder with config\.json nor a model on the hub"):
            from_data2vec_pytorch("20.pt", "nowhere")
        with pytest.raises(ValueError, match="needs --encoder"):
            import_checkpoint("20.pt", "out", "data2vec-pytorch")
