"""The teacher that a cache was made with, found again and loaded as it was then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.cache.reader import Cache
from kdcache.errors import CacheError, ModelError
from kdcache.models import load_model, refuse_narrow_head
from kdcache.same_teacher import refuse_other_teacher, teacher_revision
from kdcache.teacher.forward import TeacherForward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cached_teacher(cache: Cache, place: str | None) -> TeacherForward:
    """The teacher that a cache names, ready to be asked for the logits of its rows.

    Args:
        cache: whose.
        place: folder or id where it lies; None takes the name in the plan.

    Raises:
        CacheError: it is not there, or is another model.
        ModelError: it cannot be loaded.
    """
    name = place or cache.plan.teacher.name
    try:
        revision = _identified(cache, name)
    except ModelError as exc:
        raise CacheError(
            f"the teacher of {cache.directory} is not found at {name}; say where it lies with --teacher"
        ) from exc
    model = _loaded(cache, name, revision, "auto")
    return TeacherForward(model, vocab_size=cache.vocab_size, pad_id=cache.plan.tokenizer.pad_id)


def cached_teacher_model(cache: Cache, place: str | None, *, device: str = "auto") -> PreTrainedModel:
    """The model itself, in the quantisation and arithmetic of the plan.

    Args:
        cache: whose.
        place: folder or id where it lies; None takes the name in the plan.
        device: as `load_model` takes it.

    Raises:
        ModelError: it is not there, or cannot be loaded.
        CacheError: another model lies there.
    """
    name = place or cache.plan.teacher.name
    return _loaded(cache, name, _identified(cache, name), device)


def _identified(cache: Cache, name: str) -> str | None:
    """The revision to load, once it is sure that the teacher lies there."""
    refuse_other_teacher(cache, name, "give that model with --teacher")
    return teacher_revision(cache, name)


def _loaded(cache: Cache, name: str, revision: str | None, device: str) -> PreTrainedModel:
    identity = cache.plan.teacher
    model = load_model(name, revision=revision, quantization=identity.quantization, dtype=identity.dtype, device=device)
    refuse_narrow_head(model, cache.vocab_size, name)
    return model
