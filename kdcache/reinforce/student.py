"""Which student is reinforced, and against which reference.

A run with LoRA goes on with its own adapter: the same base, quantised as it was, and the same adapter, trainable again. TRL
then keeps a frozen second copy of that adapter (named ``ref``) in the same model, so that the KL is against the distilled
student and costs no second model; taking the adapter off instead would make the bare base the reference. `refuse_other_reference`
makes sure of it. A student that was trained in full gets a new adapter, which begins as a product with zero: there the
reference is the same model with a zero adapter. Either way what is saved is an ordinary adapter of the named base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kdcache.errors import TrainingError
from kdcache.evaluate.saved_run import trained_recipe
from kdcache.evaluate.saved_student import refuse_missing_student
from kdcache.models import load_adapter
from kdcache.recipe_student import LoraSection, StudentSection
from kdcache.reinforce_record import DISTILLED, distilled_part, is_reinforcement, load_reinforced
from kdcache.run_record import load_record, record_digest
from kdcache.student.assembly import load_student, with_adapter
from kdcache.student.start import as_started

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER, REFERENCE = "default", "ref"
DATE = "2024-07-26"  # what chat templates write as today's where a run does not say


@dataclass(frozen=True)
class Start:
    """The student that a reinforcement starts from.

    Attributes:
        path: its run directory.
        digest: of the record in it: another one is another student.
        student: its base, and how that is loaded; ``lora`` is the adapter's, or None for a student trained in full.
        adapter: folder of the adapter to go on with, or None.
        date: what chat templates are told is today.
        distilled: recipe, cache and sizes of the run that was distilled; None where an earlier version left no note of them.
    """

    path: Path
    digest: str
    student: StudentSection
    adapter: Path | None
    date: str
    distilled: dict[str, Any] | None

    @property
    def tokenizer(self) -> str:
        """Folder of its tokenizer."""
        return str(self.path / "model")


def open_start(path: Path) -> Start:
    """The student of a finished distillation run, or of an earlier reinforcement. No cache is needed, and nothing is loaded.

    Raises:
        TrainingError: no finished run, or one that this version does not read.
        ModelError: its student, or the base of that, is not there.
    """
    if is_reinforcement(path):
        record = load_reinforced(path)
        try:
            student = StudentSection.model_validate(record["student"])
        except ValidationError as exc:
            raise TrainingError(
                f"{path} was reinforced by another version of kdcache, whose record this one does not read"
            ) from exc
        refuse_missing_student(path, student)
        date, distilled = str(record.get("date", DATE)), distilled_part(record)
        return Start(path, record_digest(path), student, path / "model", date, distilled)
    finished = load_record(path)
    recipe, student = trained_recipe(finished)
    refuse_missing_student(path, student)
    date = DATE if recipe.data is None else recipe.data.date
    digest = record_digest(path)
    distilled = {key: finished.values[key] for key in DISTILLED if key in finished.values}
    if student.lora is not None:
        return Start(path, digest, as_started(student, path), path / "model", date, distilled)
    whole = student.model_copy(update={"model": str(path / "model"), "revision": None, "init": None})
    return Start(path, digest, whole, None, date, distilled)


def load_policy(start: Start, lora: LoraSection) -> PreTrainedModel:
    """The student with its adapter trainable, or with a new one of the shape ``lora``.

    Raises:
        ModelError: base or adapter cannot be loaded, or the adapter does not fit.
    """
    base = load_student(start.student)
    if start.adapter is None:
        return with_adapter(base, start.student.model_copy(update={"lora": lora}))
    model: Any = load_adapter(base, str(start.adapter), quantized=start.student.quantization != "none")
    # peft loads an adapter to be used, not to be trained.
    model.peft_config[ADAPTER].inference_mode = False
    model.set_adapter(ADAPTER)
    policy: PreTrainedModel = model
    return policy


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def put_back(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the trained weights these values, in the precision of these: TRL rounds adapters of quantised models to bfloat16,
    where small steps are lost."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].clone()


def refuse_other_reference(model: Any) -> None:
    """The frozen adapter that the KL is measured against should be there, and be the trained one as it starts.

    Raises:
        TrainingError: it is not, and the KL would be against another model.
    """
    import torch

    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    its = dict(model.named_parameters())
    other = [n for n in mine if (copy := its.get(n.replace(f".{ADAPTER}.", f".{REFERENCE}."))) is None or copy.requires_grad
             or not torch.equal(copy.float(), mine[n].float())]  # fmt: skip
    if REFERENCE not in model.peft_config or other:
        raise TrainingError(
            "this version of trl keeps no frozen copy of the distilled adapter, so that the KL would be against another model; "
            "use trl 1.16, or training.beta=0"
        )
