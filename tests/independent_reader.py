"""A reader of kdcache caches, written from cache_format.md alone: it shares no code with kdcache."""

import json
from hashlib import sha256

import numpy as np
import zstandard


def numbers(planes, *, half=False):
    whole = sum(plane.astype("<i8") << 8 * i for i, plane in enumerate(planes))
    return whole.astype("<u2").view("<f2").astype(float) if half else whole


def read_shard(data, size, record, half):
    frame, content, tensors = zstandard.get_frame_parameters(data), sha256(), {}
    assert frame.content_size == size <= 192 << 20 and frame.has_checksum and not frame.dict_id, "section 4"  # noqa: PT018
    raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    header = json.loads(raw[8 : (start := 8 + int.from_bytes(raw[:8], "little"))])
    ((key, stated),) = header.pop("__metadata__").items()
    for name, tensor in sorted(header.items()):
        flat, dtype, shape = raw[start:][slice(*tensor["data_offsets"])], tensor["dtype"], tensor["shape"]
        content.update(f"{name} {dtype} {','.join(map(str, shape))}\n".encode() + flat)
        tensors[name] = np.frombuffer(flat, {"U8": "u1", "U32": "<u4"}[dtype]).reshape(shape)
    assert (key, json.loads(stated)) == ("kdcache", {**record, "content": content.hexdigest()}), "section 5"
    rows = {"label": numbers(tensors["row.label"], half=True), "rest": numbers(tensors["row.rest"]).T / 1024 - 32}
    for part, step in (("head", 1 / 16), ("tail", 1 / 2)):
        counts, steps = numbers(tensors[f"row.{part}"]), numbers(tensors[f"{part}.id"])
        each, cuts = f"{part}.value" in tensors, np.cumsum(counts)[:-1]
        assert counts.sum() == len(steps), "invariant 4"
        stored = tensors[f"{part}.value"] if each else np.repeat(tensors["row.tail_value"], counts, axis=1)
        logits = numbers(stored, half=True) if half or not each else -step * numbers(stored)
        rows[f"{part}_ids"] = [np.cumsum(row) for row in np.split(steps, cuts)]
        rows[f"{part}_logits"] = np.split(logits, cuts)
        rows[f"{part}_counts"] = np.split(tensors.get(f"{part}.count", 0 * steps), cuts)
    return tensors, [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def read_cache(directory):
    plan, manifest = (json.loads((directory / f"{name}.json").read_bytes()) for name in ("plan", "manifest"))
    digest, splits = sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()).hexdigest(), {}
    for i, (planned, entry) in enumerate(zip(plan["shards"], manifest["shards"], strict=True)):
        data = (directory / f"shards/{i:05d}.safetensors.zst").read_bytes()
        assert sha256(data).hexdigest() == entry["sha256"], "section 9"
        record = {"format": "kdcache", "version": 1, "plan": digest, "index": i}
        t, rows = read_shard(data, entry["raw_bytes"], record, plan["selection"]["values"] == "half")
        tokens, cuts = np.stack([numbers(t["token.id"]), t["token.target"]]), np.cumsum(t["sequence.length"])[:-1]
        for (ids, flags), stated in zip(np.split(tokens, cuts, axis=1), t["sequence.digest"], strict=True):
            assert sha256(ids.astype("<u4").tobytes() + flags.astype("u1").tobytes()).digest()[:16] == bytes(stated)
            splits.setdefault(planned["split"], []).append((ids, flags, [rows.pop(0) for _ in range(flags.sum())]))
    return plan, splits


def weights(row, selection, at):
    head, tail, t = row["head_logits"], row["tail_logits"], selection["temperatures"]
    z = {b: np.logaddexp.reduce(head / b) + np.logaddexp(0, r) for b, r in zip(t, row["rest"], strict=True)}
    if selection["method"] == "random_sampling":
        return z[at], *(np.log(row[f"{part}_counts"] / selection["draws"]) for part in ("head", "tail"))
    reach = [tail / b - z[b] - np.log(floor) for b, floor in zip(t, selection["floors"], strict=False)]
    return z[at], head / at - z[at], tail / at - z[at] - np.max(reach or [tail], axis=0)
