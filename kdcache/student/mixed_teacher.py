r"""The target of a mixture of teachers: ``p = sum_m w_m p_m`` at T, the mean of distributions in probability space.

With ``q`` the student at T, the gradient of KL(p || q) by the student's scaled logits is ``c q - p_hat`` for any target
``p_hat`` with ``c = sum p_hat`` (`kdcache.student.loss`); it is linear in the target, and what is unbiased for each teacher is
unbiased for the mixture. Rows are merged so that an id stands once in each.

**Drawn entries** (every cache has them, and T is within their temperatures). Each cache gives an unbiased estimate
``p_hat_m``: exact probabilities for its head, ``p / pi`` for what it drew. The estimates add::

    p_hat_v = sum_m w_m p_hat_mv                 E[p_hat] = p, so E[gradient] = q - p, that of the dense mixture

and where the caches drew independently the variance is ``sum_m w_m^2 Var_m``, less than that of one. The *value* needs
``log p_v`` as well, which is known only where every cache holds ``v`` exactly. There it is taken; of the other entries each
brings its own teacher's logarithm::

    value = sum_{v in every head} p_hat_v log(p_v / q_v)  +  sum_m w_m sum_{other v} p_hat_mv log(p_mv / q_v)

Since ``sum_m w_m KL(p_m || q) = KL(p || q) + JS_w(p_1, ..., p_M)`` holds term by term (the generalised Jensen-Shannon divergence
has no negative term, by the log-sum inequality), this is an unbiased estimate of KL(p || q) plus a part of JS_w: never below
the KL on average, never above the mean of the KLs to the single teachers, and off by a number that has no student in
it. Differences between students are those of their KLs. In one padded row it takes the form ``W (log p~ - log q)`` with
``W = p_hat_v`` and ``log p~`` the mean of the logarithms by what each stands for. For ``soft_ce`` no logarithm of ``p`` is
needed, and the value is unbiased.

**One bucket** (a cache without draws, T above them, or a divergence over bins). A cache knows the probability of each id of
its head S_m and of all others together. Of the mixture that gives exactly the ids in the intersection of all S_m, and
the mass of everything else::

    p_v = sum_m w_m p_mv   (v in every S_m)          rho = sum_m w_m (rho_m + sum_{v in S_m, not in all} p_mv)

No finer partition of the vocabulary has known masses for every teacher. All divergences over these bins are exact; forward
KL is a lower bound of the full one, as from a single cache without draws. It is what students are scored by: never
negative, and without noise. Where one cache has draws and another has none, this holds for both: a bucket spreads as
the student does over the ids that no teacher keeps, and drawn entries would lie in it.

**Renormalised truncation**: the mean of the truncated distributions, which are known everywhere.

Axes: ``P`` rows, ``E`` entries of all rows of one cache or of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.mixture import MixedRows
from kdcache.cache.rows import SparseRows
from kdcache.student.sparse_teacher import SparseTeacher

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Entries:
    """Entries of one cache at one temperature, or of several with those of one id still apart.

    ``row`` int64, ``ids`` int64, ``log_p`` log-probabilities, ``log_w`` what each stands for, ``exact`` whether it is in
    the head: all ``[E]``.
    """

    row: NDArray[np.int64]
    ids: NDArray[np.int64]
    log_p: Floats
    log_w: Floats
    exact: NDArray[np.bool_]


def mixed_teacher(
    rows: MixedRows, temperature: float, log_rests: list[Floats] | None, *, renormalised: bool = False
) -> SparseTeacher:
    """Target distributions of a mixture at ``temperature``.

    Args:
        rows: of all caches, none of them empty.
        temperature: T.
        log_rests: for each cache the log of the mass outside its head, float64 ``[P]`` (``-inf`` for none); None where
            drawn entries stand for that.
        renormalised: leave out what lies outside the heads, drawn or not.

    Raises:
        CacheError: the temperature is below a cache's smallest declared one.
    """
    drawn = log_rests is None and not renormalised
    parts = [_entries(part, temperature, drawn=drawn) for part in rows.parts]
    log_weights = [float(np.log(weight)) for weight in rows.weights]
    if renormalised:
        parts = [_renormalised(part, len(rows)) for part in parts]
    joined = Entries(
        row=np.concatenate([p.row for p in parts]),
        ids=np.concatenate([p.ids for p in parts]),
        log_p=np.concatenate([p.log_p for p in parts]),
        log_w=np.concatenate([p.log_w + w for p, w in zip(parts, log_weights, strict=True)]),
        exact=np.concatenate([p.exact for p in parts]),
    )
    # The mixture's own probability, of entries that all hold.
    log_parts = np.concatenate([p.log_p + w for p, w in zip(parts, log_weights, strict=True)])
    order = np.argsort(joined.row * rows.design.vocab_size + joined.ids, kind="stable")
    row, ids = joined.row[order], joined.ids[order]
    starts = np.flatnonzero(np.concatenate(([True], (row[1:] != row[:-1]) | (ids[1:] != ids[:-1]))))[: len(row)]
    log_w, log_p = joined.log_w[order], log_parts[order]
    everywhere = np.add.reduceat(joined.exact[order].astype(np.int64), starts) == len(parts)
    log_mixed = np.logaddexp.reduceat(log_p, starts)
    row, ids = row[starts], ids[starts]
    if renormalised:
        return _padded(row, ids, log_mixed, None, None, len(rows))
    if log_rests is not None:
        return _padded(
            row[everywhere], ids[everywhere], log_mixed[everywhere], None,
            _log_rest(rows, log_rests, log_weights, row[~everywhere], log_mixed[~everywhere]), len(rows),
        )  # fmt: skip
    log_sum = np.logaddexp.reduceat(log_w, starts)
    with np.errstate(invalid="ignore"):
        share = np.exp(log_w - np.repeat(log_sum, np.diff([*starts, len(log_w)])))
    means = np.add.reduceat(np.nan_to_num(share) * joined.log_p[order], starts)
    # An id that no cache drew weighs nothing, whatever its logarithm.
    known = np.where(everywhere | np.isneginf(log_sum), log_mixed, means)
    return _padded(row, ids, known, log_sum, None, len(rows))


def _entries(rows: SparseRows, temperature: float, *, drawn: bool) -> Entries:
    """A cache's head, and what it drew."""
    log_z = rows.log_partition_at(temperature)
    place, beta = np.arange(len(rows)), 1.0 / temperature
    counts = [(rows.head, rows.head_ids, rows.head_logits)]
    counts += [(rows.tail, rows.tail_ids, rows.tail_logits)] if drawn else []
    log_p = [logits.astype(np.float64) * beta - np.repeat(log_z, count) for count, _, logits in counts]
    log_w = [w.astype(np.float64) for w in rows.log_weights_at(temperature, log_z)] if drawn else log_p
    return Entries(
        row=np.concatenate([np.repeat(place, count) for count, _, _ in counts]),
        ids=np.concatenate([ids.astype(np.int64) for _, ids, _ in counts]),
        log_p=np.concatenate(log_p),
        log_w=np.concatenate(log_w),
        exact=np.concatenate([np.full(len(ids), number == 0) for number, (_, ids, _) in enumerate(counts)]),
    )


