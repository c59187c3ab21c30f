"""DistillKit's offline data: Parquet with two byte lists per position, and the compression's settings beside it.

Read at source (arcee-ai/DistillKit): ``sample_common.py`` at 40198e11 (columns ``input_ids``, ``compressed_logprobs``, ``bytepacked_indices``),
``compression/config.py`` at 897bd134, ``compression/monotonic_logprobs.py`` and ``bitpack.py`` (file contents of the same months), and
``trainer.py`` at b8ed189b: row ``i`` is compared with the logits at ``i``, where ``labels[i]``, not the next label, is learnt.

Per position, ``k`` log-probabilities at T = 1, largest first: ``exact_k`` as floats, the others a polynomial in their rank; then
``k`` ids of ``ceil(log2 d)`` bits each, highest bit first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kdcache.errors import DataError
from kdcache.exchange.axolotl import IGNORED, refuse_other_labels, token_ids, whole
from kdcache.exchange.columns import Shape
from kdcache.exchange.plain import PlainSequence, lists

SETTINGS = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
SHAPES = {name: Shape(1 if name == "input_ids" else 2, whole=True) for name in COLUMNS} | {
    "labels": Shape(1, whole=True)
}
# A probability of nothing that multiplies with anything: minus infinity would make 0 * inf of it.
_FILL = -1e4
_NOTHING = -100.0
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_BATCH = 32
_SETTINGS_LIMIT = 64 << 10


@dataclass(frozen=True)
class Settings:
    """What DistillKit needs to know to unpack a row: vocabulary ``d``, entries ``k``, of which ``exact_k`` as floats."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return max(1, (self.d - 1).bit_length())

    @property
    def value_bytes(self) -> int:
        """Bytes of a position's log-probabilities."""
        return self.exact_k * _WIDTHS[self.exact_dtype] + len(self.polynomial_terms) * _WIDTHS[self.term_dtype]

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)

    def as_yaml(self) -> bytes:
        """The file beside the data, as DistillKit reads it."""
        values = {
            "d": self.d, "k": self.k, "exact_k": self.exact_k, "exact_dtype": self.exact_dtype,
            "polynomial_terms": list(self.polynomial_terms) or None, "term_dtype": self.term_dtype, "residual_bins": [],
            "delta_encoding": False, "error_diffusion": False, "normalize_t": self.normalize_t,
        }  # fmt: skip
        return yaml.safe_dump(values, sort_keys=False).encode()


def parse_settings(data: bytes, where: str) -> Settings:
    """The settings of somebody's data.

    Raises:
        DataError: not settings, or of a kind that is not read here.
    """
    if len(data) > _SETTINGS_LIMIT:
        raise DataError(f"{where} has {len(data):,} bytes; expected a few lines of settings")
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        raise DataError(f"{where} is not YAML: {' '.join(str(exc).split())[:120]}") from exc
    if not isinstance(found, dict):
        raise DataError(f"{where} should be a mapping with d, k, exact_k and so on")
    # Left out, it is on.
    if found.get("delta_encoding", True) or found.get("residual_bins") or found.get("error_diffusion"):
        raise DataError(
            f"{where} asks for delta_encoding (which is on where it is left out), residual_bins or error_diffusion, which are not read "
            "here; unpack the data with DistillKit and import them as jsonl"
        )
    terms = found.get("polynomial_terms") or []
    numbers = [found.get(key) for key in ("d", "k", "exact_k")]
    whole_numbers = all(type(n) is int for n in numbers)
    known = (
        all(t in ("sqrt", "exp") or (type(t) is int and 0 <= t <= 8) for t in terms)
        if isinstance(terms, list)
        else False
    )
    dtypes = [found.get(key, "float32") for key in ("exact_dtype", "term_dtype")]
    if not whole_numbers or not known or not all(type(t) is str and t in _WIDTHS for t in dtypes):
        raise DataError(f"{where} has no whole numbers d, k, exact_k, or unknown terms or dtypes")
    d, k, exact = (int(n) for n in numbers if n is not None)
    if not (2 <= d <= 1 << 20 and 1 <= k <= min(d, 65535) and 0 <= exact <= k and (exact == k or terms)):
        raise DataError(
            f"{where}: expected 2 <= d, 1 <= k <= d, exact_k <= k, and polynomial_terms where exact_k < k; found {d}, {k}, {exact}"
        )
    return Settings(d, k, exact, dtypes[0], tuple(terms), dtypes[1], found.get("normalize_t") is True)


