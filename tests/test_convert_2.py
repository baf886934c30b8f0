"""Checkpoints of data2vec 2.0: loaded models compute the same as tests/released.py, the modules as released."""

import sys
import types
import typing

import pytest
import torch
from transformers import AutoModel, AutoModelForCTC, AutoModelForImageClassification

from d2v_fast.config import parse
from d2v_fast.convert import from_fairseq
from d2v_fast.decoders import ConvDecoder
from d2v_fast.export import import_checkpoint
from d2v_fast.train.build import make_encoder, make_model
from tests.released import CTC, MODALITIES, PAD, ImageClassifier, TextClassifier, checkpoint, make, make_teacher, sincos

HEADS, LAYERS = dict(learned_alibi_scale_per_head=False), dict(learned_alibi_scale_per_layer=True)
CASES = {  # modality, changed settings of the modality, changed settings of the model
    "image": ("image", {}, {}),
    "image without prenet, 6 × 6 patches of 2 channels": ("image", dict(prenet_depth=0, input_size=24, in_chans=2), {}),
    "audio": ("audio", {}, {}),
    "audio with a prenet and scales for each layer": ("audio", dict(prenet_depth=1) | LAYERS, {}),
    "audio with one scale for all heads": ("audio", HEADS, {}),
    "audio, frozen scales": ("audio", dict(learned_alibi_scale=False), {}),
    "audio without ALiBi, 3 even convolutions": (
        "audio",
        dict(use_alibi_encoder=False, conv_pos_width=12, conv_pos_depth=3),
        {},
    ),
    "audio, 6 heads": ("audio", dict(num_alibi_heads=6), dict(embed_dim=48, num_heads=6)),
    "text": ("text", {}, {}),
}
CONVOLUTIONS = MODALITIES["audio"]["feature_encoder_spec"]
SOURCES = {"image": torch.randn(2, 3, 16, 16), "audio": torch.randn(2, 900), "text": torch.randint(3, 70, (2, 12))}
CLASSES = {"image": "Data2Vec2VisionModel", "audio": "Data2Vec2AudioModel", "text": "RobertaModel"}
EXACT = dict(rtol=0, atol=1e-10)

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(params=CASES)
def case(request):
    """A released model and an input for it."""
    modality, changed, model = CASES[request.param]
    source = SOURCES[modality].double()
    if "in_chans" in changed:
        source = torch.randn(2, 2, 24, 24).double()
    return make(modality, changed, **model), source.long() if modality == "text" else source


def save(original, teacher=None, change=None, **options):
    saved = checkpoint(original, teacher, **options)
    saved["model"] |= change or {}
    torch.save(saved, "checkpoint.pt")
    return "checkpoint.pt"


def close(found, expected):
    torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def states(model, source, **arguments):
    return model.double()(source, **arguments).last_hidden_state


