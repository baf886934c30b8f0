"""Fine-tune for audio classification, from an exported run and from scratch: ten spoken words, few labels.

d2v-train --config audio/tiny train.output=run && d2v-export run --to encoder && python examples/finetune_speech.py encoder
"""

import sys

import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import d2v_fast.nets  # noqa: F401  registers the models of data2vec 2.0
from d2v_fast.data.builtin import WORDS, builtin_speech


def make_samples(split, count):
    source = builtin_speech(split)
    return [{"wave": source.read(i), "label": WORDS.index(source.labels[i])} for i in range(count)]


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main(encoder, count=200, epochs=15):
    extractor = AutoFeatureExtractor.from_pretrained(encoder)

    def collate(samples):
        batch = extractor([sample["wave"] for sample in samples], sampling_rate=16_000, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([sample["label"] for sample in samples])}

    train, test = make_samples("train", count), make_samples("test", 250)
    config = AutoConfig.from_pretrained(encoder, num_labels=len(WORDS), mask_time_prob=0.0)
    arguments = TrainingArguments(
        "runs/finetune", num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=5e-4, warmup_steps=0.1,
        remove_unused_columns=False, save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    found = {}
    for start in ("scratch", "pretrained"):
        set_seed(0)
        if start == "scratch":
            model = AutoModelForAudioClassification.from_config(config)
        else:
            model = AutoModelForAudioClassification.from_pretrained(encoder, config=config)
        trainer = Trainer(model, arguments, collate, train, test, compute_metrics=accuracy)
        trainer.train()
        found[start] = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy from scratch {found['scratch']:.1%}, from {encoder} {found['pretrained']:.1%}")
    return found


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
