"""Fidelity of a cache, or of settings that a cache could be made with: one pass of the teacher, every setting measured.

The sample's hidden states are held, so the decoder runs once; every setting is selected, encoded, compressed and decoded
as a cache would be, and then compared with the full distributions.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.cache.codec import ShardContent, decode, encode
from kdcache.cache.reader import Cache
from kdcache.cache.rows import SparseRows, concatenate
from kdcache.cache.selection import SelectionPlan
from kdcache.cache.shard import pack, part_sizes
from kdcache.cache.store import open_cache
from kdcache.data.tokens import TokenRow
from kdcache.errors import CacheError, RecipeError
from kdcache.evaluate.cached_teacher import cached_teacher
from kdcache.evaluate.fidelity import TEMPERATURES, Fidelity, FidelityMeter
from kdcache.models import load_model, refuse_narrow_head
from kdcache.progress import Progress, Silent
from kdcache.student.initial import describe_init, is_made, make_student, refuse_impossible
from kdcache.teacher.budget import find_floors, sample_content
from kdcache.teacher.capture import load_teacher, settle_floors
from kdcache.teacher.forward import LOGIT_BYTES, TeacherForward
from kdcache.teacher.planning import PlannedCache, plan_cache, teacher_sections
from kdcache.teacher.sample import HiddenSample, hidden_sample, sample_rows, shard_content
from kdcache.teacher.select import Selection, select
from kdcache.token_maps import TokenMap, load_tokenizer, refuse_other_tokens, token_map

if TYPE_CHECKING:
    from kdcache.recipe import Recipe

CHOSEN = "chosen"
# Nats that another GPU or library may move a label's log-probability by, on average.
_SAME_TEACHER = 0.1
# Settings beside the chosen one: what they change in the plan's selection.
COMPARED: dict[str, dict[str, Any]] = {
    **{
        f"sampling {size} B": {"method": "threshold_sampling", "bytes_per_position": float(size)}
        for size in (24, 42, 64, 96, 192)
    },
    "threshold 64 B": {"method": "threshold", "bytes_per_position": 64.0, "k": 4096},
    "top-k 16": {"method": "top_k", "k": 16},
    "top-k 64": {"method": "top_k", "k": 64},
    "top-k 128": {"method": "top_k", "k": 128},
}


@dataclass(frozen=True)
class SettingReport:
    """One setting: its name, bytes per position in all and by part, entries per position, figures by temperature."""

    name: str
    bytes_per_position: float
    parts: dict[str, float]
    entries: float
    figures: list[Fidelity]


@dataclass(frozen=True)
class FidelityReport:
    """What was measured: on how many positions of which teacher, and every setting, the chosen one first."""

    teacher: str
    student: str | None
    positions: int
    declared: tuple[float, ...]
    settings: list[SettingReport]

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        return f"{self.positions:,} positions of {self.teacher}" + (f", student {self.student}" if self.student else "")

    def as_record(self) -> dict[str, Any]:
        """Plain values, for fidelity.json."""
        return asdict(self)


def cache_fidelity(
    directory: str | Path,
    *,
    teacher: str | None,
    student: str | None,
    positions: int,
    compare: bool,
    progress: Progress | None = None,
) -> FidelityReport:
    """What a finished cache holds, against its teacher run again on some of its sequences.

    Args:
        directory: the cache.
        teacher: folder or id of the teacher; None takes the name in the plan.
        student: folder or id of a student for the gradient, or None.
        positions: about how many to measure.
        compare: measure other settings beside it.
        progress: told about long work.

    Raises:
        KdcacheError: no such cache, or the teacher is not the one it was made with.
    """
    progress = progress or Silent()
    cache = open_cache(directory, progress=progress)
    rows, stored = _cached_sample(cache, positions)
    plan, forward = cache.plan, cached_teacher(cache, teacher)
    planned = PlannedCache(plan, (rows,), TokenMap(cache.vocabulary(), plan.tokenizer.fingerprint))
    sample = hidden_sample(forward, rows, batch_tokens=plan.teacher.batch_tokens)
    order = {id(row): i for i, row in enumerate(rows)}
    content = shard_content(sample.rows, concatenate([stored[order[id(row)]] for row in sample.rows]))
    again = sample.select(lambda logits, labels, _: select(logits, labels, Selection("top_k", (1.0,), k=1)))
    difference = float(np.abs(again.label_log_prob - content.rows.label_log_prob).mean())
    if difference > _SAME_TEACHER:
        raise CacheError(
            f"{teacher or plan.teacher.name} is not the teacher of {directory}: its log-probabilities of the labels are off by {difference:.2f} nats "
            "on average; give the cache's teacher with --teacher"
        )
    return _report(planned, sample, content, student=student, compare=compare, progress=progress)


def recipe_fidelity(
    recipe: Recipe, *, student: str | None, positions: int, compare: bool, progress: Progress | None = None
) -> FidelityReport:
    """What a recipe's cache would hold, before it is made. Arguments as `cache_fidelity`; the recipe's student by default.

    Raises:
        KdcacheError: as `capture` would.
    """
    progress = progress or Silent()
    if student is None and recipe.student is not None:
        refuse_impossible(recipe.student)
    planned, forward = settle_floors(recipe, plan_cache(recipe, progress), progress, writing=False)
    forward = forward or load_teacher(recipe, planned)
    _, section = teacher_sections(recipe)
    rows = sample_rows(planned, batch_tokens=section.batch_tokens, positions=positions)
    sample = hidden_sample(forward, rows, batch_tokens=section.batch_tokens)
    content = sample_content(planned, sample)
    if student is not None or recipe.student is None or not is_made(recipe.student):
        student = student or (None if recipe.student is None else recipe.student.model)
        return _report(planned, sample, content, student=student, compare=compare, progress=progress)
    with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
        made = Path(folder) / "student"
        make_student(recipe.student, made)
        report = _report(planned, sample, content, student=str(made), compare=compare, progress=progress)
    return replace(report, student=describe_init(recipe.student))


def _report(
    planned: PlannedCache,
    sample: HiddenSample,
    chosen: ShardContent,
    *,
    student: str | None,
    compare: bool,
    progress: Progress,
) -> FidelityReport:
    # What can be refused is, before anything takes long.
    if student is not None:
        refuse_other_tokens(token_map(load_tokenizer(student)), planned.tokens.tokens, student)
    contents, plans = {CHOSEN: chosen}, {CHOSEN: planned}
    for name, changes in COMPARED.items() if compare else ():
        try:
            plans[name] = _changed(planned, changes, sample, progress)
        except RecipeError as exc:
            progress.message(f"{name}: {exc}")
            continue
        contents[name] = sample_content(plans[name], sample)
    stored, sizes = {}, {}
    for name, content in contents.items():
        plan = plans[name].plan
        arrays = encode(content, values=plan.selection.values)
        sizes[name] = _sizes(arrays, len(pack(arrays, plan_digest=plan.digest, index=0)), len(content.rows))
        stored[name] = decode(arrays, design=plan.design(0), values=plan.selection.values).rows
    student_forward = None
    if student is not None:
        model = load_model(student, quantization="none", dtype="float32", device=sample.teacher.device.type)
        refuse_narrow_head(model, sample.teacher.head.width, student)
        student_forward = TeacherForward(model, vocab_size=sample.teacher.head.width, pad_id=sample.teacher.pad_id)
    temperatures = tuple(sorted({*TEMPERATURES, *planned.plan.selection.temperatures}))
    meter = FidelityMeter(temperatures, None if student_forward is None else student_forward.head)
    progress.begin("fidelity", len(sample), "positions")
    try:
        _measure(meter, sample, stored, student_forward, progress)
    finally:
        progress.end()
    reports = [
        SettingReport(
            name=name,
            bytes_per_position=sizes[name]["total"],
            parts={k: v for k, v in sizes[name].items() if k != "total"},
            entries=rows.entries / max(1, int(rows.kept.sum())),
            figures=meter.results(name),
        )
        for name, rows in stored.items()
    ]
    return FidelityReport(
        planned.plan.teacher.name, student, meter.positions, planned.plan.selection.temperatures, reports
    )


@torch.inference_mode()
def _measure(
    meter: FidelityMeter,
    sample: HiddenSample,
    stored: dict[str, SparseRows],
    student: TeacherForward | None,
    progress: Progress,
) -> None:
    head = sample.teacher.head
    # Several dense arrays of a chunk's size live at once.
    declared = stored[CHOSEN].design.temperatures
    only = {name: declared for name in stored if name != CHOSEN}
    chunk, start = max(1, LOGIT_BYTES // (16 * head.width)), 0
    for members, hidden_PD, labels_P in sample.hidden:
        of_student = None if student is None else student.hidden(members)[0]
        for first in range(0, len(labels_P), chunk):
            last = min(first + chunk, len(labels_P))
            meter.add(
                head.logits(hidden_PD[first:last]),
                {name: rows.slice(start + first, start + last) for name, rows in stored.items()},
                None if of_student is None else of_student[first:last],
                only=only,
            )
            progress.advance(last - first)
        start += len(labels_P)


def _changed(planned: PlannedCache, changes: dict[str, Any], sample: HiddenSample, progress: Progress) -> PlannedCache:
    """The plan with another selection, its floors found on the sample."""
    threshold = str(changes["method"]).startswith("threshold")
    temperatures = planned.plan.selection.temperatures
    base = {"floors": (0.5,) * len(temperatures) if threshold else (), "bytes_per_position": None, "tail_logits": True}
    selection = SelectionPlan(**{**planned.plan.selection.model_dump(), **base, **changes})
    if selection.method == "top_k":
        selection = selection.model_copy(update={"k": min(selection.k, planned.plan.tokenizer.vocab_size)})
    other = replace(planned, plan=planned.plan.model_copy(update={"selection": selection}))
    return find_floors(other, sample, progress=Silent()) if threshold else other


def _cached_sample(cache: Cache, positions: int) -> tuple[list[TokenRow], list[SparseRows]]:
    """Evenly spread sequences of the first split, and their rows."""
    split = cache.split(cache.plan.data.splits[0].name)
    count = min(len(split), max(1, round(positions * len(split) / split.summary.positions)))
    picked = [int((i + 0.5) * len(split) / count) for i in range(count)]
    sequences = [split[i] for i in picked]
    rows = [TokenRow(i, s.token_ids, s.targets) for i, s in zip(picked, sequences, strict=True)]
    return rows, [s.rows for s in sequences]


def _sizes(arrays: Any, whole: int, positions: int) -> dict[str, float]:
    """Bytes per position: the whole shard, and its parts."""
    sizes = {part: size / positions for part, size in part_sizes(arrays).items()}
    return {"total": whole / positions, **sizes}
