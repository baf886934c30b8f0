"""Mutations of the model, of steps and of runs, each of which must fail a test (`make mutations`, half an hour)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTATIONS = {  # mistake: file, old text (occurs once), new text
    # From features to states
    "views before samples": (
        "encoders/base.py",
        "// (len(visible) // len(x)) * x.shape[1]",
        "% len(x) * x.shape[1]",
    ),
    "rows offset by the number of visible positions": (
        "encoders/base.py",
        "// (len(visible) // len(x)) * x.shape[1]",
        "// (len(visible) // len(x)) * visible.shape[1]",
    ),
    "positions by the index among the visible ones": (
        "encoders/base.py",
        "return gather(self.place(features, padding_mask), visible)",
        "return self.place(gather(features, visible), padding_mask)",
    ),
    "convolved positions see what is masked": (
        "encoders/waves.py",
        "features.repeat_interleave(views, 0).masked_fill(mask.flatten(0, 1).unsqueeze(-1), 0)",
        "features.repeat_interleave(views, 0)",
    ),
    "convolved positions see only what is masked": (
        "encoders/waves.py",
        ".masked_fill(mask.flatten(0, 1).unsqueeze(-1), 0)",
        ".masked_fill(~mask.flatten(0, 1).unsqueeze(-1), 0)",
    ),
    "no convolved positions for what is visible": (
        "encoders/waves.py",
        "return gather(self.place(features, padding_mask), visible)",
        "return gather(features, visible)",
    ),
    "convolved positions see padding": (
        "encoders/waves.py",
        "encoder.pos_conv_embed(features, *zeroed)",
        "encoder.pos_conv_embed(features)",
    ),
    "no dropout of the projection": (
        "encoders/waves.py",
        "features = self.model.feature_projection.dropout(features)  #",
        "features = features  #",
    ),
    "ALiBi on indices among the visible ones": (
        "predictors.py",
        "padding.gather(1, visible), visible=visible)",
        "padding.gather(1, visible))",
    ),
    "ALiBi knows no padding": (
        "encoders/waves.py",
        "encoder.alibi(x, visible, padding_mask)",
        "encoder.alibi(x, visible, None)",
    ),
    "scale of ALiBi below zero": ("nets/audio.py", ".clamp(min=0)", ""),
    "slopes of other heads": ("nets/audio.py", "head + 1, head - power + 0.5", "head + 0.5, head - power + 0.5"),
    "slopes beyond a power of two": ("nets/audio.py", "head - power + 0.5", "head + 1"),
    "one scale for all layers": (
        "nets/audio.py",
        "return biases if self.config.alibi_per_layer else biases[0]",
        "return biases[0]",
    ),
    "dropout before the norm of the context, speech": (
        "encoders/waves.py",
        "x = encoder.layer_norm(x)\n        each = attend if isinstance(attend, list) else [attend] * len(self.blocks)\n"
        "        return encoder.dropout(x), 0,",
        "x = encoder.layer_norm(encoder.dropout(x))\n"
        "        each = attend if isinstance(attend, list) else [attend] * len(self.blocks)\n"
        "        return x, 0,",
    ),
    "dropout before the norm of the context, images": (
        "encoders/patches.py",
        "x = embeddings.layernorm(x)\n        x = embeddings.dropout(x)",
        "x = embeddings.layernorm(embeddings.dropout(x))",
    ),
    "no norm of the context for CLS": (
        "encoders/patches.py",
        "x = embeddings.layernorm(x)",
        "x = torch.cat([x[:, :1], embeddings.layernorm(x[:, 1:])], dim=1)",
    ),
    "rows before columns in the positions": ("nets/vision.py", "for axis in (column, row)]", "for axis in (row, column)]"),
    "relative positions gathered for queries only": (
        "encoders/patches.py",
        "rows[:, :, None], rows[:, None, :]]",
        "rows[:, :, None], torch.arange(rows.shape[1])[None, None]]",
    ),
    "relative positions without the offset of CLS": ("encoders/patches.py", "F.pad(visible + extra,", "F.pad(visible,"),
    "padding of other positions": ("predictors.py", "padding.gather(1, visible)", "padding[:, : visible.shape[1]]"),
    "padding of other samples": (
        "predictors.py",
        "padding_mask.repeat_interleave(mask.shape[1], 0)",
        "padding_mask.repeat(mask.shape[1], 1)",
    ),
    # Decoder
    "decoder sees padding": ("predictors.py", "decoder(x, grid, padding, index)", "decoder(x, grid, None, index)"),
    "decoder zeroes padding once": ("decoders.py", "if padding is not None:", "if padding is not None and x.shape[1] > 16:"),
    "noise of another strength": ("decoders.py", "device=states.device) * self.noise", "device=states.device) * self.noise**2"),
    "noise of strength 1": ("decoders.py", "device=states.device) * self.noise", "device=states.device)"),
    "states in front, whatever is visible": (
        "decoders.py",
        "rows = visible + length",
        "rows = torch.arange(visible.shape[1], device=visible.device) + length",
    ),
    "states where something is masked": ("decoders.py", "rows = visible + length", "rows = length - 1 - visible + length"),
    "no dropout of the decoder's input": ("decoders.py", "self.dropout(states)", "states"),
    "another end is cut off": ("decoders.py", "slice(side) for side in grid", "slice(1, None) for side in grid"),
    "another eps in the decoder": ("decoders.py", "F.layer_norm(y, y.shape[-1:])", "F.layer_norm(y, y.shape[-1:], eps=1e-6)"),
    "no norm in the decoder": ("decoders.py", "F.gelu(F.layer_norm(y, y.shape[-1:]))", "F.gelu(y)"),
    "norm after GELU": ("decoders.py", "F.gelu(F.layer_norm(y, y.shape[-1:]))", "F.layer_norm(F.gelu(y), y.shape[-1:])"),
    "GELU by tanh": ("decoders.py", "y.shape[-1:])).movedim", "y.shape[-1:]), approximate='tanh').movedim"),
    "no residual": ("decoders.py", "x = x + y if self.residual and x.shape == y.shape else y", "x = y"),
    "always a residual": ("decoders.py", "if self.residual and x.shape", "if x.shape"),
    "a residual where the width changes": (
        "decoders.py",
        "x = x + y if self.residual and x.shape == y.shape else y",
        "x = (x if x.shape == y.shape else F.pad(x, [0, 0] * self.axes + [0, y.shape[1] - x.shape[1]])) + y "
        "if self.residual else y",
    ),
    "projection without GELU": (
        "decoders.py",
        "nn.Linear(sizes[-1], 2 * width), nn.GELU()]",
        "nn.Linear(sizes[-1], 2 * width), nn.Identity()]",
    ),
    "a projection without zeros at the start": (
        "decoders.py",
        "if zero_init:\n            _zero_init(self.projection[-1])",
        "if zero_init:\n            pass",
    ),
    # Teacher and targets
    "the teacher drops": ("ema.py", "return super().train(False)", "return super().train(mode)"),
    "the teacher's text has the student's dropout": (
        "model.py",
        'self.shares_features = ema.scope != "all" and encoder.masks_features',
        'self.shares_features = ema.scope != "all"',
    ),
    "the teacher never shares features": (
        "model.py",
        'self.shares_features = ema.scope != "all" and encoder.masks_features',
        "self.shares_features = False",
    ),
    "the teacher sees what the first view sees": (
        "model.py",
        "features.detach() if self.shares_features and target is None",
        "features.detach() * ~mask[:, 0, :, None] if self.shares_features and target is None",
    ),
    "the teacher copies its blocks": (
        "encoders/base.py",
        '"layers": self.local + self.positional}',
        '"layers": ("enc", "emb")}',
    ),
    "the teacher averages features": ("encoders/base.py", '"encoder": self.local,', '"encoder": (),'),
    "the teacher averages positions": ("encoders/base.py", '"layers": self.local + self.positional}', '"layers": self.local}'),
    "targets normalised over other axes": (
        "model.py",
        "            **self.loss_settings,",
        '            **self.loss_settings | dict(norm="layer"),',
    ),
    "no norm of the average": (
        "model.py",
        "            **self.loss_settings,",
        '            **self.loss_settings | dict(target_norm="none"),',
    ),
    "padding in the statistics of targets": ("model.py", "padding_mask=padding_mask,\n            reduction", "reduction"),
    "targets normalised after selection": (
        "model.py",
        "            layers,\n            mask,",
        "            [x * mask.any(1)[..., None] if self.sparse else x for x in layers],\n            mask,",
    ),
    "targets in fp32": (
        "ops/reference.py",
        "upcast = upcast or torch.promote_types(predictions.dtype, torch.float32)",
        "upcast = torch.float32",
    ),
    "targets of other samples": (
        "ops/reference.py",
        "position = index // math.prod(mask.shape[1:]) * length + index % length",
        "position = index // length % len(mask) * length + index % length",
    ),
    "targets of other positions": (
        "ops/reference.py",
        "position = index // math.prod(mask.shape[1:]) * length + index % length",
        "position = index // math.prod(mask.shape[1:]) * length + (index + 1) % length",
    ),
    "padding scored": ("ops/reference.py", "keep.flatten()[position]", "torch.ones_like(keep.flatten()[position])"),
    "loss of the sum of views": (
        "model.py",
        "            **self.loss_settings,",
        '            **self.loss_settings | dict(scale=self.loss_settings["scale"] * mask.shape[1]),',
    ),
    "the teacher sees the source in place of a target": ("model.py", "source if target is None else target,", "source,"),
    "channel masks of other samples": ("model.py", "channel_mask.unsqueeze(1)", "channel_mask.flip(0).unsqueeze(1)"),
    "a grid of the inputs' last side": ("model.py", "else (mask.shape[-1],)", "else (grid,)"),
    "the teacher copies CLS with the patches": (
        "encoders/patches.py",
        'self.local, self.positional = ("embeddings.patch_embeddings",), ("embeddings",)',
        "pass",
    ),
    # CLS
    "CLS learns from a patch": (
        "model.py",
        "self._cls_loss(predicted.extra, *mean)",
        "self._cls_loss(predicted.states.view(len(predicted.extra), -1, 32), *mean)",
    ),
    "CLS learns other samples": (
        "model.py",
        "mean.repeat_interleave(len(extra) // len(mean), 0)",
        "mean.repeat(len(extra) // len(mean), 1)",
    ),
    "CLS learns padding": (
        "ops/reference.py",
        "targets.masked_fill(padding, 0).sum(1) / (~padding).sum(1).clamp(min=1)",
        "targets.masked_fill(padding, 0).sum(1) / targets.shape[1]",
    ),
    "no weight of CLS": ("model.py", "return self.cls_weight * getattr", "return getattr"),
    "another reduction of CLS": ("model.py", "getattr(values, self.cls_reduction)()", "values.mean()"),
    "another error of CLS": ("model.py", 'errors(error, self.loss_settings["beta"])', "errors(error, 0)"),
    "no scale of CLS": ("model.py", '.sum(1) * self.loss_settings["scale"]', ".sum(1)"),
    "CLS is not weighted by a micro-batch": ("model.py", "cls_loss = cls_loss * len(index)", "pass"),
    "CLS is left out of the loss": ("model.py", "loss = loss + cls_loss", "pass"),
    "CLS of an encoder without": ("model.py", "if loss.cls_weight and not encoder.extra_tokens:", "if False:"),
    "a mask vector that gets no gradient": ("model.py", "encoder.mask_token.requires_grad_(False)", "pass"),
    "encoders whose positions are inside": (
        "encoders/base.py",
        "return self.halves is not None or self._places",
        "return True",
    ),
    "masks of another length": ("model.py", "if (len(mask), mask.shape[-1]) != features.shape[:2]:", "if False:"),
    # Masks and data
    "p + a in the count": (
        "masking.py",
        "masked = size - int(size * (1 - self.prob))",
        "masked = size - int(size * self._share)",
    ),
    "1 - p instead of the published order": (
        "masking.py",
        "masked = size - int(size * (1 - self.prob))",
        "masked = int(size * self.prob)",
    ),
    "nothing inverted": ("masking.py", "return valid & ~chosen if self.inverse else chosen", "return chosen"),
    "seeds in another order": (
        "masking.py",
        "sizes * (self._share / volume)",
        "sizes * self._share / volume",
    ),
    "too many blocks": ("masking.py", "self._share / volume", "self._share / self.length"),
    "blocks to the other side": (
        "masking.py",
        "np.arange(self.length) - self.length // 2",
        "np.arange(self.length) - (self.length - 1) // 2",
    ),
    "padding masked": (
        "masking.py",
        "valid = np.arange(total) < sizes[:, None]\n",
        "valid = np.arange(total) < sizes[:, None] + total\n",
    ),
    "random masks rounded": ("masking.py", "np.floor(sizes * (1 - self.prob))", "np.round(sizes * (1 - self.prob))"),
    "views all the same": ("masking.py", "_splitmix(~key[:, None] + later)", "key[:, None] + 0 * later"),
    "views of any sample the same": ("masking.py", "_splitmix(~key[:, None] + later)", "0 * key[:, None] + _splitmix(later)"),
    "another first view": ("masking.py", "[key[:, None], _splitmix(", "[key[:, None] + np.uint64(self.views), _splitmix("),
    "views of other samples": ("masking.py", "axis=1).ravel()", "axis=1).T.ravel()"),
    "no epoch": ("masking.py", "for part in (self.seed, self.epoch):", "for part in (self.seed,):"),
    "visible backwards": ("masking.py", "[:, : counts.max()]\n", "[:, : counts.max()][:, ::-1]\n"),
    "visible one short": ("masking.py", "[:, : counts.max()]\n", "[:, : counts.max() - 1]\n"),
    "visible as in the first row": ("masking.py", "[:, : counts.max()]\n", "[:, : counts[0]]\n"),
    "padding is visible": ("masking.py", "np.where(padding, 1, 2 * mask", "np.where(padding, 0, 2 * mask"),
    "masks before crops": (
        "data/audio.py",
        "frames = np.array([self.frames(int(n)) for n in lengths])",
        "frames = np.array([self.frames(len(wave)) for wave in samples])",
    ),
    "lengths of other samples": ("data/__init__.py", "np.repeat(each, self.views)", "np.tile(each, self.views)"),
    "text masked where views leave out": (
        "data/text.py",
        "source = target if self.views else",
        "source = np.where(mask[:, 0], self.vocabulary.mask_id, target) if self.views else",
    ),
    "no padding for what is visible": ("data/__init__.py", 'arrays["mask"], arrays.get("padding_mask")', 'arrays["mask"]'),
    # On a GPU
    "no gradient after a replay": ("graphs.py", "            parameter.grad = grad\n", "            pass\n"),
    "inputs of the recording again": (
        "graphs.py",
        "found.inputs[name].copy_(x, non_blocking=True)",
        "found.inputs[name]",
    ),
    "one graph for all settings": ("graphs.py", "key = (settings, *(", "key = ((), *("),
    "groups forgotten": ("ops/conv.py", "weight, self.bias, self.groups)", "weight, self.bias, 1)"),
    "a convolution with strides for one without": ("ops/conv.py", "set(each.stride) == ", ""),
    "channels last without the stride": ("ops/conv.py", "self.bias, (1, *self.stride), *along)", "self.bias, 1, *along)"),
    # Steps, runs and what a step reads
    "Adam's betas ignored": (
        "train/optim.py",
        "torch.optim.AdamW(described, betas=betas,",
        "torch.optim.AdamW(described,",
    ),
    "weight decay on vectors": ("train/optim.py", "0.0 if vector and not config.decay_1d else", "0.0 if False else"),
    "warmup starts at the initial rate": (
        "train/optim.py",
        "(1 - config.initial) * (step + 1) / (warmup + 1)",
        "(1 - config.initial) * step / warmup",
    ),
    "the schedule ignores lr_scale": (
        "train/optim.py",
        '"initial_lr": config.lr * s}',
        '"initial_lr": config.lr}',
    ),
    "EMA before the optimizer": (
        "train/step.py",
        "        state.optimizer.step()\n        if not state.accelerator.optimizer_step_was_skipped:\n"
        "            state.core.update_teacher(pairs=state.pairs)\n",
        "        state.core.update_teacher(pairs=state.pairs)\n        state.optimizer.step()\n",
    ),
    "a skipped step updates the teacher": (
        "train/step.py",
        "        state.skipped.add(state.done + 1,",
        "        state.core.update_teacher()\n        state.skipped.add(state.done + 1,",
    ),
    "a step skipped late moves the weights": ("train/step.py", "skip = 1 - finite.float()", "skip = 0 * finite.float()"),
    "a step skipped late counts for the teacher": ("train/step.py", "            self.core.teacher.step -= 1\n", ""),
    "a checkpoint does not know its last step": ("train/save.py", "        part.state.settle()\n", "        pass\n"),
    "the limit is noticed a step late": ("train/guards.py", "len(self.suspects) + 1 >= self.limit", "False"),
    "the teacher ignores the flag": ("ema.py", "torch.where(skip != 0, y, y.lerp", "torch.where(skip != skip, y, y.lerp"),
    "gradients are summed over micro-batches": ("train/step.py", "share = output.loss / parts", "share = output.loss"),
    "targets of one micro-batch": (
        "train/step.py",
        'sum(len(batch["index"]) for batch in micro_batches)',
        'len(micro_batches[-1]["index"])',
    ),
    "loss of the last micro-batch": ("train/step.py", "loss += share", "loss = share"),
    "gradients of the previous step": ("train/step.py", "    state.optimizer.zero_grad(set_to_none=True)\n", ""),
    "no clipping": ("train/step.py", "if state.clip_norm:", "if False:"),
    "skipped steps in a row counted over the run": ("train/step.py", "        state.skipped.forget()\n", ""),
    "schedule waits during skipped steps": (
        "train/step.py",
        "    state.scheduler.step()\n",
        "    if finite:\n        state.scheduler.step()\n",
    ),
    "an infinite loss with a finite gradient is a step": (
        "train/step.py",
        "torch.isfinite(grad_norm) & torch.isfinite(loss)",
        "torch.isfinite(grad_norm)",
    ),
    "schedule one step late after a resume": ("train/build.py", "last_epoch=done - 1", "last_epoch=done - 2 if done else -1"),
    "epochs without accumulation": (
        "train/build.py",
        "/ accelerator.num_processes / train.accumulate",
        "/ accelerator.num_processes",
    ),
    "a resumed run starts its order anew": (
        "train/build.py",
        "make_order(config, data, accelerator, trained_batches(saved, accelerator))",
        "make_order(config, data, accelerator, 0)",
    ),
    "the window of the log is not restored": ("train/build.py", '        self.window.load_state_dict(state["window"])\n', ""),
    "order advanced by one batch a step": (
        "train/feed.py",
        "self.trained, self.trained_position = self.taken,",
        "self.trained, self.trained_position = self.trained + 1,",
    ),
    "batches without masked positions are trained on": (
        "train/feed.py",
        "            if not empty:\n",
        "            if True:\n",
    ),
    "one skipped step more is tolerated": (
        "train/guards.py",
        "if len(self.suspects) < self.limit:",
        "if len(self.suspects) <= self.limit:",
    ),
    "a broken sample is reported in every epoch": ("train/guards.py", "if index not in self.seen:", "if True:"),
    "skipped steps forgotten by a resume": ("train/guards.py", 'int(state["skipped"])', "0"),
    "random numbers start anew after a resume": ("train/save.py", '    torch.set_rng_state(tensors["cpu"])\n', ""),
    "the teacher is exported": (
        "train/save.py",
        "student, target = run.state.core.student, run.folder.path / EXPORT",
        "student, target = run.state.core.teacher.module, run.folder.path / EXPORT",
    ),
    "samples of the last micro-batch in the log": (
        "train/log.py",
        'sum(len(batch["samples"]) for batch in batches)',
        'len(batches[-1]["samples"])',
    ),
    "checkpoints of every step": (
        "train/loop.py",
        "state.done // train.save_every > run.saved // train.save_every",
        "state.done > run.saved",
    ),
    "precision ignored": (
        "train/parallel.py",
        '{"fp32": "no"}.get(train.precision, train.precision)',
        '"no"',
    ),
    "crops by the nearest pixel": ("data/vision.py", "BICUBIC", "NEAREST"),
    "audio cropped at its start": (
        "data/audio.py",
        "start = rng.integers(0, max(0, len(wave) - self.max_samples) + 1)",
        "start = 0",
    ),
    "no dropout of the embeddings": ("encoders/patches.py", "x = embeddings.dropout(x)", "pass"),
    "the teacher sees the student's padding": (
        "model.py",
        "padding_mask if target_padding_mask is None else target_padding_mask",
        "padding_mask",
    ),
}


def files_for(file):
    """The tests among which one must fail: those of the mutated file, or else those of the model."""
    if file.startswith("train/"):
        return ["tests/test_training.py", "tests/test_late.py", "tests/test_resume.py"]
    if file.startswith("data/"):
        return ["tests/test_views.py", "tests/test_data.py"]
    own = {
        "ema.py": ["tests/test_ema.py", "tests/test_model_2.py"],
        "model.py": ["tests/test_model_2.py", "tests/test_model.py"],
        "ops/reference.py": ["tests/test_loss.py", "tests/test_model_2.py"],
        "masking.py": ["tests/test_views.py", "tests/test_masking.py"],
        "graphs.py": ["tests/test_graphs.py"],
        "ops/conv.py": ["tests/test_conv.py"],
        "nets/audio.py": ["tests/test_model_2.py", "tests/test_nets.py"],
    }
    return own.get(file, ["tests/test_model_2.py"])


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_text_occurs_once(name):
    file, old, new = MUTATIONS[name]
    assert (ROOT / "d2v_fast" / file).read_text().count(old) == 1 and new != old


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_detected(name, tmp_path):
    for folder in ("d2v_fast", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, old, new = MUTATIONS[name]
    code = tmp_path / "d2v_fast" / file
    code.write_text(code.read_text().replace(old, new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *files_for(file)]
    found = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=600
    )
    # 1: a test failed; other codes mean that the mutated code could not run.
    assert found.returncode == 1, found.stdout[-2000:] + found.stderr[-2000:]
