"""The loss inside a Hugging Face Trainer: a RoBERTa from scratch on masked token ids, with gradient accumulation.

python examples/hf_trainer.py
"""

import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel, Trainer, TrainerCallback, TrainingArguments

from d2v_fast import Data2VecLoss, EMATeacher

LENGTH, C, K = 32, 64, 3
PAD, MASK, FIRST, VOCABULARY = 1, 3, 4, 64  # token ids; words start at FIRST


def keep(module, args, output):
    module.result = output


class Data2VecText(nn.Module):
    accepts_loss_kwargs = True  # makes Trainer pass num_items_in_batch, counted over the whole step

    def __init__(self, config):
        super().__init__()
        self.student = RobertaModel(config, add_pooling_layer=False)
        self.head = nn.Linear(C, C)
        self.teacher = EMATeacher(self.student, start=0.99, end=0.999, anneal_steps=100)  # a submodule: checkpoints contain it
        for block in self.teacher.module.encoder.layer[-K:]:
            block.output.dense.register_forward_hook(keep)  # the FFN before dropout and residual

    def forward(self, input_ids, attention_mask, labels):
        mask = labels != -100
        with torch.no_grad():
            self.teacher(torch.where(mask, labels, input_ids), attention_mask)
        states = self.student(input_ids, attention_mask).last_hidden_state
        return self.head(states[mask]), [block.output.dense.result for block in self.teacher.module.encoder.layer[-K:]]


class Data2VecTrainer(Trainer):
    criterion = Data2VecLoss(norm="layer", reduction="sum", return_stats=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predictions, layers = model(**inputs)
        total, stats = self.criterion(predictions, layers, inputs["labels"] != -100, inputs["attention_mask"] == 0)
        # num_items_in_batch counts labels ≠ -100, the scored positions, over all micro-batches of the step and all ranks.
        # Trainer then does not divide by the accumulation steps, but DDP still divides by the number of ranks. A mean here
        # would weight micro-batches equally, regardless of the number of masked positions.
        loss = total / num_items_in_batch * self.accelerator.num_processes
        self.target_std = stats.target.std
        return (loss, (loss, predictions)) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "target_std": self.target_std.item()}, *args, **kwargs)


class FollowStudent(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if not optimizer.step_was_skipped:  # fp16 skips steps after an overflow
            model.teacher.update(model.student)


def make_samples(count):
    """Sentences of varying length that count in steps of 1 to 5, with a third of the words masked."""
    place = torch.arange(LENGTH)
    ids = FIRST + (torch.randint(60, (count, 1)) + place * torch.randint(1, 6, (count, 1))) % (VOCABULARY - FIRST)
    words = place < torch.randint(LENGTH // 4, LENGTH + 1, (count, 1))
    mask = (torch.rand(count, LENGTH) < 1 / 3) & words
    seen = torch.where(words, ids, PAD).masked_fill(mask, MASK)
    rows = zip(seen, words.long(), ids.masked_fill(~mask, -100), strict=True)
    return [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in rows]


def main(steps=100, micro_batch=8, accumulation=2):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=C, intermediate_size=2 * C, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH + 2, pad_token_id=PAD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    arguments = TrainingArguments(
        "runs/hf_trainer", max_steps=steps, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
        learning_rate=1e-3, logging_steps=20, logging_first_step=True, disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Data2VecTrainer(Data2VecText(config), arguments, train_dataset=make_samples(1024), callbacks=[FollowStudent()])
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
