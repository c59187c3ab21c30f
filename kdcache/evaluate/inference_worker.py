"""One model on the bench, in a process of its own: how fast it generates, what it takes in memory and on disk.

    python -m kdcache.evaluate.inference_worker REQUEST.json ANSWER.json

`inference` starts it. A process of its own, because what another model left on the heap, or in an allocator's cache, would be
counted with this one. The merging of an adapter is asked for here as well, for the same reason.

Speed is taken with greedy generation of exactly so many new tokens, end or no end, from random prompts of one length: which
tokens they are does not matter to it.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache.files import write_file
from kdcache.evaluate.perplexity import AUTOCAST
from kdcache.models import first_line, load_adapter, load_model, quiet_libraries
from kdcache.student.merged import fold_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Figures = dict[str, Any]


def measure(request: dict[str, Any]) -> Figures:
    """What `inference` writes into a row.

    Args:
        request: ``load`` (keyword arguments of `load_model`), ``adapter`` (its folder or None), ``precision`` (of autocast, or
            None), ``batch_size``, ``prompt_tokens``, ``new_tokens``, ``repeats``.

    Returns:
        tokens per second and seconds to the first token, each with ``_min`` and ``_max``; ``memory_bytes`` and what it is
        the memory of; ``libraries_bytes``, the part of a process's memory that was there before the model; ``disk_bytes``;
        ``threads``.
    """
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    libraries = peak_memory()
    model = load_model(**request["load"])
    on_gpu = model.device.type == "cuda"
    quantized = request["load"]["quantization"] != "none"
    if request["adapter"] is not None:
        model = load_adapter(model, request["adapter"], quantized=quantized)
    model.eval()
    figures = speed(model, request)
    # Of the model and its generation alone: what saving takes comes later.
    memory = {
        "memory_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else peak_memory(),
        "memory_of": "GPU" if on_gpu else "process",
        "libraries_bytes": 0 if on_gpu else libraries,
    }
    # The adapter's base was brought to other types for it; on disk it is what it was when it was loaded.
    saved = [model] if request["adapter"] is None else [load_model(**request["load"]), model]
    return {**figures, **memory, "disk_bytes": sum(size_on_disk(m) for m in saved), "threads": torch.get_num_threads()}


@torch.inference_mode()
def speed(model: PreTrainedModel, request: dict[str, Any]) -> Figures:
    """Median, least and most of the repeats, of whole generations and of ones that end with the first token."""
    width = int(model.config.get_text_config().vocab_size)
    shape = (request["batch_size"], request["prompt_tokens"])
    ids = torch.randint(0, width, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    precision = request["precision"]
    # A value of None handed to `generate` would be filled in from here again.
    model.generation_config.eos_token_id = None

    def generate(new_tokens: int) -> None:
        with torch.autocast(model.device.type, AUTOCAST[precision or "fp32"], enabled=precision not in (None, "fp32")):
            found: Any = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, use_cache=True,
                max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        assert found.shape[1] == ids.shape[1] + new_tokens

    first: list[float] = []
    whole: list[float] = []
    # The first round warms up.
    for _ in range(request["repeats"] + 1):
        first.append(_seconds(lambda: generate(1), model.device))
        whole.append(_seconds(lambda: generate(request["new_tokens"]), model.device))
    rates = [request["batch_size"] * request["new_tokens"] / seconds for seconds in whole[1:]]
    return {**_spread("tokens_per_second", rates), **_spread("time_to_first_token", first[1:])}


def merge(request: dict[str, Any]) -> Figures:
    """Write the model with its adapter folded in, in bfloat16, to ``request["folder"]``."""
    merged = fold_adapter(load_model(**request["load"]), Path(request["adapter"]), torch.bfloat16)
    merged.save_pretrained(request["folder"])
    return {}


def size_on_disk(model: PreTrainedModel) -> int:
    """Bytes of the files that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def peak_memory() -> int:
    """Most bytes that this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage there: that remembers the process that started this one.
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _spread(name: str, values: list[float]) -> Figures:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started


def main(request: Path, answer: Path) -> None:
    """Do what the request says; an error is an answer, too."""
    warnings.simplefilter("ignore")
    quiet_libraries()
    wanted = json.loads(request.read_text())
    try:
        found = {"merge": merge, "measure": measure}[wanted["what"]](wanted)
    except Exception as exc:
        found = {"error": first_line(exc)}
    write_file(answer, json.dumps(found).encode())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
