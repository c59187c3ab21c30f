"""What each position keeps, as the plan records it."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdcache.cache.layout import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, MINIMUM_FLOOR, TEMPERATURE_RATIO
from kdcache.cache.rows import RowDesign


class Strict(BaseModel):
    """A record that is read back exactly as it was written, or refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SelectionPlan(Strict):
    """What each position keeps."""

    method: Literal["top_k", "threshold", "threshold_sampling", "random_sampling"]
    k: Annotated[int, Field(ge=1, le=65535)]
    floors: Annotated[tuple[Annotated[float, Field(ge=MINIMUM_FLOOR, lt=1)], ...], Field(max_length=16)]
    draws: Annotated[int, Field(ge=1, le=255)]
    temperatures: Annotated[
        tuple[Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)], ...],
        Field(min_length=1, max_length=16),
    ]
    bytes_per_position: Annotated[float, Field(gt=0)] | None
    tail_logits: bool
    values: Literal["quantised", "half"]
    positions: Literal["all", "entropy", "loss"]
    quantile: Annotated[float, Field(ge=0, lt=1)]

    @model_validator(mode="after")
    def _consistent(self) -> SelectionPlan:
        if any(b < a * TEMPERATURE_RATIO for a, b in pairwise(self.temperatures)):
            raise ValueError(f"temperatures should rise, each to {TEMPERATURE_RATIO:g} times the one before or more")
        if len(self.floors) != (len(self.temperatures) if self.method.startswith("threshold") else 0):
            raise ValueError("threshold methods have one floor per temperature, others none")
        one = len(self.temperatures) == 1
        if (self.method == "random_sampling" or not self.tail_logits) and not one:
            raise ValueError("random_sampling, and tail_logits false, go with one temperature")
        return self

    def describe(self) -> str:
        """One line for people."""
        floors = ", ".join(f"{f:g} at T = {t:g}" for f, t in zip(self.floors, self.temperatures, strict=False))
        text = {
            "top_k": f"the {self.k} largest",
            "threshold": f"probabilities above {floors}, at most {self.k}",
            "threshold_sampling": f"probabilities above {floors}, the rest drawn by size",
            "random_sampling": f"{self.draws} draws with replacement",
        }[self.method]
        if self.positions != "all":
            text += f"; positions by {self.positions} above quantile {self.quantile:g}"
        return f"{self.method}, {text} (values {self.values}{'' if self.tail_logits else ', drawn ids alone'})"

    def design(self, vocab_size: int, *, thinned: bool) -> RowDesign:
        """What the rows of one split share; ``thinned``: positions are selected in it."""
        return RowDesign(
            temperatures=self.temperatures,
            vocab_size=vocab_size,
            floors=self.floors if self.method == "threshold_sampling" else (),
            draws=self.draws if self.method == "random_sampling" else 0,
            tail_logits=self.tail_logits,
            some_empty=thinned,
            k=self.k if self.method in ("top_k", "threshold") else vocab_size,
        )
