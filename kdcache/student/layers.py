"""Some layers of a model: its configuration, the model itself, and whether the one describes the other.

A configuration may say of its layers by number how each is made (which have experts, which look at a window), in lists, as
"every n-th", or as "from layer n on". What is written down here covers lists with one item per layer; whatever else a
family has is found by building the shortened model both ways, without values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kdcache.errors import ModelError
from kdcache.models import first_line
from kdcache.student.bench import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def shortened_config(source: PreTrainedConfig, kept: tuple[int, ...]) -> PreTrainedConfig:
    """A configuration with some of its layers; lists with one item per layer keep those of the layers that stay."""
    config = copy.deepcopy(source)
    layers = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == layers:
            setattr(config, name, [value[i] for i in kept])
    # Qwen2: from this layer on attention may slide.
    first_sliding = getattr(config, "max_window_layers", None)
    if isinstance(first_sliding, int) and first_sliding < layers:
        config.max_window_layers = sum(i < first_sliding for i in kept)
    config.num_hidden_layers = len(kept)
    return config


def drop_layers(model: PreTrainedModel, kept: tuple[int, ...]) -> None:
    """Take every other layer out of a model, in place; embeddings, final norm and head stay the same tensors.

    Raises:
        ModelError: its decoder has no list of as many layers as its configuration says.
    """
    config: Any = model.config
    found = layers_of(model, config.num_hidden_layers)
    if found is None:
        raise ModelError(f"a model of type {config.model_type} has no list of layers that some could be taken out of")
    parent, name = found
    layers: Any = getattr(parent, name)
    setattr(parent, name, torch.nn.ModuleList(layers[i] for i in kept))
    for number, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            # Attention finds its place in the cache of keys and values by it.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    for key, value in shortened_config(config, kept).to_dict().items():
        if hasattr(config, key) and getattr(config, key) != value and ("layer" in key):
            setattr(config, key, value)


def refuse_undescribed(source: PreTrainedConfig, kept: tuple[int, ...], model: str) -> None:
    """Whether a model with some of its layers is the one that its configuration describes, and that is loaded by it.

    Names and shapes of all tensors are compared, and of the layers what modules they are made of and the plain attributes
    of these, such as a window of attention.

    Raises:
        ModelError: it is not; or transformers cannot build it, or it has no list of layers.
    """
    short, described = _without_values(source, model), _without_values(shortened_config(source, kept), model)
    drop_layers(short, kept)
    wanted, found = (dict(_of_the_configuration(m, len(kept))) for m in (short, described))
    differing = [key for key in (wanted | found) if wanted.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise ModelError(
            f"the configuration of {model} ({source.model_type}) tells layers apart by their number, and does not describe layers "
            f"{', '.join(map(str, kept))} without the others: {key} should be {wanted.get(key, 'absent')}, found "
            f"{found.get(key, 'absent')}; keep other layers by student.init.layers, such as the first ones, which keep their "
            "numbers, or take a model whose layers are all alike"
        )


def _without_values(config: PreTrainedConfig, model: str) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            built: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception as exc:
        raise ModelError(f"cannot build {model} from its configuration: {first_line(exc)}") from exc
    return built


def _of_the_configuration(model: PreTrainedModel, count: int) -> Iterator[tuple[str, Any]]:
    """What a configuration decides about a model without values that has ``count`` layers."""
    for name, tensor in model.state_dict().items():
        yield name, tuple(tensor.shape)
    listed = layers_of(model, count)
    if listed is None:
        return
    for number, layer in enumerate(getattr(*listed)):
        for name, module in layer.named_modules():
            place = f"{name or 'all'} of the {number + 1}. that is kept"
            yield place, type(module).__name__
            for key, value in vars(module).items():
                if not key.startswith("_") and isinstance(value, bool | int | float | str):
                    yield f"{key} in {place}", value
