"""Prompts -> the teacher's answers, token by token, with the hidden states that each token came from.

Prompts are filled on the left and answered together; a key-value cache keeps what the decoder has seen. An answer ends
with one of the stop tokens or at its limit, and once half of a batch has ended only the others go on. Logits are those
that a cache is made from (float32, only columns that stand for tokens), so a token is drawn from the very distribution
that is kept. Every token takes one number in [0, 1) of SHAKE-256 over seed and prompt: no other prompt and no batch has a
part in it.

Axes: ``B`` prompts, ``b`` those still answered, ``L`` tokens of the longest, ``P`` tokens of all answers, ``D`` hidden,
``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from kdcache.data.tokens import TokenRow
from kdcache.errors import ModelError
from kdcache.teacher.forward import TeacherForward
from kdcache.teacher.top_k import top_k


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: at ``temperature`` 0 the most probable; else drawn from the ``top_k`` most probable (0: all), of
    these from the fewest that reach the mass ``top_p``."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """Answers of one batch, in the order of its prompts.

    Attributes:
        lengths: int64 ``[B]``, tokens of each.
        ids: int64 ``[P]``, the end included where it was reached.
        states: ``[P, D]``, the state that each token came from, in the teacher's arithmetic, on the CPU.
        ended: bool ``[B]``, whether the answer came to its end before its limit.
    """

    lengths: torch.Tensor
    ids: torch.Tensor
    states: torch.Tensor
    ended: torch.Tensor


def numbers_of(prompt: NDArray[np.uint32], seed: int, count: int) -> NDArray[np.float64]:
    """float64 ``[count]`` in [0, 1): SHAKE-256 over the seed and the prompt's ids, 53 bits each."""
    data = seed.to_bytes(8, "little") + prompt.astype("<u4").tobytes()
    words = np.frombuffer(hashlib.shake_256(data).digest(8 * count), dtype="<u8")
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def choose(logits_bV: torch.Tensor, sampling: Sampling, numbers_b: torch.Tensor | None) -> torch.Tensor:
    """int64 ``[b]``: the chosen tokens. Ties go to the lower id; a point on the cumulated probabilities finds the token.

    Args:
        logits_bV: float32.
        sampling: how to choose.
        numbers_b: float64 in [0, 1), needed where the temperature is above 0.
    """
    if sampling.temperature == 0 or numbers_b is None:
        return top_k(logits_bV, 1)[1][:, 0]
    width = logits_bV.shape[1]
    scaled, ids = logits_bV.double() / sampling.temperature, None
    if 0 < sampling.top_k < width:
        scaled, ids = top_k(scaled, sampling.top_k)
    if sampling.top_p < 1:
        order = scaled.argsort(dim=1, descending=True, stable=True)
        scaled, ids = scaled.gather(1, order), order if ids is None else ids.gather(1, order)
    p = scaled.softmax(dim=1)
    cumulated = p.cumsum(dim=1)
    if sampling.top_p < 1:
        # A token is in as long as those before it do not reach the mass: the most probable always is.
        p = p.where(cumulated - p < sampling.top_p, 0.0)
        cumulated = p.cumsum(dim=1)
    # right=True: a token of probability zero has no room for a point.
    points = (numbers_b * cumulated[:, -1])[:, None]
    place = torch.searchsorted(cumulated, points, right=True).clamp_(max=cumulated.shape[1] - 1)
    # Rounding may carry a point to the very end, behind the last token that is in.
    place = torch.minimum(place, (p > 0).double().cumsum(dim=1).argmax(dim=1, keepdim=True))
    return (place if ids is None else ids.gather(1, place))[:, 0]


