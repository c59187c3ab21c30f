"""A chain on one screen: for each stage the teacher's cache -> the student -> one merged model, which teaches the next.

Every stage is looked at before the first one starts. A stage goes on where it was left: a cache and a training as they do
by themselves, a merged model is written whole or not at all, and what is finished is not done again.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache.files import write_file
from kdcache.cache.reader import Cache
from kdcache.cache.store import open_cache
from kdcache.chain.board import FAILED, FINISHED, RUNNING, STOPPED, Board, StageState, earlier_states, held
from kdcache.chain.ready import opened, refuse_impossible_stages, refuse_remade_cache, run_digest
from kdcache.chain.stages import expand
from kdcache.chain.table import markdown
from kdcache.devices import give_back_memory
from kdcache.errors import CacheError, ModelError, StorageError, TrainingError
from kdcache.evaluate.saved_run import Students, open_saved_run, run_score
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe
from kdcache.run_record import AFTER, RunRecord
from kdcache.student.assembly import load_student
from kdcache.student.distill import distill
from kdcache.student.merged import fold_adapter, save_whole
from kdcache.student.start import as_started
from kdcache.teacher.capture import capture
from kdcache.token_maps import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAIN_PAGE = "chain.md"


def run_chain(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    after_run: Callable[[RunRecord], Any] | None = None,
) -> Board:
    """Carry out the recipe's chain; the same call goes on with one that was stopped.

    Args:
        recipe: with a section ``chain``; its ``output`` is the chain's directory.
        progress: told in words.
        after_run: called with the record of every run that has been trained, such as `kdcache.report.write_pages`.

    Returns:
        The board: every stage with its scores, and the direct way last.

    Raises:
        KdcacheError: a stage cannot be carried out, which is found before the first one starts as far as it can be; or one
            fails. What is done stays.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise TrainingError(
            "a chain makes caches and trains students in one process: run kdcache chain without a launcher, or its stages one by one"
        )
    progress = progress or Silent()
    stages = expand(recipe)
    with held(recipe):
        board = Board(recipe, earlier_states(Path(recipe.output), stages))
        refuse_impossible_stages(board.stages)
        board.write()
        for number, state in enumerate(board.stages):
            before = None if state.stage.taught_by is None else board.stages[number - 1]
            if state.state == FINISHED and state.run is not None and state.run == run_digest(state.stage.run):
                progress.message(f"stage {state.name}: finished")
            else:
                _carry_out(board, state, before, progress, after_run or (lambda record: None))
            _drop(board, state, before, progress)
        write_file(board.path / CHAIN_PAGE, markdown(board).encode())
        return board


def _carry_out(
    board: Board,
    state: StageState,
    before: StageState | None,
    progress: Progress,
    after_run: Callable[[RunRecord], Any],
) -> None:
    """One stage from where it was left to its end."""
    stage = state.stage
    progress.message(f"stage {stage.name}: {stage.teacher} teaches {stage.student}")
    state.state, state.error = RUNNING, None
    board.write()
    try:
        _cache(board, state, before, progress)
        board.write()
        with state.timed("train"):
            record = distill(stage.recipe, resume=True, progress=progress)
        state.scores, state.run = record.scores, run_digest(stage.run)
        _release(cycles=True)
        board.write()
        after_run(record)
        if stage.merged is not None:
            _merge(state, progress)
            board.write()
        _compare(board, state, record, progress)
        state.state = FINISHED
    except BaseException as exc:
        stopped = not isinstance(exc, Exception)
        state.state, state.error = (STOPPED, None) if stopped else (FAILED, " ".join(str(exc).split())[:2000])
        raise
    finally:
        board.write()


