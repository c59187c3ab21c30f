"""Students that are made before they are trained: some layers of a model, or random weights in its family.

What is made is a function of the model's weights and the recipe's section ``student.init`` (with its seed) alone, never of
the device, the quantisation or the run. It is written as an ordinary model folder in the precision that the model is stored
in, and from there loaded as any other student. A copy of the teacher needs no making: it is the teacher's folder, loaded as
a student.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kdcache.errors import ModelError
from kdcache.models import first_line, load_model, quiet_libraries, refuse_missing_folder
from kdcache.recipe_student import SHAPE, InitSection, StudentSection
from kdcache.student.layers import drop_layers, refuse_undescribed, shortened_config
from kdcache.student.merged import save_whole
from kdcache.student.shapes import Shape, alternatives, count, scaled_config, shape_lines
from kdcache.token_maps import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DTYPES = ("bfloat16", "float16", "float32")


def is_made(student: StudentSection) -> bool:
    """Whether the student has to be made: a copy of the teacher only has to be loaded."""
    return student.init is not None and student.init.method != "teacher"


def read_source(student: StudentSection) -> PreTrainedConfig:
    """The configuration of ``student.model``, from which a student may be made.

    Raises:
        ModelError: it cannot be read.
    """
    quiet_libraries()
    refuse_missing_folder(student.model)
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            student.model, revision=student.revision, trust_remote_code=False
        )
    except Exception as exc:
        raise ModelError(f"cannot read the configuration of {student.model}: {first_line(exc)}") from exc
    return config


def made_config(source: PreTrainedConfig, student: StudentSection) -> PreTrainedConfig:
    """The configuration of the student as it starts; the model's own where nothing is made.

    Raises:
        ModelError: layers that are not there or that the configuration does not describe without the others, sizes or shapes
            that cannot be, a family that is not known well enough.
    """
    init = student.init
    if init is None or init.method == "teacher":
        return source
    refuse_unknown_family(source, student.model)
    if init.method == "drop_layers":
        kept = kept_layers(init, source.num_hidden_layers, student.model)
        refuse_undescribed(source, kept, student.model)
        return shortened_config(source, kept)
    return scaled_config(source, _wanted_shape(source, init, student.model), student.model)


def kept_layers(init: InitSection, count: int, model: str) -> tuple[int, ...]:
    """Numbers of the layers that are kept, counted from 0.

    ``every: n`` keeps ``ceil(count / n)`` layers: 0, n, 2n and so on, but the last of these gives way to the last layer, so
    that what reads the embeddings and what feeds the head both stay. 16 layers with n = 2 become 8: 0, 2, ... 12, 15.

    Raises:
        ModelError: the model has not as many.
    """
    if init.layers is not None:
        beyond = [i for i in init.layers if i >= count]
        if beyond:
            raise ModelError(
                f"student.init.layers names {', '.join(map(str, beyond))}, but {model} has {count} layers, 0 to {count - 1}"
            )
        return init.layers
    assert init.every is not None
    if init.every >= count:
        raise ModelError(
            f"student.init.every should be less than the {count} layers of {model}, found {init.every}; name a single layer by "
            "student.init.layers"
        )
    return (*range(0, count, init.every)[:-1], count - 1)


def make_student(student: StudentSection, folder: Path) -> None:
    """Make the student and write it, with its tokenizer, to a folder that is whole or not there.

    Raises:
        ModelError: as `made_config`, or the model's weights cannot be loaded.
        TokenizerError: the model has no tokenizer.
        StorageError: the folder cannot be written.
    """
    source = read_source(student)
    config = made_config(source, student)
    tokenizer = load_tokenizer(student.model, student.revision)
    init, dtype = student.init, stored_dtype(source)
    assert init is not None
    if init.method == "drop_layers":
        model = load_model(student.model, revision=student.revision, dtype=dtype, device="cpu")
        drop_layers(model, kept_layers(init, source.num_hidden_layers, student.model))
        # Loaded models are told to remember nothing; the folder should be as its source was.
        model.config.use_cache = source.use_cache
    else:
        assert init.seed is not None, "a recipe puts its own seed in the place of null"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init.seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = model.to(getattr(torch, dtype))
        with suppress(OSError):  # which most folders have, and no folder needs
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                student.model, revision=student.revision or "main"
            )
    save_whole(model, tokenizer, folder)


def stored_dtype(source: PreTrainedConfig) -> str:
    """The precision that a model is stored in, and what is made from it; float32, which loses nothing, where it does not say."""
    dtype = str(source.dtype).removeprefix("torch.")
    return dtype if dtype in _DTYPES else "float32"


def refuse_impossible(student: StudentSection) -> None:
    """Whether the student can be made, from the model's configuration alone.

    Raises:
        ModelError: as `made_config`.
    """
    if is_made(student):
        made_config(read_source(student), student)


def init_lines(student: StudentSection, context: int) -> list[str]:
    """What the student is made as, in words: for a scaled one with the other shapes of its size; nothing for one that is not made.

    Args:
        student: as the recipe has it.
        context: tokens that a token sees, for the FLOPs.

    Raises:
        ModelError: as `made_config`.
    """
    init = student.init
    if init is None:
        return []
    if init.method == "teacher":
        return [f"the student starts as a copy of the teacher, {student.model} ({student.quantization})"]
    source = read_source(student)
    if init.method == "scale":
        made = made_config(source, student)
        size = init.parameters or count(made).total
        return shape_lines(source, student.model, size, context, chosen=Shape.of(made))
    return [f"the student starts as {describe_init(student)}"]


def describe_init(student: StudentSection) -> str:
    """The student as it starts in half a sentence, from the model's configuration.

    Raises:
        ModelError: as `made_config`.
    """
    init, name = student.init, Path(student.model).name
    if init is None or init.method == "teacher":
        return name
    source = read_source(student)
    made = made_config(source, student)
    size = f"{count(made).total:,}"
    if init.method == "scale":
        return f"random weights in the family of {name}: {made.num_hidden_layers} layers of {made.hidden_size}, {size} parameters"
    kept = kept_layers(init, source.num_hidden_layers, student.model)
    return (
        f"layers {', '.join(map(str, kept))} of the {source.num_hidden_layers} of {name}: {size} of {count(source).total:,} "
        "parameters"
    )


def _wanted_shape(source: Any, init: InitSection, model: str) -> Shape:
    """The shape that is asked for; of an explicit one, what is left out is the model's own.

    Raises:
        ModelError: heads that do not share the width, or a size that no shape has.
    """
    if init.parameters is not None:
        return alternatives(source, init.parameters, model).chosen
    own = Shape.of(source)
    values = {key: init.shape.get(key, getattr(own, key)) for key in SHAPE}
    for a, b in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if values[a] % values[b]:
            whose = [f"{key} {values[key]}{'' if key in init.shape else f' (of {model})'}" for key in (a, b)]
            raise ModelError(f"student.init: {whose[0]} is not a multiple of {whose[1]}; give both")
    if values["hidden_size"] // values["num_attention_heads"] % 2:
        raise ModelError(
            f"student.init: hidden_size {values['hidden_size']} over {values['num_attention_heads']} heads makes heads of an odd "
            "width, which rotary positions cannot turn; change one of them"
        )
    return Shape(**values)


def refuse_unknown_family(config: Any, model: str) -> None:
    """Whether a configuration is of a kind that students can be made in.

    Raises:
        ModelError: it is not.
    """
    lacking = [key for key in SHAPE if not isinstance(getattr(config, key, None), int)]
    if config.get_text_config() is not config:
        raise ModelError(
            f"{model} is more than a text model ({config.model_type}); student.init takes plain text models"
        )
    if lacking:
        raise ModelError(
            f"the configuration of {model} ({config.model_type}) does not say {', '.join(lacking)}; student.init takes families "
            "such as Llama and Qwen2"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{model} is stored quantised; give student.init a model with its full weights")
