"""The loss in place of I-JEPA's: a predictor sees context patches and predicts the EMA encoder's output in target blocks.

python examples/ijepa.py
"""

import torch
from torch import nn

from d2v_fast import Data2VecLoss, EMATeacher

B, GRID, PATCH, C, BLOCKS = 16, 8, 4, 64, 4
T = GRID**2


def transformer(layers):
    block = nn.TransformerEncoderLayer(C, nhead=4, dim_feedforward=2 * C, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(block, layers, enable_nested_tensor=False)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(PATCH**2, C), transformer(3)
        self.positions = nn.Parameter(0.2 * torch.randn(T, C))

    def forward(self, patches, visible=slice(None)):
        return self.blocks((self.embed(patches) + self.positions)[:, visible])


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.out = transformer(2), nn.Linear(C, C)
        self.positions = nn.Parameter(0.2 * torch.randn(T, C))

    def forward(self, context, visible, block):
        queries = self.positions[block].expand(len(context), -1, -1)
        states = self.blocks(torch.cat([context + self.positions[visible], queries], 1))
        return self.out(states[:, context.shape[1] :])


def make_batch():
    """Random gratings, (B, T, pixels), and blocks of 3×3 patches shared by the batch, (BLOCKS, T) bool."""
    y, x = torch.meshgrid(torch.arange(GRID * PATCH), torch.arange(GRID * PATCH), indexing="ij")
    wave, phase = 0.1 * torch.randn(2, B, 1, 1), 6.28 * torch.rand(B, 1, 1)
    images = (wave[0] * x + wave[1] * y + phase).sin()
    blocks = torch.zeros(BLOCKS, GRID, GRID, dtype=torch.bool)
    for block, (top, left) in zip(blocks, torch.randint(GRID - 2, (BLOCKS, 2)).tolist(), strict=True):
        block[top : top + 3, left : left + 3] = True
    return images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2), blocks.flatten(1)


def main(steps=150):
    torch.manual_seed(0)
    student, predictor = Encoder(), Predictor()
    teacher = EMATeacher(student, start=0.996, end=1.0, anneal_steps=steps)
    # I-JEPA: F.smooth_l1_loss(predictions, F.layer_norm(h, (C,))[targets]), a mean over positions and channels. Hence 1/C,
    # where data2vec divides the sum over channels by √C.
    criterion = Data2VecLoss(norm="none", target_norm="layer", beta=1.0, scale=1 / C, return_stats=True)
    optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=2e-3)
    history = []
    for step in range(steps):
        patches, blocks = make_batch()
        with torch.no_grad():
            h = teacher(patches)
        visible = ~blocks.any(0)
        context = student(patches, visible)
        loss = 0
        for block in blocks:  # one call per block: blocks overlap, and each predicts the shared patches separately
            predictions = predictor(context, visible, block).flatten(0, 1)
            block_loss, stats = criterion(predictions, [h], block.expand(B, T))
            loss = loss + block_loss / BLOCKS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        history.append((loss.item(), stats.target.std.item()))
        if step % 30 == 0 or step == steps - 1:
            print("step {:3d}   loss {:.3f}   target std {:.3f}".format(step, *history[-1]))
    return history


if __name__ == "__main__":
    main()
