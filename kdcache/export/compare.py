"""An exported student against the run it comes from: KL of their next-token distributions, top-1, perplexity, speed.

Both are scored on the validation split of the run's cache. Of the run only hidden states and head stay in memory, so that
no two models are there at once: the distributions ``softmax(h W^T)`` are made from them again, a few rows at a time, in
float32. ``KL(run || export)`` and the share of positions with the same most probable token are means over the positions kept.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.devices import give_back_memory
from kdcache.errors import ModelError
from kdcache.evaluate.head_inputs import HeadInputs
from kdcache.evaluate.inference_worker import speed
from kdcache.evaluate.perplexity import Score, student_score
from kdcache.evaluate.saved_run import SavedRun, Students, run_score
from kdcache.head import Head
from kdcache.models import first_line, head_of, load_adapter, load_model
from kdcache.progress import Progress
from kdcache.student.assembly import load_student
from kdcache.student.loss import CHUNK_BYTES, LossSums
from kdcache.student.start import as_started

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcache.export.formats import Form

# Hidden states kept of the run: 64 MB at a width of 1,024.
POSITIONS = 16_384
_TOKENS = 32
_REPEATS = 3


class _States:
    """Hidden states in front of the head at the positions of a split's targets, by sequence, up to `POSITIONS` of them."""

    def __init__(self, model: Any) -> None:
        self._inputs = HeadInputs(model)
        # By sequence: a pass that ran out of memory is repeated from the start.
        self.kept: dict[int, torch.Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[_States]:
        with self._inputs.listening():
            yield self

    def __call__(self, batch: Mapping[str, torch.Tensor], _sums: LossSums) -> None:
        hidden_ND = self._inputs.take(batch["labels"])
        parts = hidden_ND.split(batch["sequence_targets"].tolist())
        for index, part in zip(batch["sequence_index"].tolist(), parts, strict=True):
            if sum(len(p) for i, p in self.kept.items() if i != index) < POSITIONS:
                # Copied, or each would keep all of its batch.
                self.kept[index] = part.detach().to("cpu", copy=True)


@dataclass(frozen=True)
class Reference:
    """The run's own student: its score and speed, its hidden states by sequence, and its head."""

    score: Score
    tokens_per_second: float
    states: dict[int, torch.Tensor]
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None


def reference_of(run: SavedRun, progress: Progress) -> Reference:
    """Score a run's student as it was trained and saved, and remember what its distributions are made of.

    Raises:
        ModelError: its base or adapter cannot be loaded.
    """
    students = Students()
    with students.after(run) as model:
        model.eval()
        states = _States(model)
        with states.listening():
            score = run_score(run, model, "the run", batch_size=None, progress=progress, observe=states)
        weight_VD, bias_V = head_of(model)
        width = run.cache.vocab_size
        # Copies, so that the model may go.
        head = weight_VD[:width].detach().clone(), None if bias_V is None else bias_V[:width].detach().clone()
        rate = _rate(model, run.recipe.training.precision)
    del model
    students.release()
    return Reference(score, rate, states.kept, *head)


def compared(
    run: SavedRun, reference: Reference, model: PreTrainedModel, what: str, progress: Progress
) -> dict[str, Any]:
    """An export against its run.

    Returns:
        ``loss`` (nats), ``perplexity``, ``kl_to_teacher`` and ``tokens`` as a score has them; ``kl_to_run`` (nats) and ``top_1`` (a share) over
        ``compared_positions``; ``tokens_per_second``.

    Raises:
        TrainingError: nothing to score on.
    """
    states = _States(model)
    # An adapter is the run itself, in the arithmetic of its training.
    precision = run.recipe.training.precision if what == "adapter" else "fp32"
    with states.listening():
        score = student_score(
            model, run.validation, batch_size=run.batch_size, max_length=run.recipe.training.max_length,
            precision=precision, what=what, progress=progress, observe=states,
        )  # fmt: skip
    weight_VD, bias_V = head_of(model)
    width = run.cache.vocab_size
    kl, agreed, positions = 0.0, 0, 0
    place = weight_VD.device
    ours = Head(reference.weight_VD.to(place), None if reference.bias_V is None else reference.bias_V.to(place))
    theirs = Head(weight_VD[:width], None if bias_V is None else bias_V[:width])
    rows = max(1, CHUNK_BYTES // (4 * width))
    for index, mine in reference.states.items():
        for a, b in zip(mine.split(rows), states.kept[index].split(rows), strict=True):
            p = ours.logits(a.to(place)).log_softmax(-1)
            q = theirs.logits(b.to(place)).log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            positions += len(a)
    return {
        **score.as_record(),
        "kl_to_run": kl / positions,
        "top_1": agreed / positions,
        "compared_positions": positions,
        "tokens_per_second": _rate(model, precision),
    }


@contextmanager
def loaded(run: SavedRun, form: Form, folder: Path) -> Iterator[PreTrainedModel]:
    """An export loaded from its files, as whoever gets it would.

    Raises:
        ModelError: it cannot be.
    """
    student = as_started(run.student, run.path)
    if form.gguf is not None:
        model = _load_gguf(folder)
    elif form.name == "adapter":
        model = load_adapter(load_student(student), str(folder), quantized=student.quantization != "none")
    else:
        # What a quantised folder says of itself is enough to load it.
        model = load_model(str(folder), dtype=_dtype_of(folder), device=student.device, attention=student.attention)
    model.eval()
    try:
        yield model
    finally:
        del model
        give_back_memory()


def _dtype_of(folder: Path) -> str:
    import transformers

    stated = str(transformers.AutoConfig.from_pretrained(folder).dtype).removeprefix("torch.")
    return stated if stated in ("bfloat16", "float16", "float32") else "bfloat16"


def _load_gguf(folder: Path) -> PreTrainedModel:
    """A GGUF file unpacked to float32 by transformers, under the model's own configuration, which lies beside it.

    transformers does not read everything back from the file (rope factors, attention biases); llama.cpp does.
    """
    import transformers

    [file] = folder.glob("*.gguf")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # It draws a progress bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, config=config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as exc:
        raise ModelError(f"{file} cannot be loaded again: {first_line(exc)}") from exc
    return model


def _rate(model: PreTrainedModel, precision: str | None) -> float:
    """Tokens per second of greedy generation, one sequence at a time."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * _TOKENS
    count = max(1, min(_TOKENS, int(longest) // 2))
    work = {"batch_size": 1, "prompt_tokens": count, "new_tokens": count, "repeats": _REPEATS, "precision": precision}
    stated = model.generation_config
    ends = None if stated is None else stated.eos_token_id
    figures = speed(model, work)
    if stated is not None:
        stated.eos_token_id = ends
    return float(figures["tokens_per_second"])