class TestPreTrained:
    def test_student_and_teacher_compute_what_the_original_does(self, case):
        original, source = case
        teacher = make_teacher(original)
        released = from_fairseq(save(original, teacher))
        assert type(released.model).__name__ == CLASSES[original.modality]
        with torch.no_grad():
            expected, taught = original.double().extract(source), teacher.double().extract(source)
        assert (expected - taught).abs().max() > 0.1
        close(states(released.model, source), expected)
        released.model.load_state_dict(released.teacher)
        close(states(released.model, source), taught)

    def test_saved_again_it_is_the_same(self, case):
        original, source = case
        released = from_fairseq(save(original))
        released.model.save_pretrained("again")
        with torch.no_grad():
            close(states(AutoModel.from_pretrained("again"), source), original.double().extract(source))

    @pytest.mark.parametrize("modality", SOURCES)
    @pytest.mark.parametrize(
        "changed", [{}, dict(decoder_kernel=4), dict(decoder_dim=64, decoder_residual=True), dict(decoder_groups=2)]
    )
    def test_decoder(self, modality, changed):
        original = make(modality, dict(decoder=changed))
        released = from_fairseq(save(original))
        decoder = ConvDecoder(32, **released.decoder_settings).double().eval()
        decoder.load_state_dict(released.decoder)
        x = torch.randn(2, 16, 32).double()
        close(decoder(x, (4, 4) if modality == "image" else (16,)), original.double().encoder.decoder(x))

    @pytest.mark.parametrize(
        "modality, own, students",
        [
            ("image", "embeddings.patch_embeddings.projection.weight", None),
            ("audio", "encoder.pos_conv_embed.layers.0.conv.weight", "feature_projection.projection.weight"),
            ("text", "encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"),
        ],
    )
    def test_what_a_teacher_does_not_own_is_the_students(self, modality, own, students):
        original = make(modality)
        teacher = make_teacher(original)
        whole = from_fairseq(save(teacher)).model.state_dict()
        released = from_fairseq(save(original, teacher))
        assert released.teacher.keys() == whole.keys()
        assert all(torch.equal(whole[key], value) for key, value in released.teacher.items())
        student = released.model.state_dict()
        assert not torch.equal(released.teacher[own], student[own])
        assert students is None or torch.equal(released.teacher[students], student[students])

    def test_texts_with_padding(self):
        original = make("text").double()
        ids = SOURCES["text"].clone()
        ids[0, 7:] = PAD
        model = from_fairseq(save(original)).model
        with torch.no_grad():
            expected = original.extract(ids, ids == PAD)
        real = ids != PAD
        close(states(model, ids, attention_mask=real.long())[real], expected[real])

    @pytest.mark.parametrize("changed", [{}, HEADS], ids=["a scale for each head", "one scale"])
    def test_scales_of_older_versions(self, changed):
        """Four axes, in the student and in the teacher."""
        original = make("audio", changed)
        teacher = make_teacher(original)
        released = from_fairseq(save(original, teacher, old_alibi=True))
        assert released.model.encoder.alibi_scale.shape == (1, 1, 4, 1, 1)
        with torch.no_grad():
            source = SOURCES["audio"].double()
            close(states(released.model, source), original.double().extract(source))
            released.model.load_state_dict(released.teacher)
            close(states(released.model, source), teacher.double().extract(source))

    def test_frozen_scales_stay_frozen(self):
        frozen = from_fairseq(save(make("audio", dict(learned_alibi_scale=False)))).model
        assert "encoder.alibi_scale" not in dict(frozen.named_parameters())
        assert from_fairseq(save(make("audio"))).model.encoder.alibi_scale.requires_grad

    def test_without_decoder_and_teacher(self):
        original = make("image")
        del original.encoder.decoder
        released = from_fairseq(save(original))
        assert (released.decoder, released.decoder_settings, released.teacher) == (None, None, None)
        assert from_fairseq(save(original, change={"_ema": {}})).teacher is None

    def test_other_predictors_are_left_behind(self):
        more = {"shared_decoder.blocks.0.0.weight": torch.ones(2), "recon_proj.weight": torch.ones(2)}
        assert from_fairseq(save(make("image"), change=more)).decoder

    def test_half_precision_becomes_fp32(self):
        original = make("image")
        teacher = make_teacher(original).half()
        released = from_fairseq(save(original.half(), teacher))
        kinds = {*released.model.parameters(), *released.teacher.values(), *released.decoder.values()}
        assert {value.dtype for value in kinds} == {torch.float32}

    def test_a_file_that_is_replaced_changes_nothing(self):
        original = make("image")
        released = from_fairseq(save(original, make_teacher(original)))
        before = [
            value.clone() for value in (*released.model.parameters(), *released.teacher.values(), *released.decoder.values())
        ]
        other = make("image", seed=7)
        save(other, make_teacher(other, seed=8))
        after = (*released.model.parameters(), *released.teacher.values(), *released.decoder.values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_settings_come_along(self):
        released = from_fairseq(save(make("audio", encoder_dropout=0.15, attention_dropout=0.25, layerdrop=0.35)))
        config = released.model.config
        assert (config.hidden_dropout, config.attention_dropout, config.layerdrop) == (0.15, 0.25, 0.35)
        assert released.settings["model.modalities.audio.mask_length"] == 5
        assert released.settings["task.normalize"] is True
        config = from_fairseq(save(make("text", encoder_dropout=0.15, attention_dropout=0.25))).model.config
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.15, 0.25)
        config = from_fairseq(save(make("image", encoder_dropout=0.15, attention_dropout=0.25))).model.config
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.15, 0.25)

    def test_epsilon_as_a_string(self):
        original = make("image", norm_eps=1e-2)
        original.cfg["model"]["norm_eps"] = "1e-2"
        model = from_fairseq(save(original)).model
        with torch.no_grad():
            source = SOURCES["image"].double()
            close(states(model, source), original.double().extract(source))

    @pytest.mark.parametrize("package", ["examples.data2vec", "data2vec"])
    def test_enumerations(self, monkeypatch, package):
        """Enums as fairseq and omegaconf pickle them (class and number), and typing.List; neither package is installed here."""

        def fake_class(module, name):
            made = types.ModuleType(module)
            cls = type(name, (), {"__module__": module})
            setattr(made, name, cls)
            monkeypatch.setitem(sys.modules, module, made)
            return cls

        for name in ("examples", "examples.data2vec", "data2vec", f"{package}.data", "omegaconf"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        modality, node = fake_class(f"{package}.data.modality", "Modality"), fake_class("omegaconf.nodes", "EnumNode")
        modality.__new__ = lambda cls, *number: object.__new__(cls)
        modality.__reduce__ = lambda self: (modality, (2,))
        value = node()
        value._val, value._metadata = modality(), {"ref_type": typing.List}  # noqa: UP006
        file = save(make("image", supported_modality=value, type=modality()))
        for name in [name for name in sys.modules if name.startswith(("examples", "data2vec", "omegaconf"))]:
            monkeypatch.delitem(sys.modules, name)
        settings = from_fairseq(file).settings
        assert (settings["model.supported_modality"], settings["model.type"]) == (2, 2)

    def test_recursive_settings(self):
        original = make("image")
        original.cfg["model"]["own"] = original.cfg
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: its weights and settings do not form a model: RecursionError"):
            from_fairseq(save(original))

    def test_the_number_of_heads_is_assumed_with_a_warning_without_settings(self, caplog):
        original = make("image", embed_dim=128, num_heads=2, norm_eps=1e-6)
        original.cfg = None
        model = from_fairseq(save(original)).model
        assert "does not give its number of attention heads; assuming 2" in caplog.text
        with torch.no_grad():
            source = SOURCES["image"].double()
            close(states(model, source), original.double().extract(source))

    def test_licences_are_those_of_the_released_weights(self):
        found = {modality: from_fairseq(save(make(modality))).licence for modality in SOURCES}
        assert found == {"image": "cc-by-nc-4.0", "audio": "mit", "text": "mit"}

    def test_decoder_settings_of_the_run(self):
        """Settings that cannot be derived from the weights."""
        changed = dict(mask_noise_std=0.03, decoder=dict(input_dropout=0.2, decoder_residual=False))
        found = from_fairseq(save(make("audio", changed))).decoder_settings
        assert (found["noise"], found["dropout"], found["residual"]) == (0.03, 0.2, False)
        original = make("audio")
        original.cfg = {"model": {"num_heads": 4}}
        original.cfg["model"]["modalities"] = {"audio": {"feature_encoder_spec": CONVOLUTIONS}}
        assert {"noise", "dropout"}.isdisjoint(from_fairseq(save(original)).decoder_settings)


# Settings of d2v-train: the preset of the base size, and changes to it.
RECIPES = {
    "image": [
        "vision/v2-base",
        "head.width=32",
        "head.layers=3",
        "head.groups=8",
        "loss.cls_weight=.01",
        "loss.cls_reduction=sum",
    ],
    "audio": ["audio/v2-base", "head.width=16", "head.groups=8"],
    "text": ["text/v2-base", "head.width=32", "head.layers=3"],
}


class TestTraining:
    @pytest.mark.parametrize("modality", SOURCES)
    def test_training_resumes_with_the_same_loss(self, modality):
        """Student, decoder and teacher from the folder that d2v-export writes give the loss of the original."""
        original = make(modality)
        teacher = make_teacher(original)
        assert import_checkpoint(save(original, teacher), "out", "fairseq") == 0
        top_k = original.cfg["model"]["average_top_k_layers"]
        preset, *changed = RECIPES[modality]
        config, _ = parse(["--config", preset, "encoder.pretrained=out", *changed, f"targets.top_k={top_k}", "head.noise=0"])
        model = make_model(config, make_encoder(config)).double().eval()
        original, teacher = original.double(), teacher.double()
        source = SOURCES[modality].to(torch.int64 if modality == "text" else torch.float64)
        with torch.no_grad():
            features = teacher.encoder.local_features(source)
            mask = torch.rand(2, 3, features.shape[1]).argsort(2) < features.shape[1] // 2
            _, results = teacher.run_blocks(teacher.encoder.contextualize(features))
            expected = original.losses(*original.student(source, mask), original.targets(results), mask)
            found = model(source, mask)
        size, fp32 = expected["sample_size"], dict(rtol=1e-6, atol=0)  # the loss is computed in fp32
        regression = found.loss - (found.cls_loss or 0)
        torch.testing.assert_close(regression, expected["regression"] / size, **fp32)
        if modality == "image":
            torch.testing.assert_close(found.cls_loss.double(), expected["cls"] / size, **fp32)


class TestFineTuned:
    def test_classifier_of_images(self):
        original = ImageClassifier(make("image"), 5)
        released = from_fairseq(save(original))
        assert type(released.model).__name__ == "Data2Vec2VisionForImageClassification" and released.decoder is None
        released.model.save_pretrained("again")
        source = SOURCES["image"].double()
        with torch.no_grad():
            expected = original.double()(source)
            for model in (released.model, AutoModelForImageClassification.from_pretrained("again")):
                close(model.double()(source).logits, expected)

    def test_pooling(self):
        original = ImageClassifier(make("image"), 5)
        for mode, pooling in ((None, "mean"), (1, "mean"), ("CLS_TOKEN", "cls"), (2, "cls")):
            original.cfg["model"]["prediction_mode"] = mode
            assert from_fairseq(save(original)).model.config.pooling == pooling
        original.cfg["model"]["prediction_mode"] = 3
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: model\.prediction_mode: found 3, expected one of mean_pooling"):
            from_fairseq(save(original))

    def test_without_a_norm_before_the_head(self):
        original = ImageClassifier(make("image"), 5)
        del original.fc_norm
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: has no fc_norm"):
            from_fairseq(save(original))

    @pytest.mark.parametrize("changed", [{}, dict(prenet_depth=1) | LAYERS])
    def test_letters_of_speech(self, changed):
        original = CTC(make("audio", changed), 7)
        released = from_fairseq(save(original))
        assert type(released.model).__name__ == "Data2Vec2AudioForCTC" and released.settings["task.normalize"] is True
        released.model.save_pretrained("again")
        source = SOURCES["audio"].double()
        with torch.no_grad():
            expected = original.double()(source)
            for model in (released.model, AutoModelForCTC.from_pretrained("again")):
                close(model.double()(source).logits, expected)

    def test_classifier_of_texts(self):
        original = TextClassifier(make("text"), 3)
        model = from_fairseq(save(original)).model
        with torch.no_grad():
            close(model.double()(SOURCES["text"]).logits, original.double()(SOURCES["text"]))
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: has several heads: "):
            from_fairseq(save(original, change={"classification_heads.other.dense.weight": torch.ones(32, 32)}))

    def test_an_unknown_head(self):
        original = ImageClassifier(make("image"), 5)
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: holds norm\.running_mean"):
            from_fairseq(save(original, change={"norm.running_mean": torch.ones(32)}))


class TestRefused:
    @pytest.mark.parametrize(
        "modality, changed, model, key, found",
        [
            *((modality, {}, dict(layer_norm_first=True), "layer_norm_first", "True") for modality in SOURCES),
            ("audio", dict(learned_alibi=True), {}, "modalities.audio.learned_alibi", "True"),
            ("audio", dict(conv_pos_pre_ln=True), {}, "modalities.audio.conv_pos_pre_ln", "True"),
            ("audio", dict(extractor_mode="default"), {}, "modalities.audio.extractor_mode", "'default'"),
            ("audio", dict(num_extra_tokens=2), {}, "modalities.audio.num_extra_tokens", "2"),
            ("audio", {}, dict(norm_eps=1e-6), "norm_eps", "1e-06"),
            ("text", {}, dict(norm_eps=1e-6), "norm_eps", "1e-06"),
            ("text", dict(prenet_depth=2), {}, "modalities.text.prenet_depth", "2"),
            ("text", dict(no_scale_embedding=False), {}, "modalities.text.no_scale_embedding", "False"),
            ("text", dict(num_extra_tokens=1), {}, "modalities.text.num_extra_tokens", "1"),
            ("image", dict(num_extra_tokens=2), {}, "modalities.image.num_extra_tokens", "2"),
            ("image", dict(transformer_decoder=True), {}, "modalities.image.transformer_decoder", "True"),
            ("image", dict(enc_dec_transformer=True), {}, "modalities.image.enc_dec_transformer", "True"),
            ("image", dict(decoder=dict(add_positions_all=True)), {}, "modalities.image.decoder.add_positions_all", "True"),
        ],
    )  # fmt: skip
    def test_settings_of_another_architecture(self, modality, changed, model, key, found):
        """The error names the file, the key, the value found and the reason."""
        with pytest.raises(ValueError, match=rf"^checkpoint\.pt: model\.{key}: found {found}, expected \S+: \w+"):
            from_fairseq(save(make(modality, changed, **model)))

    @pytest.mark.parametrize("modality, key", [("text", "local"), ("image", "global")])
    def test_biases_by_distance_of_texts_and_images(self, modality, key):
        original = make(modality)
        original.cfg["model"]["modalities"][modality]["use_alibi_encoder"] = True
        with pytest.raises(ValueError, match=rf"model\.modalities\.{modality}\.use_alibi_encoder: found True, expected False"):
            from_fairseq(save(original))

    def test_settings_of_pre_training_inside_those_of_fine_tuning(self):
        original = ImageClassifier(make("image", layer_norm_first=True), 5)
        with pytest.raises(ValueError, match=r"model\.pretrained_model_args\.model\.layer_norm_first: found True"):
            from_fairseq(save(original))

    def test_several_modalities(self):
        more = {"modality_encoders.AUDIO.alibi_scale": torch.ones(1, 1, 4, 1, 1)}
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: has encoders of AUDIO, IMAGE, expected one of .* share blocks"):
            from_fairseq(save(make("image"), change=more))

    def test_an_unknown_modality(self):
        torch.save({"model": {"modality_encoders.VIDEO.extra_tokens": torch.ones(1)}}, "checkpoint.pt")
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: has encoders of VIDEO, expected one of IMAGE, AUDIO, TEXT"):
            from_fairseq("checkpoint.pt")

    def test_an_unknown_prefix(self):
        torch.save({"model": {"student.modality_encoders.IMAGE.extra_tokens": torch.ones(1)}}, "checkpoint.pt")
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: has a model of data2vec 2\.0 under 'student\.'"):
            from_fairseq("checkpoint.pt")

    def test_patches_of_another_width(self):
        name = "modality_encoders.IMAGE.local_encoder."
        original = make("image").state_dict()
        state = {key.replace(name, f"{name}0."): value for key, value in original.items()}
        torch.save({"model": state | {f"{name}1.weight": torch.ones(32, 32)}}, "checkpoint.pt")
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: modalities\.image\.embed_dim is not the width of the blocks"):
            from_fairseq("checkpoint.pt")

    def test_other_positions(self):
        rows_first = sincos(32, 4).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
        half = (sincos(32, 4) + 1e-2).half()
        for positions in (rows_first, sincos(32, 4) + 1e-3, half, sincos(32, 4)[:, :12], sincos(32, 4)[0]):
            change = {"modality_encoders.IMAGE.fixed_positional_encoder.positions": positions}
            with pytest.raises(ValueError, match=r"^checkpoint\.pt: fixed_positional_encoder\.positions are not the sines"):
                from_fairseq(save(make("image"), change=change))

    def test_a_decoder_of_another_kind(self):
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: decoder: projection\.0\.bias: found \[96\], expected \[64\]"):
            from_fairseq(save(make("text", dict(decoder=dict(projection_ratio=3.0)))))
        change = {"modality_encoders.IMAGE.decoder.blocks.0.norm1.weight": torch.ones(32)}
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: holds blocks\.0\.norm1\.weight"):
            from_fairseq(save(make("image"), change=change))


class TestHostile:
    @pytest.mark.parametrize("modality", SOURCES)
    def test_unusable_weights(self, modality):
        """Every weight outside the blocks, and some inside."""
        original = make(modality)
        keys = [key for key in original.state_dict() if ".blocks.0.attn" in key or "fc1.bias" in key or "blocks." not in key]
        for key in keys:
            for value in (torch.tensor(1.0), torch.zeros(0), torch.zeros(3, 3)):
                with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
                    from_fairseq(save(original, change={key: value}))

    @pytest.mark.parametrize("modality", SOURCES)
    def test_a_missing_weight(self, modality):
        original = make(modality)
        saved = checkpoint(original)
        for key in original.state_dict():
            if ".decoder." in key or "alibi_scale" in key or (".blocks." in f".{key}" and "norm1" not in key):
                continue
            torch.save(saved | {"model": {k: v for k, v in saved["model"].items() if k != key}}, "checkpoint.pt")
            with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
                from_fairseq("checkpoint.pt")

    def test_a_small_file_that_demands_much_memory(self):
        huge = torch.zeros(1, 1, 1).expand(1, 10**8, 10**7)
        change = {"modality_encoders.IMAGE.fixed_positional_encoder.positions": huge}
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: .*positions has shape .* the file holds fewer numbers"):
            from_fairseq(save(make("image"), change=change))

        # An empty tensor with a large size: refused before a table of this size is allocated.
        change = {"modality_encoders.TEXT.local_encoder.embed_positions.weight": torch.zeros(10**5, 0)}
        with pytest.raises(
            ValueError, match=r"^checkpoint\.pt: weights: embeddings\.position_embeddings\.weight: found \[100000, 0\]"
        ):
            from_fairseq(save(make("text"), change=change))

    def test_a_name_that_asks_for_a_billion_layers(self):
        for name in ("blocks.999999999.norm1.weight", f"blocks.{'9' * 5000}.norm1.weight"):
            with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
                from_fairseq(save(make("image"), change={name: torch.ones(32)}))

    @pytest.mark.parametrize(
        "teacher",
        [[1], {"blocks.0.norm1.weight": 1}, {"x": torch.ones(1)}, {"blocks.0.norm1.weight": torch.ones(3)}, {1: torch.ones(3)}],
    )
    def test_unusable_teachers(self, teacher):
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
            from_fairseq(save(make("image"), change={"_ema": teacher}))

    @pytest.mark.parametrize(
        "changed, model",
        [
            *(({}, dict(num_heads=heads)) for heads in ("many", -1, 0.1, 7, [1])),
            *(({}, dict(norm_eps=eps)) for eps in ("much", [1])),
            *((dict(feature_encoder_spec=spec), {}) for spec in ("__import__('os')", [1], 7, "[(16, 10, 5)]")),
            ({}, dict(encoder_dropout="much")),
            (torch.ones(2), {}),
            (7, {}),
        ],
    )
    def test_unusable_settings(self, changed, model):
        original = make("audio")
        original.cfg["model"] |= model
        if isinstance(changed, dict):
            original.cfg["model"]["modalities"]["audio"] |= changed
        else:
            original.cfg["model"]["modalities"] = changed
        with pytest.raises(ValueError, match=r"^checkpoint\.pt: "):
            from_fairseq(save(original))
