"""The paper's equations once more, in float64 numpy, written from the paper alone.

Nothing here imports horse_plugin. Rows are answer tokens.
"""

import numpy as np


def coefficients(h, h_tilde, eta):
    """c_i = −η Σ_j H_ij H̃_ij."""
    return np.array(
        [-eta * sum(h[i, j] * h_tilde[i, j] for j in range(h.shape[1])) for i in range(len(h))]
    )


def residual(h, h_tilde, g_tilde, eta):
    """Eq. 4, token by token."""
    c = coefficients(h, h_tilde, eta)
    return np.stack([c[i] * g_tilde[i] for i in range(len(h))])


def inner(a, b):
    return float(np.trace(a.T @ b))


def orthogonal(residuals, strength=1.0):
    """Eq. 6; R^{l-1} is the residual before its own projection."""
    out = [residuals[0]]
    for l in range(1, len(residuals)):
        below = residuals[l - 1]
        norm2 = inner(below, below)
        share = inner(residuals[l], below) / norm2 if norm2 > 0 else 0.0
        out.append(residuals[l] - strength * share * below)
    return out


def decay(residuals):
    """Eq. 5 with T layers, l = 1 … T."""
    big_t = len(residuals)
    return [residuals[l - 1] / (big_t - l + 1) for l in range(1, big_t + 1)]


def gram_schmidt(residuals):
    out = []
    for r in residuals:
        r = r.copy()
        for q in out:
            norm2 = inner(q, q)
            r -= (inner(r, q) / norm2 if norm2 > 0 else 0.0) * q
        out.append(r)
    return out


def shift(h, r, lam, metric=None):
    """Eq. 2 in the paper's orientation: ΔW = R Hᵀ (H Hᵀ + e^λ C̄)⁻¹ with columns as tokens."""
    big_h, big_r = h.T, r.T
    metric = np.eye(big_h.shape[0]) if metric is None else metric
    return (big_r @ big_h.T @ np.linalg.inv(big_h @ big_h.T + np.exp(lam) * metric)).T


def metric(keys, rho):
    """C̄ = (1−ρ) C/mean(diag C) + ρI from the keys of ordinary text, one a row."""
    moment = sum(np.outer(k, k) for k in keys) / len(keys)
    return (1 - rho) * moment / np.mean(np.diag(moment)) + rho * np.eye(keys.shape[1])


def gelu(x):
    from math import erf

    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def network(h, g, mean, std, blocks):
    """Sec. 2.3: standardise, then y ← y + scale ⊙ act(yAB + bias) + shift."""
    y = (np.concatenate([h, g], 1) - mean) / std
    for b in blocks:
        y = y + b["scale"] * gelu(y @ b["A"] @ b["B"] + b["bias"]) + b["shift"]
    return y[:, : h.shape[1]], y[:, h.shape[1] :]
