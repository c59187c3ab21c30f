"""``kdcache export`` on one screen: a finished run becomes a folder with its student in the forms that were asked for.

refuse what can be refused -> merge -> quantise, write GGUF, copy the adapter -> load each again and compare -> card -> rename.

Everything is made in a folder beside OUT, which is renamed when it is whole. One that was stopped or failed is gone on with:
forms that are there stay.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache.card import HUB_ID
from kdcache.cache.files import flush, write_file
from kdcache.cache.transfer import refuse_full_disk
from kdcache.errors import CacheError, ModelError, TransferError
from kdcache.evaluate.saved_run import SavedRun, first_student, open_saved_run, trained_recipe
from kdcache.evaluate.saved_student import refuse_missing_student
from kdcache.export.card import licence_of, model_card
from kdcache.export.folder import CARD, FORMAT, MERGED, earlier, put_in_place, record_finished, remember, working_folder
from kdcache.export.formats import Form, chosen_forms, refuse_unpublished_base
from kdcache.export.forms import Maker, adapter_base
from kdcache.progress import Progress, Silent
from kdcache.recipe_student import StudentSection
from kdcache.reinforce_record import load_trained
from kdcache.run_record import RunRecord, is_amount, record_digest
from kdcache.student.initial import is_made
from kdcache.student.start import described_base

# A form with 16-bit weights, or half-precision ones, is the run's student up to rounding.
_SAME = ("merged", "gguf-f16")
_SAME_KL = 1e-2


@dataclass(frozen=True)
class Exported:
    """A finished export: its folder, and the rows of its table by form; the run's own row comes first where it was compared."""

    folder: Path
    rows: dict[str, dict[str, Any]]


