"""Views of a split for people who train elsewhere: a torch data set, or a `datasets.Dataset` on disk.

Both give, for one sequence at a temperature T, the labels in the convention of Hugging Face (``labels[i]`` is
``input_ids[i]`` where token ``i`` is learnt and -100 elsewhere, and is predicted by the logits at ``i - 1``), and one
teacher row per label, in order: entry ids, log-probabilities ``log p`` at T, the weight ``w`` each entry has in a sum over the vocabulary, and
the mass ``rho`` outside the entries as one bucket. With the student's ``q = softmax(logits / T)`` at the row's position
and ``sigma = 1 - sum_e q(e)`` over the row's entries, the distillation loss of a sequence is::

    KD = sum over rows of  sum_e w_e (log p_e - log q(e))  +  rho (log rho - log sigma)

where a term of no weight counts 0. It is the forward KL where all entries are exact (then ``w = p``) and an unbiased
estimate of it where some are drawn (then ``rho = 0``). Usual is ``T^2 KD`` beside the cross-entropy. A row without
entries, of a position that the cache leaves out, adds nothing; means are over the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import Dataset

from kdcache import __version__
from kdcache.cache.codec import CachedSequence
from kdcache.cache.reader import Cache, Split
from kdcache.errors import CacheError, StorageError
from kdcache.student.collate import IGNORED, Collator, Tail, sparse_teacher
from kdcache.student.sparse_teacher import SparseTeacher

Tensors = dict[str, torch.Tensor]
_ROW_KEYS = ("teacher_ids", "teacher_log_probs", "teacher_log_tail", "teacher_log_weights")


class TorchView(Dataset[Tensors]):
    """A split as a map-style data set of dicts of tensors. Use `to_torch`.

    Item ``i`` is what `Collator` makes of sequence ``i`` alone, without the axis of the batch: ``input_ids``,
    ``attention_mask`` and ``labels`` (int64 ``[L]``), ``teacher_ids`` (int64 ``[P, K]``), ``teacher_log_probs`` (float32
    ``[P, K]``, ``-inf`` in places that only fill a row), ``teacher_log_tail`` (float32 ``[P]``, log of ``rho``), where
    entries are drawn ``teacher_log_weights`` (float32 ``[P, K]``, log of ``w``), ``sequence_index`` and ``sequence_targets``, the number of its rows (int64, scalars).
    """

    def __init__(self, split: Split, collator: Collator) -> None:
        self.split = split
        self.collator = collator

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensors:
        batch = self.collator([(range(len(self))[index], self.split[index])])
        return {key: value if key in _ROW_KEYS else value[0] for key, value in batch.items()}

    def collate(self, items: Sequence[Tensors]) -> Tensors:
        """Items -> the batch that `Collator` makes of their sequences, for ``DataLoader(view, collate_fn=view.collate)``.

        Rows of all sequences lie end to end, in the order in which ``labels[:, 1:] != -100`` meets them.
        """
        length = max(len(item["input_ids"]) for item in items)
        width = max(item["teacher_ids"].shape[1] for item in items)
        fill = {"input_ids": self.collator.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {
            key: torch.stack([pad(item[key], (0, length - len(item[key])), value=value) for item in items])
            for key, value in fill.items()
        }
        for key in _ROW_KEYS:
            rows = [item[key] for item in items if key in item]
            if rows and rows[0].ndim == 2:
                filler = 0.0 if key == "teacher_ids" else -torch.inf
                rows = [pad(r, (0, width - r.shape[1]), value=filler) for r in rows]
            if rows:
                batch[key] = torch.cat(rows)
        own = {key: torch.stack([item[key] for item in items]) for key in ("sequence_index", "sequence_targets")}
        return {**batch, **own}


def to_torch(split: Split, *, temperature: float | None = None, tail: Tail = "auto") -> TorchView:
    """A split as a torch data set; read shard by shard as it is indexed.

    Batches of `TorchView.collate` are those that `DistillationTrainer` trains on; ``loss_sums`` takes them as they are.

    Args:
        split: of an open cache.
        temperature: T; by default 1 where the cache declares it, and otherwise the smallest that it does.
        tail: the mass outside the exact entries, as `Collator` takes it.

    Raises:
        CacheError: the temperature is below every declared one.
    """
    return TorchView(split, Collator(split.cache.plan.tokenizer.pad_id, _temperature(split.cache, temperature), tail))


def to_datasets(
    split: Split, *, temperature: float | None = None, tail: Tail = "auto", cache_dir: str | Path | None = None
) -> Any:
    """A split as a `datasets.Dataset`, memory-mapped from an Arrow file.

    The file is written once for a cache, split, temperature and tail, and found again. Columns:

    - ``input_ids``, ``labels``: lists of int32, as above;
    - ``positions``: list of int32, for each row the index of the logits that it is compared with;
    - ``teacher_ids`` (int32), ``teacher_log_probs``, ``teacher_weights`` (float32): lists of one list per row;
    - ``rest_mass``: list of float32, ``rho`` of each row.

    Args:
        split: of an open cache.
        temperature: T; by default 1 where the cache declares it, and otherwise the smallest that it does.
        tail: the mass outside the exact entries, as `Collator` takes it.
        cache_dir: where the file is kept; by default where ``datasets`` keeps its own.

    Raises:
        CacheError: the temperature is below every declared one, or the cache is damaged.
        StorageError: the file cannot be written.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    chosen = _temperature(split.cache, temperature)
    integers, numbers = datasets.List(datasets.Value("int32")), datasets.List(datasets.Value("float32"))
    features = datasets.Features(
        {
            **dict.fromkeys(("input_ids", "labels", "positions"), integers),
            "teacher_ids": datasets.List(integers),
            **dict.fromkeys(("teacher_log_probs", "teacher_weights"), datasets.List(numbers)),
            "rest_mass": numbers,
        }
    )
    what = f"kdcache {__version__}|{split.cache.id}|{split.name}|{chosen!r}|{tail}"

    def examples() -> Iterator[dict[str, Any]]:
        return (_example(sequence, chosen, tail) for sequence in split)

    try:
        return datasets.Dataset.from_generator(
            examples,
            features=features,
            cache_dir=None if cache_dir is None else str(cache_dir),
            fingerprint=hashlib.sha256(what.encode()).hexdigest()[:32],
        )
    except DatasetGenerationError as exc:
        if isinstance(exc.__cause__, CacheError):
            raise exc.__cause__ from exc
        raise StorageError(f"datasets cannot write the view of split {split.name}: {exc.__cause__ or exc}") from exc
    except OSError as exc:
        raise StorageError(f"datasets cannot write the view of split {split.name}: {exc.strerror or exc}") from exc


