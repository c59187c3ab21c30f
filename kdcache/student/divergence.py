"""Divergences between teacher and student on the kept entries and what lies outside them.

A row is a distribution over bins: one for each kept entry and, where the teacher states the mass outside,
one for the rest. With ``z = x / T`` the student's scaled logits, ``q`` its probabilities and ``sigma`` its mass
outside the kept set, every divergence here has a gradient of one form::

    dL/dz_j = on_kept_j                                  for a kept entry
    dL/dz_j = by_q * q_j + by_share * q_j / sigma        for every other entry

(two factors, since ``1 / sigma`` may be beyond any float while ``q_j / sigma`` is not), so that all of them share the passes over the vocabulary. Axes: ``C`` rows, ``K`` kept entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

_SURE = 1e-4
# Logarithm of how many entries one drawn entry may stand for; so improbable a draw is never made.
_NEVER = 40.0
# What is taken off an estimated share, and how many draws are believed by half: `_shares`.
_DOUBTED, _FEW = 0.2, 200
Divergence = Literal["forward_kl", "soft_ce", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Bins:
    """Teacher and student over the bins of each row, as log-probabilities at T.

    Attributes:
        log_p_CK: teacher on the kept entries; ``-inf`` marks a place that only fills a short row.
        log_q_CK: student on the same entries; ``-inf`` where a filling place repeats an id.
        log_rho_C: teacher's mass outside, ``-inf`` for none.
        log_sigma_C: student's mass outside.
        weights_CK: what each kept entry stands for: its probability, or the weight of a sampled entry.
    """

    log_p_CK: torch.Tensor
    log_q_CK: torch.Tensor
    log_rho_C: torch.Tensor
    log_sigma_C: torch.Tensor
    weights_CK: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """Value per row, gradient by ``z`` on the kept entries, and the two factors of it outside them."""

    value_C: torch.Tensor
    on_kept_CK: torch.Tensor
    by_q_C: torch.Tensor
    by_share_C: torch.Tensor


def divergence_of(name: str, beta: float) -> Callable[[Bins], Outcome]:
    """The divergence called ``name``; ``beta`` is the generalised JSD's.

    Raises:
        ValueError: no such divergence, or a beta outside (0, 1).
    """
    if name == "jsd":
        if not 0 < beta < 1:
            raise ValueError(f"beta of the generalised JSD should lie strictly between 0 and 1, found {beta}")
        return lambda bins: generalised_jsd(bins, beta)
    table = {"forward_kl": forward_kl, "soft_ce": soft_cross_entropy, "reverse_kl": reverse_kl}
    if name not in table:
        raise ValueError(f"divergence should be one of {', '.join([*table, 'jsd'])}, found {name!r}")
    return table[name]


def forward_kl(bins: Bins) -> Outcome:
    """KL(teacher || student), Hinton et al. 2015 (arXiv:1503.02531).

    With sampled entries the sum over them is an unbiased estimate of the full one (threshold or RS-KD
    sampling, arXiv:2503.16870); with a lumped rest it is exact on the kept entries and on the total mass
    outside, and never teaches how that mass is spread; renormalised truncation is biased towards the kept set.
    """
    return _linear(bins, bins.log_p_CK, bins.log_rho_C)


def soft_cross_entropy(bins: Bins) -> Outcome:
    """Cross-entropy with the teacher's distribution: forward KL plus the teacher's entropy, the same gradient."""
    return _linear(bins, torch.zeros_like(bins.log_p_CK), torch.zeros_like(bins.log_rho_C))


def controlled(bins: Bins, outcome: Outcome) -> Outcome:
    """The gradient of a linear divergence on sampled entries with less noise; the value stays.

    With ``pi_v`` the probability that entry ``v`` is drawn, the sum over drawn entries estimates the teacher by ``p_v / pi_v``
    and says nothing of the others. The student's own distribution ``m_v = c * rho * q_v / Q`` of the mass ``rho`` outside
    the head is a better guess than nothing, and the draws correct it::

        p_hat_v = m_v + [v drawn] (p_v - m_v) / pi_v                    outside the head

    Its expectation over the draws is ``p_v`` whatever ``m`` is, as long as that does not depend on them, and its variance
    ``(p_v - m_v)^2 (1 / pi_v - 1)`` instead of ``p_v^2 (1 / pi_v - 1)``: a difference estimator, or control variate (Cochran,
    Sampling Techniques, ch. 7). ``m`` carries no gradient. How much of the guess is taken, ``c``, is estimated for each row
    from the other rows (`_shares`).

    Args:
        bins: the kept entries are the head, whose weights are their probabilities, and entries drawn with probability
            ``p / weight``; no bucket for the rest.
        outcome: of `forward_kl` or `soft_cross_entropy`.
    """
    weights, held = bins.weights_CK, ~torch.isneginf(bins.log_p_CK)
    log_times_CK = torch.where(held, weights.log() - bins.log_p_CK, torch.zeros_like(weights))
    # Of the head only rounding is left; an entry that is drawn as good as always needs no guess.
    drawn = log_times_CK > _SURE
    times_CK = torch.where(drawn, log_times_CK.clamp(max=_NEVER), 0.0).exp()
    rho_C = (held.any(dim=1).to(weights.dtype) - torch.where(drawn, 0.0, weights).sum(dim=1)).clamp(min=0.0)
    log_q_drawn = bins.log_q_CK.masked_fill(~drawn, -torch.inf)
    log_outside_C = torch.logaddexp(bins.log_sigma_C, torch.logsumexp(log_q_drawn, dim=1))
    # Where nothing lies outside the head there is nothing to be guessed.
    nothing = torch.isneginf(log_outside_C)
    rho_C, log_outside_C = rho_C.masked_fill(nothing, 0.0), log_outside_C.masked_fill(nothing, 0.0)
    guess_CK = rho_C[:, None] * (log_q_drawn - log_outside_C[:, None]).exp()
    share_C = _shares(guess_CK, torch.where(drawn, weights / times_CK, 0.0), times_CK)
    weights = weights + share_C[:, None] * guess_CK * (1.0 - times_CK)
    rest_C = share_C * rho_C * (bins.log_sigma_C - log_outside_C).exp()
    total_C = weights.sum(dim=1) + rest_C
    return Outcome(outcome.value_C, total_C[:, None] * bins.log_q_CK.exp() - weights, total_C, -rest_C)


def _shares(guess_CK: torch.Tensor, p_CK: torch.Tensor, times_CK: torch.Tensor) -> torch.Tensor:
    """``[C]`` share of the guess that each row takes: what leaves the least noise in the *other* rows of the chunk.

    The noise is least at ``c = sum p m w / sum m^2 w`` with ``w = 1 / pi - 1``, both sums over all that lies outside the
    head, and estimated from the draws (each counts ``1 / pi`` times). A row's own draws are left out, or its target would
    no longer be ``p`` on average. The ratio comes out too large, the more so the fewer the draws, for it is the rare ones
    that say that a guess is bad: `_DOUBTED` of it is taken off (a guess that is right keeps its 1), and a chunk of `_FEW`
    draws is believed by half.

    Args:
        guess_CK: ``m`` at a share of 1 on drawn entries, 0 elsewhere.
        p_CK: the teacher on drawn entries.
        times_CK: ``1 / pi``, 1 for entries that are not drawn.
    """
    # In double precision, for a row of large terms is taken away from the sum again.
    counted_CK = (times_CK * (times_CK - 1.0) * guess_CK).double()
    with_p_C, with_guess_C = (counted_CK * p_CK).sum(dim=1), (counted_CK * guess_CK).sum(dim=1)
    with_p_C, with_guess_C = ((s.sum() - s).clamp(min=0.0) for s in (with_p_C, with_guess_C))
    best_C = torch.where(with_guess_C > 0, with_p_C / with_guess_C, 0.0).clamp(max=1.0)
    draws_C = (times_CK > 1.0).sum(dim=1)
    draws_C = draws_C.sum() - draws_C
    believed_C = ((best_C - _DOUBTED) / (1.0 - _DOUBTED)).clamp(min=0.0) * draws_C / (draws_C + _FEW)
    return believed_C.to(guess_CK.dtype)


def reverse_kl(bins: Bins) -> Outcome:
    """KL(student || teacher) over the bins, mode-seeking (MiniLLM, arXiv:2306.08543).

    Infinite where the student has mass outside and the teacher states none there: it wants a lumped rest.
    """
    return _by_bins(bins, lambda log_p, log_q: log_q - log_p)


def generalised_jsd(bins: Bins, beta: float) -> Outcome:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv:2306.13649), over the bins."""

    def log_m(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))

    # The derivative by q_b is (1 - beta) log(q_b / m_b): what the mixture contributes cancels.
    outcome = _by_bins(bins, lambda log_p, log_q: (1 - beta) * (log_q - log_m(log_p, log_q)))
    kept = _times(bins.log_p_CK, bins.log_p_CK - log_m(bins.log_p_CK, bins.log_q_CK)).sum(dim=1)
    rest = _times(bins.log_rho_C, bins.log_rho_C - log_m(bins.log_rho_C, bins.log_sigma_C))
    return Outcome(outcome.value_C + beta * (kept + rest), outcome.on_kept_CK, outcome.by_q_C, outcome.by_share_C)


