"""Writes the golden caches of format version 1: ``python -m tests.golden.make DIRECTORY``.

The committed files are the truth: another zstd may compress the same content to other bytes. They are never deleted, and
never replaced once a release has been made with them; a new version of the format gets a directory of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import safetensors
import zstandard

from kdcache.cache.layout import CARD_FILE
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.strict_json import readable
from kdcache.cache.writer import CacheWriter
from tests.golden.broken import BROKEN
from tests.golden.contents import GOLDENS, content_of, plan_of
from tests.golden.edits import Files

# Beside the declared temperatures: one between them or above, where a reader interpolates.
BETWEEN = 1.5


def libraries() -> dict[str, str]:
    """What decides about bytes beside the content."""
    return {"zstd": ".".join(map(str, zstandard.ZSTD_VERSION)), "safetensors": safetensors.__version__}


def make(directory: Path) -> None:
    """Valid caches, what readers have to find in them, invalid caches and the index."""
    for name, golden in GOLDENS.items():
        plan = plan_of(golden)
        writer = CacheWriter(directory / "valid" / name, plan, golden.tokens)
        for shard in range(len(plan.shards)):
            writer.commit(shard, content_of(golden, plan, shard))
        writer.finalise()
        (directory / "valid" / name / CARD_FILE).unlink()
        expected = directory / "expected" / f"{name}.json"
        expected.parent.mkdir(exist_ok=True)
        expected.write_text(_lines(expectations(open_cache(directory / "valid" / name))))
    index = {}
    for name, broken in BROKEN.items():
        whole = files_of(directory / "valid" / broken.base)
        edited = Files(whole)
        broken.change(edited)
        changed = {path: data for path, data in edited.files.items() if data != whole.get(path)}
        for path, data in changed.items():
            (directory / "invalid" / name / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / "invalid" / name / path).write_bytes(data)
        index[name] = {
            "base": broken.base,
            "removed": sorted(set(whole) - set(edited.files)),
            "error": broken.error if broken.text else None,
            "text": broken.text,
            "verify": broken.verify or broken.text,
        }
    (directory / "index.json").write_bytes(readable({"made_with": libraries(), "invalid": index}))


def expectations(cache: Cache) -> dict[str, list[dict[str, object]]]:
    """Decoded numbers of every sequence by split: what any reader has to find."""
    result: dict[str, list[dict[str, object]]] = {}
    for name, split in cache.splits.items():
        result[name] = []
        for sequence in split:
            rows = sequence.rows
            temperatures = [*cache.temperatures, BETWEEN]
            partitions = {
                f"{t}": [
                    round(float(z), 9) if kept else None
                    for z, kept in zip(rows.log_partition_at(t), rows.kept, strict=True)
                ]
                for t in temperatures
            }
            result[name].append(
                {
                    "token_ids": sequence.token_ids.tolist(),
                    "targets": sequence.targets.astype(int).tolist(),
                    "label_log_prob": rows.label_log_prob.tolist(),
                    "rest": rows.rest.tolist(),
                    "log_partition": partitions,
                    "rows": [_row(rows.slice(i, i + 1), cache.temperatures) for i in range(len(rows))],
                }
            )
    return result


def _row(row, temperatures) -> dict[str, object]:
    weights = {}
    for t in temperatures:
        parts = row.log_weights_at(t, row.log_partition_at(t))
        weights[f"{t}"] = [round(float(value), 6) if value > -1e30 else None for part in parts for value in part]
    entries = {
        "head_ids": row.head_ids, "head_logits": row.head_logits, "tail_ids": row.tail_ids,
        "tail_logits": row.tail_logits, "head_counts": row.head_counts, "tail_counts": row.tail_counts,
    }  # fmt: skip
    # Adding 0 makes 0 of -0.
    return {**{k: (v + 0).tolist() for k, v in entries.items() if v is not None}, "log_weights": weights}


def files_of(directory: Path) -> dict[str, bytes]:
    """Relative path -> bytes."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def _lines(expected: dict[str, list[dict[str, object]]]) -> str:
    """JSON with one line per row, so that it is small and a difference can be read."""
    text = json.dumps(expected, sort_keys=True)
    return text.replace('{"head_', '\n{"head_').replace(', "token_ids"', ',\n"token_ids"') + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is there already; goldens are never replaced, write beside them and compare")
    make(target)
