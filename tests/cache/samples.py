"""Small valid content for tests of the format, made from random logits by every method."""

import dataclasses
import hashlib

import numpy as np
import torch

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent, decode, encode, sequence_digest
from kdcache.cache.manifest import DataPlan, Plan, ShardPlan, SplitPlan, TeacherIdentity, TokenizerIdentity
from kdcache.cache.reader import open_cache
from kdcache.cache.selection import SelectionPlan
from kdcache.cache.strict_json import canonical
from kdcache.cache.writer import CacheWriter
from kdcache.teacher.select import Selection, select

VOCAB = 500
TOKENS = [f"t{i}" for i in range(VOCAB)]


DEFAULT = "threshold_sampling"
# Every way to select; the last stores drawn ids without their logits.
SELECTIONS = {
    "top_k": Selection("top_k", (1.0, 2.0), k=6),
    "threshold": Selection("threshold", (1.0, 2.0), k=6, floors=(0.05, 0.02)),
    "threshold_sampling": Selection("threshold_sampling", (1.0, 2.0), floors=(0.2, 0.1)),
    "random_sampling": Selection("random_sampling", (1.0,), draws=8),
    "ids_alone": Selection("threshold_sampling", (2.0,), floors=(0.1,), tail_logits=False),
}


def sample_rows(positions, *, seed=0, method=DEFAULT):
    logits = torch.randn(positions, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    labels = torch.randint(VOCAB, (positions,), generator=torch.Generator().manual_seed(seed + 1))
    uniforms = np.random.default_rng(seed).random((positions, SELECTIONS[method].uniforms))
    return select(logits, labels, SELECTIONS[method], uniforms).rows


def sample_sequences(sequences, *, seed=0, method=DEFAULT):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 12, sequences)
    targets = np.concatenate([np.r_[False, np.ones(n - 1, dtype=bool)] for n in lengths])
    return ShardContent(
        lengths=lengths.astype(np.int64),
        token_ids=generator.integers(0, VOCAB, lengths.sum()).astype(np.uint32),
        targets=targets,
        rows=sample_rows(int(targets.sum()), seed=seed, method=method),
    )


def stored(content, *, values="quantised"):
    """The content as a shard keeps it, numbers rounded."""
    return decode(encode(content, values=values), design=content.rows.design, values=values)


def stored_rows(rows, *, values="quantised"):
    """Rows as a shard keeps them: those of one sequence of nothing but targets."""
    targets = np.r_[False, np.ones(len(rows), dtype=bool)]
    ids = np.zeros(len(targets), dtype=np.uint32)
    return stored(ShardContent(np.array([len(targets)]), ids, targets, rows), values=values).rows


def selection_plan(method=DEFAULT, **changes):
    """The plan's record of one of `SELECTIONS`."""
    chosen = SELECTIONS[method]
    record = {
        "method": chosen.method, "k": chosen.k, "floors": chosen.floors, "draws": chosen.draws,
        "temperatures": chosen.temperatures, "bytes_per_position": None, "tail_logits": chosen.tail_logits,
        "values": "quantised", "positions": "all", "quantile": 0.0,
    }  # fmt: skip
    return SelectionPlan(**{**record, **changes})


def sample_plan(contents, *, selection=None, **changes):
    """A plan whose two splits hold the given shards: the last is validation, the others train.

    ``changes`` are to the teacher.
    """
    shards, starts = [], [0, 0]
    for number, content in enumerate(contents):
        split = int(number == len(contents) - 1)
        shards.append(
            ShardPlan(
                split=split,
                start=starts[split],
                sequences=len(content),
                tokens=len(content.token_ids),
                positions=len(content.rows),
            )
        )
        starts[split] += len(content)

    def split_plan(number, name):
        own = [c for c, s in zip(contents, shards, strict=True) if s.split == number]
        digests = [sequence_digest(c[i].token_ids, c[i].targets) for c in own for i in range(len(c))]
        return SplitPlan(
            name=name, source="sample", revision=None, selected=name, examples=starts[number], dropped_empty=0,
            dropped_no_target=0, truncated=0, sequences=starts[number], tokens=sum(len(c.token_ids) for c in own),
            positions=sum(len(c.rows) for c in own), fingerprint=hashlib.sha256(b"".join(digests)).hexdigest(),
        )  # fmt: skip

    teacher = {
        "name": "teacher", "revision": None, "fingerprint": "0" * 64, "architecture": "Qwen2ForCausalLM",
        "quantization": "none", "dtype": "float32", "batch_tokens": 64,
    }  # fmt: skip
    return Plan(
        format=layout.FORMAT,
        version=layout.VERSION,
        teacher=TeacherIdentity(**{**teacher, **changes}),
        tokenizer=TokenizerIdentity(
            name="teacher", fingerprint=hashlib.sha256(canonical(TOKENS)).hexdigest(), vocab_size=VOCAB, eos_id=1, pad_id=0
        ),
        data=DataPlan(
            shape="text", columns={}, system=None, date="2024-07-26", prompt="plain", template_sha256=None, max_length=16,
            splits=(split_plan(0, "train"), split_plan(1, "validation")),
        ),
        selection=selection or selection_plan(),
        shards=tuple(shards),
        derived=None,
    )  # fmt: skip


def method_caches(folder):
    """An open cache in ``folder`` for each method, and ``thinned``, with positions left out of its first split."""
    opened = {}
    for method in [*SELECTIONS, "thinned"]:
        own = DEFAULT if method == "thinned" else method
        contents = [sample_sequences(n, seed=n, method=own) for n in (3, 5, 2)]
        selection = selection_plan(own)
        if method == "thinned":
            selection = selection_plan(own, positions="loss", quantile=0.5)
            for number in (0, 1):
                rows = contents[number].rows.emptied(np.arange(len(contents[number].rows)) % 2 == 0)
                rows = dataclasses.replace(rows, design=dataclasses.replace(rows.design, some_empty=True))
                contents[number] = dataclasses.replace(contents[number], rows=rows)
        writer = CacheWriter(folder / method, sample_plan(contents, selection=selection), TOKENS)
        for index, content in enumerate(contents):
            writer.commit(index, content)
        writer.finalise()
        opened[method] = open_cache(folder / method)
    return opened
