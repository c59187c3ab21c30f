"""The teacher answers the prompts of a recipe; its answers are the text that its cache is made of.

prompts -> batches -> for each that is not there: decode, spool -> token rows, and the hidden states that every token came
from, so that the cache is made without a second pass of the decoder.

Batches follow from the prompts alone: the longest first, for what does not fit into memory should show at once. A run that
goes on finds the finished ones; of several workers each makes every n-th. Once the cache is complete the answers lie in
it, and are read from there should the command be given again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdcache.cache.strict_json import canonical_sha256
from kdcache.progress import Progress
from kdcache.teacher.answers import answers_of_cache, never_ends, rows_of_answers
from kdcache.teacher.decode import Answers, Sampling, answer
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.planning import Ground, PlannedCache, ground_of, plan_rows, teacher_identity, teacher_sections
from kdcache.teacher.splits import SPLITS, Prompt, SplitPrompts, SplitRows, read_prompts, read_split
from kdcache.teacher.spool import Spool
from kdcache.teacher.workers import ALONE, Worker

if TYPE_CHECKING:
    from kdcache.recipe import Recipe
    from kdcache.recipe_data import DataSection, GenerateSection

Load = Callable[[], TeacherForward]
# Prompts of which none was answered to the end before somebody is told.
_NEVER_ENDS = 8


@dataclass(frozen=True)
class Task:
    """All that is to be answered.

    Attributes:
        ground: teacher and tokenizer.
        read: splits with the responses of their data set.
        asked: splits whose prompts are answered.
        batches: pairs of a split's number in ``asked`` and a prompt's number in it.
        stop: ids that end an answer.
        spool: where finished batches lie.
    """

    data: DataSection
    ground: Ground
    read: list[SplitRows]
    asked: list[SplitPrompts]
    batches: list[list[tuple[int, int]]]
    stop: tuple[int, ...]
    spool: Spool

    @property
    def section(self) -> GenerateSection:
        """How the teacher answers."""
        return self.data.generate

    def prompts(self, batch: Sequence[tuple[int, int]]) -> list[Prompt]:
        """The prompts of a batch."""
        return [self.asked[split].prompts[i] for split, i in batch]

    def answer(
        self, teacher: TeacherForward, batch: Sequence[tuple[int, int]], on_step: Callable[[int], None]
    ) -> Answers:
        """Answer a batch; prompt and answer stay within ``data.max_length``."""
        section, ids = self.section, [p.ids for p in self.prompts(batch)]
        limits = [min(section.max_new_tokens, self.data.max_length - len(prompt)) for prompt in ids]
        sampling = Sampling(section.temperature, section.top_p, section.top_k, section.seed)
        return answer(teacher, ids, limits, sampling=sampling, stop=self.stop, on_step=on_step)


@dataclass(frozen=True)
class Generated:
    """What became of the generation: the plan over the answers, or, where other workers have not finished, how many of the
    batches are still to come; and how many this process has made, with the teacher where it was loaded."""

    planned: PlannedCache | None
    unfinished: int
    made: int
    teacher: TeacherForward | None


def prepare(recipe: Recipe, progress: Progress) -> Task:
    """Read the prompts and cut them into batches. Whatever can be refused is, before a model is loaded.

    Raises:
        KdcacheError: bad data, tokenizer, model or recipe values.
        PlanMismatchError: the cache directory belongs to another plan.
    """
    data, teacher = teacher_sections(recipe)
    ground = ground_of(recipe)
    read = [read_split(data, name, ground.tokenizer, progress) for name in SPLITS if not data.answered(name)]
    asked = [read_prompts(data, name, ground.tokenizer, progress) for name in SPLITS if data.answered(name)]
    stop = _stop_ids(ground, teacher.model, teacher.revision)
    order = [(s, i) for s, split in enumerate(asked) for i in range(len(split.prompts))]
    order.sort(key=lambda place: -len(asked[place[0]].prompts[place[1]].ids))
    size = data.generate.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    digest = canonical_sha256(
        {
            "teacher": teacher_identity(recipe, ground).model_dump(mode="json"),
            "tokenizer": ground.tokens.fingerprint,
            "settings": data.generate.model_dump(mode="json", exclude={"unfinished", "splits"}),
            "max_length": data.max_length,
            "stop": list(stop),
            "prompts": [[split.name, _digest_of(split.prompts)] for split in asked],
        }
    )
    spool = Spool.of(recipe.cache.directory, digest, [len(b) for b in batches], len(ground.tokens))
    return Task(data, ground, read, asked, batches, stop, spool)


def generate(recipe: Recipe, task: Task, load: Load, progress: Progress, worker: Worker = ALONE) -> Generated:
    """Answer what is not answered yet, and plan the cache of it all.

    Args:
        recipe: with ``data.source: generate``.
        task: of the recipe.
        load: gives the teacher; called only where something is to be answered.
        progress: told of answers, tokens per second, and what became of the prompts.
        worker: which of the batches are this process's.

    Raises:
        PlanMismatchError: the cache directory belongs to another plan.
        KdcacheError: the teacher fails, the disk is full, or no answer is left; finished batches stay.
    """
    spool = task.spool
    there = answers_of_cache(recipe, task.ground, [*task.asked, *task.read])
    if there is not None:
        return Generated(plan_rows(recipe, task.ground, there), 0, 0, None)
    own, missing = worker.shards(len(task.batches)), spool.missing()
    todo = [i for i in missing if i in own]
    for other in spool.others():
        progress.message(f"{other} holds answers to another recipe or other settings; remove it when it is not needed")
    if len(missing) < len(task.batches):
        progress.message(
            f"{len(task.batches) - len(missing)} of {len(task.batches)} batches of answers are there already"
        )
    teacher = None
    if todo:
        teacher = load()
        _answer_all(task, teacher, todo, progress)
    unfinished = [] if worker.count == 1 else spool.missing()
    if unfinished:
        return Generated(None, len(unfinished), len(todo), teacher)
    batches = [(task.spool.path(i), batch, spool.get(i)) for i, batch in enumerate(task.batches)]
    splits, states = rows_of_answers(task.data, task.ground, task.asked, batches, progress)
    by_name = {split.name: split for split in [*splits, *task.read]}
    planned = plan_rows(recipe, task.ground, [by_name[name] for name in SPLITS])
    if task.section.states == "reuse":
        planned = replace(planned, states=states)
    return Generated(planned, 0, len(todo), teacher)


def _answer_all(task: Task, teacher: TeacherForward, todo: Sequence[int], progress: Progress) -> None:
    progress.begin("answer prompts", sum(len(task.batches[i]) for i in todo), "answers")
    started, tokens, answered, ended = time.monotonic(), 0, 0, 0

    def rate() -> str:
        return f"{tokens / max(1e-9, time.monotonic() - started):,.0f} tokens/s"

    def on_step(made: int) -> None:
        nonlocal tokens
        tokens += made
        progress.advance(0, rate())

    try:
        for index in todo:
            done = task.answer(teacher, task.batches[index], on_step)
            task.spool.put(index, done, states=task.section.states == "reuse")
            told = answered >= _NEVER_ENDS
            answered, ended = answered + len(done.lengths), ended + int(done.ended.sum())
            if not told and answered >= _NEVER_ENDS and not ended:
                progress.warning(
                    f"none of the first {answered:,} answers has come to its end: {never_ends(task.data, task.stop)}"
                )
            progress.advance(len(done.lengths), rate())
    finally:
        progress.end()


def _digest_of(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt.ids).to_bytes(4, "little") + prompt.ids.astype("<u4").tobytes())
    return digest.hexdigest()


def _stop_ids(ground: Ground, model: str, revision: str | None) -> tuple[int, ...]:
    """The tokenizer's end and those that the model itself stops at: chat models have several."""
    import transformers

    found = {int(ground.tokenizer.eos_token_id)}
    try:
        own = transformers.GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        own = None  # many models have none
    found |= {own} if isinstance(own, int) else set(own or ())
    return tuple(sorted(i for i in found if i < len(ground.tokens)))
