"""Teacher and student at work: speed, memory and size on disk, each variant measured in a process of its own.

run.json -> which models there are to compare -> a process for each -> RUN/inference.json.

A student with an adapter is measured as it was trained, merged into bfloat16, and merged and quantised again to 8 and to 4
bits; a fully trained one as it was saved, in 8 and in 4 bits. A variant that fails is a row that says why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache.files import write_file
from kdcache.errors import ModelError
from kdcache.evaluate.saved_run import trained_recipe
from kdcache.evaluate.saved_student import refuse_missing_student
from kdcache.models import effective_dtype, first_line, refuse_missing_folder
from kdcache.progress import Progress, Silent
from kdcache.recipe import Recipe, TeacherSection
from kdcache.recipe_student import StudentSection
from kdcache.reinforce_record import load_trained
from kdcache.run_record import INFERENCE_FILE, record_digest
from kdcache.student.record import hardware
from kdcache.student.start import as_started

FORMAT = "kdcache-inference"
FIGURES = (
    "tokens_per_second", "tokens_per_second_min", "tokens_per_second_max",
    "time_to_first_token", "time_to_first_token_min", "time_to_first_token_max",
    "memory_bytes", "memory_of", "libraries_bytes", "disk_bytes", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What every variant has to do.

    Attributes:
        batch_size: prompts at a time.
        prompt_tokens: length of each.
        new_tokens: generated for each.
        repeats: measured, after one that is not.
    """

    batch_size: int = 1
    prompt_tokens: int = 64
    new_tokens: int = 64
    repeats: int = 5


@dataclass(frozen=True)
class Variant:
    """A model to be measured: keyword arguments of `load_model`, its adapter, and the autocast it is used in."""

    name: str
    load: dict[str, Any]
    adapter: str | None = None
    precision: str | None = None
    merged: bool = False


