"""A stranger's sequence -> a cached one: every number is checked, and what the data do not say is guessed and counted.

With entries ``e`` of log-probability ``log p(e)`` at T, mass ``m = sum p(e)``, V tokens and ``c`` entries, the row becomes
``logits(e) = T (log p(e) - max log p)`` and ``rest = log((1 - m) / m)``. The label's log-probability at T = 1, which only the teacher's own
perplexity is made of, is taken from the entries; where it is not among them the rest counts as shared evenly by ``V - c`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.codec import CachedSequence
from kdcache.cache.layout import HALF_LIMIT, REST_LIMIT, TOKENS_PER_SHARD
from kdcache.cache.rows import RowDesign, SparseRows
from kdcache.errors import DataError
from kdcache.exchange.plain import PlainSequence

# Probabilities of single precision add up to one to about this.
_ONE = 1e-6
_ABOVE_ONE = 1e-3
# What an approximation may add up to before the settings must be wrong.
_APPROXIMATED = 0.5
_LEAST = 1e-6
# A row's entries are counted in 16 bits.
_ENTRIES = 65_535
# What rounding, to two decimals or to 8 bits of precision, may put between a label and its own entry.
_ROUNDED, _RELATIVE = 0.02, 0.01


@dataclass
class Tally:
    """What was found and guessed, summed over a source's rows."""

    sequences: int = 0
    dropped: int = 0
    rows: int = 0
    without_row: int = 0
    full: int = 0
    scaled: int = 0
    guessed: int = 0
    widest: int = 0
    longest: int = 0
    mass: float = 0.0

    def lines(self, temperature: float) -> list[str]:
        """For people."""
        lines = [
            f"rows at T = {temperature:g} alone: other temperatures above it are interpolated from the entries and one bucket for the rest",
            f"{self.rows:,} rows of at most {self.widest:,} entries, which hold {self.mass / max(1, self.rows):.1%} of the teacher's "
            "probability on average",
        ]
        if self.full:
            lines.append(
                f"{self.full:,} rows add up to one: if they were scaled to that, what lay outside is lost, and a student learns to put "
                "nothing there"
            )
        if self.scaled:
            lines.append(
                f"{self.scaled:,} rows of approximated probabilities added up to more than one and were scaled down"
            )
        if self.guessed:
            lines.append(
                f"the teacher's probability of the learnt token is a guess in {self.guessed:,} of {self.rows:,} rows, where it is not among "
                "the entries or they are not at T = 1: the teacher's own loss and perplexity are approximate, students' are not"
            )
        if self.without_row:
            lines.append(f"{self.without_row:,} learnt tokens have no row and are no targets of the cache")
        if self.dropped:
            lines.append(f"{self.dropped:,} of {self.sequences:,} sequences have no target left and are dropped")
        return lines


def settled(
    sequence: PlainSequence, where: str, *, design: RowDesign, approximated: bool, tally: Tally
) -> CachedSequence | None:
    """The sequence as a cache holds it; None where nothing is left to learn from.

    Args:
        sequence: of a reader.
        where: its name in errors.
        design: of the cache's rows, with one declared temperature.
        approximated: probabilities were rebuilt from an approximation, and may add up to a little more than one.
        tally: added to.

    Raises:
        DataError: ids outside the vocabulary or twice in a row, numbers that are no log-probabilities, a row of more than one.
    """
    tally.sequences += 1
    if len(sequence.token_ids) > TOKENS_PER_SHARD:
        raise DataError(
            f"{where} holds {len(sequence.token_ids):,} tokens; a sequence has {TOKENS_PER_SHARD:,} at most"
        )
    vocabulary, [temperature] = design.vocab_size, design.temperatures
    if int(sequence.token_ids.max()) >= vocabulary:
        raise DataError(
            f"{where}: token id {int(sequence.token_ids.max())}, and the tokenizer has {vocabulary:,} tokens; give the teacher's"
        )
    targets, counts, ids, log_probs, labels = _with_rows(sequence)
    tally.without_row += int((sequence.counts == 0).sum())
    tally.longest = max(tally.longest, len(sequence.token_ids))
    if not len(counts):
        tally.dropped += 1
        return None
    if int(counts.max()) > _ENTRIES:
        place = int(np.flatnonzero(targets)[int(np.argmax(counts))])
        raise DataError(
            f"{where}: the row for token {place} has {int(counts.max()):,} entries; expected {_ENTRIES:,} at most, the most probable ones"
        )
    owner = np.repeat(np.arange(len(counts)), counts)
    _check(where, np.flatnonzero(targets), owner, ids, log_probs, vocabulary)
    order = np.lexsort((ids, owner))
    ids, log_probs = ids[order], np.minimum(log_probs[order], 0.0)
    twice = (np.diff(ids) == 0) & (np.diff(owner) == 0)
    if twice.any():
        raise DataError(f"{where}: id {int(ids[1:][twice][0])} is twice in a row")
    mass = np.bincount(owner, weights=np.exp(log_probs))
    above = mass > 1.0 + _ABOVE_ONE
    limit = 1.0 + (_APPROXIMATED if approximated else _ABOVE_ONE)
    if (mass > limit).any():
        place = int(np.flatnonzero(targets)[int(np.argmax(mass))])
        raise DataError(
            f"{where}: the probabilities of the row for token {place} add up to {float(mass.max()):.4f}; they are at another temperature, or no "
            "log-probabilities of the whole vocabulary"
        )
    log_probs = log_probs - np.log(np.maximum(mass, 1.0))[owner]
    mass = np.minimum(mass, 1.0)
    tally.scaled += int(above.sum())
    tally.full += int((mass > 1.0 - _ONE).sum())
    tally.rows += len(counts)
    tally.mass += float(mass.sum())
    tally.widest = max(tally.widest, int(counts.max()))
    largest = np.maximum.reduceat(log_probs, np.cumsum(counts) - counts)
    logits = np.maximum(temperature * (log_probs - largest[owner]), -HALF_LIMIT)
    outside = np.where((mass > 1.0 - _ONE) | (counts == vocabulary), 0.0, 1.0 - mass)
    with np.errstate(divide="ignore"):
        rest = np.clip(np.log(outside) - np.log(mass), -REST_LIMIT, REST_LIMIT)
    guess, known = _labels(sequence.token_ids[targets], owner, ids, log_probs, outside, counts, vocabulary, temperature)
    given = ~np.isnan(labels)
    _check_labels(where, np.flatnonzero(targets), labels, guess, known & (temperature == 1.0))
    tally.guessed += int((~given & ~(known & (temperature == 1.0))).sum())
    rows = SparseRows(
        head=counts,
        tail=np.zeros(len(counts), dtype=np.int64),
        head_ids=ids.astype(np.uint32),
        head_logits=logits.astype(np.float32),
        tail_ids=np.zeros(0, dtype=np.uint32),
        tail_logits=np.zeros(0, dtype=np.float32),
        rest=rest.astype(np.float32)[:, None],
        label_log_prob=np.clip(np.where(given, labels, guess), -HALF_LIMIT, 0.0).astype(np.float32),
        design=design,
    )
    return CachedSequence(sequence.token_ids, targets, rows)


