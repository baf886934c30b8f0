"""Data2Vec with Lightning.

pip install lightning && python examples/lightning_loop.py
"""

import lightning
import torch
from plain_loop import BATCH, LR, make_model, make_samples
from torch.utils.data import DataLoader


class LightningData2Vec(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()
        self.losses = []

    def training_step(self, batch, index):
        output = self.model(**batch)
        self.log_dict({"loss": output.loss, "target_std": output.stats.target.std}, prog_bar=True)
        self.losses.append(output.loss.item())
        return output.loss

    def optimizer_step(self, *args, **kwargs):  # called once per step, not per micro-batch
        super().optimizer_step(*args, **kwargs)
        self.model.update_teacher()

    def configure_optimizers(self):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)


def main(steps=100):
    module = LightningData2Vec()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(make_samples(steps * BATCH), BATCH))
    return module.losses


if __name__ == "__main__":
    main()
