"""The recipe's section on the model that learns."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcache.recipe_selection import Section

Quantization = Literal["none", "nf4", "int8"]
Dtype = Literal["bfloat16", "float16", "float32"]
Device = Literal["auto", "cuda", "cpu"]


class LoraSection(Section):
    """LoRA as peft knows it."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="Scale; updates are multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before the first LoRA matrix.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Module names, or all-linear for every linear layer but the head."
    )
    dora: bool = Field(False, description="DoRA: direction by LoRA, magnitude learnt apart.")
    rslora: bool = Field(False, description="rsLoRA: updates are multiplied by alpha / sqrt(r).")


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMBT]?)", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LARGEST = 10**12


class InitSection(Section):
    """A student that is made before it is trained."""

    method: Literal["drop_layers", "scale", "teacher"] = Field(
        description="drop_layers: student.model with some of its layers; scale: random weights in the family of student.model; "
        "teacher: a copy of the recipe's teacher, and student.model may be left out."
    )
    every: int | None = Field(
        None,
        ge=2,
        description="drop_layers: keep layers 0, n, 2n and so on, and the last layer in the place of the last of these.",
    )
    layers: tuple[int, ...] | None = Field(
        None, description="drop_layers: the layers to keep, counted from 0, in rising order."
    )
    parameters: int | None = Field(
        None,
        ge=1,
        le=_LARGEST,
        description="scale: parameters with embeddings, such as 50M or 0.5B; kdcache student-shapes shows what is to be had.",
    )
    hidden_size: int | None = Field(
        None, ge=1, description="scale: width; of the shape's keys those left out are student.model's."
    )
    intermediate_size: int | None = Field(None, ge=1, description="scale: width of the feed-forward layers.")
    num_hidden_layers: int | None = Field(None, ge=1, description="scale: depth.")
    num_attention_heads: int | None = Field(None, ge=1, description="scale: heads, which share the width.")
    num_key_value_heads: int | None = Field(None, ge=1, description="scale: heads of keys and values.")
    seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="scale: of the random weights; null takes the recipe's seed."
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @property
    def shape(self) -> dict[str, int]:
        """The keys of an explicit shape that are given."""
        return {key: value for key in SHAPE if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _one_way(self) -> InitSection:
        own = {"drop_layers": ("every", "layers"), "scale": ("parameters", "seed", *SHAPE), "teacher": ()}
        for method, keys in own.items():
            for key in keys if method != self.method else ():
                if getattr(self, key) is not None:
                    raise ValueError(f"student.init.{key} is for student.init.method {method}; leave it out")
        if self.method == "drop_layers":
            self._refuse_unclear_layers()
        if self.method == "scale":
            self._refuse_unclear_shape()
        return self

    def _refuse_unclear_layers(self) -> None:
        if (self.every is None) == (self.layers is None):
            raise ValueError(
                "student.init.method drop_layers needs student.init.every or student.init.layers, one of them and not both"
            )
        layers = self.layers
        if layers is not None and (not layers or any(b <= a for a, b in zip((-1, *layers), layers, strict=False))):
            raise ValueError(
                f"student.init.layers should name layers from 0 on in rising order, none of them twice, found {list(layers)}"
            )

    def _refuse_unclear_shape(self) -> None:
        shape = self.shape
        if (self.parameters is None) == (not shape):
            given = f", found both ({', '.join(shape)})" if shape else ""
            raise ValueError(
                f"student.init.method scale needs either student.init.parameters or a shape (student.init.hidden_size, "
                f"num_hidden_layers and so on){given}"
            )
        for a, b in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            if a in shape and b in shape and shape[a] % shape[b]:
                raise ValueError(
                    f"student.init.{a} {shape[a]} is not a multiple of student.init.{b} {shape[b]}; change one of them"
                )


def parse_size(text: str) -> int:
    """``50M``, ``0.5B`` or ``50000000`` as a number of parameters.

    Raises:
        ValueError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"a number of parameters should look like 50M, 0.5B or 50000000, found {text!r}")
    return round(float(found[1]) * _FACTORS[found[2].upper()])


class StudentSection(Section):
    """The model that learns."""

    model: str = Field(description="Hugging Face id or local folder.")
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub.")
    quantization: Quantization = Field("nf4", description="nf4 (QLoRA), int8 or none.")
    dtype: Dtype = Field("bfloat16", description="Unquantised weights; float32 for full fine-tuning.")
    device: Device = Field("auto", description="auto takes CUDA where there is one.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Implementation of attention; auto takes transformers' choice."
    )
    init: InitSection | None = Field(
        None, description="A student that is made from student.model; null takes the model as it is."
    )
    lora: LoraSection | None = Field(default_factory=LoraSection, description="null trains every weight.")

    @model_validator(mode="after")
    def _trainable(self) -> StudentSection:
        if self.lora is None and self.quantization != "none":
            raise ValueError("student.lora is null (full fine-tuning), which needs student.quantization none")
        return self


def with_teacher_as_student(values: Any) -> Any:
    """Values of a recipe, with the teacher's model as the student's where ``student.init`` asks for a copy of it.

    Raises:
        ValueError: there is no section ``teacher``, or the student names another model.
    """
    student = values.get("student") if isinstance(values, dict) else None
    init = student.get("init") if isinstance(student, dict) else None
    if not isinstance(student, dict) or not isinstance(init, dict) or init.get("method") != "teacher":
        return values
    teacher = values.get("teacher")
    if not isinstance(teacher, dict) or not teacher.get("model"):
        raise ValueError("student.init.method teacher copies the teacher, and needs the recipe section teacher")
    filled = dict(student)
    for key in ("model", "revision"):
        if filled.get(key) not in (None, teacher.get(key)):
            raise ValueError(
                f"student.init.method teacher copies teacher.{key} {teacher.get(key)!r}, but student.{key} is "
                f"{filled[key]!r}; leave it out"
            )
        filled[key] = teacher.get(key)
    return {**values, "student": filled}
