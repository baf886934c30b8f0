"""Fine-tune for text classification, from an exported run and from scratch: are the words of a sentence shuffled?

d2v-train --config text/tiny train.output=run && d2v-export run --to encoder && python examples/finetune_text.py encoder
"""

import sys

import numpy as np
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from d2v_fast.data.builtin import builtin_text


def make_samples(tokenizer, split, count):
    """Sentences of 6 to 16 words; every other one is shuffled."""
    rng = np.random.default_rng(0)
    sentences = [s.split() for paragraph in builtin_text(split) for s in paragraph.split(". ")]
    sentences = [words for words in sentences if 6 <= len(words) <= 16]
    samples = []
    for i, at in enumerate(rng.permutation(len(sentences))[:count]):
        words = rng.permutation(sentences[at]) if i % 2 else sentences[at]
        samples.append({**tokenizer(" ".join(words), truncation=True), "label": i % 2})
    return samples


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main(encoder, count=2000, epochs=8):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    train, test = make_samples(tokenizer, "train", count), make_samples(tokenizer, "test", 500)
    config = AutoConfig.from_pretrained(encoder, num_labels=2)
    arguments = TrainingArguments(
        "runs/finetune", num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1,
        save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    found = {}
    for start in ("scratch", "pretrained"):
        set_seed(0)
        if start == "scratch":
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(encoder, config=config)
        data = dict(train_dataset=train, eval_dataset=test, processing_class=tokenizer)  # the tokenizer pads batches
        trainer = Trainer(model, arguments, compute_metrics=accuracy, **data)
        trainer.train()
        found[start] = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy from scratch {found['scratch']:.1%}, from {encoder} {found['pretrained']:.1%}")
    return found


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
