"""What the bundled harness tasks (`tasks/*.yaml`) are made of: local files, and how answers are judged.

The harness calls these by the names that the YAML files give.
"""

from __future__ import annotations

import gzip
import json
import re
from decimal import Decimal, InvalidOperation
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

import datasets
from lm_eval.api.task import ConfigurableTask

from kdcache.errors import DataError

# Digits in groups of three, or without groups; a dash after a digit or a bracket is no sign ("10-12").
_DIGITS = {
    "en": r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?",
    # 1.000 is a thousand and 3,5 is three and a half; a point before one, two or four digits can only be a decimal one.
    "es": r"(?:\d{1,3}(?:\.\d{3})+(?!\d)(?:,\d+)?|\d+(?:[.,]\d+)?)",
}
_NUMBER = {language: re.compile(rf"(?:(?<![\d)\]])-)?{digits}") for language, digits in _DIGITS.items()}
_MARKED = {language: re.compile(rf"####\s*\$?\s*(-?{digits})") for language, digits in _DIGITS.items()}
_GROUPS_ES = re.compile(r"-?\d{1,3}(?:\.\d{3})+(?:,\d+)?")


def local_splits(
    *, task_data: str, files: dict[str, str | list[str]], columns: list[str], spread: str | None = None, **_: Any
) -> dict[str, datasets.Dataset]:
    """Splits of JSON Lines files (plain or gzip), the wanted columns of each row.

    Args:
        task_data: folder that file names are relative to.
        files: one file, or several laid end to end, for each split.
        columns: what is kept of a row.
        spread: a column, or ``file``, whose values take turns.

    Raises:
        DataError: a file is not there, is no JSON Lines, or lacks a column.
    """
    splits = {}
    for split, names in files.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for name in [names] if isinstance(names, str) else names:
            for row in _rows(Path(task_data) / name, columns):
                group = name if spread == "file" else str(row[spread]) if spread else ""
                groups.setdefault(group, []).append(row)
        turns = chain.from_iterable(zip_longest(*groups.values()))
        splits[split] = datasets.Dataset.from_list([row for row in turns if row is not None])
    return splits


def _rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    # As it is published, or unpacked.
    found = path if path.exists() else path.with_suffix("") if path.suffix == ".gz" else path
    try:
        data = found.read_bytes()
        lines = (gzip.decompress(data) if found.suffix == ".gz" else data).decode().split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        return [{column: row[column] for column in columns} for row in rows]
    except FileNotFoundError as exc:
        raise DataError(f"no file {path}; --task-data names the folder that it lies below") from exc
    except KeyError as exc:
        raise DataError(f"{found} has rows without {exc.args[0]!r}; {', '.join(columns)} are needed") from exc
    except (OSError, EOFError, ValueError, TypeError) as exc:
        raise DataError(f"{found} should hold JSON Lines: {exc}") from exc


def answer_number(text: str, language: Literal["en", "es"] = "en") -> Decimal | None:
    """The number after the last ``####``, or else the last number of a text; None where it has none.

    Args:
        text: an answer.
        language: whose separators it is written with: 1,234.5 in English, 1.234,5 in Spanish.
    """
    found = _MARKED[language].findall(text) or _NUMBER[language].findall(text)
    if not found:
        return None
    last = found[-1]
    if language == "en":
        last = last.replace(",", "")
    else:
        last = (last.replace(".", "") if _GROUPS_ES.fullmatch(last) else last).replace(",", ".")
    try:
        return Decimal(last)
    except InvalidOperation:
        return None


def same_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact answer of an arithmetic problem: 1 where both texts come to the same number."""
    return _same(doc, results, "en")


def same_number_es(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`same_number` of an answer in Spanish; the reference is a JSON number."""
    return _same(doc, results, "es")


def _same(doc: dict[str, Any], results: list[str], language: Literal["en", "es"]) -> dict[str, float]:
    wanted = answer_number(doc.get("answer") or str(doc.get("answer_number")))
    return {"exact_match": float(wanted is not None and answer_number(results[0], language) == wanted)}


def answer_in_text(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Verbatim completion: whether a reference answer stands in what was generated, and whether it is all of it."""
    made = " ".join(results[0].split())
    references = [" ".join(text.split()) for text in doc["answers"]["text"]]
    return {
        "contains": float(any(r and r in made for r in references)),
        "exact_match": float(made in references),
    }


class ExamplesOfTheSubject(ConfigurableTask):  # type: ignore[misc]
    """A task whose shown examples are of the question's own subject."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={k: v for k, v in config.items() if k != "class"})
        self._examples = list(self.dataset[self.config.fewshot_split])

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The harness's own, of the examples of one subject."""
        self.sampler.replace_df([e for e in self._examples if e["subject"] == doc["subject"]])
        return super().fewshot_context(doc, *args, **options)
