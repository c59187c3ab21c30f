"""Depth and width: the shapes that a model family has at one size, and what each costs.

A size is reached by many shapes. For every width that fits, the depth follows, and the feed-forward width is then set so
that the size is hit to within a few percent. Parameters are counted on models without values, one and two layers deep, so
that no family's formula is written down here; layers of one shape are alike.

FLOPs follow Kaplan et al. 2020 (arXiv:2001.08361, table 1): two for every weight that multiplies a token, head included, and
``2 x layers x width of the heads x context`` for attention over half the context on average; training takes three times the
forward pass. At equal size deeper and thinner students tend to be better below a billion parameters (Liu et al. 2024,
arXiv:2402.14905), and slower, since layers wait for each other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kdcache.errors import ModelError
from kdcache.models import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Rows of a table; how far from the wanted size a shape may end; widths that are looked at; and what is still called a shape.
_ROWS, _OFF, _WIDTHS = 7, 0.05, 40
_ASPECTS, _DEEPEST = (4.0, 512.0), 200
# Feed-forward widths: multiples that kernels like, and their share of the width.
_STEP, _SMALL_STEP, _FEED_FORWARD = 64, 32, (1.0, 8.0)
_HEADER = (
    "layers", "hidden", "ffn", "heads/kv", "params", "body", "embed.", "16-bit", "AdamW", "forward", "training",
)  # fmt: skip
# Weights, gradients and two moments in float32.
_TRAINED_BYTES = 16


@dataclass(frozen=True)
class Shape:
    """The numbers that make a size; the keys of a configuration."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a configuration."""
        return cls(**{key: getattr(config, key) for key in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Count:
    """Parameters: all of them, those of embeddings and head (once where they are one), and those of the head."""

    total: int
    embedding: int
    head: int

    @property
    def body(self) -> int:
        """Parameters of the layers and norms."""
        return self.total - self.embedding


@dataclass(frozen=True)
class Alternatives:
    """Shapes of about one size, deepest first, and the one whose width goes with its depth most as in the model itself."""

    shapes: tuple[Shape, ...]
    chosen: Shape


def count(config: PreTrainedConfig) -> Count:
    """Parameters of a model, from its configuration.

    Raises:
        ModelError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as exc:
        raise ModelError(f"cannot build a model of type {config.model_type}: {first_line(exc)}") from exc
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    own = {id(p): p.numel() for p in (embeddings, head)}
    return Count(sum(p.numel() for p in model.parameters()), sum(own.values()), head.numel())


def scaled_config(source: PreTrainedConfig, shape: Shape, model: str) -> PreTrainedConfig:
    """A model's configuration in another shape.

    Raises:
        ModelError: the layers are of several kinds, and it is not known of which kind more or fewer of them would be.
    """
    config: Any = copy.deepcopy(source)
    layers, wanted = config.num_hidden_layers, shape.num_hidden_layers
    for name, value in config.to_dict().items():
        if "layer" not in name or not isinstance(value, list) or len(value) != layers or layers == wanted:
            continue
        if any(item != value[0] for item in value):
            raise ModelError(
                f"the layers of {model} are not all alike ({name}: {', '.join(sorted(map(str, set(value))))}); student.init cannot "
                f"scale them to another number than {layers}: give student.init.num_hidden_layers {layers}, or drop some"
            )
        setattr(config, name, [value[0]] * wanted)
    if isinstance(getattr(config, "max_window_layers", None), int) and layers != wanted:
        config.max_window_layers = wanted if config.max_window_layers >= layers else 0
    for key, value in asdict(shape).items():
        setattr(config, key, value)
    if isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = shape.hidden_size // shape.num_attention_heads
    scaled: PreTrainedConfig = config
    return scaled


def alternatives(source: Any, parameters: int, model: str) -> Alternatives:
    """Shapes of about so many parameters in the family of a model: its width of a head, and its heads per key.

    Raises:
        ModelError: there is none within five percent.
    """
    head_width = source.hidden_size // source.num_attention_heads
    group = source.num_attention_heads // source.num_key_value_heads
    ratio = source.intermediate_size / source.hidden_size

    @cache
    def counted(width: int, feed_forward: int, layers: int) -> Count:
        heads = width // head_width
        shared = next(g for g in range(min(group, heads), 0, -1) if heads % g == 0)
        return count(_probe_config(source, Shape(width, feed_forward, layers, heads, heads // shared)))

    def fitted(width: int) -> tuple[Shape, int] | None:
        """The shape of a width, and its size."""
        step = _STEP if width >= 512 else _SMALL_STEP
        start = max(step, round(ratio * width / step) * step)
        one, two = counted(width, start, 1).total, counted(width, start, 2).total
        per_layer, per_unit = two - one, (counted(width, start + step, 1).total - one) / step
        fixed = one - per_layer
        layers = max(1, round((parameters - fixed) / per_layer))
        more = (parameters - fixed - layers * per_layer) / (layers * per_unit)
        low, high = (max(step, round(share * width / step) * step) for share in _FEED_FORWARD)
        feed_forward = min(max(low, round((start + more) / step) * step), high)
        heads = width // head_width
        shared = next(g for g in range(min(group, heads), 0, -1) if heads % g == 0)
        size = fixed + layers * round(per_layer + per_unit * (feed_forward - start))
        fits = abs(size / parameters - 1) <= _OFF and layers <= _DEEPEST
        return (Shape(width, feed_forward, layers, heads, heads // shared), size) if fits else None

    smallest = counted(head_width, _SMALL_STEP, 1)
    # No wider than the embeddings allow, with at least a layer of about twelve squares of the width.
    per_width = smallest.embedding // head_width
    widest = int((math.sqrt(per_width**2 + 8 * parameters) - per_width) / 4)
    fitting = [w for w in range(head_width, widest + 1, head_width) if w * per_width < parameters]
    # Numbers of heads that share keys as the model's do, or even ones, where enough of them fit.
    coarse = ([w for w in fitting if w // head_width % heads == 0] for heads in (group, 2, 1))
    widths = next((some for some in coarse if len(some) >= _ROWS), fitting)
    if len(widths) > _WIDTHS:
        places = {round(len(widths) ** (i / (_WIDTHS - 1))) - 1 for i in range(_WIDTHS)}
        widths = [widths[i] for i in sorted(places)]
    found = [made[0] for width in widths if (made := fitted(width)) is not None]
    usual = [s for s in found if _ASPECTS[0] <= s.hidden_size / s.num_hidden_layers <= _ASPECTS[1]] or found
    if not usual:
        raise ModelError(
            f"no model in the family of {model} has about {parameters:,} parameters: its {source.vocab_size:,} tokens alone take "
            f"{per_width:,} for each unit of width, and heads are {head_width} wide; the smallest has {smallest.total:,}"
            + ("" if parameters < smallest.total else ", and the next sizes lie too far apart: give a shape instead")
        )
    own = math.log(source.hidden_size / source.num_hidden_layers)
    chosen = min(usual, key=lambda s: abs(math.log(s.hidden_size / s.num_hidden_layers) - own))
    return Alternatives(_spread(usual, chosen), chosen)


def shape_lines(source: Any, model: str, parameters: int, context: int, *, chosen: Shape | None = None) -> list[str]:
    """Depth and width at a size as a table, and which is deeper.

    Args:
        source: configuration of the model whose family it is.
        model: its name.
        parameters: the size.
        context: tokens of a sequence, for the FLOPs of attention.
        chosen: a shape to show among them as the one that is taken; None for the one that the size alone means.

    Raises:
        ModelError: as `alternatives`, where no shape is given.
    """
    try:
        found = alternatives(source, parameters, model)
    except ModelError:
        if chosen is None:
            raise
        # An explicit shape may be what no rule would come to.
        found = Alternatives((chosen,), chosen)
    taken = chosen or found.chosen
    ordered = sorted({*found.shapes, taken}, key=lambda s: (-s.num_hidden_layers, s.hidden_size, s.intermediate_size))
    rows = [_HEADER, *(_cells(source, shape, model, context) for shape in ordered)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [f"shapes of {parameters:,} parameters, to within {_OFF:.0%}, in the family of {model}:"]
    for shape, row in zip([None, *ordered], rows, strict=True):
        mark = "*" if shape == taken else " "
        lines.append(f"{mark} " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    deep, wide = ordered[0], ordered[-1]
    if len(ordered) > 1:
        lines.append(
            f"{deep.num_hidden_layers} layers of {deep.hidden_size} are the deepest, {wide.num_hidden_layers} of "
            f"{wide.hidden_size} the widest; at one size deeper students tend to be better, and slower"
        )
        other = deep if deep != taken else wide
        lines.append(
            f"* is taken ({taken.num_hidden_layers} layers of {taken.hidden_size}); another one by its shape, such as "
            f"student.init='{{method: scale, {', '.join(f'{k}: {v}' for k, v in asdict(other).items())}}}'"
        )
    lines.append(
        "16-bit: weights alone; AdamW: full fine-tuning, weights, gradients and two moments in float32, without activations; "
        f"forward, training: FLOPs per token at {context} tokens"
    )
    return lines


def _cells(source: Any, shape: Shape, model: str, context: int) -> tuple[str, ...]:
    made = count(scaled_config(source, shape, model))
    # Every shape's heads share its width.
    forward = 2 * (made.body + made.head) + 2 * shape.num_hidden_layers * shape.hidden_size * context
    return (
        str(shape.num_hidden_layers),
        str(shape.hidden_size),
        str(shape.intermediate_size),
        f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
        _short(made.total),
        _short(made.body),
        _short(made.embedding),
        _bytes(2 * made.total),
        _bytes(_TRAINED_BYTES * made.total),
        _short(forward),
        _short(3 * forward),
    )


def _probe_config(source: Any, shape: Shape) -> Any:
    """A configuration to count by: only the shape matters, and not of what kind its layers are."""
    config = copy.deepcopy(source)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[0]] * shape.num_hidden_layers)
    config.num_hidden_layers = shape.num_hidden_layers
    return scaled_config(config, shape, "")


def _spread(shapes: list[Shape], chosen: Shape) -> tuple[Shape, ...]:
    """At most as many as a table has rows, evenly from the deepest to the widest, with the chosen one."""
    places = {round(i * (len(shapes) - 1) / (_ROWS - 1)) for i in range(_ROWS)} | {shapes.index(chosen)}
    return tuple(shapes[i] for i in sorted(places))


def _short(number: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