def write(path: Path, sequences: Iterable[PlainSequence], settings: Settings, *, length: int, pad_id: int) -> int:
    """Write one split as Parquet; returns its rows.

    Every sequence is filled up to ``length`` with ``pad_id`` (whole batches are stacked there), and every position has ``k`` entries:
    one that the cache has no row for says that the next token is certain, which makes its KL a cross-entropy.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    bytes_ = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        [*zip(COLUMNS, (pa.list_(pa.uint64()), bytes_, bytes_), strict=True), ("labels", pa.list_(pa.int64()))]
    )
    rows = 0
    with parquet.ParquetWriter(path, schema) as writer:
        batch: list[Any] = []
        for sequence in sequences:
            batch.append(_filled(sequence, settings, length, pad_id))
            if len(batch) == _BATCH:
                rows += _write_batch(writer, schema, batch)
                batch = []
        rows += _write_batch(writer, schema, batch)
    return rows


def read(
    rows: Iterable[tuple[str, Mapping[str, Any]]], settings: Settings, pad_id: int
) -> Iterator[tuple[str, PlainSequence]]:
    """Rows of DistillKit's columns, checked and unpacked; without a column ``labels`` every token but the first is learnt.

    Raises:
        DataError: naming the row.
    """
    for where, row in rows:
        yield where, _sequence(where, row, settings, pad_id)


def packed_ids(ids: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """uint8 ``[N, ceil(K bits / 8)]`` of ids ``[N, K]``: each ``bits`` long, highest first, zeros at the end."""
    shifts = np.arange(bits - 1, -1, -1)
    flags = ((ids[..., None] >> shifts) & 1).astype(np.uint8)
    return np.packbits(flags.reshape(len(ids), -1), axis=1)


def unpacked_ids(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """int64 ``[N, count]``; inverse of `packed_ids`."""
    flags = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits).astype(np.int64)
    return flags @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def unpacked_values(packed: NDArray[np.uint8], settings: Settings) -> NDArray[np.float64]:
    """float64 ``[N, k]`` of a position's bytes: floats, then the polynomial at the ranks behind them."""
    split = settings.exact_k * _WIDTHS[settings.exact_dtype]
    exact = _floats(packed[:, :split], settings.exact_dtype)
    count = settings.k - settings.exact_k
    if not count:
        return exact
    terms = _floats(packed[:, split:], settings.term_dtype)
    ranks = np.linspace(0, 1, count) if settings.normalize_t else np.arange(count, dtype=np.float64)
    functions: dict[Any, Any] = {"sqrt": np.sqrt, "exp": np.exp}
    basis = np.stack([functions[t](ranks) if t in functions else ranks ** int(t) for t in settings.polynomial_terms])
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([exact, terms @ basis], axis=1)


