"""Data2Vec with Hugging Face Trainer; a callback updates the teacher.

python examples/trainer_loop.py
"""

from plain_loop import BATCH, LR, make_model, make_samples
from transformers import Trainer, TrainerCallback, TrainingArguments


class Data2VecTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        return (output.loss, (output.loss, output.features)) if return_outputs else output.loss


class MoveTeacher(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if not optimizer.step_was_skipped:  # fp16 skips steps after an overflow
            model.update_teacher()


def main(steps=100):
    model = make_model()
    arguments = TrainingArguments(
        "runs/trainer_loop", max_steps=steps, per_device_train_batch_size=BATCH, train_sampling_strategy="sequential",
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    trainer = Data2VecTrainer(model, arguments, train_dataset=make_samples(steps * BATCH), callbacks=[MoveTeacher()])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
