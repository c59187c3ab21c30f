"""The keys of a recipe model: their paths, defaults and descriptions, and what is wrong with a value."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kdcache.errors import RecipeError

_Model = TypeVar("_Model", bound=BaseModel)


def recipe_keys(model: type[BaseModel], prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every key path with its default (or ``...`` where it is required) and its description."""
    keys: dict[str, tuple[Any, str]] = {}
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        default = ... if field.is_required() else field.get_default(call_default_factory=True)
        if section is None:
            keys[prefix + name] = (default, field.description or "")
        else:
            keys |= recipe_keys(section, f"{prefix}{name}.")
    return keys


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a key path in nested mappings; None where there is none."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, or may leave out; a key that takes a plain value as well is no section."""
    candidates = [c for c in getattr(annotation, "__args__", (annotation,)) if c is not type(None)]
    section = candidates[0]
    return section if len(candidates) == 1 and isinstance(section, type) and issubclass(section, BaseModel) else None


def validated(model: type[_Model], values: Any) -> _Model:
    """The model of plain values.

    Raises:
        RecipeError: naming the key, what was expected and, for an unknown key, the nearest known one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        raise RecipeError(explain(exc, model)) from exc


def explain(exc: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first thing wrong: the key, what was expected, and for an unknown key the nearest known one."""
    # Unknown keys first: they usually are the cause of what else is wrong.
    # Of what was wrong with a number and with a ramp, the one that was meant.
    meant = [
        e
        for e in exc.errors()
        if not (e["loc"][-1:] == ("float",) and isinstance(e["input"], dict)) and e["type"] != "model_type"
    ]
    errors = sorted(meant or exc.errors(), key=lambda e: e["type"] != "extra_forbidden" and e["loc"][-1:] != ("[key]",))
    error = errors[0]
    path = [str(p) for p in error["loc"]]
    # A number or a ramp: pydantic names which of the two it tried.
    key = ".".join(p for p in path if not p.startswith(("literal[", "list[")) and p not in ("float", "Ramp"))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if error["type"] == "extra_forbidden":
        known = [*recipe_keys(model), *model.model_fields]
        above = ".".join(p for p in path[:-1] if p not in ("float", "Ramp"))
        if path[-2:-1] == ["Ramp"]:
            return f"unknown recipe key {key}; {above} takes a number, or {{start: , end: , shape: linear or cosine}}"
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see recipes/README.md for every key"
        return f"unknown recipe key {key}{hint}{more}"
    if path[-1:] == ["[key]"] and error["type"] == "literal_error":
        key = key.removesuffix(".[key]")
        above, wanted = ".".join(path[:-2]), str(error["ctx"]["expected"])
        near = difflib.get_close_matches(path[-2], wanted.split("'")[1::2], n=1, cutoff=0.5)
        hint = f"did you mean {above}.{near[0]}?" if near else f"{above} takes {wanted}"
        return f"unknown recipe key {key}; {hint}{more}"
    if error["type"] == "missing":
        return f"the recipe lacks {key}{more}"
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}{more}"
    if error["type"] == "tuple_type":
        return f"recipe key {key} should be a list, such as [{error['input']}], found {error['input']!r}{more}"
    return f"recipe key {key}: {error['msg']}, found {error['input']!r}{more}"