def _floats(packed: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    raw = np.ascontiguousarray(packed)
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kinds = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
    found: NDArray[np.float64] = raw.view(kinds[dtype]).astype(np.float64)
    return found


def _filled(sequence: PlainSequence, settings: Settings, length: int, pad_id: int) -> tuple[Any, Any, Any, Any]:
    used = len(sequence.token_ids)
    ids = np.full(length, pad_id, dtype=np.int64)
    ids[:used] = sequence.token_ids
    labels = np.full(length, IGNORED, dtype=np.int64)
    labels[:used][sequence.targets] = ids[:used][sequence.targets]
    entries = np.repeat(np.append(ids[1:], pad_id)[:, None], settings.k, axis=1)
    values = np.full(entries.shape, _FILL, dtype=np.float32)
    values[:, 0] = 0.0
    for place, own, log_probs in sequence.rows():
        if len(own):
            entries[place - 1, : len(own)] = own
            # What fills the row repeats an id, with no probability.
            entries[place - 1, len(own) :] = own[0]
            values[place - 1] = _FILL
            values[place - 1, : len(own)] = log_probs
    return ids, labels, values.astype("<f4").view(np.uint8), packed_ids(entries, settings.id_bits)


def _write_batch(writer: Any, schema: Any, batch: Sequence[Any]) -> int:
    import pyarrow as pa

    if not batch:
        return 0
    ids, labels, values, packed = (np.concatenate(column) for column in zip(*batch, strict=True))
    lengths = np.array([len(b[0]) for b in batch], dtype=np.int64)

    def bytes_of(rows: NDArray[np.uint8]) -> Any:
        inner = lists(rows.reshape(-1), np.full(len(rows), rows.shape[1], dtype=np.int64), pa.uint8())
        return lists(inner, lengths, None)

    columns = [
        lists(ids.astype(np.uint64), lengths, pa.uint64()), bytes_of(values), bytes_of(packed),
        lists(labels, lengths, pa.int64()),
    ]  # fmt: skip
    writer.write_table(
        pa.Table.from_arrays([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    )
    return len(batch)


def _sequence(where: str, row: Mapping[str, Any], settings: Settings, pad_id: int) -> PlainSequence:
    lacking = [name for name in COLUMNS if row.get(name) is None]
    if lacking:
        raise DataError(f"{where} lacks {', '.join(lacking)}; expected DistillKit's columns {', '.join(COLUMNS)}")
    length = len(row["input_ids"])
    ids = token_ids(where, row["input_ids"])
    if row.get("labels") is None:
        targets = np.arange(length) > 0
    else:
        targets = refuse_other_labels(where, ids, whole(where, "labels", row["labels"], length))
        # Tokens that only fill the sequence up to the length of the others.
        end = length
        while end > 2 and ids[end - 1] == pad_id and not targets[end - 1]:
            end -= 1
        ids, targets = ids[:end], targets[:end]
    if len(ids) < 2:
        raise DataError(f"{where}: expected two tokens at least, found {len(ids)}")
    values, packed = (
        _byte_rows(where, name, row[name], length, size)
        for name, size in zip(COLUMNS[1:], (settings.value_bytes, settings.id_bytes), strict=True)
    )
    places = np.flatnonzero(targets) - 1
    if len(places) and int(places[-1]) >= min(len(values), len(packed)):
        raise DataError(f"{where}: the learnt token {int(places[-1]) + 1} has no row")
    log_probs = unpacked_values(values[places], settings)
    entries = unpacked_ids(packed[places], settings.id_bits, settings.k)
    exact = log_probs[:, : settings.exact_k]
    if np.isnan(log_probs).any() or (np.diff(exact, axis=1) > 1e-3).any():
        raise DataError(
            f"{where}: the log-probabilities are not numbers that fall; {SETTINGS} is not the one these data were made with"
        )
    kept = log_probs > _NOTHING
    return PlainSequence(
        ids.astype(np.uint32), targets, kept.sum(axis=1).astype(np.int64), entries[kept], log_probs[kept]
    )


def _byte_rows(where: str, name: str, rows: Any, length: int, size: int) -> NDArray[np.uint8]:
    if len(rows) not in (length - 1, length):
        raise DataError(f"{where}: expected {length} rows in {name}, or one less, found {len(rows)}")
    if any(len(r) != size for r in rows):
        found = next(len(r) for r in rows if len(r) != size)
        raise DataError(
            f"{where}: {SETTINGS} makes rows of {size} bytes in {name}, found {found}; these are other data's settings"
        )
    # Bytes, whatever the column could hold.
    if any(min(r, default=0) < 0 or max(r, default=0) > 255 for r in rows):
        raise DataError(f"{where}: {name} should hold bytes")
    return np.asarray(rows, dtype=np.uint8).reshape(len(rows), size)
