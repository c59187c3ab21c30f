"""The recipe's section `sweep`: which keys vary from row to row, and over which values."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from kdcache.recipe_selection import Section

Plain = bool | int | float | str


class Range(Section):
    """Values that a search draws from an interval."""

    low: int | float = Field(description="Smallest value.")
    high: int | float = Field(description="Largest value; two whole numbers make whole numbers.")
    log: bool = Field(False, description="Draw evenly in the logarithm.")

    @model_validator(mode="after")
    def _rises(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            wanted = "0 < low < high, since log is true" if self.log else "low < high"
            raise ValueError(f"an interval of sweep.search needs {wanted}, found low {self.low:g}, high {self.high:g}")
        return self


class SweepSection(Section):
    """Rows are the named ones first, then every combination of the grid's values, then the trials of a search."""

    rows: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Named rows: for each the recipe keys it changes, such as A2: {loss.temperature: 1}; an empty one is the "
        "recipe itself.",
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Recipe keys and a list of values for each, such as loss.temperature: [1, 2]; every combination is a row. "
        "Beside rows it adds rows of its own: the two are not combined.",
    )
    search: dict[str, Range | list[Plain]] = Field(
        default_factory=dict,
        description="Recipe keys that Optuna's TPE looks for good values of, by the loss of the trained student: a list of "
        "values, or {low, high, log}. Needs trials and pip install 'kdcache[search]'.",
    )
    trials: int | None = Field(None, ge=1, le=100_000, description="Rows that the search makes in all.")

    @field_validator("grid", "search")
    @classmethod
    def _some_values(cls, keys: dict[str, Any]) -> dict[str, Any]:
        for key, values in keys.items():
            if isinstance(values, list) and not values:
                raise ValueError(f"{key} has an empty list of values in the sweep; give it some, or leave the key out")
            said = [repr(value) for value in values] if isinstance(values, list) else []
            twice = next((text for i, text in enumerate(said) if text in said[:i]), None)
            if twice is not None:
                raise ValueError(f"{key} has the value {twice} twice in the sweep; leave one out")
        return keys

    @field_validator("search", mode="before")
    @classmethod
    def _lists_or_ranges(cls, keys: Any) -> Any:
        for key, space in keys.items() if isinstance(keys, dict) else ():
            interval = isinstance(space, dict) and {"low", "high"} <= space.keys() <= set(Range.model_fields)
            if not interval and not (isinstance(space, list) and all(isinstance(v, Plain) for v in space)):
                raise ValueError(
                    f"{key} in sweep.search takes a list of plain values, or {{low: , high: , log: true or false}}; found {space!r}"
                )
        return keys

    @model_validator(mode="after")
    def _complete(self) -> SweepSection:
        if not self.rows and not self.grid and not self.search:
            raise ValueError("the section sweep is empty: give it rows, grid or search")
        if self.search and self.trials is None:
            raise ValueError("sweep.search needs sweep.trials (or --trials): how many rows it makes")
        if self.trials is not None and not self.search:
            raise ValueError("sweep.trials goes with sweep.search, which is not there")
        both = self.grid.keys() & self.search.keys()
        if both:
            raise ValueError(f"{min(both)} stands in sweep.grid and in sweep.search; leave it in one of them")
        return self