def export(
    run: Path,
    out: Path,
    forms: Sequence[str],
    *,
    cache: str | None = None,
    compare: bool = True,
    base_model: str | None = None,
    licence: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Export a finished run.

    Args:
        run: its directory.
        out: a folder that is not there, or is empty, or holds an export. With one form its files lie in it, with several each
            in a folder of its own.
        forms: names in `kdcache.export.formats.FORMS`.
        cache: directory or URL of the run's cache, where it is not where the recipe says.
        compare: load every form again and hold it against the run on the cache's validation split.
        base_model: the base's id on the Hub, for the card and the adapter; None for the name in the recipe.
        licence: for the card; None for the base's, if that is known.
        overwrite: replace an earlier export in ``out``.
        progress: told about long work.

    Raises:
        KdcacheError: an unfinished run, a missing base or cache, a form it cannot have, a folder that holds something else, a
            disk that is full or cannot be written. ``out`` is then as it was.
    """
    progress = progress or Silent()
    # What a link points to is replaced, never the link; a bare "." has no name beside which something could be made.
    out = out.resolve()
    record = load_trained(run)
    student = trained_recipe(record)[1]
    refuse_missing_student(run, student)
    origin = first_student(record)
    wanted = chosen_forms(forms, run, student)
    refuse_unpublished_base(wanted, run, origin)
    if base_model is not None and HUB_ID.fullmatch(base_model) is None:
        raise ModelError(f"expected --base-model USER/NAME, an id on the Hub, found {base_model}")
    digest = record_digest(run)
    identity = {
        "format": FORMAT, "kdcache": __version__, "run_sha256": digest, "forms": [f.name for f in wanted],
        "compared": compare, "base_model": base_model, "license": licence,
    }  # fmt: skip
    if (found := earlier(out, identity, overwrite=overwrite)) is not None:
        progress.message(f"{out} holds this export, finished")
        return Exported(out, found)
    maker = Maker(run, student, wanted, base_model or adapter_base(origin), progress)
    maker.check()
    saved = _compared_run(run, cache, progress) if compare else None
    if saved is None:
        progress.warning("the forms are not compared with the run (--no-compare): only their sizes will be known")
    beside = out.with_name(out.name + ".partial")
    with working_folder(beside, identity, progress) as rows:
        _refuse_full(beside, record, wanted)
        done = _make(maker, wanted, beside, rows, saved, progress)
        if saved is not None:
            done = _ordered(done, wanted)
            _warn_of_others(done, progress)
        _finish(run, beside, done, identity, record, origin, saved, base_model=base_model, licence=licence)
        put_in_place(beside, out, identity, overwrite=overwrite, progress=progress)
    return Exported(out, done)


def _make(
    maker: Maker,
    wanted: list[Form],
    beside: Path,
    rows: dict[str, dict[str, Any]],
    saved: SavedRun | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Make the forms that are not there yet, and measure those that are not measured; remembered one by one."""
    from kdcache.export.compare import compared, loaded, reference_of

    for form in wanted:
        if form.name not in rows:
            progress.message(f"making {form.name}: {form.what}")
            rows[form.name] = maker.make(form, beside)
            remember(beside, rows)
    lacking = [] if saved is None else [f for f in wanted if "kl_to_run" not in rows[f.name]]
    if saved is not None and (lacking or "run" not in rows):
        reference = reference_of(saved, progress)
        rows["run"] = {**reference.score.as_record(), "tokens_per_second": reference.tokens_per_second}
        for form in lacking:
            try:
                with loaded(saved, form, beside / form.name) as model:
                    rows[form.name] |= compared(saved, reference, model, form.name, progress)
            except ModelError:
                # Finished, but not what it should be: made again the next time.
                shutil.rmtree(beside / form.name, ignore_errors=True)
                raise
            remember(beside, rows)
    return rows


def _finish(
    run: Path,
    beside: Path,
    rows: dict[str, dict[str, Any]],
    identity: dict[str, Any],
    record: RunRecord,
    origin: StudentSection,
    saved: SavedRun | None,
    *,
    base_model: str | None,
    licence: str | None,
) -> None:
    """Leave in the folder what is to be there, with the card, readable for others, and on the disk.

    ``origin`` is the student's section as the distillation had it.
    """
    names = identity["forms"]
    if MERGED not in names:
        shutil.rmtree(beside / MERGED, ignore_errors=True)
    for name in names:
        (beside / name / CARD).unlink(missing_ok=True)
        if rows[name].get("file"):
            # What was needed to load the file again is in it.
            (beside / name / "config.json").unlink(missing_ok=True)
    if len(names) == 1:
        for path in list((beside / names[0]).iterdir()):
            path.rename(beside / path.name)
        (beside / names[0]).rmdir()
    base, made = base_model or origin.model, _made(run, record, origin)
    teacher, datasets = _sources(record, saved)
    random = origin.init is not None and origin.init.method == "scale"
    # Random weights have nothing of the model that their shape is after.
    known = None if random else licence_of(base)
    card = model_card(
        record, rows, base=base if base_model else adapter_base(origin), licence=licence or known, teacher=teacher,
        datasets=datasets, single=len(names) == 1, made=made, based=not random,
    )  # fmt: skip
    write_file(beside / CARD, card.encode())
    record_finished(beside, rows, identity)
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(beside.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        flush(path)


def _made(run: Path, record: RunRecord, origin: StudentSection) -> str | None:
    """What was made of the origin's model for the student to start from; None where it started from that model as it is."""
    if not is_made(origin):
        return None
    # The base of a reinforced student lies in the run that was distilled.
    folder = run if "distilled_student" not in record.values else Path(trained_recipe(record)[1].model).parent
    return described_base(folder) or "a student made of it"


def _sources(record: RunRecord, saved: SavedRun | None) -> tuple[str | None, list[str]]:
    """Name of the teacher and ids of the data sets: from the cache, or without it as far as the run's recipe has them."""
    teacher: str | None
    if saved is not None:
        teacher, used = saved.cache.plan.teacher.name, [(s.source, s.revision) for s in saved.cache.plan.data.splits]
    else:
        recipe = record.values["recipe"]
        teacher = (recipe.get("teacher") or {}).get("model")
        splits = [(recipe.get("data") or {}).get(split) or {} for split in ("train", "validation")]
        used = [(split.get("path", ""), split.get("revision")) for split in splits]
    # A local folder can look like an id too; it has no revision.
    return teacher, sorted({name for name, revision in used if revision and HUB_ID.fullmatch(name)})


def _compared_run(run: Path, cache: str | None, progress: Progress) -> SavedRun:
    """The run with its cache, which it is to be compared on.

    Raises:
        CacheError, TransferError: the cache is not there, or damaged.
    """
    try:
        return open_saved_run(run, cache=cache, progress=progress)
    except (CacheError, TransferError) as exc:
        raise type(exc)(f"{exc}; or leave the comparison out with --no-compare") from exc


def _refuse_full(beside: Path, record: RunRecord, wanted: list[Form]) -> None:
    """Whether the forms fit onto the disk, as far as it can be said before."""
    sizes = record.values.get("parameters")
    count = sizes.get("total") if isinstance(sizes, dict) else None
    count = count if isinstance(count, int | float) and is_amount(count) else 0
    merged = 0.0 if any(f.name == MERGED for f in wanted) or not any(f.quantization or f.gguf for f in wanted) else 2.0
    refuse_full_disk(beside, int(count * (merged + sum(f.bytes_per_parameter for f in wanted))))


def _warn_of_others(rows: dict[str, dict[str, Any]], progress: Progress) -> None:
    for name in _SAME:
        if (kl := rows.get(name, {}).get("kl_to_run", 0.0)) > _SAME_KL:
            progress.warning(
                f"{name} is not the run's student: its distributions are {kl:.2g} nats from the run's, where rounding makes less than "
                f"{_SAME_KL:g}; has something in the run directory or in its base been changed?"
            )


def _ordered(rows: dict[str, dict[str, Any]], wanted: list[Form]) -> dict[str, dict[str, Any]]:
    return {"run": rows["run"], **{f.name: rows[f.name] for f in wanted}}
