"""What a reinforcement comes to, without training: run, recipe and data are checked, sizes are worked out from configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.data.examples import Example, Message
from kdcache.data.tokens import prompt_ids
from kdcache.errors import DataError, ModelError
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.reinforce.questions import Question, load_questions, reinforced
from kdcache.reinforce.run import check_reinforce
from kdcache.reinforce.student import Start
from kdcache.student.parameters import count_parameters, outline, read_config
from kdcache.token_maps import load_tokenizer

_SAMPLE = 256
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def estimate_lines(run: Path, recipe: ReinforceRecipe) -> list[str]:
    """Lines that say what would be trained, on what, for how many tokens, and what of the memory can be worked out.

    Raises:
        KdcacheError: whatever `reinforce` would refuse before it loads a model.
    """
    start = check_reinforce(run, recipe)
    training = recipe.training
    tokenizer = load_tokenizer(start.tokenizer)
    asked, longest, passes = _question_line(recipe, start, tokenizer)
    questions = training.steps * training.prompts
    sampled = questions * training.num_generations
    kind = (
        "its adapter"
        if start.adapter is not None
        else f"a new adapter (r = {recipe.lora.r}), since it was trained in full"
    )
    lines = [
        f"student    {start.student.model} ({start.student.quantization}, {start.student.dtype}) of {run}; {kind} learns",
        f"reference  the student {'after the cold start' if recipe.cold_start else 'as it was distilled'}, KL weight {training.beta:g}",
        asked,
        f"a step     {training.prompts} questions x {training.num_generations} completions = {training.completions}, in passes of "
        f"{training.batch_size}",
        f"the run    {training.steps:,} steps: {questions:,} questions{passes(questions)}, "
        f"{sampled:,} completions, at most {sampled * training.max_completion_length:,} sampled tokens",
    ]
    if recipe.cold_start is not None:
        cold = recipe.cold_start
        lines.append(
            f"before it  {cold.steps:,} supervised steps of {cold.batch_size} on {cold.examples:,} worked solutions"
        )
    return [*lines, *_memory_lines(recipe, start, longest), _rewards_line(recipe)]


def _question_line(recipe: ReinforceRecipe, start: Start, tokenizer: Any) -> tuple[str, int, Callable[[int], str]]:
    """What is asked, the longest prompt of the first questions, and in words how often so many questions go through the data."""
    source = recipe.data.train
    try:
        train, test = load_questions(recipe)
    except DataError as exc:
        # A data set of the Hub may well be out of reach where a run is only planned; a local one is not.
        if (
            source is None
            or Path(source.path).suffix
            or source.path.startswith((".", "/", "~"))
            or Path(source.path).exists()
        ):
            raise
        return f"questions  {source.path} on the Hub, which is not at hand here ({str(exc)[:120]})", 0, lambda count: ""
    asked = reinforced(recipe, train)
    lengths = [_prompt_length(recipe, start, question, tokenizer) for question in asked[:_SAMPLE]]
    line = (
        f"questions  {len(asked):,} to learn from, {len(test):,} held out; prompts of {sum(lengths) / len(lengths):.0f} tokens on "
        f"average, at most {max(lengths)} (of the first {len(lengths)})"
    )
    return line, max(lengths), lambda count: f" ({count / len(asked):.2f} passes over the data)"


def _prompt_length(recipe: ReinforceRecipe, start: Start, question: Question, tokenizer: Any) -> int:
    example = Example(0, messages=(Message("user", question.text),))
    return len(prompt_ids(example, tokenizer, prompt=recipe.prompt.shape, system=recipe.prompt.system, date=start.date))


def _memory_lines(recipe: ReinforceRecipe, start: Start, prompt: int) -> list[str]:
    training = recipe.training
    lora = recipe.lora if start.adapter is None else start.student.lora
    student = start.student.model_copy(update={"lora": lora})
    try:
        config: Any = read_config(student)
        found = count_parameters(outline(config, student), student, training.optimizer)
    except ModelError as exc:
        return [f"memory     not worked out: {exc}"]
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    length = prompt + training.max_completion_length
    # Keys and values of all sequences that are sampled together; float32 logits of one pass, their log-softmax and gradient.
    cache = 2 * text.num_hidden_layers * heads * width * _BYTES[student.dtype] * length * training.completions
    logits = 3 * 4 * text.vocab_size * training.max_completion_length * training.batch_size
    state = "unknown" if found.state_bytes is None else _size(found.state_bytes)
    return [
        f"weights    {found.total:,} parameters, {found.trained:,} trained: base {_size(found.base_bytes)}, adapter twice (trained and "
        f"reference) {_size(2 * found.adapter_bytes)}, gradient {_size(found.gradient_bytes)}, optimizer {state}",
        f"memory     while sampling, keys and values up to {_size(cache)}; in a pass, logits up to {_size(logits)}; activations come "
        "on top",
    ]


def _rewards_line(recipe: ReinforceRecipe) -> str:
    rewards = recipe.rewards
    parts = [f"{rewards.format:g} for the form", f"{rewards.correct:g} for a right answer ({rewards.check})"]
    if rewards.length:
        parts.append(
            f"down to -{rewards.length:g} from {rewards.length_target} to {recipe.training.max_completion_length} tokens"
        )
    return f"rewards    {', '.join(parts)}"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
