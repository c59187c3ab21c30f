"""What the recipes take at published size, from their models' published shapes: parameters and bytes, nothing loaded.

    python benchmarks/pipelines_sizes.py

Models are built without values (on torch's ``meta`` device), quantised and given LoRA by arithmetic, as ``kdcache train-student
--dry-run`` does with a configuration from the Hub. Activations and speed depend on the machine: ``--dry-run`` there measures them.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from kdcache.chain.stages import expand  # noqa: E402
from kdcache.markdown import table  # noqa: E402
from kdcache.recipe import Recipe, load_recipe  # noqa: E402
from kdcache.recipe_student import StudentSection  # noqa: E402
from kdcache.student.parameters import Parameters, count_parameters, outline, read_config, untrained_bytes  # noqa: E402

# hidden, feed-forward, layers, heads, key/value heads, vocabulary, tied head; from the models' cards.
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "meta-llama/Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
}
MADE = {"drop_layers": " with every other layer", "teacher": " itself", "scale": " made anew"}
COLUMNS = (
    "recipe", "teacher", "teacher in memory", "student", "student in memory", "trained", "training state", "cache per million positions",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    print(published())


def published() -> str:
    """The table of every recipe at published size."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    recipes = HERE.parent / "recipes"
    files = [f for folder in (".", "start", "tasks") for f in sorted((recipes / folder).glob("*.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row(file.relative_to(recipes).with_suffix("").as_posix() + note, recipe, Path(folder))
            for file in [*files, *sorted((recipes / "chains").glob("*.yaml"))]
            for note, recipe in in_stages(file)
        ]
    return table(COLUMNS, rows)


def in_stages(file: Path) -> Iterator[tuple[str, Recipe]]:
    """The recipe of a file that is not embedded, or those of a chain's stages, each with the published model that its teacher was made from."""
    recipe = load_recipe(file)
    if recipe.embedded is not None:
        return
    if recipe.chain is None:
        yield "", recipe
        return
    for stage in expand(recipe):
        teacher = stage.teacher_section
        if stage.taught_by is not None:
            teacher = teacher.model_copy(update={"model": stage.taught_by.student_section.model})
        yield f", {stage.name}", stage.recipe.model_copy(update={"teacher": teacher})


def row(name: str, recipe: Recipe, folder: Path) -> list[str]:
    """One line: what the teacher and the student weigh, and what is trained."""
    teacher, student = recipe.teacher, recipe.student
    assert teacher is not None
    assert student is not None
    alone = StudentSection(model=local(teacher.model, folder), quantization=teacher.quantization)
    source = student.model or teacher.model
    made = student.model_copy(update={"model": local(source, folder)})
    found = parameters(made, recipe.training.optimizer)
    state = found.gradient_bytes + (found.state_bytes or 0)
    return [
        name, f"{source_name(teacher.model)}, {form(teacher.quantization, teacher.dtype)}", gib(untrained_bytes(alone)),
        f"{source_name(source)}{MADE.get(student.init.method, '') if student.init else ''}, {millions(found.total)}, {form(student.quantization, student.dtype)}",
        gib(found.base_bytes + found.adapter_bytes), millions(found.trained), gib(state),
        f"{recipe.selection.bytes_per_position:g} MB",
    ]  # fmt: skip


def parameters(student: StudentSection, optimizer: str) -> Parameters:
    """Counted on a model without values."""
    return count_parameters(outline(read_config(student), student), student, optimizer)


def local(model: str, folder: Path) -> str:
    """A folder that holds the configuration of a published model."""
    kind, hidden, feed_forward, layers, heads, key_values, vocabulary, tied = SHAPES[model]
    place = folder / model.replace("/", "--")
    place.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "model_type": kind, "architectures": ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_values, "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(values))
    return str(place)


def source_name(model: str) -> str:
    """Without its owner."""
    return model.rpartition("/")[2].removesuffix("-Instruct")


def form(quantization: str, dtype: str) -> str:
    """As people say it."""
    return {"none": "32-bit" if dtype == "float32" else "16-bit", "nf4": "NF4", "int8": "int8"}[quantization]


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def millions(count: int) -> str:
    """Parameters for people."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


if __name__ == "__main__":
    main()
