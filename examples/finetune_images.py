"""Fine-tune for image classification, from an exported run and from scratch: ten shapes, few labels.

d2v-train --config vision/tiny train.output=run && d2v-export run --to encoder && python examples/finetune_images.py encoder
"""

import sys

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import d2v_fast.nets  # noqa: F401  registers the models of data2vec 2.0
from d2v_fast.data.builtin import SHAPES, builtin_images


def make_samples(processor, split, count):
    source = builtin_images(split)
    pixels = processor([source.read(i) for i in range(count)], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": image, "labels": SHAPES.index(label)} for image, label in zip(pixels, source.labels, strict=False)]


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main(encoder, count=1000, epochs=15):
    processor = AutoImageProcessor.from_pretrained(encoder)
    train, test = make_samples(processor, "train", count), make_samples(processor, "test", 500)
    config = AutoConfig.from_pretrained(encoder, num_labels=len(SHAPES))
    arguments = TrainingArguments(
        "runs/finetune", num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1,
        save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    found = {}
    for start in ("scratch", "pretrained"):
        set_seed(0)
        if start == "scratch":
            model = AutoModelForImageClassification.from_config(config)
        else:
            model = AutoModelForImageClassification.from_pretrained(encoder, config=config)
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
        trainer.train()
        found[start] = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy from scratch {found['scratch']:.1%}, from {encoder} {found['pretrained']:.1%}")
    return found


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