def _with_rows(
    sequence: PlainSequence,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Targets, and their rows, without the targets that have none."""
    filled = sequence.counts > 0
    targets = sequence.targets.copy()
    targets[np.flatnonzero(targets)[~filled]] = False
    labels = sequence.label_log_probs
    if labels is None:
        labels = np.full(len(filled), np.nan)
    return targets, sequence.counts[filled], sequence.ids, sequence.log_probs, labels[filled]


def _check(
    where: str,
    places: NDArray[np.int64],
    owner: NDArray[np.int64],
    ids: NDArray[np.int64],
    log_probs: NDArray[np.float64],
    vocabulary: int,
) -> None:
    for bad, what in (
        ((ids < 0) | (ids >= vocabulary), f"an id outside the tokenizer's {vocabulary:,} tokens"),
        (~np.isfinite(log_probs), "a log-probability that is not finite"),
        (log_probs > _ABOVE_ONE, "a log-probability above 0"),
    ):
        if bad.any():
            first = int(np.argmax(bad))
            raise DataError(
                f"{where}: the row for token {int(places[owner[first]])} has {what} (id {int(ids[first])}, {float(log_probs[first]):g})"
            )


def _check_labels(
    where: str,
    places: NDArray[np.int64],
    labels: NDArray[np.float64],
    entries: NDArray[np.float64],
    known: NDArray[np.bool_],
) -> None:
    """Labels are log-probabilities, and where the row has the token among its entries, that entry's."""
    if (bad := labels > _ABOVE_ONE).any():
        at = int(np.argmax(bad))
        raise DataError(f"{where}: the label of token {int(places[at])} is {labels[at]:g}, a log-probability above 0")
    # Entries as they were, not scaled to what the row adds up to: what is left of that is far below the rounding.
    far = known & (np.abs(labels - entries) > _ROUNDED + _RELATIVE * np.abs(entries))
    if far.any():
        at = int(np.argmax(far))
        raise DataError(
            f"{where}: the label of token {int(places[at])} is {labels[at]:g}, and the entry of the same token {entries[at]:g}"
        )


def _labels(
    labels: NDArray[np.uint32], owner: NDArray[np.int64], ids: NDArray[np.int64], log_probs: NDArray[np.float64],
    outside: NDArray[np.float64], counts: NDArray[np.int64], vocabulary: int, temperature: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:  # fmt: skip
    """Log-probabilities of the labels at T = 1, and whether each is among its row's entries."""
    free = np.maximum(vocabulary - counts, 1)
    share = np.log(np.maximum(outside, _LEAST) / free)
    top = np.maximum.reduceat(log_probs, np.cumsum(counts) - counts)
    # To T = 1 and normalised anew, the rest as so many equal tokens.
    # What is largest is taken out first, which in a row of next to nothing is the rest.
    peak = np.where(outside > 0, np.maximum(top, share), top)
    sums = np.bincount(owner, weights=np.exp(temperature * (log_probs - peak[owner])))
    sums += np.where(outside > 0, free * np.exp(temperature * np.minimum(share - peak, 0.0)), 0.0)
    log_z = temperature * peak + np.log(sums)
    found = np.minimum(
        temperature * share - log_z, temperature * np.minimum.reduceat(log_probs, np.cumsum(counts) - counts) - log_z
    )
    hits = ids == labels[owner].astype(np.int64)
    found[owner[hits]] = temperature * log_probs[hits] - log_z[owner[hits]]
    known = np.zeros(len(counts), dtype=np.bool_)
    known[owner[hits]] = True
    return found, known