def _cache(board: Board, state: StageState, before: StageState | None, progress: Progress) -> None:
    """The stage's cache, made or gone on with; of the first teacher it may be one that was brought from elsewhere."""
    stage, digest = state.stage, None if before is None else before.run
    cache = opened(stage.cache)
    # The merged teacher may have been dropped: a cache that is known to be its own needs it no more.
    if cache is None or (before is not None and state.taught_by != digest):
        if before is not None:
            _merge(before, progress)
        with state.timed("cache"):
            capture(stage.recipe, progress)
        _release()
        cache = open_cache(stage.cache)
        refuse_remade_cache(board.stages, cache)
    state.cache_id, state.taught_by = cache.id, digest
    state.cache_bytes = sum(shard.bytes for shard in cache.manifest.shards)
    _refuse_other_text(board, cache)


def _refuse_other_text(board: Board, cache: Cache) -> None:
    """Figures of two stages can be compared because they are of the same tokens."""
    first = open_cache(board.stages[0].stage.cache)
    ours, theirs = ([s.fingerprint for s in c.plan.data.splits] for c in (first, cache))
    if ours != theirs:
        raise CacheError(
            f"{cache.directory} holds other sequences than {first.directory}, though made from the same recipe: the data has "
            "changed in between. Bring it back, or start the chain over in another directory"
        )


def _merge(state: StageState, progress: Progress) -> None:
    """The stage's student as one 16-bit model folder, with the tokenizer of its teacher, whose words it has learnt."""
    stage = state.stage
    assert stage.merged is not None
    if state.merged is not None and state.merged == state.run and stage.merged.is_dir():
        return
    progress.message(f"stage {stage.name}: merging the student into {stage.merged}")
    with state.timed("merge"):
        student, saved = as_started(stage.student_section, stage.run), stage.run / "model"
        model: Any = load_student(student, saved) if student.lora is None else load_student(student)
        model = model.to(torch.bfloat16) if student.lora is None else fold_adapter(model, saved, torch.bfloat16)
        save_whole(model, _tokenizer(state, progress), stage.merged)
    del model
    _release()
    state.merged = state.run


def _tokenizer(state: StageState, progress: Progress) -> PreTrainedTokenizerBase:
    """The tokenizer that wrote the texts, template and all; it is the first teacher's, who may not be on this machine."""
    stage = state.stage
    while stage.taught_by is not None:
        stage = stage.taught_by
    teacher = stage.teacher_section
    try:
        return load_tokenizer(teacher.model, teacher.revision)
    except ModelError as exc:
        progress.warning(f"the merged student keeps its own tokenizer and chat template: {exc}")
        return load_tokenizer(str(state.stage.run / "model"))


def _compare(board: Board, state: StageState, record: RunRecord, progress: Progress) -> None:
    """How far the student is from the first teacher, which is what the stages and the direct way have in common."""
    first = board.stages[0]
    if state.stage.cache == first.stage.cache:
        state.kl_to_first = record.scores[AFTER]["kl_to_teacher"]
        return
    with state.timed("compare"):
        run, students = open_saved_run(state.stage.run, progress=progress), Students()
        held_against = replace(run, cache=open_cache(first.stage.cache))
        with students.after(run) as model:
            score = run_score(
                held_against, model, f"{state.name} against the first teacher", batch_size=None, progress=progress
            )
        del model
        students.release()
    state.kl_to_first = score.kl
    _release()


def _drop(board: Board, state: StageState, before: StageState | None, progress: Progress) -> None:
    """Remove what the recipe says once it has been used."""
    assert board.recipe.chain is not None
    drop = board.recipe.chain.drop
    used = [before.stage.merged] if "merged" in drop and before is not None else []
    used += [Path(state.stage.cache)] if "caches" in drop and before is not None else []
    for path in used:
        if path is None or not path.exists():
            continue
        progress.message(f"stage {state.name}: removing {path}")
        try:
            shutil.rmtree(path)
        except OSError as exc:
            raise StorageError(f"cannot remove {path}: {exc.strerror or exc}") from exc


def _release(*, cycles: bool = False) -> None:
    """Give back what the last model held; with ``cycles`` also a trainer and its model, which refer to each other."""
    if cycles or torch.cuda.is_available():
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_memory()
