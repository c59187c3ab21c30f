"""JSON from a stranger: size, depth, duplicate keys, NaN and huge integers are refused with our error.

Depth needs no code of ours: the standard parser stops at the interpreter's recursion limit.
"""

from __future__ import annotations

import hashlib
import json

from kdcache.cache.layout import JSON_LIMIT, JSON_VALUES
from kdcache.errors import CorruptCacheError

_INTEGER_DIGITS = 18


def parse_object(data: bytes, *, what: str, limit: int = JSON_LIMIT) -> dict[str, object]:
    """Parse one JSON object.

    Raises:
        CorruptCacheError: anything but one well-formed object within the limits.
    """
    value = parse(data, what=what, limit=limit)
    if not isinstance(value, dict):
        raise CorruptCacheError(f"{what} is not a JSON object")
    return value


def parse(data: bytes, *, what: str, limit: int = JSON_LIMIT, values: int = JSON_VALUES) -> object:
    """Parse one JSON value.

    Raises:
        CorruptCacheError: malformed, too large, too deep, a key twice, NaN or infinity, a huge integer.
    """
    if len(data) > limit:
        raise CorruptCacheError(f"{what} has {len(data)} bytes, more than the limit of {limit}")
    if data.count(b",") + data.count(b"[") + data.count(b"{") > values:
        raise CorruptCacheError(f"{what} holds more than {values} values, the limit")
    try:
        text = data.decode("ascii")  # as all of it is written; one wide character would make all others as wide
        return json.loads(
            text,
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except (ValueError, RecursionError) as exc:
        raise CorruptCacheError(f"{what} is not acceptable JSON: {exc}") from exc


def canonical(value: object) -> bytes:
    """The one byte form of a JSON value that digests are taken of: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def canonical_sha256(value: object) -> str:
    """Hex SHA-256 of the canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def readable(value: object) -> bytes:
    """The form files are written in: sorted keys, one-space indent, newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode("ascii") + b"\n"


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number here")


def _bounded_int(digits: str) -> int:
    if len(digits.lstrip("-")) > _INTEGER_DIGITS:
        raise ValueError("an integer is too large")
    return int(digits)
