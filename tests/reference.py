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


def divergence_from_logits(x, p, kept, rho, *, temperature, divergence="forward_kl", beta=0.5, log_p=None):
    """Summed divergence over the bins (kept entries, one rest), from float64 student logits [N, V]; differentiable."""
    log_q = torch.log_softmax(x / temperature, dim=1)
    total = x.new_zeros(())
    for row in range(len(x)):
        entries = kept[row].nonzero().squeeze(1)
        weight, log_q_bins = p[row, entries], log_q[row, entries]
        log_p_bins = weight.log() if log_p is None else log_p[row, entries]
        rest = (~kept[row]).nonzero().squeeze(1)
        if len(rest):
            weight = torch.cat([weight, rho[row : row + 1]])
            log_p_bins = torch.cat([log_p_bins, rho[row : row + 1].log()])
            log_q_bins = torch.cat([log_q_bins, torch.logsumexp(log_q[row, rest], dim=0, keepdim=True)])
        there = weight > 0
        if divergence == "forward_kl":
            total = total + (weight[there] * (log_p_bins[there] - log_q_bins[there])).sum()
        elif divergence == "soft_ce":
            total = total - (weight[there] * log_q_bins[there]).sum()
        elif divergence == "reverse_kl":
            total = total + (log_q_bins.exp() * (log_q_bins - log_p_bins)).sum()
        else:
            mixture = (beta * weight + (1 - beta) * log_q_bins.exp()).log()
            total = total + beta * (weight[there] * (log_p_bins - mixture)[there]).sum()
            total = total + (1 - beta) * (log_q_bins.exp() * (log_q_bins - mixture)).sum()
    return total


def loss_from_logits(x, labels, p, kept, rho, *, temperature, ce_weight, kd_weight, **options):
    """Summed total, CE and divergence of float64 student logits [N, V]; differentiable."""
    ce = -torch.log_softmax(x, dim=1).gather(1, labels[:, None]).sum()
    kd = divergence_from_logits(x, p, kept, rho, temperature=temperature, **options)
    return ce_weight * ce + kd_weight * temperature**2 * kd, ce, kd


def dense_loss(hidden, head, bias, labels, teacher, **weights):
    """Loss and gradients in float64 for hidden [N, D], head [V, D] and bias [V] or None.

    ``teacher`` is a `SparseTeacher`; sampled entries count with their weights.
    """
    leaves = [t.detach().double().requires_grad_(True) for t in (hidden, head)]
    if bias is not None:
        leaves.append(bias.detach().double().requires_grad_(True))
    x = leaves[0] @ leaves[1].T
    if bias is not None:
        x = x + leaves[2]
    log_weights = teacher.log_probs_NK if teacher.log_weights_NK is None else teacher.log_weights_NK
    p, kept, rho = dense_teacher(teacher.ids_NK, log_weights, teacher.log_tail_N, head.shape[0])
    log_p = None
    if teacher.log_weights_NK is not None:
        log_p = dense_teacher(teacher.ids_NK, teacher.log_probs_NK, teacher.log_tail_N, head.shape[0])[0].log()
    total, ce, kd = loss_from_logits(x, labels, p, kept, rho, log_p=log_p, **weights)
    grads = torch.autograd.grad(total, leaves)
    return total.detach(), ce.detach(), kd.detach(), grads


def log_softmax(logits, temperature=1.0):
    """float64 log-softmax of numpy logits over the last axis."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def relative_error(found, truth):
    """Norm of the difference over the norm of the truth."""
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))
