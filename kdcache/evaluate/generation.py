"""What models answer to the validation prompts of a cache: greedy generations, ROUGE-L, exact match.

Prompts are the cache's own tokens up to the first target, chat template included; references are the targets that follow.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from kdcache.cache.reader import Split
from kdcache.errors import CacheError, KdcacheError
from kdcache.evaluate.perplexity import AUTOCAST
from kdcache.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BUDGET = 256
# Scripts that are written without spaces: every character is a word of its own, as for any other measure of overlap.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts and references, and what a generation ends with.

    Attributes:
        prompts: token ids, one list per prompt.
        references: token ids, the end included where the reference has one.
        eos_id: end of a response, as the cache was made.
        pad_id: what fills short prompts.
        budget: tokens that a generation may have.
    """

    prompts: list[list[int]]
    references: list[list[int]]
    eos_id: int
    pad_id: int
    budget: int


def prompts_of(split: Split, count: int, budget: int | None = None) -> Prompts:
    """The first ``count`` prompts of a split, or as many as it has.

    Args:
        split: sequences; those that begin with a target have no prompt and are passed over.
        count: prompts that are wanted.
        budget: tokens to generate; None for as many as the longest of the references has, at most 256.

    Raises:
        CacheError: the split has no prompts, being plain text.
    """
    prompts: list[list[int]] = []
    references: list[list[int]] = []
    # Plain text is learnt from its second token on: the first is no prompt.
    wordless = split.cache.plan.data.shape == "text"
    for sequence in split if not wordless else ():
        if len(prompts) == count:
            break
        first = int(np.argmax(sequence.targets))
        if first == 0:
            continue
        # Of a conversation, the first answer.
        ended = np.flatnonzero(~sequence.targets[first:])
        stop = first + int(ended[0]) if len(ended) else len(sequence.targets)
        prompts.append(sequence.token_ids[:first].tolist())
        references.append(sequence.token_ids[first:stop].tolist())
    if not prompts:
        raise CacheError(
            f"split {split.name} of {split.cache.directory} has no prompts, only plain text; --generate and --samples need a "
            "cache of instructions or conversations"
        )
    tokenizer = split.cache.plan.tokenizer
    longest = min(max(map(len, references)), DEFAULT_BUDGET)
    return Prompts(prompts, references, tokenizer.eos_id, tokenizer.pad_id, budget or longest)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    precision: str = "fp32",
    what: str = "student",
    progress: Progress,
) -> list[str]:
    """Greedy answers, one per prompt, in their order; special tokens are left out of the text.

    Args:
        model: a causal language model, adapters in place.
        prompts: what is asked.
        tokenizer: its decoding is the cache's.
        batch_size: prompts per forward pass, filled on the left.
        precision: autocast as in training: ``fp32`` for none.
        what: a name for the progress.
        progress: told about every batch.
    """
    model = inner(model)
    answers = [""] * len(prompts.prompts)
    by_length = sorted(range(len(answers)), key=lambda i: -len(prompts.prompts[i]))
    progress.begin(f"generate {what}", len(answers), "prompts")
    try:
        with greedily(model, prompts.eos_id, prompts.pad_id):
            for start in range(0, len(by_length), batch_size):
                batch = by_length[start : start + batch_size]
                width = len(prompts.prompts[batch[0]])
                ids = torch.full((len(batch), width), prompts.pad_id, dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(batch):
                    own = prompts.prompts[i]
                    ids[row, width - len(own) :] = torch.tensor(own)
                    mask[row, width - len(own) :] = 1
                with torch.autocast(model.device.type, AUTOCAST[precision], enabled=precision != "fp32"):
                    made: Any = model.generate(  # type: ignore[operator]
                        input_ids=ids.to(model.device),
                        attention_mask=mask.to(model.device),
                        max_new_tokens=prompts.budget,
                        use_cache=True,
                    )
                for i, tokens in zip(batch, made[:, width:].tolist(), strict=True):
                    answers[i] = answer_text(tokens, prompts.eos_id, tokenizer)
                progress.advance(len(batch))
    finally:
        progress.end()
    return answers


def answer_text(tokens: Sequence[int], eos_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer up to its end."""
    own = list(tokens)
    own = own[: own.index(eos_id)] if eos_id in own else own
    return str(tokenizer.decode(own, skip_special_tokens=True)).strip()


def inner(model: Any) -> Any:
    """The model itself inside peft's wrapper; its adapters lie in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def greedily(model: PreTrainedModel, eos_id: int, pad_id: int) -> Iterator[None]:
    """Without what a released model brings for chatting (temperature, a penalty on repetitions), as long as this lasts."""
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=eos_id, pad_token_id=pad_id)
    try:
        yield
    finally:
        model.generation_config = own


def words(text: str) -> list[str]:
    """Lower-case words of letters, marks and digits of any script; scripts without spaces by character.

    On ASCII text these are rouge-score's own, which know no other letters.
    """
    found: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFKC", text).lower():
        if unicodedata.category(character)[0] not in "LMN":
            inside = False
        elif unicodedata.name(character, "").startswith(_UNSPACED):
            # A mark belongs to the letter before it.
            if unicodedata.category(character)[0] == "M" and found:
                found[-1] += character
            else:
                found.append(character)
            inside = False
        elif inside:
            found[-1] += character
        else:
            found.append(character)
            inside = True
    return found


def scorer() -> Any:
    """rouge-score's ROUGE-L over `words`.

    Raises:
        KdcacheError: the package is not there.
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError as exc:
        raise KdcacheError("ROUGE-L needs the package rouge-score: pip install 'kdcache[eval]'") from exc

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def judged(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """ROUGE-L F1 and exact match (white space aside), means in [0, 1] with the standard errors of means."""
    rouge = scorer()
    overlap = [rouge.score(r, a)["rougeL"].fmeasure for r, a in zip(references, answers, strict=True)]
    same = [float(a.split() == r.split()) for r, a in zip(references, answers, strict=True)]
    return {
        "rouge_l": float(np.mean(overlap)),
        "rouge_l_stderr": _error_of_mean(overlap),
        "exact_match": float(np.mean(same)),
        "exact_match_stderr": _error_of_mean(same),
    }


def retention(student: dict[str, float | None], teacher: dict[str, float | None]) -> dict[str, float | None]:
    """What of the teacher's score the student has, in percent; None where the teacher has none."""
    return {
        key: 100 * (student[key] or 0.0) / whole if (whole := teacher[key]) else None
        for key in ("rouge_l", "exact_match")
    }


def _error_of_mean(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
