"""The truth: dense float64 versions of what the package computes sparsely, written as plainly as possible."""

import numpy as np
import torch


def dense_teacher(ids, log_probs, log_tail, vocabulary):
    """[N, V] teacher probabilities on the kept entries (0 elsewhere), kept mask, and tail mass [N]."""
    p = torch.zeros(len(ids), vocabulary, dtype=torch.float64)
    kept = torch.zeros(len(ids), vocabulary, dtype=torch.bool)
    for row in range(len(ids)):
        for column in range(ids.shape[1]):
            if not torch.isneginf(log_probs[row, column]):
                p[row, ids[row, column]] = log_probs[row, column].double().exp()
                kept[row, ids[row, column]] = True
    return p, kept, log_tail.double().exp()


def loss_from_logits(x, labels, p, kept, rho, *, temperature, ce_weight, kd_weight):
    """Summed total, CE and KL of float64 student logits [N, V]; differentiable."""
    ce = -torch.log_softmax(x, dim=1).gather(1, labels[:, None]).sum()
    log_q = torch.log_softmax(x / temperature, dim=1)
    on_kept = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q.masked_fill(p == 0, 0.0)), 0.0).sum()
    log_sigma = torch.logsumexp(log_q.masked_fill(kept, -torch.inf), dim=1)
    has_tail = rho > 0
    tail = (rho[has_tail] * (rho[has_tail].log() - log_sigma[has_tail])).sum()
    kl = on_kept + tail
    return ce_weight * ce + kd_weight * temperature**2 * kl, ce, kl


def dense_loss(hidden, head, bias, labels, teacher, *, temperature, ce_weight, kd_weight):
    """Loss and gradients in float64 for hidden [N, D], head [V, D] and bias [V] or None."""
    leaves = [t.detach().double().requires_grad_(True) for t in (hidden, head)]
    if bias is not None:
        leaves.append(bias.detach().double().requires_grad_(True))
    x = leaves[0] @ leaves[1].T
    if bias is not None:
        x = x + leaves[2]
    p, kept, rho = dense_teacher(*teacher, head.shape[0])
    total, ce, kl = loss_from_logits(
        x, labels, p, kept, rho, temperature=temperature, ce_weight=ce_weight, kd_weight=kd_weight
    )
    grads = torch.autograd.grad(total, leaves)
    return total.detach(), ce.detach(), kl.detach(), grads


def log_softmax(logits, temperature=1.0):
    """float64 log-softmax of numpy logits over the last axis."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def relative_error(found, truth):
    """Norm of the difference over the norm of the truth."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))
