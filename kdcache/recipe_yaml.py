"""Text of a recipe file and its command-line overrides -> plain values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kdcache.errors import RecipeError


def read_values(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file with ``key.path=value`` overrides applied, not yet validated.

    Raises:
        RecipeError: the file is missing, not UTF-8, not YAML or not a mapping, or an override is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise RecipeError(f"no recipe at {path}; recipes/embedded.yaml is the one to start from") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot read the recipe {path}: {exc}") from exc
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} should be a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r} should look like key.path=value")
        _assign(values, key.split("."), _yaml(value, override), override)
    return values


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


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise RecipeError(f"override {override!r}: {key} is not a section")
    values[keys[-1]] = value
