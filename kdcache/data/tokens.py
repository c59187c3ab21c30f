"""Examples -> token rows: ids and which of them are targets.

The text before a response and the response are tokenised apart and joined, as at inference, where
the prompt is tokenised before the response exists: no token ever straddles the border. A target is
a token of an assistant turn up to and including its end-of-sequence token; whatever the template
puts behind that is context for the next turn.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdcache.data.examples import Example
from kdcache.errors import DataError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

Segments = list[tuple[str, bool]]


@dataclass(frozen=True)
class TokenRow:
    """One training sequence: uint32 ``ids [L]`` and bool ``targets [L]``; ``targets[0]`` is never set.

    ``index`` is the example's place in its split.
    """

    index: int
    ids: NDArray[np.uint32]
    targets: NDArray[np.bool_]

    @property
    def positions(self) -> int:
        """How many tokens are learnt, which is how many distributions the teacher gives."""
        return int(self.targets.sum())


@dataclass(frozen=True)
class TokenRows:
    """The token rows of a split, and what became of the examples that are not among them."""

    rows: list[TokenRow]
    examples: int
    dropped_empty: int
    dropped_no_target: int
    truncated: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)


def template_sha256(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str | None:
    """Hex SHA-256 of the chat template, None where the prompt is plain."""
    if prompt != "chat":
        return None
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenise(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "chat",
    system: str | None = None,
    date: str = "2024-07-26",
    max_length: int,
    budget: int | None = None,
    on_row: Callable[[int], None] = lambda tokens: None,
) -> TokenRows:
    """Token rows of at most ``max_length`` tokens, in the order of the examples.

    Args:
        examples: as `load_examples` gives them.
        tokenizer: needs an end-of-sequence token, and a chat template for ``prompt="chat"``.
        prompt: ``chat`` renders the tokenizer's template, ``plain`` puts line breaks between the parts.
        system: message put before a conversation that has none.
        date: the day (ISO) that templates which write the date are given.
        max_length: longer sequences are cut at the end and counted as truncated.
        budget: tokens of all rows together; the example that would go beyond is the last that is read, and is left out.
        on_row: called with the tokens of each row.

    Raises:
        TokenizerError: no end-of-sequence token or no chat template.
        DataError: a conversation that the template refuses or renders differently as it grows.
    """
    refuse_endless(tokenizer)
    rows: list[TokenRow] = []
    total = empty = targetless = truncated = tokens = 0
    for example in examples:
        total += 1
        if example.empty:
            empty += 1
            continue
        segments = _segments(example, tokenizer, prompt, system, date)
        if not any(learnt for _, learnt in segments):
            targetless += 1
            continue
        ids, targets = _encode(segments, tokenizer)
        if example.text is not None or prompt == "plain":
            ids, targets = _with_bos(ids, targets, tokenizer)
        row = TokenRow(example.index, ids[:max_length], targets[:max_length].copy())
        row.targets[:1] = False
        if budget is not None and row.positions and tokens + len(row.ids) > budget:
            total -= 1
            break
        truncated += len(ids) > max_length
        if row.positions:
            rows.append(row)
            tokens += len(row.ids)
            on_row(len(row.ids))
        else:
            targetless += 1
    return TokenRows(rows, total, empty, targetless, truncated)


def document(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """A plain text with the tokenizer's beginning, where it puts one, and its end: uint32 ids ``[L]`` and bool targets
    ``[L]``, all but the beginning."""
    return _with_bos(*_encode([(example.text or "", True), (str(tokenizer.eos_token), True)], tokenizer), tokenizer)


def prompt_ids(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "chat",
    system: str | None = None,
    date: str = "2024-07-26",
) -> NDArray[np.uint32]:
    """uint32 ids ``[L]`` of a conversation that waits for its next answer, as `tokenise` has them before a response.

    Raises:
        TokenizerError: no chat template for ``prompt="chat"``.
        DataError: a conversation that the template refuses or renders differently as it grows.
    """
    ids, targets = _encode(_segments(example, tokenizer, prompt, system, date, answer=False), tokenizer)
    return _with_bos(ids, targets, tokenizer)[0] if prompt == "plain" else ids


def refuse_endless(tokenizer: PreTrainedTokenizerBase) -> None:
    """Every response ends.

    Raises:
        TokenizerError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, which every response should end "
            "with; set eos_token in its tokenizer_config.json"
        )


