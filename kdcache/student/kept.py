"""What a process keeps from one student to the next: opened caches, the loaded base, tokenizers and scores.

Whatever is kept is what would be made again: shards stay verified as long as their files stay the same, a base is kept only if
its adapter came off again and left every weight as it was, and scores only for the very same model on the very same batches. A
student trained by a process that has trained others is the student that a process of its own would have trained.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache.mixture import open_caches
from kdcache.cache.reader import Cache
from kdcache.evaluate.perplexity import Score
from kdcache.progress import Progress
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.student.assembly import load_student
from kdcache.student.processes import loaded_whole
from kdcache.student.start import BASE, MadeBase, made_base
from kdcache.token_maps import load_tokenizer, refuse_other_tokens, token_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Caches that are held open at a time; a sweep over more of them opens them again.
_CACHES = 4


class Kept:
    """Give one to every call of `distill` that a process makes one after the other; a fresh one keeps nothing yet."""

    def __init__(self) -> None:
        self._caches: dict[tuple[tuple[tuple[str, float], ...], int], Cache] = {}
        self._base: tuple[tuple[Any, ...], PreTrainedModel] | None = None
        self._scores: dict[tuple[Any, ...], Score] = {}
        self._tokenizers: dict[tuple[str, str | None], PreTrainedTokenizerBase] = {}
        self._agreed: set[tuple[str, str, str | None]] = set()
        self._passed: set[tuple[Any, ...]] = set()
        self._started: tuple[tuple[Any, ...], Path] | None = None

    def cache(self, recipe: Recipe, progress: Progress) -> Cache:
        """The recipe's cache or mixture of caches, with the shards that are verified already.

        Raises:
            CacheError: it is incomplete or damaged.
        """
        # As many as are mixed, the one that comes next, and one that is scored.
        key = recipe.cache.places, recipe.training.shuffle_shards + 2
        if key not in self._caches:
            if len(self._caches) >= _CACHES:
                del self._caches[next(iter(self._caches))]
            self._caches[key] = open_caches(key[0], keep=key[1], progress=progress)
        return self._caches[key]

    def tokenizer(self, student: StudentSection, cache: Cache) -> PreTrainedTokenizerBase:
        """The student's tokenizer, once it is sure that it numbers tokens as the cache does.

        Raises:
            TokenizerError: it is missing, or another than the cache's.
        """
        key = student.model, student.revision
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(*key)
        if (cache.id, *key) not in self._agreed:
            refuse_other_tokens(token_map(self._tokenizers[key]), cache.vocabulary(), student.model)
            self._agreed.add((cache.id, *key))
        return self._tokenizers[key]

    def check(self, key: tuple[Any, ...], refuse: Callable[[], None]) -> None:
        """Run a check once, under a key that says all it depends on.

        Raises:
            KdcacheError: what the check raises.
        """
        if key not in self._passed:
            refuse()
            self._passed.add(key)

    def start(self, student: StudentSection, run: Path, *, going_on: bool) -> MadeBase:
        """The made student of a run in its folder; see `made_base`.

        Raises:
            KdcacheError: it cannot be made or written.
        """
        key = _base_key(student)
        like = self._started[1] if self._started is not None and self._started[0] == key else None
        made = made_base(student, run, going_on=going_on, like=like)
        self._started = key, run / BASE
        return made

    def take_base(self, student: StudentSection, made: MadeBase | None = None) -> PreTrainedModel:
        """The student without its adapter: the one that was put back, or loaded, a made one from its folder. Until
        it is put back it is the caller's, so that an error in between loses it and not its weights' good name.

        Raises:
            ModelError: it cannot be loaded.
        """
        kept, self._base = self._base, None
        if kept is not None and kept[0] == _base_key(student, made):
            return kept[1]
        # Not two of them in memory at once.
        del kept
        _forget_optimizers()
        with loaded_whole():
            model = load_student(student) if made is None else load_student(student, made.folder)
        if made is not None and torch.distributed.is_initialized():
            # The first process soon gives the folder its place; none should still be reading it then.
            torch.distributed.barrier()
        return model

    def put_back(self, model: Any, student: StudentSection, made: MadeBase | None = None) -> None:
        """Take the adapter off a trained student and keep its base; nothing is kept of one that was trained in every weight."""
        _forget_optimizers()
        if student.lora is None:
            return
        base = model.unload()
        # The next row may do without, and neither switches off by itself.
        getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
        if getattr(base, "_require_grads_hooks", None) or getattr(base, "_require_grads_hook", None):
            base.disable_input_require_grads()
        base.eval().requires_grad_(False)
        self._base = _base_key(student, made), base

    def score(self, key: tuple[Any, ...], measure: Callable[[], Score]) -> Score:
        """The score kept under a key that says all it depends on, or measured now."""
        if key not in self._scores:
            self._scores[key] = measure()
        return self._scores[key]

    def release(self) -> None:
        """Collect what the last training left: a trainer and its model refer to each other, and hold the device's memory."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def end_readers(trainer: Any) -> None:
    """End the processes that read the batches of a training that is over. Left to the garbage collector, which takes their
    queues down first, they are waited for in vain for five seconds."""
    loader = trainer.callback_handler.train_dataloader
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()


def untrained_key(
    recipe: Recipe, student: StudentSection, cache: Cache, batch_size: int, made: MadeBase | None = None
) -> tuple[Any, ...]:
    """All that the score of a student before its training depends on.

    LoRA begins as a product with zero, whatever its rank and scale; DoRA goes through the norms of the weights, and rounds.
    """
    lora = student.lora
    adapter = None if lora is None else lora.model_dump_json() if lora.dora else "zero"
    training = recipe.training
    return ("before", cache.id, *_base_key(student, made), adapter, batch_size, training.max_length, training.precision)


def _base_key(student: StudentSection, made: MadeBase | None = None) -> tuple[Any, ...]:
    """Everything of the section but its adapter, and what was made by it: the model it names may have changed since."""
    return student.model_dump_json(exclude={"lora"}), None if made is None else made.identity


def _forget_optimizers() -> None:
    """bitsandbytes remembers which weights of the last model wanted 32-bit states by their place in its optimizer, and would
    apply that to the next model's."""
    import bitsandbytes

    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
