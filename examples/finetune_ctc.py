"""Fine-tune for speech recognition with CTC, from an exported run and from scratch: made-up words, letter by letter.

d2v-train --config audio/tiny train.output=run && d2v-export run --to encoder && python examples/finetune_ctc.py encoder
"""

import sys
from itertools import groupby

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, Trainer, TrainingArguments, set_seed

import d2v_fast.nets  # noqa: F401  registers the models of data2vec 2.0
from d2v_fast.data.builtin import WORDS, builtin_speech

LETTERS = ["", *sorted(set("".join(WORDS)))]  # 0 is the blank


def make_samples(split, count):
    source = builtin_speech(split)
    return [{"wave": source.read(i), "labels": [LETTERS.index(x) for x in source.labels[i]]} for i in range(count)]


def spelled(prediction):
    """Share of words without errors, with best-path decoding. The batch size is 1, because padding would add letters."""
    words = [[letter for letter, _ in groupby(row) if letter > 0] for row in prediction.predictions.argmax(-1)]
    return {"spelled": sum(word == list(labels) for word, labels in zip(words, prediction.label_ids, strict=True)) / len(words)}


def main(encoder, count=200, epochs=20):
    extractor = AutoFeatureExtractor.from_pretrained(encoder)

    def collate(samples):
        batch = extractor([sample["wave"] for sample in samples], sampling_rate=16_000, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([sample["labels"] for sample in samples])}  # all words have four letters

    train, test = make_samples("train", count), make_samples("test", 250)
    settings = dict(vocab_size=len(LETTERS), pad_token_id=0, ctc_loss_reduction="mean")
    config = AutoConfig.from_pretrained(encoder, mask_time_prob=0.0, **settings)
    arguments = TrainingArguments(
        "runs/finetune", num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=1e-3, warmup_steps=0.1,
        per_device_eval_batch_size=1, remove_unused_columns=False, save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    found = {}
    for start in ("scratch", "pretrained"):
        set_seed(0)
        if start == "scratch":
            model = AutoModelForCTC.from_config(config)
        else:
            model = AutoModelForCTC.from_pretrained(encoder, config=config)
            model.freeze_feature_encoder()  # the convolutions; common practice with few labels
        trainer = Trainer(model, arguments, collate, train, test, compute_metrics=spelled)
        trainer.train()
        found[start] = trainer.evaluate()["eval_spelled"]
    print(f"words without errors from scratch {found['scratch']:.1%}, from {encoder} {found['pretrained']:.1%}")
    return found


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
