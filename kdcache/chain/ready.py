"""All stages of a chain looked at before the first one starts: what the last would refuse should not wait for days.

What can be known without a model is: that the recipes are possible, that all tokenizers number tokens alike, that every
student can be made and has a column for every token, that the caches that are there fit, and that the runs that are there
are these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache.reader import Cache
from kdcache.cache.store import open_cache
from kdcache.chain.board import StageState
from kdcache.chain.stages import Stage
from kdcache.errors import CacheError, IncompleteCacheError, KdcacheError, ModelError, RecipeError, TrainingError
from kdcache.model_identity import identify
from kdcache.progress import Silent
from kdcache.recipe import Recipe
from kdcache.recipe_student import StudentSection
from kdcache.recipe_training import span_of
from kdcache.run_record import RECORD_FILE, read_json, record_digest
from kdcache.student.agreement import refuse_unfit
from kdcache.student.arguments import training_arguments
from kdcache.student.initial import refuse_impossible
from kdcache.student.parameters import (
    count_parameters,
    outline,
    read_config,
    refuse_other_targets,
    untrained_bytes,
)
from kdcache.student.record import RunDirectory
from kdcache.teacher.planning import plan_cache
from kdcache.token_maps import load_tokenizer, refuse_other_tokens, token_map


@dataclass(frozen=True)
class StageEstimate:
    """What a stage takes: parameters of the student, bytes of both models in memory (the student's with gradients and
    optimizer; None where that is not known), positions and bytes of the cache."""

    name: str
    parameters: int
    teacher_bytes: int
    student_bytes: int | None
    positions: int
    cache_bytes: int


def opened(directory: str) -> Cache | None:
    """A cache, None where it is not there yet or not whole.

    Raises:
        CacheError: something else lies there, or it is damaged.
    """
    try:
        return open_cache(directory)
    except IncompleteCacheError:
        return None
    except CacheError:
        if not Path(directory).exists() or not any(Path(directory).iterdir()):
            return None
        raise


def refuse_impossible_stages(states: list[StageState]) -> None:
    """Hold every stage against the first teacher, its own cache and its own run, as far as these are there.

    Raises:
        KdcacheError: a stage cannot be carried out; it is named.
    """
    tokens = _named(states[0].stage, lambda: first_tokens(states[0].stage))
    for number, state in enumerate(states):
        before = None if state.stage.taught_by is None else states[number - 1]

        def look(state: StageState = state, before: StageState | None = before) -> None:
            _refuse_student(state.stage, tokens)
            _refuse_cache(state, before)
            _refuse_run(state.stage)

        _named(state.stage, look)


def first_tokens(stage: Stage) -> list[str | None]:
    """Tokens by id, of the first teacher's cache or, before it is made, of the teacher.

    Raises:
        KdcacheError: neither can be read.
    """
    cache = opened(stage.cache)
    if cache is not None:
        return cache.vocabulary()
    teacher = stage.teacher_section
    tokenizer = load_tokenizer(teacher.model, teacher.revision)
    return token_map(tokenizer, head_width=identify(teacher.model, teacher.revision).head_width).tokens


def is_stale(state: StageState, before: StageState | None) -> bool:
    """Whether a stage learnt from a student that has been trained again since."""
    return state.taught_by is not None and before is not None and state.taught_by != run_digest(before.stage.run)


def refuse_remade_cache(states: list[StageState], cache: Cache) -> None:
    """Hold a cache that has just been made against what its stages recorded: they may have learnt from an earlier one.

    Raises:
        TrainingError: a stage learnt from another one; it is named.
    """
    for state in states:
        if Path(state.stage.cache) == cache.directory:

            def look(state: StageState = state) -> None:
                _refuse_other_cache(state, cache)

            _named(state.stage, look)


def _refuse_other_cache(state: StageState, cache: Cache) -> None:
    """A stage that has begun to learn should have learnt from the cache that lies there: figures of a chain are of one first
    teacher, and its cache may have been made anew from a model that has changed.

    Raises:
        TrainingError: it learnt from another one.
    """
    if state.cache_id not in (None, cache.id) and state.stage.run.is_dir():
        raise TrainingError(
            f"it learnt from the cache {str(state.cache_id)[:12]}, and {cache.directory} is {cache.id[:12]} by now; bring the "
            f"earlier one back there, or remove {state.stage.run.parent} and do this stage again"
        )


def run_digest(run: Path) -> str | None:
    """Which training a finished run holds; None where there is none."""
    return record_digest(run) if (run / RECORD_FILE).exists() else None


def estimates(recipe: Recipe, stages: list[Stage]) -> list[StageEstimate]:
    """What each stage takes, without loading a model: models are counted from their configurations, the data is tokenised
    where the first cache is not there yet.

    Raises:
        KdcacheError: the data or a configuration cannot be read.
    """
    cache = opened(stages[0].cache)
    plan = plan_cache(stages[0].recipe, Silent()).plan if cache is None else cache.plan
    positions = sum(split.positions for split in plan.data.splits)
    found = []
    for stage in stages:
        student = stage.student_section
        counted = count_parameters(outline(read_config(student), student), student, stage.recipe.training.optimizer)
        base, state = counted.base_bytes + counted.adapter_bytes + counted.gradient_bytes, counted.state_bytes
        taught = stage.recipe.selection.bytes_per_position if _has_budget(stage.recipe) else 0.0
        found.append(
            StageEstimate(
                stage.name,
                counted.total - counted.trained if student.lora is not None else counted.total,
                _teacher_bytes(stage),
                None if state is None else base + state,
                positions,
                round(taught * positions),
            )
        )
    return found


def _teacher_bytes(stage: Stage) -> int:
    """The teacher's weights as it is loaded; that of a later stage has the shape of the student before."""
    section = stage.teacher_section
    if stage.taught_by is None:
        like = StudentSection(model=section.model, revision=section.revision)
    else:
        like = stage.taught_by.student_section
    return untrained_bytes(like.model_copy(update={"quantization": section.quantization, "dtype": section.dtype}))


