"""The recipe's section `selection`: what each position keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdcache.cache.layout import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, MINIMUM_FLOOR, TEMPERATURE_RATIO


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class SelectionSection(Section):
    """What each position keeps."""

    method: Literal["threshold_sampling", "threshold", "top_k", "random_sampling"] = Field(
        "threshold_sampling",
        description="threshold_sampling: all above a probability floor, and below it entries drawn by size that stand for "
        "the floor (unbiased); threshold: all above the floor, at most k; top_k: the k largest; random_sampling: draws "
        "with replacement.",
    )
    bytes_per_position: float = Field(
        64.0,
        ge=8,
        le=65536,
        description="threshold methods without floors: the floor is found on a small sample so that the cache comes to this size, per position of the data (kept or not).",
    )
    floors: tuple[float, ...] | None = Field(
        None,
        description="threshold methods: probability floor for each declared temperature, instead of bytes_per_position.",
    )
    k: int = Field(
        64,
        ge=1,
        le=65535,
        description="Entries kept per position (top_k), or at most kept above the floor (threshold).",
    )
    draws: int = Field(16, ge=1, le=255, description="random_sampling: draws per position.")
    temperatures: tuple[float, ...] = Field(
        (1.0, 2.0),
        min_length=1,
        max_length=16,
        description="Temperatures at which the mass outside the kept entries is stored, and the floors hold.",
    )
    tail_logits: bool = Field(
        True,
        description="Whether drawn entries carry their logits; false stores their ids alone, and fixes T to the one declared "
        "temperature.",
    )
    values: Literal["quantised", "half"] = Field(
        "quantised",
        description="Logits in steps of 1/16 nat (drawn entries 1/2), or in half precision.",
    )
    positions: Literal["all", "entropy", "loss"] = Field(
        "all",
        description="entropy, loss: keep only the positions of the train split where the teacher is unsure or wrong.",
    )
    quantile: float = Field(
        0.0, ge=0, lt=1, description="entropy, loss: share of each sequence's positions that is dropped."
    )

    def _set(self, key: str) -> bool:
        """Whether a key says something: a record of a recipe states defaults too."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def recorded(self) -> dict[str, Any]:
        """What a plan records: a key that the method does not use is recorded with its default."""
        values = self.model_dump()
        unused = {"draws"} if self.method != "random_sampling" else set()
        unused |= {"k"} if self.method not in ("top_k", "threshold") else set()
        defaults = {key: type(self).model_fields[key].default for key in unused}
        if not self.method.startswith("threshold") or self.floors is not None:
            defaults["bytes_per_position"] = None
        return {**values, **defaults}

    @model_validator(mode="after")
    def _consistent(self) -> SelectionSection:
        threshold = self.method.startswith("threshold")
        apart = all(b >= a * TEMPERATURE_RATIO for a, b in pairwise(self.temperatures))
        if not apart or self.temperatures[0] < LOWEST_TEMPERATURE or self.temperatures[-1] > HIGHEST_TEMPERATURE:
            raise ValueError(
                f"selection.temperatures should be positive and rise from {LOWEST_TEMPERATURE:g} at least to "
                f"{HIGHEST_TEMPERATURE:g} at most, each to {TEMPERATURE_RATIO:g} times the one before or more"
            )
        if self.floors is not None and not threshold:
            raise ValueError(f"selection.floors is for the threshold methods; with {self.method} leave it out")
        if self._set("bytes_per_position") and (self.floors is not None or not threshold):
            raise ValueError(
                "selection.bytes_per_position is for the threshold methods without selection.floors; leave it out"
            )
        if self.floors is not None and len(self.floors) != len(self.temperatures):
            raise ValueError(
                f"selection.floors has {len(self.floors)} values for {len(self.temperatures)} selection.temperatures"
            )
        if self.floors is not None and not all(MINIMUM_FLOOR <= f < 1 for f in self.floors):
            raise ValueError(f"selection.floors should lie between {MINIMUM_FLOOR:g} and 1")
        if len(self.temperatures) > 1 and self.method == "random_sampling":
            raise ValueError("selection.method random_sampling draws at one temperature; declare one")
        if not self.tail_logits and (len(self.temperatures) > 1 or self.method != "threshold_sampling"):
            raise ValueError(
                "selection.tail_logits false goes with threshold_sampling at one of selection.temperatures: with more the "
                "drawn entries stand for different masses, which their logits tell"
            )
        for key, methods in (("k", ("top_k", "threshold")), ("draws", ("random_sampling",))):
            if self._set(key) and self.method not in methods:
                raise ValueError(f"selection.{key} is for selection.method {' or '.join(methods)}; leave it out")
        if self.positions != "all" and self.quantile == 0:
            raise ValueError(f"selection.positions {self.positions} needs selection.quantile above 0")
        if self.positions == "all" and self.quantile > 0:
            raise ValueError("selection.quantile above 0 goes with selection.positions entropy or loss")
        return self


def claimed_keys(chosen: SelectionSection) -> list[str]:
    """Keys that a cache has to agree in: floors where they are given, otherwise the bytes that they are found from; a plan
    records which."""
    keys = [key for key in type(chosen).model_fields if key not in ("floors", "bytes_per_position")]
    if chosen.floors is not None:
        return [*keys, "floors"]
    return [*keys, "bytes_per_position"] if chosen.method.startswith("threshold") else keys