def _renormalised(part: Entries, rows: int) -> Entries:
    """A head scaled to 1; its entries lie row after row."""
    mass = np.bincount(part.row, weights=np.exp(part.log_p), minlength=rows)
    log_p = part.log_p - np.log(mass)[part.row]
    return Entries(part.row, part.ids, log_p, log_p, part.exact)


def _log_rest(
    rows: MixedRows,
    log_rests: list[Floats],
    log_weights: list[float],
    row: NDArray[np.int64],
    log_p: Floats,
) -> Floats:
    """float64 ``[P]``: log of the mass outside the common ids; ``row`` and ``log_p`` are of the entries that some hold."""
    terms = [rest + weight for rest, weight in zip(log_rests, log_weights, strict=True)]
    outside: Floats = np.exp(np.logaddexp.reduce(terms))
    outside += np.bincount(row, weights=np.exp(log_p), minlength=len(rows))
    with np.errstate(divide="ignore"):
        log_outside: Floats = np.log(outside)
    return log_outside


def _padded(
    row: NDArray[np.int64],
    ids: NDArray[np.int64],
    log_p: Floats,
    log_w: Floats | None,
    log_rest: Floats | None,
    rows: int,
) -> SparseTeacher:
    def tensor(values: Floats | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values.astype(np.float32))

    log_probs = tensor(log_p)
    assert log_probs is not None
    return SparseTeacher.from_ragged(
        torch.from_numpy(ids), log_probs, torch.from_numpy(np.bincount(row, minlength=rows)), tensor(log_rest), tensor(log_w)
    )  # fmt: skip