@torch.inference_mode()
def answer(
    teacher: TeacherForward,
    prompts: Sequence[NDArray[np.uint32]],
    limits: Sequence[int],
    *,
    sampling: Sampling,
    stop: Sequence[int],
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Answers:
    """Answer a batch of prompts.

    Args:
        teacher: whose answers.
        prompts: uint32 ids, at least one each.
        limits: most tokens of each answer, at least one.
        sampling: how tokens are chosen.
        stop: ids that end an answer.
        on_step: called with the tokens that each step has made.

    Raises:
        ModelError: out of memory, or states that are not finite.
    """
    try:
        return _answer(teacher, prompts, limits, sampling, stop, on_step)
    except torch.OutOfMemoryError as exc:
        raise ModelError(
            f"the teacher ran out of memory answering {len(prompts)} prompts of at most {max(map(len, prompts))} tokens with up to "
            f"{max(limits)}; lower data.generate.batch_size or data.generate.max_new_tokens"
        ) from exc


@torch.inference_mode()
def replay(teacher: TeacherForward, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[P, D]`` and labels ``[P]`` (int64) of rows that end with their targets, token by token as `answer` has
    them: a second opinion of what one pass over the whole row gives.

    Args:
        teacher: whose states.
        rows: prompts, each with one answer behind it.
    """
    states, labels = [], []
    for row in rows:
        start = int(np.argmax(row.targets))
        ids_1L = torch.from_numpy(row.ids.astype(np.int64)).to(teacher.device)[None]
        memory = transformers.DynamicCache(config=teacher.decoder.config)
        places = torch.arange(len(row.ids), device=teacher.device)[None]
        for begin, end in [(0, start), *((i, i + 1) for i in range(start, len(row.ids) - 1))]:
            span, mask = slice(begin, end), torch.ones_like(ids_1L[:, :end])
            states.append(_step(teacher.decoder, ids_1L[:, span], mask, places[:, span], memory))
        labels.append(ids_1L[0, start:])
    return torch.cat(states), torch.cat(labels)


def _answer(
    teacher: TeacherForward,
    prompts: Sequence[NDArray[np.uint32]],
    limits: Sequence[int],
    sampling: Sampling,
    stop: Sequence[int],
    on_step: Callable[[int], None],
) -> Answers:
    device, width = teacher.device, max(map(len, prompts))
    ids_BL = np.full((len(prompts), width), teacher.pad_id, dtype=np.int64)
    mask_BL = np.zeros((len(prompts), width), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        ids_BL[i, width - len(prompt) :] = prompt
        mask_BL[i, width - len(prompt) :] = 1
    numbers_BT = None
    if sampling.temperature:
        drawn = [numbers_of(p, sampling.seed, max(limits)) for p in prompts]
        numbers_BT = torch.from_numpy(np.stack(drawn)).to(device)
    # The prompts still answered, by their number.
    owner_b = torch.arange(len(prompts), device=device)
    limit_B, stop_S = torch.tensor(limits, device=device), torch.tensor(stop, device=device)
    step_ids, mask = torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL).to(device)
    places = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    going_b = torch.ones_like(owner_b, dtype=torch.bool)
    ended_B = torch.zeros_like(going_b)
    memory = transformers.DynamicCache(config=teacher.decoder.config)
    owners, tokens, states = [], [], []
    for step in range(max(limits)):
        hidden_bD = _step(teacher.decoder, step_ids, mask, places, memory)
        numbers = None if numbers_BT is None else numbers_BT[owner_b, step]
        token_b = choose(teacher.head.logits(hidden_bD), sampling, numbers)
        owners.append(owner_b[going_b])
        tokens.append(token_b[going_b])
        states.append(hidden_bD[going_b])
        on_step(len(owners[-1]))
        stopped_b = going_b & torch.isin(token_b, stop_S)
        ended_B[owner_b[stopped_b]] = True
        going_b = going_b & ~stopped_b & (step + 1 < limit_B[owner_b])
        left = int(going_b.sum())
        if not left:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step_ids, places = token_b[:, None], places[:, -1:] + 1
        if 2 * left <= len(owner_b):
            rest = going_b.nonzero().squeeze(1)
            memory.batch_select_indices(rest)
            owner_b, going_b, mask = owner_b[rest], going_b[rest], mask[rest]
            step_ids, places = step_ids[rest], places[rest]
    owner_P, state_PD = torch.cat(owners), torch.cat(states)
    if not bool(torch.isfinite(state_PD).all()):
        raise ModelError(
            "the teacher gives no finite distribution while it answers; float16 overflows on some models: try teacher.dtype "
            "bfloat16 or float32"
        )
    # Steps follow each other, so a stable order by prompt is each answer from its beginning.
    order = owner_P.argsort(stable=True)
    return Answers(
        lengths=torch.bincount(owner_P, minlength=len(prompts)).cpu(),
        ids=torch.cat(tokens)[order].cpu(),
        states=state_PD[order].cpu(),
        ended=ended_B.cpu(),
    )


def _step(
    decoder: Any,
    ids_bL: torch.Tensor,
    mask_bL: torch.Tensor,
    places_bL: torch.Tensor,
    memory: transformers.DynamicCache,
) -> torch.Tensor:
    """Hidden states ``[b, D]`` of the last tokens."""
    known = inspect.signature(decoder.forward).parameters
    # Families without a table or rotation of places find them from the mask.
    extra = {"position_ids": places_bL} if "position_ids" in known else {}
    output = decoder(input_ids=ids_bL, attention_mask=mask_bL, past_key_values=memory, use_cache=True, **extra)
    hidden: torch.Tensor = output.last_hidden_state[:, -1]
    return hidden
