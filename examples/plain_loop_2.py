"""data2vec 2.0 in a loop of plain PyTorch: several masked views per sentence, of which only the visible words are encoded.

python examples/plain_loop_2.py
"""

import plain_loop
import torch
from plain_loop import BATCH, EMA, LENGTH, LR, TARGETS, make_encoder
from torch.utils.data import DataLoader

from d2v_fast import ConvDecoder, Data2Vec

VIEWS, MASKED = 4, 16  # views per sentence, masked words per view


def make_model():
    encoder = make_encoder()
    decoder = ConvDecoder(encoder.hidden_size, width=64, kernel=5, layers=3, groups=1)
    return Data2Vec(encoder, decoder, targets=TARGETS, ema=EMA)


def make_samples(count):
    """The sentences of plain_loop.py, unmasked because masked words are not encoded, with VIEWS masks each."""
    masks = torch.rand(count, VIEWS, LENGTH).argsort(-1) < MASKED  # the same number in every view
    return [dict(source=s["target"], mask=mask) for s, mask in zip(plain_loop.make_samples(count), masks, strict=True)]


def main(steps=100):
    model = make_model().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    history = []
    for step, batch in enumerate(DataLoader(make_samples(steps * BATCH), BATCH)):
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher()
        history.append((output.loss.item(), output.stats.target.std.item()))
        if step % 20 == 0 or step == steps - 1:
            print("step {:3d}   loss {:.4f}   target std {:.3f}".format(step, *history[-1]))
    return history


if __name__ == "__main__":
    main()
