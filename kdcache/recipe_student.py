"""The recipe's section on the model that learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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
    lora: LoraSection | None = Field(default_factory=LoraSection, description="null trains every weight.")

    @model_validator(mode="after")
    def _trainable(self) -> StudentSection:
        if self.lora is None and self.quantization != "none":
            raise ValueError("student.lora is null (full fine-tuning), which needs student.quantization none")
        return self