def _segments(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system: str | None,
    date: str,
    *,
    answer: bool = True,
) -> Segments:
    """Text pieces in order, each with whether it is learnt; without the ``answer``, up to where one would begin."""
    eos = str(tokenizer.eos_token)
    if example.text is not None:
        return [(example.text, True), (eos, True)]
    messages = [{"role": m.role, "content": m.content} for m in example.messages or ()]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if prompt == "plain":
        return _plain(messages, eos)
    if not tokenizer.chat_template:
        raise TokenizerError(f"the tokenizer {tokenizer.name_or_path} has no chat template; use data.prompt plain")
    return _chat(messages, tokenizer, eos, example.index, date, answer)


def _plain(messages: list[dict[str, str]], eos: str) -> Segments:
    segments: Segments = []
    for message in messages:
        learnt = message["role"] == "assistant"
        segments.append((message["content"] + ("" if learnt else "\n"), learnt))
        if learnt:
            segments.append((eos, True))
    return segments


def _chat(
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    eos: str,
    index: int,
    date: str,
    answer: bool,
) -> Segments:
    segments: Segments = []
    done = ""

    def refuse_rewritten(rendered: str, earlier: str) -> None:
        if not rendered.startswith(earlier):
            raise DataError(
                f"example {index}: the chat template of {tokenizer.name_or_path} renders earlier turns differently "
                "once later ones follow, so a turn's tokens cannot be told apart; give the tokenizer a template "
                "that only appends, or use data.prompt plain"
            )

    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, index, date, generation=True)
        through = _render(messages[: turn + 1], tokenizer, index, date, generation=False)
        refuse_rewritten(before, done)
        refuse_rewritten(through, before)
        response = through[len(before) :]
        end = response.rfind(eos)
        # A template that closes turns with another token than the tokenizer's still learns one real end.
        learnt = response[: end + len(eos)] if end >= 0 else response + eos * (message is messages[-1])
        segments += [(before[len(done) :], False), (learnt, True)]
        done = before + learnt if end >= 0 else through
    if not answer:
        before = _render(messages, tokenizer, index, date, generation=True)
        refuse_rewritten(before, done)
        segments.append((before[len(done) :], False))
    return segments


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, index: int, date: str, *, generation: bool
) -> str:
    from jinja2 import TemplateError

    try:
        # As a batch of one: a conversation that opens with the assistant has nothing before it, and a bare
        # empty list is not taken for a conversation.
        day = datetime.date.fromisoformat(date)
        rendered = tokenizer.apply_chat_template(
            [messages],
            tokenize=False,
            add_generation_prompt=generation,
            # Llama's templates take a date, others call for today's.
            date_string=day.strftime("%d %b %Y"),
            chat_template=_NOW.sub(lambda call: json.dumps(day.strftime(call[2])), str(tokenizer.chat_template)),
        )
        return str(rendered[0])
    except (TemplateError, ValueError, TypeError) as exc:
        raise DataError(f"example {index}: the chat template refuses the conversation: {exc}") from exc


def _encode(
    segments: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    pieces = tokenizer([text for text, _ in segments], add_special_tokens=False)["input_ids"]
    ids = [np.asarray(piece, dtype=np.uint32) for piece in pieces]
    flags = [np.full(len(piece), learnt) for piece, (_, learnt) in zip(ids, segments, strict=True)]
    return np.concatenate(ids), np.concatenate(flags)


def _with_bos(
    ids: NDArray[np.uint32], targets: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Put the beginning-of-sequence token where the tokenizer itself would put one."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return ids, targets
    return np.concatenate(([np.uint32(bos)], ids)), np.concatenate(([False], targets))
