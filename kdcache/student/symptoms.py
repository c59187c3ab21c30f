"""What the figures of a finished training say is wrong with it; docs/failures.md lists causes and remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.evaluate.perplexity import Score
from kdcache.run_record import AFTER, BEFORE, TEACHER

_FEWEST = 10  # logged losses, below which a trend is chance
_MOVED = 0.01  # of the loss: less is none
_WORSE = 1e-3  # of the loss: what an evaluation in another arithmetic may differ by


def symptoms(
    log: Sequence[Mapping[str, Any]], scores: Mapping[str, Score], *, distils: bool = True, labelled: bool = True
) -> list[str]:
    """One line for each thing that should not be so.

    Args:
        log: the trainer's history; entries with ``loss`` are those of the training.
        scores: of the student before and after, and of the teacher, on the validation split.
        distils: whether the KD term had any weight; without it nothing draws towards the teacher.
        labelled: whether the CE term had any; without it the loss on the labels may rise as it will.
    """
    before, after, teacher = scores[BEFORE], scores[AFTER], scores[TEACHER]
    found = []
    losses = [float(line["loss"]) for line in log if "loss" in line]
    if len(losses) >= _FEWEST:
        part = max(1, len(losses) // 5)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        # A student that has learnt all it will within the first steps is flat as well: that shows on the validation split.
        learnt = after.loss < before.loss * (1 - _MOVED) or (distils and after.kl < before.kl * (1 - _MOVED))
        if last > first * (1 - _MOVED) and not learnt:
            found.append(
                f"the training loss is flat: {first:.4f} in the first fifth of the steps, {last:.4f} in the last; raise "
                "training.learning_rate, or train longer"
            )
    if labelled and after.loss > before.loss * (1 + _WORSE):
        found.append(
            f"the student is worse on the validation split than before (perplexity {before.perplexity:.3f}, now "
            f"{after.perplexity:.3f}): train longer, or lower training.learning_rate"
        )
    elif distils and after.kl > before.kl * (1 + _WORSE) and (not labelled or after.loss <= before.loss):
        found.append(
            f"the student's loss fell while its KL to the teacher rose, {before.kl:.4f} to {after.kl:.4f}: it "
            "learns the labels and leaves the teacher; raise loss.kd_weight against loss.ce_weight"
            if labelled
            else f"the student's KL to the teacher rose, {before.kl:.4f} to {after.kl:.4f}: train longer, or lower "
            "training.learning_rate"
        )
    if distils and teacher.loss > before.loss * (1 + _WORSE):
        found.append(
            f"the teacher is worse on the validation split (perplexity {teacher.perplexity:.3f}) than the student before training "
            f"({before.perplexity:.3f}): the KD term draws towards a worse model; lower loss.kd_weight, or take another teacher"
        )
    return found
