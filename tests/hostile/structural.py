"""Changes of what a cache says, with every hash made right again: a stranger's cache, not a damaged one.

Either an error of ours, or content that a second reader (`independent`) decodes to the same numbers, that holds every
invariant of ``cache_format.md``, and that training takes without a warning or a number that is not finite.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent, sequence_digest
from kdcache.cache.manifest import parse_plan
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.shard import compress
from kdcache.cache.verify import verify
from kdcache.errors import KdcacheError
from tests.hostile import independent
from tests.hostile.victims import SHARDS, Victim

_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 256, 65535, 65536, 1 << 24, (1 << 32) - 1, 1 << 32, (1 << 53) - 1, 1 << 53,
    1 << 63, (1 << 63) - 1, -(1 << 63), 10**17, 10**30, 0.0, -0.0, 0.5, 1.0, 2.0, 1e-4, 1e-3, 99.9, 100.0, 1e-5, 5e-324,
    1e-40, 1e308, -1.5, "", "x", "\ud800", "\x00", "a" * 5000, "../../etc", [], {}, [[]], [None], {"a": 1}, "0" * 64, "top_k",
    "threshold", "threshold_sampling", "random_sampling", "half", "quantised", "all", "entropy", "subset", [1.0], [1.0, 2.0],
    [0.5, 1.0, 1.0000000000000002], [1.9, 1.9000000000000004], [5e-324], [1e-30, 1.0], [100.0],
)  # fmt: skip
_DTYPES = (
    "U8",
    "I8",
    "U16",
    "I16",
    "U32",
    "I32",
    "U64",
    "I64",
    "F16",
    "BF16",
    "F32",
    "F64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "x",
    7,
)


class Forgery:
    """A victim taken apart: plan, manifest, and of one shard its header, tensors and commit record."""

    def __init__(self, victim: Victim, place: int) -> None:
        self.files = dict(victim.files)
        self.plan: Any = json.loads(victim.files[layout.PLAN_FILE])
        self.manifest: Any = json.loads(victim.files[layout.MANIFEST_FILE])
        self.place = place
        self.parts = [_take_apart(victim.files[name]) for name in SHARDS]
        self.header, self.tensors, self.record = self.parts[place]
        # How the safetensors file is put together from these, where an attack wants it otherwise.
        self.metadata: Any = None
        self.change_header: Callable[[dict[str, Any]], Any] = lambda header: header
        self.behind = b""

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor as the header has it."""
        shape: list[int] = self.header[name]["shape"]
        return shape

    def numbers(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor's bytes, to be written to."""
        array = np.frombuffer(self.tensors[name], dtype=np.uint8).copy()
        return array

    def seal(self) -> dict[str, bytes]:
        """Every file, all hashes made right."""
        plan_bytes = _dumped(self.plan)
        try:
            digest = parse_plan(plan_bytes).digest
        except KdcacheError:
            digest = hashlib.sha256(plan_bytes).hexdigest()
        files = {**self.files, layout.PLAN_FILE: plan_bytes}
        for number, (header, tensors, record) in enumerate(self.parts):
            if "plan" in record and isinstance(record["plan"], str) and len(record["plan"]) == 64:
                record["plan"] = digest
            mine = number == self.place
            raw, content = _put_together(header, tensors, record, self if mine else None)
            data = compress(raw)
            files[SHARDS[number]] = data
            entry = self.manifest["shards"][number]
            entry.update(
                sha256=hashlib.sha256(data).hexdigest(), content_sha256=content, bytes=len(data), raw_bytes=len(raw),
                entries=sum(_second(header.get(f"{part}.id")) for part in ("head", "tail")),
            )  # fmt: skip
        self.manifest["plan_digest"] = digest
        for stated, split in zip(self.manifest["splits"], _splits(self.plan), strict=False):
            if isinstance(split, dict):
                stated.update({k: split.get(k) for k in ("name", "sequences", "tokens", "positions")})
            wanted = self.plan.get("selection") if isinstance(self.plan, dict) else None
            wanted = wanted.get("temperatures") if isinstance(wanted, dict) else None
            if isinstance(wanted, list) and len(wanted) <= 16 and len(wanted) != len(stated["kept_mass_mean"]):
                stated.update(kept_mass_mean=[0.5] * len(wanted), kept_mass_p1=[0.5] * len(wanted))
        files[layout.MANIFEST_FILE] = _dumped(self.manifest)
        return files


# Attacks --------------------------------------------------------------------------------------------------------------


def tensor_values(f: Forgery, draw: random.Random) -> None:
    """A few stored numbers of one or two tensors become others."""
    for name in draw.sample([n for n in f.tensors if f.tensors[n]], draw.choice((1, 1, 2))):
        data = f.numbers(name)
        for _ in range(draw.choice((1, 1, 2, 5))):
            place = draw.randrange(len(data))
            data[place] = draw.choice(
                (0, 1, 2, 0x3C, 0x7C, 0x7E, 0x7F, 0x80, 0xFC, 0xFE, 0xFF, draw.randrange(256), data[place] ^ 1)
            )
        f.tensors[name] = data.tobytes()
    if draw.random() < 0.7:
        _redigest(f)


def tensor_everywhere(f: Forgery, draw: random.Random) -> None:
    """One tensor all zeros, all ones, reversed, shuffled or random."""
    name = draw.choice([n for n in f.tensors if f.tensors[n]])
    data, how = f.numbers(name), draw.randrange(5)
    np.random.default_rng(draw.randrange(1 << 30)).shuffle(data)
    choices = (bytes(len(data)), b"\xff" * len(data), f.tensors[name][::-1], data.tobytes(), draw.randbytes(len(data)))
    f.tensors[name] = choices[how]
    if draw.random() < 0.7:
        _redigest(f)


def entries_moved(f: Forgery, draw: random.Random) -> None:
    """Counts of two rows change so that their sum stays: entries pass from one row to another."""
    name = draw.choice(("row.head", "row.tail", "sequence.length", "head.count", "tail.count"))
    if name not in f.tensors or len(f.tensors[name]) < 8:
        name = "row.head"
    data = f.numbers(name)
    count = f.shape(name)[-1]
    if name == "sequence.length":
        data = data.view("<u4")
    if count > 1:
        a, b = draw.sample(range(count), 2)
        step = draw.choice((1, 1, 2, int(data[b])))
        data[a], data[b] = (int(data[a]) + step) % 256, (int(data[b]) - step) % 256
    f.tensors[name] = data.tobytes()
    if draw.random() < 0.7:
        _redigest(f)


def legal(f: Forgery, draw: random.Random) -> None:
    """Another label, rest or logit within its range: as a rule a legal cache with other content."""
    name = draw.choice(
        [n for n in ("row.label", "row.rest", "head.value", "tail.value", "row.tail_value") if f.tensors.get(n)]
    )
    data = f.numbers(name).reshape(2, -1)
    place = draw.randrange(data.shape[1])
    if name in ("row.label", "row.tail_value"):
        low, high = struct.pack("<e", -draw.choice((0.0, 1e-7, 0.5, 3.0, 60.0, 65504.0, draw.random() * 20)))
    else:
        low, high = draw.randrange(256), draw.choice((0, 1, 2, 63, 127, 128, 255))
    data[:, place] = low, high
    f.tensors[name] = data.tobytes()


def tensors_swapped(f: Forgery, draw: random.Random) -> None:
    """Two tensors change names, or one takes the other's bytes."""
    a, b = draw.sample(sorted(f.tensors), 2)
    if draw.random() < 0.5:
        f.tensors[a], f.tensors[b] = f.tensors[b], f.tensors[a]
        if draw.random() < 0.5:
            f.header[a], f.header[b] = f.header[b], f.header[a]
    else:
        size = len(f.tensors[a])
        f.tensors[a] = (f.tensors[b] * (size // max(1, len(f.tensors[b])) + 1))[:size].ljust(size, b"\0")


def shape_or_dtype(f: Forgery, draw: random.Random) -> None:
    """Another dtype or shape over the same bytes, or over as many as it then needs."""
    name = draw.choice(sorted(f.tensors))
    entry, size = f.header[name], len(f.tensors[name])
    how = draw.randrange(6)
    if how == 0:
        entry["dtype"] = draw.choice(_DTYPES)
    elif how == 1:
        entry["shape"] = draw.choice(
            ([], [size], [1, size], [size, 1], entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]])
        )
    elif how == 2:
        place = draw.randrange(max(1, len(entry["shape"])))
        entry["shape"][place] = _odd(draw)
    elif how == 3:
        entry["dtype"], entry["shape"] = draw.choice(
            (("U16", [size // 2]), ("U32", [size // 4]), ("F16", [size // 2]), ("I8", [size]))
        )
    elif how == 4:
        more = draw.choice((-1, 1, 2))
        last = max(0, entry["shape"][-1] + more)
        entry["shape"][-1] = last
        width = 4 if entry["dtype"] == "U32" else 1
        f.tensors[name] = f.tensors[name].ljust(math.prod(entry["shape"]) * width, b"\0")[
            : math.prod(entry["shape"]) * width
        ]
    else:
        entry["shape"] = draw.choice(
            ([(1 << 63) - 1], [1 << 32, 1 << 32], [0], [0, 1 << 62], [-1], [True], [1.0], None, "x", {})
        )


def header_fields(f: Forgery, draw: random.Random) -> None:
    """The safetensors header: offsets that overlap or leave gaps, odd fields, other keys, other JSON."""
    how = draw.randrange(8)

    def change(header: dict[str, Any]) -> Any:
        names = [n for n in header if n != "__metadata__"]
        name, other = draw.sample(names, 2)
        if how == 0:
            header[name]["data_offsets"] = header[other]["data_offsets"]
        elif how == 1:
            place = draw.randrange(2)
            header[name]["data_offsets"][place] += draw.choice((-8, -1, 1, 8, 1 << 40, -(1 << 40), 1 << 63))
        elif how == 2:
            header[name]["data_offsets"] = draw.choice(
                ([], [0], [0, 0, 0], None, [0.0, 1.0], ["0", "1"], [10**17, 10**18], [1, 0])
            )
        elif how == 3:
            header[name][draw.choice(("extra", "dtype", "shape", "Dtype"))] = _odd(draw)
        elif how == 4:
            header[draw.choice(("extra", "", "__metadata", "head.id\0", "\ud800"))] = header.pop(name)
        elif how == 5:
            header[name] = _odd(draw)
        elif how == 6:
            return nested(draw.choice((10, 100, 900, 960, 980, 990, 995, 1000, 20000)), draw.choice("[{"))
        else:
            header[name]["shape"] = json.loads(nested(draw.choice((3, 100, 400)), "["))
        return header

    f.change_header = change
    if draw.random() < 0.1:
        f.behind = draw.randbytes(draw.choice((1, 8, 1000)))


def commit_record(f: Forgery, draw: random.Random) -> None:
    """The record in the metadata, or the metadata itself."""
    how = draw.randrange(5)
    if how <= 1:
        f.record[draw.choice(sorted(f.record))] = draw.choice(
            (_odd(draw), 1 - f.place, 0.0 + f.place, bool(f.place), 1.0)
        )
    elif how == 2:
        del f.record[draw.choice(sorted(f.record))]
    elif how == 3:
        f.record[draw.choice(("more", "", "Plan"))] = _odd(draw)
    else:
        text = json.dumps(f.record)
        f.metadata = draw.choice((
            {}, None, [], "x", {"kdcache": text, "other": "x"}, {"kdcache": f.record}, {"kdcache": [text]}, {"kdcache": None},
            {"kdcache": text + " "}, {"kdcache": " " + text}, {"KDCACHE": text}, {"kdcache": text[:-1]}, {"kdcache": 5},
            {"kdcache": nested(draw.choice((100, 950, 990, 1000)), draw.choice("[{"))}, {"kdcache": text.replace('"index"', '"index": 0, "index"')},
        ))  # fmt: skip


def plan_field(f: Forgery, draw: random.Random) -> None:
    """One to three values of the plan, anywhere in it."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change_json(f.plan, draw)


def plan_selection(f: Forgery, draw: random.Random) -> None:
    """Temperatures, floors, limits and methods that fit each other and nothing else."""
    selection = f.plan["selection"]
    selection["temperatures"] = sorted({
        draw.choice((1.0, 2.0, 0.5, 1e-5, 1e-2, 1e-3, 1e-30, 1e-40, 5e-324, 99.0, 100.0, 1.0000000000000002, 1.0000000001, 1.01, draw.random() * 4))
        for _ in range(len(selection["temperatures"]))
    })  # fmt: skip
    missing = {"threshold_sampling": 2, "top_k": 2, "threshold": 2}.get(selection["method"], 1) - len(
        selection["temperatures"]
    )
    if missing > 0 and len(_take_apart(f.files[SHARDS[0]])[0]["row.rest"]["shape"]) and f.shape("row.rest")[1] == 2:
        selection["temperatures"].append(
            max(selection["temperatures"]) * draw.choice((1.0000000000000002, 1.0000000000000004, 1.0001, 1.01, 1.5))
        )
    if selection["floors"]:
        selection["floors"] = [
            draw.choice((1e-4, 1e-3, 0.2, 0.1, 0.999, draw.random())) for _ in selection["temperatures"]
        ]
    if draw.random() < 0.3:
        f.plan["tokenizer"]["vocab_size"] = draw.choice((2, 499, 500, 501, 65536, 65537, 1 << 24))


def manifest_field(f: Forgery, draw: random.Random) -> None:
    """One to three values of the manifest, behind the sealing."""
    sealed = f.seal()
    value = json.loads(sealed[layout.MANIFEST_FILE])
    for _ in range(draw.choice((1, 1, 2, 3))):
        _change_json(value, draw)
    f.files = {**sealed, layout.MANIFEST_FILE: _dumped(value)}
    f.seal = lambda: f.files  # type: ignore[method-assign]


def json_text(f: Forgery, draw: random.Random) -> None:
    """Plan or manifest as text that parsers disagree on."""
    file = draw.choice((layout.PLAN_FILE, layout.MANIFEST_FILE))
    sealed = f.seal()
    text = sealed[file].decode()
    depth = draw.choice((100, 190, 200, 260, 900, 950, 990, 1000, 100_000))
    old, new = draw.choice((
        ('"format"', '"format": "kdcache", "format"'), ('"version": 1', '"version": 1.0'), ('"version": 1', '"version": true'),
        ('"version": 1', '"version": 1e0'), ('"version": 1', '"version": 01'), ('"version": 1', f'"version": {nested(depth, "[")}'),
        ('"version": 1', '"version": NaN'), ('"version": 1', '"version": -Infinity'), ('"version": 1', '"version": ' + "9" * 5000),
        ('"version": 1', '"version": 1, "more": ' + nested(depth, "{")), ("{", "\ufeff{"), ("{", "\x00{"), ("}", "}}"), (":", "::"),
        ('"format"', '"\\u0066ormat"'), ('"kdcache"', '"\\ud800"'), ('"kdcache"', '"kdcache\\u0000"'), (",", ",,"), ("{", "/**/{"),
        ("{", nested(depth, "[") + "{"), ('"format": "kdcache"', f'"format": {nested(depth, draw.choice("[{"))}'),
    ))  # fmt: skip
    f.files = {**sealed, file: text.replace(old, new, 1).encode("utf-8", "surrogatepass")}
    f.seal = lambda: f.files  # type: ignore[method-assign]


KINDS: dict[Callable[[Forgery, random.Random], None], float] = {
    tensor_values: 0.3, tensor_everywhere: 0.06, entries_moved: 0.1, legal: 0.1, tensors_swapped: 0.05, shape_or_dtype: 0.08,
    header_fields: 0.08, commit_record: 0.05, plan_field: 0.08, plan_selection: 0.03, manifest_field: 0.04, json_text: 0.03,
}  # fmt: skip


def prepare() -> None:
    """Import what takes seconds."""
    import kdcache.student.collate  # noqa: F401


def attack(victims: list[Victim], directories: dict[str, Path], index: int) -> tuple[str, str]:
    """Case number ``index``: forge one cache, read it as a student would, put it back.

    Returns:
        Its kind, and ``refused``, ``no difference``, ``another legal cache``, or in capitals what went wrong.
    """
    draw = random.Random(index)
    victim = draw.choice(victims)
    directory = directories[victim.name]
    forgery = Forgery(victim, draw.randrange(2))
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    kind(forgery, draw)
    files = forgery.seal()
    changed = [name for name, data in files.items() if data != victim.files[name]]
    try:
        for name in changed:
            (directory / name).write_bytes(files[name])
        return kind.__name__.replace("_", " "), _outcome(directory, files, victim, thorough=draw.random() < 0.125)
    finally:
        for name in changed:
            (directory / name).write_bytes(victim.files[name])


def _outcome(directory: Path, files: dict[str, bytes], victim: Victim, *, thorough: bool) -> str:
    try:
        if thorough:
            verify(directory)
        cache = open_cache(directory)
        contents = [cache.load(i) for i in range(len(SHARDS))]
        cache.vocabulary()
    except KdcacheError:
        return "refused"
    plan = json.loads(files[layout.PLAN_FILE])
    for index, content in enumerate(contents):
        shard = independent.read(files[SHARDS[index]], plan, index)
        if independent.broken(shard, files[SHARDS[index]], plan, index):
            return f"INVARIANTS {independent.broken(shard, files[SHARDS[index]], plan, index)}"
        if not _agree(content, shard):
            return "TWO READERS DIFFER"
        problem = _unusable(cache, content, thorough=thorough)
        if problem:
            return problem
    same = all(files[name] == victim.files[name] for name in (*SHARDS, layout.VOCABULARY_FILE))
    return "no difference" if same else "another legal cache"


def _agree(content: ShardContent, shard: independent.Shard) -> bool:
    rows = content.rows
    pairs: list[tuple[Any, Any]] = [
        (content.lengths.tolist(), [len(i) for i, _ in shard.sequences]),
        (content.token_ids.tolist(), [i for ids, _ in shard.sequences for i in ids]),
        (content.targets.astype(int).tolist(), [f for _, flags in shard.sequences for f in flags]),
        (rows.head.tolist(), [len(r.head) for r in shard.rows]),
        (rows.tail.tolist(), [len(r.tail) for r in shard.rows]),
        (
            list(zip(rows.head_ids.tolist(), rows.head_logits.tolist(), strict=True)),
            [e for r in shard.rows for e in r.head],
        ),
        (
            list(zip(rows.tail_ids.tolist(), rows.tail_logits.tolist(), strict=True)),
            [e for r in shard.rows for e in r.tail],
        ),
        (rows.rest.tolist(), [r.rest for r in shard.rows]),
        (rows.label_log_prob.tolist(), [r.label for r in shard.rows]),
    ]
    return all(mine == theirs for mine, theirs in pairs)


def _unusable(cache: Cache, content: ShardContent, *, thorough: bool) -> str | None:
    """What keeps the content from being trained on."""
    rows, declared = content.rows, content.rows.design.temperatures
    mass = rows.kept_mass()
    if not ((mass >= 0) & (mass <= 1)).all():
        return "MASS BEYOND 1"
    above = (declared[0] + declared[-1]) / 2, declared[-1] * 3
    for temperature in (*declared, *above):
        log_z = rows.log_partition_at(temperature)
        if not np.isfinite(log_z).all():
            return f"LOG-PARTITION NOT FINITE at {temperature!r}"
        weights = rows.log_weights_at(temperature, log_z)
        if any(np.isnan(w).any() or (w == np.inf).any() for w in weights):
            return f"WEIGHTS NOT FINITE at {temperature!r}"
        if thorough and (problem := _not_trainable(cache, content, temperature)):
            return problem
    return None


def _not_trainable(cache: Cache, content: ShardContent, temperature: float) -> str | None:
    import torch

    from kdcache.student.collate import Collator

    for tail in ("auto", "lumped", "renormalised"):
        collate = Collator(cache.plan.tokenizer.pad_id, temperature, tail)  # type: ignore[arg-type]
        batch = collate([(i, content[i]) for i in range(len(content))])
        for name, values in batch.items():
            if torch.isnan(values).any() or (values == torch.inf).any():
                return f"{name} NOT FINITE at {temperature!r}"
        if int(batch["teacher_ids"].max()) >= cache.vocab_size:
            return "AN ID BEYOND THE VOCABULARY"
    return None


# Making hashes right --------------------------------------------------------------------------------------------------


def nested(depth: int, bracket: str) -> str:
    """JSON this deep."""
    return "[" * depth + "]" * depth if bracket == "[" else '{"a":' * depth + "1" + "}" * depth


def _take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Any]]:
    raw = zstandard.ZstdDecompressor().decompress(data)
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    record = json.loads(header.pop("__metadata__")["kdcache"])
    return header, {n: raw[8 + size :][slice(*e["data_offsets"])] for n, e in header.items()}, record


def _put_together(
    header: dict[str, Any], tensors: dict[str, bytes], record: dict[str, Any], forgery: Forgery | None
) -> tuple[bytes, str]:
    h = hashlib.sha256()
    for name in sorted(tensors):
        entry = header[name]
        shape = entry["shape"] if isinstance(entry["shape"], list) else []
        h.update(
            f"{name} {entry['dtype']} {','.join(str(n) for n in shape)}\n".encode("utf-8", "replace") + tensors[name]
        )
    content = h.hexdigest()
    if isinstance(record.get("content"), str) and len(record["content"]) == 64:
        record["content"] = content
    body, entries = b"", {}
    for name in header:
        entries[name] = {**header[name], "data_offsets": [len(body), len(body) + len(tensors[name])]}
        body += tensors[name]
    metadata: Any = {"kdcache": json.dumps(record, sort_keys=True, separators=(",", ":"))}
    changed: Any = {"__metadata__": metadata, **entries}
    if forgery is not None:
        if forgery.metadata is not None:
            changed["__metadata__"] = forgery.metadata
        changed = forgery.change_header(changed)
        body += forgery.behind
    text = _dumped(changed) if not isinstance(changed, str) else changed.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body, content


def _redigest(f: Forgery) -> None:
    """Sequence digests, and the split's fingerprint in the plan, made those of the tokens."""
    ids = np.frombuffer(f.tensors["token.id"], dtype=np.uint8).reshape(f.shape("token.id")[0], -1).astype(np.uint32)
    tokens = sum(
        (plane << np.uint32(8 * place) for place, plane in enumerate(ids)), np.zeros(ids.shape[1], dtype=np.uint32)
    )
    flags = np.frombuffer(f.tensors["token.target"], dtype=np.uint8)
    ends = np.cumsum(np.frombuffer(f.tensors["sequence.length"], dtype="<u4").astype(np.int64))
    if len(ends) and ends[-1] == len(tokens) and (np.diff(ends, prepend=0) > 0).all():
        spans = [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        joined = b"".join(sequence_digest(tokens[s], flags[s]) for s in spans)
        f.tensors["sequence.digest"] = joined
        f.plan["data"]["splits"][f.place]["fingerprint"] = hashlib.sha256(joined).hexdigest()


def _odd(draw: random.Random) -> Any:
    """One of the odd values, a copy: lists among them are changed in their turn."""
    return copy.deepcopy(draw.choice(_ODD))


def _change_json(value: Any, draw: random.Random) -> None:
    """Replace, remove, repeat or add one value somewhere below ``value``."""
    while True:
        keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.9:
            value = value[key]
            continue
        break
    how, old = draw.randrange(8), value[key]
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, dict):
        value[draw.choice(("more", "", "Format", "\ud800"))] = _odd(draw)
    elif how == 2 and isinstance(value, list):
        value.append(old)
    elif how <= 4 and isinstance(old, int | float):
        value[key] = draw.choice((old + 1, old - 1, -old, float(old), old * 2, str(old), bool(old)))
    else:
        value[key] = _odd(draw)


def _dumped(value: Any) -> bytes:
    """JSON with lone surrogates as escapes and numbers of any size."""
    return json.dumps(value, sort_keys=False).encode("ascii")


def _second(entry: Any) -> int:
    """Entries that a tensor of ids has, as far as its header says so."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return shape[1] if isinstance(shape, list) and len(shape) == 2 and type(shape[1]) is int and shape[1] >= 0 else 0


def _splits(plan: Any) -> list[Any]:
    data = plan.get("data") if isinstance(plan, dict) else None
    splits = data.get("splits") if isinstance(data, dict) else None
    return splits if isinstance(splits, list) else []