def _linear(bins: Bins, log_p_CK: torch.Tensor, log_rho_C: torch.Tensor) -> Outcome:
    """sum w (log p - log q) over kept entries plus the same for the rest; linear in the teacher's weights."""
    weights, rho = bins.weights_CK, bins.log_rho_C.exp()
    zero = torch.zeros_like(weights)
    # 0 * (-inf) counts as 0: places that fill a row, and a rest of no mass.
    kept = torch.where(weights != 0, weights * (log_p_CK - bins.log_q_CK), zero).sum(dim=1)
    rest = torch.where(rho != 0, rho * (log_rho_C - bins.log_sigma_C), torch.zeros_like(rho))
    total = weights.sum(dim=1) + rho
    return Outcome(kept + rest, total[:, None] * bins.log_q_CK.exp() - weights, total, -rho)


def _by_bins(bins: Bins, slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Outcome:
    """For a value sum_b q_b g_b whose derivative by q_b is g_b: dL/dz_j = q_j (g_b(j) - sum_b q_b g_b)."""
    q_CK = bins.log_q_CK.exp()
    g_CK, g_C = slope(bins.log_p_CK, bins.log_q_CK), slope(bins.log_rho_C, bins.log_sigma_C)
    mean_C = _times(bins.log_q_CK, g_CK).sum(dim=1) + _times(bins.log_sigma_C, g_C)
    on_kept = torch.where(q_CK > 0, q_CK * (g_CK - mean_C[:, None]), torch.zeros_like(q_CK))
    outside = torch.where(torch.isneginf(bins.log_sigma_C), torch.zeros_like(mean_C), g_C - mean_C)
    return Outcome(mean_C, on_kept, outside, torch.zeros_like(mean_C))


def _times(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """exp(log_weight) * value, 0 where the weight is 0 whatever the value."""
    return torch.where(torch.isneginf(log_weight), torch.zeros_like(value), log_weight.exp() * value)
