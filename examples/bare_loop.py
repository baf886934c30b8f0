"""The loss in a bare training loop: T×B×C tensors and layer results in fairseq's layout, with padding.

python examples/bare_loop.py
"""

import torch
from torch import nn

from d2v_fast import Data2VecLoss, EMATeacher

T, B, C, K = 48, 8, 64, 3  # frames, sequences, channels, teacher layers that form the target


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask_embedding = nn.Parameter(0.1 * torch.randn(C))
        self.positions = nn.Parameter(torch.randn(T, 1, C))
        block = nn.TransformerEncoderLayer(C, nhead=4, dim_feedforward=2 * C, dropout=0.0, activation="gelu")
        self.blocks = nn.TransformerEncoder(block, num_layers=4, enable_nested_tensor=False)

    def forward(self, x, padding_mask, mask=None):  # x is (T, B, C), the masks are (B, T)
        if mask is not None:
            x = torch.where(mask.T.unsqueeze(-1), self.mask_embedding, x)
        return self.blocks(x + self.positions, src_key_padding_mask=padding_mask)


def make_batch(projection):
    """Slow tones projected to C channels, between T/2 and T frames long, with spans of three frames masked."""
    angle = torch.arange(T).unsqueeze(1) * (0.1 + 0.2 * torch.rand(B)) + 6.28 * torch.rand(B)
    x = torch.stack([angle.sin(), angle.cos()], -1) @ projection
    padding_mask = torch.arange(T) >= torch.randint(T // 2, T + 1, (B, 1))
    starts = torch.rand(B, T) < 0.15
    mask = torch.stack([starts.roll(i, 1) for i in range(3)]).any(0) & ~padding_mask
    return x, padding_mask, mask


def keep(module, args, output):
    module.result = output


def main(steps=150):
    torch.manual_seed(0)
    student, head, projection = Encoder(), nn.Linear(C, C), torch.randn(2, C)
    teacher = EMATeacher(student, start=0.99, end=0.999, anneal_steps=steps)
    taps = [block.linear2 for block in teacher.module.blocks.layers[-K:]]  # the FFN before dropout and residual
    for tap in taps:
        tap.register_forward_hook(keep)
    criterion = Data2VecLoss(norm="instance", layout="TBC", return_stats=True)
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=1e-3)
    history = []
    for step in range(steps):
        x, padding_mask, mask = make_batch(projection)
        with torch.no_grad():
            teacher(x, padding_mask)
        states = student(x, padding_mask, mask)
        # Rows are ordered like the (B, T) mask, batch first. states[mask.T] has the same shape but the wrong order.
        predictions = head(states.transpose(0, 1)[mask])
        loss, stats = criterion(predictions, [tap.result for tap in taps], mask, padding_mask)
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
