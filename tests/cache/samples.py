"""Small valid content for tests of the format, made from random logits."""

import hashlib

import numpy as np
import torch

from kdcache.cache import layout
from kdcache.cache.codec import ShardContent, sequence_digest
from kdcache.cache.manifest import (
    DataPlan,
    Plan,
    SelectionPlan,
    ShardPlan,
    SplitPlan,
    TeacherIdentity,
    TokenizerIdentity,
)
from kdcache.cache.strict_json import canonical
from kdcache.teacher.select import Selection, select

VOCAB = 500
TOKENS = [f"t{i}" for i in range(VOCAB)]


def sample_rows(positions, *, seed=0, k=6):
    logits = torch.randn(positions, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    labels = torch.randint(VOCAB, (positions,), generator=torch.Generator().manual_seed(seed + 1))
    return select(logits, labels, Selection("top_k", k, 0.0, (1.0, 2.0)))


def sample_sequences(sequences, *, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 12, sequences)
    targets = np.concatenate([np.r_[False, np.ones(n - 1, dtype=bool)] for n in lengths])
    return ShardContent(
        lengths=lengths.astype(np.int64),
        token_ids=generator.integers(0, VOCAB, lengths.sum()).astype(np.uint32),
        targets=targets,
        rows=sample_rows(int(targets.sum()), seed=seed),
    )


def sample_plan(contents, **changes):
    """A plan whose two splits hold the given shards: the last is validation, the others train."""
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
        selection=SelectionPlan(method="top_k", k=6, floor=0.0, temperatures=(1.0, 2.0)),
        shards=tuple(shards),
    )  # fmt: skip
