"""Documents -> rows of one length, as in pre-training.

Documents are laid one behind the other, each with the end-of-sequence token behind it and, where the tokenizer puts one,
the beginning-of-sequence token before it, and the line is cut every ``max_length`` tokens: what is left of a document goes
on in the next row. Every token is a target but a row's first, which nothing stands before, and beginnings, which no model
has to say. So the first token of a document is learnt after the end of the one before (or after its own beginning), and
the end of a document tells a model that what follows has nothing to do with it: attention is plain causal attention over
the row. One document and one row are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from kdcache.data.examples import Example
from kdcache.data.tokens import TokenRow, TokenRows, document, refuse_endless

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pack(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    budget: int | None = None,
    on_row: Callable[[int], None] = lambda tokens: None,
) -> TokenRows:
    """Rows of exactly ``max_length`` tokens; where documents end before the budget does, the last row is shorter.

    Args:
        examples: plain texts.
        tokenizer: needs an end-of-sequence token.
        max_length: tokens of a row.
        budget: tokens of all rows together: as many whole rows as fit. No document is read once they are full.
        on_row: called with the tokens of each row.

    Returns:
        Rows, each with the number of the document that its first token is of; none counts as truncated.

    Raises:
        TokenizerError: no end-of-sequence token.
    """
    refuse_endless(tokenizer)
    wanted = None if budget is None else budget // max_length
    rows: list[TokenRow] = []
    ids, targets = np.zeros(max_length, dtype=np.uint32), np.zeros(max_length, dtype=bool)
    total = empty = filled = first = 0

    def close() -> None:
        nonlocal filled
        row = TokenRow(first, ids[:filled].copy(), targets[:filled].copy())
        row.targets[0] = False
        if row.positions:
            rows.append(row)
            on_row(filled)
        filled = 0

    for example in examples:
        total += 1
        if example.empty:
            empty += 1
            continue
        own, learnt = document(example, tokenizer)
        start = 0
        while start < len(own) and (wanted is None or len(rows) < wanted):
            first = first if filled else example.index
            taken = min(max_length - filled, len(own) - start)
            ids[filled : filled + taken] = own[start : start + taken]
            targets[filled : filled + taken] = learnt[start : start + taken]
            start, filled = start + taken, filled + taken
            if filled == max_length:
                close()
        if wanted is not None and len(rows) >= wanted:
            break
    if filled:
        close()
    return TokenRows(rows, total, empty, 0, 0)