def _temperature(cache: Cache, temperature: float | None) -> float:
    """The temperature asked for, or the usual one."""
    declared = cache.temperatures
    if temperature is None:
        return 1.0 if 1.0 in declared else min(declared)
    if not temperature >= min(declared):
        raise CacheError(
            f"temperature {temperature:g} is below the cache's smallest declared temperature {min(declared):g}; ask for that or "
            "one above, or make a cache with selection.temperatures including it"
        )
    return temperature


def _example(sequence: CachedSequence, temperature: float, tail: Tail) -> dict[str, Any]:
    """One row of the `datasets.Dataset`."""
    teacher = sparse_teacher(sequence.rows, temperature, tail)
    places = np.flatnonzero(sequence.targets)
    labels = np.full(len(sequence.token_ids), IGNORED, dtype=np.int32)
    labels[places] = sequence.token_ids[places]
    return {
        "input_ids": sequence.token_ids.astype(np.int32),
        "labels": labels,
        "positions": (places - 1).astype(np.int32),
        **_ragged(teacher),
        "rest_mass": teacher.log_tail_N.exp().numpy(),
    }


def _ragged(teacher: SparseTeacher) -> dict[str, list[Any]]:
    """Entries of each row, without the places that fill it."""
    log_weights = teacher.log_probs_NK if teacher.log_weights_NK is None else teacher.log_weights_NK
    inside = ~torch.isneginf(teacher.log_probs_NK)
    ends = inside.sum(dim=1).cumsum(0)[:-1].tolist()
    columns = {
        "teacher_ids": teacher.ids_NK.to(torch.int32),
        "teacher_log_probs": teacher.log_probs_NK,
        "teacher_weights": log_weights.exp(),
    }
    if not len(inside):  # a sequence without targets; numpy splits nothing into one part
        return {name: [] for name in columns}
    return {name: np.split(values[inside].numpy(), ends) for name, values in columns.items()}
