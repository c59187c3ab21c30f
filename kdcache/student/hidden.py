"""Hidden states of a live teacher as a further term of the loss (TinyBERT, Jiao et al. 2020, arXiv:1909.10351, equation 8).

For every target, at the position that predicts it::

    L = mean over pairs (m, t) of  || h_m W - z_t ||^2 / D_t

``h_m`` is what the student's layer m puts out, ``z_t`` what the teacher's layer t does; 0 are the embeddings, and the last is
taken behind the final norm. Layers are paired uniformly, ``t = m x N / M``. ``W`` is one learned projection for all pairs, and
is left out where both are equally wide. The term is summed over targets as cross-entropy and divergence are, and divided with
them.

These states cannot come from a cache: docs/hidden-states.md works out the bytes. The teacher lies beside the student, and runs
once on every batch. The projection is a part of the student while it trains, so that optimizer, clipping and DDP take it as any
other weight; checkpoints keep it in a file of its own, and before the student is saved it is taken off.

Axes: ``N`` targets, ``D`` the student's width, ``E`` the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import transformers

from kdcache.cache.reader import Cache
from kdcache.errors import ModelError, RecipeError, TrainingError
from kdcache.models import first_line, load_model, quiet_libraries, refuse_missing_folder, refuse_narrow_head
from kdcache.recipe import Recipe
from kdcache.same_teacher import refuse_other_teacher, teacher_revision
from kdcache.student.forward import model_inputs
from kdcache.student.packing import refuse_leaks
from kdcache.student.processes import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "hidden_projection"
_FILE = f"{_NAME}.safetensors"


def paired_layers(chosen: Sequence[int] | None, student: int, teacher: int) -> list[tuple[int, int]]:
    """Layers of the student, and for each the teacher's at the same share of its depth.

    Args:
        chosen: of the student, 0 for its embeddings; every layer when None.
        student: its layers M.
        teacher: its layers N.

    Raises:
        ModelError: the student has not as many.
    """
    wanted = range(1, student + 1) if chosen is None else chosen
    beyond = [m for m in wanted if m > student]
    if beyond:
        raise ModelError(
            f"loss.hidden_layers names {', '.join(map(str, beyond))}, but the student has {student} layers; take numbers from 0 "
            f"(the embeddings) to {student}"
        )
    return [(m, round(m * teacher / student)) for m in wanted]


def hidden_sum(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], projection_ED: torch.Tensor | None
) -> torch.Tensor:
    """Mean squared distance of hidden states, summed over targets; in float32 at least.

    Args:
        student: for each pair of layers ``[N, D]``, any floating dtype; carries the gradient.
        teacher: for each pair ``[N, E]``.
        projection_ED: turns the student's states into the teacher's width; None where the widths are equal.
    """
    total = torch.zeros((), device=student[0].device)
    with torch.autocast(student[0].device.type, enabled=False):
        for mine, theirs in zip(student, teacher, strict=True):
            own = mine.to(torch.promote_types(mine.dtype, torch.float32))
            if projection_ED is not None:
                own = own @ projection_ED.to(own.dtype).T
            total = total + (own - theirs.to(own.dtype)).square().mean(dim=1).sum()
    return total / len(student)


class HiddenTerm:
    """The term of one training: a teacher that runs beside the student.

    Args:
        teacher: in evaluation mode on its device.
        pairs: layers of student and teacher, as `paired_layers` has them.
        weight: of the term in the loss.
        projection: without bias, ``D`` in and ``E`` out, in float32; None where the widths are equal.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        pairs: Sequence[tuple[int, int]],
        weight: float,
        projection: torch.nn.Linear | None = None,
    ) -> None:
        self.weight = weight
        self.last = torch.zeros(())
        self._teacher: Any = teacher
        self._pairs = list(pairs)
        self._projection = projection

    @property
    def wanted(self) -> list[int]:
        """Layers of the student whose states have to be there."""
        return [m for m, _ in self._pairs]

    def __call__(
        self, states: Sequence[torch.Tensor], batch: Mapping[str, torch.Tensor], counts: torch.Tensor
    ) -> torch.Tensor:
        """The weighted term, summed over the targets of a batch. ``last`` is then the sum before its weight.

        Args:
            states: the student's hidden states by layer, in the batch's rows or laid end to end.
            batch: as the collator makes it.
            counts: bool ``[R, L - 1]``, where the next token is a target.
        """
        shape = batch["labels"].shape

        def rows(state: torch.Tensor) -> torch.Tensor:
            return state.reshape(*shape, -1)[:, :-1][counts]

        theirs = self._teacher_states(batch)
        device = counts.device
        total = hidden_sum(
            [rows(states[m]) for m, _ in self._pairs],
            [rows(theirs[t].to(device)) for _, t in self._pairs],
            None if self._projection is None else self._projection.weight,
        )
        self.last = total.detach()
        return self.weight * total

    def attach(self, model: Any) -> None:
        """Let the projection train as a part of the student."""
        if self._projection is not None:
            model.add_module(_NAME, self._projection.to(model.device))

    def save(self, checkpoint: Path) -> None:
        """Keep the projection in a checkpoint; errors are the system's own."""
        if self._projection is not None:
            weight = self._projection.weight.detach().cpu().contiguous()
            safetensors.torch.save_file({"weight": weight}, checkpoint / _FILE)

    def load(self, checkpoint: Path) -> None:
        """Take the projection from a checkpoint.

        Raises:
            TrainingError: it is not there, or of another shape.
        """
        if self._projection is None:
            return
        try:
            found = safetensors.torch.load_file(checkpoint / _FILE)["weight"]
            with torch.no_grad():
                self._projection.weight.copy_(found)
        except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as exc:
            raise TrainingError(
                f"{checkpoint} has no usable projection of hidden states ({first_line(exc)}); remove that checkpoint to go on from "
                "an earlier one"
            ) from exc

    @torch.no_grad()
    def _teacher_states(self, batch: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        device = self._teacher.device
        inputs = {name: tensor.to(device) for name, tensor in model_inputs(self._teacher, batch).items()}
        # In the arithmetic that it was loaded in, whatever the student trains in.
        with torch.autocast(device.type, enabled=False):
            output = self._teacher.get_decoder()(
                **inputs, use_cache=False, output_hidden_states=sorted({t for _, t in self._pairs})
            )
        states: Sequence[torch.Tensor] = output.hidden_states
        return states


def detach_projection(model: Any) -> None:
    """The training is over: the projection is no part of the student that is saved."""
    if hasattr(model, _NAME):
        delattr(model, _NAME)


@contextmanager
def without_projection(model: Any) -> Iterator[None]:
    """Around the saving of a checkpoint: the model without the projection, which comes back as the same parameter."""
    projection = getattr(model, _NAME, None)
    detach_projection(model)
    try:
        yield
    finally:
        if projection is not None:
            model.add_module(_NAME, projection)


def live_term(recipe: Recipe, model: Any, cache: Cache) -> HiddenTerm | None:
    """The recipe's term for a student that is loaded, its projection attached; None where the recipe has none. That the teacher
    is the cache's is looked at before, by `refuse_other_live_teacher`.

    Raises:
        ModelError: the teacher cannot be loaded or run on packed rows, or the layers are not there.
    """
    loss, section = recipe.loss, recipe.teacher
    if not loss.hidden_weight or section is None:
        return None
    teacher = load_model(
        section.model,
        revision=teacher_revision(cache, section.model),
        quantization=section.quantization,
        dtype=section.dtype,
        device=section.device,
    )
    refuse_narrow_head(teacher, cache.vocab_size, section.model)
    if recipe.training.packing:
        refuse_leaks(teacher)
    own, theirs = model.config.get_text_config(), teacher.config.get_text_config()
    pairs = paired_layers(loss.hidden_layers, own.num_hidden_layers, theirs.num_hidden_layers)
    projection = None
    if own.hidden_size != theirs.hidden_size:
        projection = torch.nn.Linear(own.hidden_size, theirs.hidden_size, bias=False, device="meta").to_empty(
            device="cpu"
        )
        # Drawn apart from everything else: order, dropout and LoRA are those of the same run without the term.
        generator = torch.Generator().manual_seed(recipe.seed)
        torch.nn.init.normal_(projection.weight, std=own.hidden_size**-0.5, generator=generator)
    term = HiddenTerm(teacher.requires_grad_(False), pairs, loss.hidden_weight, projection)
    term.attach(model)
    return term


def refuse_impossible_term(recipe: Recipe, student: Any, cache: Cache) -> None:
    """Whether the recipe's term can be had, without loading a model; ``student`` is the student's configuration.

    Raises:
        RecipeError: there is no section ``teacher``, or an engine that the term does not go with.
        ModelError: the teacher is not there, or the layers are not.
    """
    loss, section = recipe.loss, recipe.teacher
    if not loss.hidden_weight:
        return
    if section is None:
        raise RecipeError("loss.hidden_weight compares with a live teacher, and needs the recipe section teacher")
    if recipe.training.compile:
        raise RecipeError("loss.hidden_weight does not go with training.compile; leave one of them out")
    if is_sharded():
        raise RecipeError(
            "loss.hidden_weight does not go with FSDP or DeepSpeed, which cut the student's weights; train in one process, or in "
            "several with torchrun"
        )
    quiet_libraries()
    refuse_missing_folder(section.model)
    try:
        config = transformers.AutoConfig.from_pretrained(
            section.model, revision=teacher_revision(cache, section.model), trust_remote_code=False
        )
    except Exception as exc:
        raise ModelError(f"cannot read the configuration of the teacher {section.model}: {first_line(exc)}") from exc
    paired_layers(
        loss.hidden_layers, student.get_text_config().num_hidden_layers, config.get_text_config().num_hidden_layers
    )


def refuse_other_live_teacher(recipe: Recipe, cache: Cache) -> None:
    """Whether the teacher of the recipe's term is the model that its cache was made with, by the hash of its weights.

    Raises:
        ModelError: it is not there.
        CacheError: it is another model; of a mixture, than the first cache's.
    """
    if recipe.loss.hidden_weight and recipe.teacher is not None:
        way_out = "hidden states are compared with those of the cache's teacher: give teacher.model that one"
        refuse_other_teacher(cache, recipe.teacher.model, way_out)
