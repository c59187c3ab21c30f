"""The forms of an exported student: their names, what they are, and what each needs before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import ModelError
from kdcache.recipe_student import StudentSection
from kdcache.student.initial import is_made


@dataclass(frozen=True)
class Form:
    """A form of an exported student.

    Attributes:
        name: as the command line has it.
        what: one line for people.
        bytes_per_parameter: about how much it takes on disk.
        quantization: of `load_model`, where the form is a quantised model folder.
        gguf: the type of the matrices in a GGUF file.
    """

    name: str
    what: str
    bytes_per_parameter: float
    quantization: str | None = None
    gguf: str | None = None


FORMS = {
    form.name: form
    for form in (
        Form("merged", "16-bit weights, the adapter folded in", 2.0),
        Form("nf4", "4-bit NormalFloat weights, made from the merged ones (bitsandbytes)", 0.7, quantization="nf4"),
        Form("int8", "8-bit weights, made from the merged ones (bitsandbytes)", 1.2, quantization="int8"),
        Form("gguf-f16", "GGUF, matrices in half precision", 2.0, gguf="F16"),
        Form("gguf-q8_0", "GGUF, matrices in 8 bits (Q8_0)", 1.1, gguf="Q8_0"),
        Form("gguf-q4_0", "GGUF, matrices in 4 bits (Q4_0), embeddings and head in 8 (Q8_0)", 0.7, gguf="Q4_0"),
        Form("adapter", "the adapter alone, for the base that it was trained on", 0.1),
    )
}


def chosen_forms(names: Sequence[str], run: Path, student: StudentSection) -> list[Form]:
    """The forms that are meant, each once, in the order in which they are made.

    Raises:
        ModelError: a name that is none, or a form that this student cannot have.
    """
    unknown = [name for name in names if name not in FORMS]
    if unknown or not names:
        found = ", ".join(unknown) or "none"
        raise ModelError(f"expected the forms {', '.join(FORMS)}, found {found}; name them with --to")
    if "adapter" in names and student.lora is None:
        raise ModelError(
            f"{run} trained every weight (student.lora is null), so it has no adapter; export it --to merged"
        )
    return [form for form in FORMS.values() if form.name in names]


def refuse_unpublished_base(forms: Sequence[Form], run: Path, origin: StudentSection) -> None:
    """An adapter alone is of use where others can get the model that it belongs to.

    Args:
        forms: that are wanted.
        run: the run directory.
        origin: the student's section as the distillation had it.

    Raises:
        ModelError: the adapter is wanted, and its base was made, or trained in every weight before the adapter came.
    """
    if all(form.name != "adapter" for form in forms):
        return
    if is_made(origin):
        raise ModelError(
            f"the base of {run} was made by student.init and is published nowhere, so nobody could load the adapter alone; export it --to merged"
        )
    if origin.lora is None:
        raise ModelError(
            f"the adapter of {run} belongs to a student that was distilled in every weight and is published nowhere, so nobody could "
            "load it alone; export it --to merged"
        )
