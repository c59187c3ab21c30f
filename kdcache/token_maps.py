"""Tokenizers, and the map from ids to tokens that teacher, cache and student must share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.cache.strict_json import canonical_sha256
from kdcache.errors import TokenizerError
from kdcache.hub_access import refuse_unreachable
from kdcache.models import first_line, quiet_libraries, refuse_missing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenMap:
    """A tokenizer's map: token strings by id (None where an id has no token), and their hash."""

    tokens: list[str | None]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ModelError: there is no such folder.
        TokenizerError: the folder has no tokenizer, or it has no end-of-sequence token.
    """
    import transformers

    quiet_libraries()
    refuse_missing_folder(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as exc:
        refuse_unreachable(model, revision, exc)
        # Anything from OSError to KeyError, depending on which file is missing or broken.
        raise TokenizerError(f"{model} has no usable tokenizer: {first_line(exc)}") from exc
    if len(tokenizer.get_vocab()) < 2:
        raise TokenizerError(f"{model} has no usable tokenizer: its vocabulary is empty")
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {model} has no end-of-sequence token, which every response should end with; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def token_map(tokenizer: PreTrainedTokenizerBase, *, head_width: int | None = None) -> TokenMap:
    """Token strings by id, from id 0 to the largest id that has a token and a column of the head.

    A few tokenizers have tokens that their text model's head does not know (image placeholders).
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    # Two spellings of one id: the smaller is kept, so that the map does not depend on dictionary order.
    for token in sorted(vocabulary, reverse=True):
        tokens[vocabulary[token]] = token
    tokens = tokens[:head_width]
    return TokenMap(tokens, canonical_sha256(tokens))


def refuse_other_tokens(mine: TokenMap, theirs: list[str | None], model: str) -> None:
    """Refuse a tokenizer whose map differs from a cache's.

    Raises:
        TokenizerError: naming the first ids that differ with both spellings.
    """
    longest = max(len(mine.tokens), len(theirs))
    a = mine.tokens + [None] * (longest - len(mine.tokens))
    b = theirs + [None] * (longest - len(theirs))
    differing = [i for i in range(longest) if a[i] != b[i]]
    if differing:
        shown = "; ".join(f"id {i} is {a[i]!r}, in the cache {b[i]!r}" for i in differing[:4])
        raise TokenizerError(
            f"the tokenizer of {model} differs from the cache's in {len(differing)} of {longest} entries: {shown}. "
            "A student needs its teacher's token map"
        )