class InferenceBench:
    """Measures runs one after another; what several share (their teacher) is measured once.

    Args:
        workload: what every variant has to do.
        teacher: folder or id to take instead of the recipe's teacher.
        progress: told about every variant.
    """

    def __init__(
        self, workload: Workload | None = None, *, teacher: str | None = None, progress: Progress | None = None
    ) -> None:
        self.workload = workload or Workload()
        self._teacher = teacher
        self._progress = progress or Silent()
        self._known: dict[str, dict[str, Any]] = {}

    def check(self, run: Path) -> Recipe:
        """The recipe of a finished run whose models are there, without loading one.

        Raises:
            TrainingError: no finished run, one without a student, or one whose recipe this version does not read.
            ModelError: the saved student, its base or the wanted teacher is not there, or the student takes no text this long.
        """
        recipe, student = trained_recipe(load_trained(run))
        if self._teacher is not None:
            refuse_missing_folder(self._teacher)
        refuse_missing_student(run, student)
        self._refuse_long(as_started(student, run).model if student.lora is not None else str(run / "model"))
        return recipe

    def run(self, run: Path) -> dict[str, Any]:
        """Measure a finished run and write its ``inference.json``; returns what it holds.

        Raises:
            KdcacheError: as `check`; or the record cannot be written.
        """
        recipe, digest = self.check(run), record_digest(run)
        assert recipe.student is not None
        student = as_started(recipe.student, run)
        variants = [*self._teachers(recipe), *students(student, run / "model", recipe.training.precision)]
        self._progress.begin(f"models of {run}", len(variants), "models")
        rows: list[dict[str, Any]] = []
        try:
            with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
                merged: dict[str, Any] | None = None
                for variant in variants:
                    if variant.merged and merged is None:
                        merged = self._merge(student, run / "model", Path(folder) / "merged")
                    rows.append(self._row(variant, Path(folder) / "merged", (merged or {}).get("error")))
                    self._progress.advance(1, variant.name)
        finally:
            self._progress.end()
        values = {
            "format": FORMAT,
            "kdcache": __version__,
            "run_sha256": digest,
            "hardware": hardware(),
            **{key: getattr(self.workload, key) for key in ("prompt_tokens", "new_tokens", "batch_size", "repeats")},
            "rows": rows,
        }
        write_file(run / INFERENCE_FILE, json.dumps(values, indent=1).encode() + b"\n")
        return values

    def _teachers(self, recipe: Recipe) -> list[Variant]:
        teacher = recipe.teacher
        if self._teacher is not None:
            settings = {} if teacher is None else teacher.model_dump(exclude={"model", "revision"})
            teacher = TeacherSection(model=self._teacher, **settings)
        if teacher is None:
            self._progress.message("the recipe names no teacher, which is left out; name one by --teacher")
            return []
        try:
            refuse_missing_folder(teacher.model)
        except ModelError as exc:
            self._progress.message(f"the teacher is left out: {exc}; name another by --teacher")
            return []
        load = teacher.model_dump(include={"model", "revision", "quantization", "dtype", "device"})
        return [Variant(f"teacher, {_kind(teacher.quantization, teacher.dtype)}", load)]

    def _refuse_long(self, model: str) -> None:
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as exc:
            raise ModelError(f"cannot read the configuration of {model}: {first_line(exc)}") from exc
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        wanted = self.workload.prompt_tokens + self.workload.new_tokens
        if isinstance(limit, int) and wanted > limit:
            raise ModelError(
                f"{model} takes at most {limit} tokens, fewer than --prompt-tokens {self.workload.prompt_tokens} and "
                f"--new-tokens {self.workload.new_tokens} together; lower one of them"
            )

    def _merge(self, student: StudentSection, adapter: Path, folder: Path) -> dict[str, Any]:
        load = student.model_dump(include={"model", "revision", "quantization", "dtype", "device", "attention"})
        return self._ask({"what": "merge", "load": load, "adapter": str(adapter), "folder": str(folder)})

    def _row(self, variant: Variant, merged: Path, failed: str | None) -> dict[str, Any]:
        if variant.merged and failed is not None:
            return {"model": variant.name, **dict.fromkeys(FIGURES), "error": f"merging failed: {failed}"}
        load = {**variant.load, "model": str(merged)} if variant.merged else variant.load
        request = {"what": "measure", "load": load, "adapter": variant.adapter, "precision": variant.precision}
        request |= {key: getattr(self.workload, key) for key in Workload.__dataclass_fields__}
        key = json.dumps(request)
        # Merged models of two runs lie in folders of their own, so that no two are taken for one.
        found = self._known.get(key) or self._ask(request)
        if "error" not in found:
            self._known[key] = found
        return {"model": variant.name, **dict.fromkeys(FIGURES), "error": None, **found}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """A worker's answer; one that ends without is an error as well."""
        with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
            asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
            asked.write_text(json.dumps(request))
            command = [sys.executable, "-m", "kdcache.evaluate.inference_worker", str(asked), str(answer)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
            if not answer.exists():
                last = (done.stderr.strip().splitlines() or [""])[-1]
                return {"error": f"its process ended with {done.returncode}, {last[:200] or 'without a word'}"}
            found: dict[str, Any] = json.loads(answer.read_text())
            return found


def students(student: StudentSection, saved: Path, precision: str) -> list[Variant]:
    """The forms in which a finished student can be put to use."""
    load = student.model_dump(include={"model", "revision", "quantization", "dtype", "device", "attention"})
    kind = _kind(student.quantization, student.dtype)
    plain = {"device": student.device, "attention": student.attention, "dtype": "bfloat16"}
    if student.lora is not None:
        # Where the merged model will lie is known when it is made.
        return [
            Variant(f"student, {kind} + adapter", load, adapter=str(saved), precision=precision),
            Variant("merged, bfloat16", {**plain, "quantization": "none"}, merged=True),
            Variant("merged, int8", {**plain, "quantization": "int8"}, merged=True),
            Variant("merged, nf4", {**plain, "quantization": "nf4"}, merged=True),
        ]
    load |= {"model": str(saved), "revision": None}
    return [
        Variant(f"student, {kind}", load, precision=precision),
        Variant("student, int8", {**plain, "model": str(saved), "quantization": "int8"}),
        Variant("student, nf4", {**plain, "model": str(saved), "quantization": "nf4"}),
    ]


def _kind(quantization: str, dtype: str) -> str:
    return effective_dtype(quantization, dtype) if quantization == "none" else quantization
