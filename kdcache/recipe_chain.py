"""The recipe's section `chain`: students that are taught one after the other, each by the one before.

Stages have an order, and each says what it changes in the recipe: at least which student it trains. The first is taught by
the recipe's teacher from `cache.directory`, every later one by the student of the stage before, merged into one model, from
a cache of its own.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcache.recipe_selection import Section

DIRECT = "direct"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
# What a stage may change: how its student is trained ...
_STUDENTS = ("student", "loss", "training")
# ... and, of every stage but the first, how its teacher is loaded and what is kept of it.
_TEACHERS = ("quantization", "dtype", "device", "batch_tokens")


class ChainSection(Section):
    """Stages in order, and the way beside them."""

    stages: dict[str, dict[str, Any]] = Field(
        description="Stages in order, such as 3b: {student.model: ...}: for each the recipe keys that it changes, of student, loss, "
        "training and seed, and of every stage but the first teacher.quantization, dtype, device, batch_tokens and selection.",
    )
    direct: bool = Field(
        True, description="Train the last stage's student from the first teacher as well, to compare the two ways."
    )
    drop: tuple[Literal["caches", "merged"], ...] = Field(
        (),
        description="What is removed once it has been used: caches of the stages (never cache.directory), merged models that have "
        "taught the next stage.",
    )

    @field_validator("stages")
    @classmethod
    def _usable(cls, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if len(stages) < 2:
            raise ValueError("chain.stages needs two stages or more; a single one is what kdcache train-student does")
        places: dict[str, str] = {}
        for number, name in enumerate(stages):
            if not _NAME.fullmatch(name) or name[-1] == "." or name.lower() in (DIRECT, "report"):
                raise ValueError(
                    f"the stage name {name!r} is to be a directory as well: letters, digits and any of ._+- , at most 64 of them, "
                    f"a letter or digit first, and not {DIRECT} or report"
                )
            if name.lower() in places:
                raise ValueError(f"the stages {places[name.lower()]} and {name} would share a directory; rename one")
            places[name.lower()] = name
            for key in stages[name]:
                _refuse_key(name, number, key)
        return stages

    @model_validator(mode="after")
    def _once(self) -> ChainSection:
        if len(set(self.drop)) < len(self.drop):
            raise ValueError(f"chain.drop names {self.drop[0]} twice; leave one out")
        return self


def _refuse_key(stage: str, number: int, key: str) -> None:
    section, _, rest = key.partition(".")
    if key == "seed" or (section in _STUDENTS and rest):
        return
    if section in _STUDENTS:
        raise ValueError(f"stage {stage} gives the section {key} as a whole; name the keys it changes one by one")
    ours = (section == "teacher" and rest in _TEACHERS) or (section == "selection" and rest)
    if ours and number:
        return
    if ours:
        raise ValueError(
            f"stage {stage} is the first, and changes {key}: the first teacher is the recipe's, for the direct way as well; set it there"
        )
    raise ValueError(
        f"stage {stage} changes {key}; a stage changes keys of student, loss, training and seed, and if it is not the first "
        f"{', '.join(f'teacher.{k}' for k in _TEACHERS)} and selection: all stages learn from the same sequences"
    )
