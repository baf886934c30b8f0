"""Data2Vec in a loop of plain PyTorch; trainer_loop.py and lightning_loop.py train the same model on the same batches.

python examples/plain_loop.py
"""

import torch
from torch.utils.data import DataLoader
from transformers import RobertaConfig, RobertaModel

from d2v_fast import Data2Vec, EMAConfig, TargetsConfig, wrap

LENGTH, VOCABULARY, MASK, FIRST = 32, 64, 3, 4  # words start at id FIRST
BATCH, LR = 16, 1e-3
TARGETS, EMA = TargetsConfig(top_k=3), EMAConfig(start=0.99, end=0.999, anneal_steps=100)


def make_encoder():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH + 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return wrap(RobertaModel(config, add_pooling_layer=False))


def make_model():
    return Data2Vec(make_encoder(), targets=TARGETS, ema=EMA)


def make_samples(count):
    """Sentences that count in steps of 1 to 5, a third of the words masked; keys are the arguments of Data2Vec."""
    words = torch.randint(60, (count, 1)) + torch.arange(LENGTH) * torch.randint(1, 6, (count, 1))
    target = FIRST + words % (VOCABULARY - FIRST)
    mask = torch.rand(count, LENGTH) < 1 / 3
    rows = zip(target.masked_fill(mask, MASK), mask, target, strict=True)
    return [dict(zip(("source", "mask", "target"), row, strict=True)) for row in rows]


def main(steps=100):
    model = make_model().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(DataLoader(make_samples(steps * BATCH), BATCH)):
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher()
        losses.append(output.loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}   loss {losses[-1]:.4f}   target std {output.stats.target.std:.3f}")
    return losses


if __name__ == "__main__":
    main()
