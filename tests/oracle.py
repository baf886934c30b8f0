"""An independent transcription of the data2vec formulas from the specification: numpy float64, plain loops."""

import numpy as np

EPS = 1e-5


def norm_vector(x):
    """(x - mean) / sqrt(biased variance + eps) of a flat list of numbers."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return [(value - mean) / np.sqrt(variance + EPS) for value in x]


def normalized(x, kind, padding=None):
    """x (B, T, C) float64; padding (B, T) bool."""
    batch, length, channels = x.shape
    keep = np.ones((batch, length), bool) if padding is None else ~padding
    y = np.zeros_like(x)
    if kind == "none":
        return x.copy()
    if kind == "layer":
        for b in range(batch):
            for t in range(length):
                y[b, t] = norm_vector(x[b, t])
    elif kind == "instance":
        for b in range(batch):
            for c in range(channels):
                y[b, keep[b], c] = norm_vector(x[b, keep[b], c])
    elif kind == "batch":
        for c in range(channels):
            y[keep, c] = norm_vector(x[keep, c])
    elif kind == "group":
        for b in range(batch):
            rows = x[b, keep[b]]
            y[b, keep[b]] = np.array(norm_vector(rows.flatten())).reshape(rows.shape)
    return y


def targets(layers, norm, target_norm, padding=None):
    average = sum(normalized(x, norm, padding) for x in layers) / len(layers)
    return normalized(average, target_norm, padding)


def loss(predictions, layers, mask, norm, target_norm, beta, scale, padding=None, reduction="mean"):
    """Loss and its gradient; predictions (B, T, C), or (B, M, T, C) for a mask (B, M, T)."""
    if mask.ndim == 3:
        views = [
            loss(predictions[:, m], layers, mask[:, m], norm, target_norm, beta, scale, padding, "sum")
            for m in range(mask.shape[1])
        ]
        scored = mask if padding is None else mask & ~padding[:, None]
        divisor = max(scored.sum(), 1) if reduction == "mean" else 1
        return sum(value for value, _ in views) / divisor, np.stack([gradient for _, gradient in views], 1) / divisor
    y = targets(layers, norm, target_norm, padding)
    total, count, gradient = 0.0, 0, np.zeros_like(predictions)
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if not mask[b, t] or (padding is not None and padding[b, t]):
                continue
            count += 1
            for c in range(predictions.shape[2]):
                e = predictions[b, t, c] - y[b, t, c]
                if beta == 0:
                    total += e * e
                    gradient[b, t, c] = 2 * e
                elif abs(e) < beta:
                    total += e * e / (2 * beta)
                    gradient[b, t, c] = e / beta
                else:
                    total += abs(e) - beta / 2
                    gradient[b, t, c] = np.sign(e)
    divisor = max(count, 1) if reduction == "mean" else 1
    return total * scale / divisor, gradient * scale / divisor