def _has_budget(recipe: Recipe) -> bool:
    return recipe.selection.method.startswith("threshold") and recipe.selection.floors is None


def _named(stage: Stage, look: Callable[[], list[str | None] | None]) -> list[str | None]:
    try:
        return look() or []
    except KdcacheError as exc:
        raise type(exc)(f"stage {stage.name}: {exc}") from exc


def _refuse_student(stage: Stage, tokens: list[str | None]) -> None:
    student, training = stage.student_section, stage.recipe.training
    tokenizer = load_tokenizer(student.model, student.revision)
    refuse_other_tokens(token_map(tokenizer), tokens, student.model)
    refuse_impossible(student)
    width = int(read_config(student).get_text_config().vocab_size)
    if width < len(tokens):
        raise ModelError(
            f"{student.model} has {width:,} output columns and the teacher {len(tokens):,} tokens; take a student of the same family"
        )
    refuse_other_targets(student)
    training_arguments(
        training, device=student.device, seed=stage.recipe.seed, checkpoints=RunDirectory(stage.run).checkpoints
    )


def _refuse_cache(state: StageState, before: StageState | None) -> None:
    stage = state.stage
    if is_stale(state, before):
        assert before is not None
        raise TrainingError(
            f"it learnt from an earlier student of stage {before.name}, which has been removed or trained again since; to do "
            f"this stage again as well remove {stage.run.parent}"
        )
    cache = opened(stage.cache)
    if cache is not None:
        _refuse_other_cache(state, cache)
        refuse_unfit(stage.recipe, cache)
        return
    lowest, declared = span_of(stage.recipe.loss.temperature)[0], min(stage.recipe.selection.temperatures)
    if lowest < declared:
        raise RecipeError(
            f"loss.temperature {lowest:g} is below the smallest of selection.temperatures, {declared:g}; raise it, or declare it "
            "there"
        )


def _refuse_run(stage: Stage) -> None:
    """A run that is there should have the settings of the stage; nothing is written."""
    if not stage.run.is_dir():
        return
    try:
        # Its cache may have been dropped: the settings alone are held against those of the run.
        cache_id = str(read_json(stage.run / "started.json")["cache_id"])
    except (OSError, ValueError, KeyError, TypeError):
        cache_id = ""
    RunDirectory(stage.run).prepare(stage.recipe, cache_id, resume=True, overwrite=False)
