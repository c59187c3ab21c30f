"""Text of a recipe file, of the file it is based on and its command-line overrides -> plain values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kdcache.errors import RecipeError

BASE = "base"


def read_values(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file with ``key.path=value`` overrides applied, not yet validated.

    A file may name another one under ``base``, relative to itself: its own values are laid over that one's, mapping into
    mapping; everything else, lists too, is replaced.

    Raises:
        RecipeError: a file is missing, not UTF-8, not YAML or not a mapping, is based on itself, or an override is malformed.
    """
    values = _with_base(path, ())
    for override in overrides:
        key, value = parse_assignment(override)
        assign(values, key, value, f"override {override!r}")
    return values


def parse_assignment(text: str) -> tuple[str, Any]:
    """Key path and value of ``key.path=value``; the value is YAML.

    Raises:
        RecipeError: there is no key or no equals sign, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {text!r} should look like key.path=value")
    return key, _yaml(value, text)


def assign(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a key path in nested mappings, making the mappings that are missing; ``where`` says in an error who asked.

    Raises:
        RecipeError: a part of the path before its last holds a plain value.
    """
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise RecipeError(f"{where}: {section} is not a section")
    values[last] = value


def _with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's values over those of its base; ``above`` are the files that are based on it."""
    if path.resolve() in above:
        chain = " -> ".join(p.name for p in (*above, path.resolve()))
        raise RecipeError(f"{path} is based on itself: {chain}; take the key base out of one of them")
    values = _mapping(path, based_on=above[-1] if above else None)
    if BASE not in values:
        return values
    base = values.pop(BASE)
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base should be the path of another recipe, relative to this one, found {base!r}")
    return _laid_over(_with_base(path.parent / base, (*above, path.resolve())), values)


def _mapping(path: Path, *, based_on: Path | None) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        hint = (
            "recipes/embedded.yaml is the one to start from"
            if based_on is None
            else f"{based_on} names it as its base, relative to itself"
        )
        raise RecipeError(f"no recipe at {path}; {hint}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot read the recipe {path}: {exc}") from exc
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} should be a mapping of keys to values")
    return values


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _laid_over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as exc:
        problem = " ".join(str(exc).split())
        raise RecipeError(f"{where} is not YAML: {problem}") from exc


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 2e-4 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "+-0123456789.":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _EXPONENT))
