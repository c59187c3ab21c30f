"""What `gpu.py` measures, each in a process of its own: models of true shape with random weights, the cache such a
teacher makes, and training steps on it. Weights decide nothing about speed and memory; quality is not measured here.

    python benchmarks/gpu_workers.py '{"measure": "machine"}'      # one line of JSON; gpu.py calls it so
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import json
import math
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence

from kdcache.cache.reader import open_cache
from kdcache.cache.shard import pack
from kdcache.models import load_model, quiet_libraries
from kdcache.progress import Silent
from kdcache.recipe import Recipe, parse_recipe
from kdcache.student.arguments import training_arguments
from kdcache.student.assembly import load_student, with_adapter
from kdcache.student.collate import IGNORED, Collator
from kdcache.student.record import hardware
from kdcache.student.trainer import DistillationTrainer, SplitDataset
from kdcache.teacher.capture import capture, load_teacher
from kdcache.teacher.draws import chance_of
from kdcache.teacher.forward import LOGIT_BYTES, length_buckets
from kdcache.teacher.planning import plan_cache
from kdcache.teacher.sample import shard_content

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
SFT, CACHED, LIVE = "CE alone (SFT), transformers.Trainer", "cached KD", "live KD, 4-bit teacher in the loop"
CONTENDERS = (SFT, CACHED, LIVE)
GIB = 2**30
# Standard deviation of the teacher's logits: entropies of a few nats, as real teachers have; a plain random one is flat.
_SPREAD = 4.0


@dataclass(frozen=True)
class Scale:
    """Shapes of models and data. ``batch`` sequences are one training step, ``warmup`` steps are not timed."""

    teacher: dict[str, int | float]
    student: dict[str, int | float]
    vocabulary: int
    length: int
    sequences: int
    batch: int
    steps: int
    warmup: int


# Qwen2.5-3B-Instruct and Qwen2.5-0.5B-Instruct.
FULL = Scale(
    teacher={
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "initializer_range": 0.02,
    },
    student={
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "initializer_range": 0.02,
    },
    vocabulary=151_936, length=512, sequences=256, batch=8, steps=20, warmup=5,
)  # fmt: skip
TINY = Scale(
    teacher={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "initializer_range": 0.2,
    },
    student={
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "initializer_range": 0.2,
    },
    vocabulary=512, length=32, sequences=24, batch=2, steps=3, warmup=1,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where the models and the cache lie, how large they are, and the device."""

    work: Path
    scale: Scale
    device: str

    @property
    def recipe(self) -> Recipe:
        """The reference recipe's settings on these models."""
        data, sequences = str(self.work / "data.jsonl"), self.scale.sequences
        return parse_recipe({
            "output": str(self.work / "run"),
            "cache": {"directory": str(self.work / "cache"), "positions_per_shard": 16_384},
            "data": {
                "train": {"path": data, "split": f"train[:{sequences}]"},
                "validation": {"path": data, "split": f"train[{sequences}:]"},
                "shape": "instruction", "prompt": "plain", "max_length": self.scale.length,
            },
            "teacher": {"model": str(self.work / "teacher"), "device": self.device},
            "student": {"model": str(self.work / "student"), "device": self.device},
        })  # fmt: skip


class Clock(Silent):
    """A progress that remembers how long each task took, and how much of it there was."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.amount: dict[str, int] = {}
        self._task, self._started = "", 0.0

    def begin(self, task: str, total: int, unit: str) -> None:
        """Start the task's clock."""
        self._task, self._started = task, time.perf_counter()
        self.amount[task] = total

    def end(self) -> None:
        """Stop it."""
        self.seconds[self._task] = time.perf_counter() - self._started


def machine() -> dict[str, Any]:
    """Hardware and versions, for the head of the report."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**hardware(), "python": sys.version.split()[0], "cuda": torch.version.cuda, "versions": found}


def prepare(bench: Bench) -> dict[str, float]:
    """Make models, data and cache where they are not there yet; the rate at which the cache was made."""
    made, wanted = bench.work / "made.json", asdict(bench.scale)
    if made.exists() and (earlier := json.loads(made.read_text()))["scale"] == wanted:
        rates: dict[str, float] = earlier["rates"]
        return rates
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    for name, shape, spread in (("teacher", bench.scale.teacher, _SPREAD), ("student", bench.scale.student, 1.0)):
        _make_model(bench.work / name, shape, bench.scale.vocabulary, spread, bench.device)
    _make_data(bench)
    clock = Clock()
    result = capture(bench.recipe, clock)
    positions = clock.amount["teacher cache"]
    size = sum(p.stat().st_size for p in (result.directory / "shards").iterdir())
    rates = {"positions": positions, "seconds": clock.seconds["teacher cache"], "bytes": size / positions}
    made.write_text(json.dumps({"scale": wanted, "rates": rates}))
    return rates


def _make_model(folder: Path, shape: dict[str, int | float], vocabulary: int, spread: float, device: str) -> None:
    """Random weights, logits of the wanted spread, and a tokenizer with as many entries."""
    import tokenizers

    config = transformers.Qwen2Config(
        vocab_size=vocabulary, tie_word_embeddings=True, eos_token_id=0, pad_token_id=1, bos_token_id=None,
        use_cache=False, max_position_embeddings=32_768, **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.norm.weight.data.fill_(spread / (config.initializer_range * math.sqrt(config.hidden_size)))
    model.save_pretrained(folder)
    # Bytes that no merge joins, and entries that nothing becomes: every letter of a text is one token.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    entries = ["<|end|>", "<|pad|>", *alphabet, *(f"<{i}>" for i in range(vocabulary - len(alphabet) - 2))]
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({entry: i for i, entry in enumerate(entries)}, []))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=entries[0], pad_token=entries[1])
    fast.save_pretrained(folder)


def _make_data(bench: Bench) -> None:
    """Sequences of exactly ``length`` tokens, a quarter of each a prompt."""
    generator, length = np.random.default_rng(0), bench.scale.length
    with (bench.work / "data.jsonl").open("w") as file:
        for _ in range(bench.scale.sequences + 8):
            # A line break follows the instruction, an end the response.
            text = "".join(map(chr, generator.integers(ord("a"), ord("z") + 1, length - 2)))
            cut = length // 4 - 1
            file.write(json.dumps({"instruction": text[:cut], "output": text[cut:]}) + "\n")


def teacher_pass(bench: Bench, rounds: int = 5) -> dict[str, float]:
    """Positions per second of the decoder, of decoder and head, of the whole pass, and with encoding behind it."""
    recipe = bench.recipe
    plan = open_cache(recipe.cache.directory).plan
    planned = plan_cache(recipe, Silent())
    forward, rows = load_teacher(recipe, planned), planned.rows[0]
    chosen, numbers, thin = chance_of(plan, 0)
    assert recipe.teacher is not None
    tokens = recipe.teacher.batch_tokens

    @torch.inference_mode()
    def bare(*, with_head: bool = True) -> None:
        chunk = max(1, LOGIT_BYTES // (4 * forward.head.width))
        for batch in length_buckets([len(r.ids) for r in rows], tokens):
            hidden, _ = forward.hidden([rows[i] for i in batch])
            for start in range(0, len(hidden) if with_head else 0, chunk):
                forward.head.logits(hidden[start : start + chunk])

    def whole() -> Any:
        return forward(rows, chosen, batch_tokens=tokens, uniforms=numbers, thin=thin)

    from kdcache.cache.codec import encode

    content = shard_content(rows, whole())
    count = len(content.rows)
    stages: dict[str, Callable[[], Any]] = {
        "decoder": partial(bare, with_head=False),
        "bare": bare,
        "pass": whole,
        "encode": lambda: pack(encode(content, values=plan.selection.values), plan_digest="0" * 64, index=0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(rounds + 1):
        for name, stage in stages.items():
            started = _now()
            stage()
            seconds[name].append(_now() - started)
    # The first round warms up.
    return {"positions": count, **{n: count / statistics.median(s[1:]) for n, s in seconds.items()}}


class PlainSet(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The cache's token ids and labels alone, in memory: what SFT and a live teacher train from."""

    def __init__(self, directory: str) -> None:
        split = open_cache(directory).split("train")
        self._rows = []
        for sequence in split:
            ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
            labels = ids.masked_fill(~torch.from_numpy(sequence.targets), IGNORED)
            self._rows.append({"input_ids": ids, "labels": labels})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._rows[index]


def plain_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Padding alone, as a collator for fine-tuning does it."""
    ids, labels = [r["input_ids"] for r in rows], [r["labels"] for r in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


class LiveTrainer(transformers.Trainer):
    """A teacher in the loop with the full logits of both models, as it is usually written: what the cache replaces."""

    def __init__(self, *, teacher: Any, temperature: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._teacher, self._temperature = teacher, temperature
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """0.5 CE + 0.5 T^2 KL over the response tokens."""
        tokens = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            target = self._teacher(**tokens).logits
        labels, t = inputs["labels"][:, 1:], self._temperature
        counts = labels != IGNORED
        logits = model(**tokens).logits[:, :-1][counts].float()
        ce = F.cross_entropy(logits, labels[counts], reduction="sum")
        p = torch.softmax(target[:, :-1][counts].float() / t, dim=1)
        kl = F.kl_div(torch.log_softmax(logits / t, dim=1), p, reduction="sum")
        return (0.5 * ce + 0.5 * t**2 * kl) / (
            len(labels[counts]) if num_items_in_batch is None else num_items_in_batch
        )


class StepClock(transformers.TrainerCallback):
    """When each step ended, the device's work included; from end to end, so that waiting for data counts."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(_now())


class Training:
    """One contender's student, loaded once, to be trained for a few steps at any micro-batch.

    Args:
        bench: models and cache.
        contender: one of `CONTENDERS`.
    """

    def __init__(self, bench: Bench, contender: str) -> None:
        self._bench, self._recipe = bench, bench.recipe
        student, teacher = self._recipe.student, self._recipe.teacher
        assert student is not None
        assert teacher is not None
        self.model = with_adapter(load_student(student), student)
        cache = open_cache(self._recipe.cache.directory)
        loss = self._recipe.loss
        plain = {"train_dataset": PlainSet(self._recipe.cache.directory), "data_collator": plain_batch}
        self._trainer: Callable[..., transformers.Trainer] = partial(transformers.Trainer, **plain)
        if contender == LIVE:
            live = load_model(
                teacher.model, quantization=teacher.quantization, dtype=teacher.dtype, device=teacher.device
            )
            self._trainer = partial(LiveTrainer, teacher=live, temperature=loss.temperature, **plain)
        if contender == CACHED:
            self._trainer = partial(
                DistillationTrainer,
                train_dataset=SplitDataset(cache.split("train")),
                data_collator=Collator(cache.plan.tokenizer.pad_id, loss.temperature),
                distillation={
                    "vocab_size": cache.vocab_size,
                    **loss.model_dump(include={"temperature", "ce_weight", "kd_weight"}),
                },
            )

    def run(self, batch: int, steps: int, **changes: Any) -> list[float]:
        """Seconds of every step after the first; ``changes`` are to the recipe's training section."""
        clock = StepClock()
        changes |= {"batch_size": batch, "max_steps": steps, "logging_steps": 1_000_000, "save_steps": 1_000_000}
        section = self._recipe.training.model_copy(update=changes)
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(section, device=self._bench.device, seed=0, checkpoints=Path(folder))
            arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
            trainer = self._trainer(model=self.model, args=arguments, callbacks=[clock])
            trainer.remove_callback(transformers.PrinterCallback)
            try:
                trainer.train()
            finally:
                # Autocast was put around the model's forward, and the next trainer would put another around it.
                trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                self.model.zero_grad(set_to_none=True)
        return np.diff(clock.ends).tolist()

    def fits(self, batch: int) -> bool:
        """Whether two steps at this micro-batch stay within the memory."""
        fits = True
        try:
            self.run(batch, 2, workers=0)
        except torch.OutOfMemoryError:
            fits = False
        # Out here the exception, and with it the frames that hold the activations, is gone.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return fits


def training_steps(bench: Bench, contender: str) -> dict[str, float]:
    """Median seconds of a step and peak memory in GiB, or ``out_of_memory``."""
    training = Training(bench, contender)
    on_cuda = bench.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = training.run(bench.scale.batch, bench.scale.steps + bench.scale.warmup)
    except torch.OutOfMemoryError:
        return {"out_of_memory": 1.0}
    peak = torch.cuda.max_memory_allocated() if on_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(seconds[bench.scale.warmup - 1 :]), "peak": peak / GIB}


def capacity(bench: Bench, contender: str, cap: float, limit: int) -> dict[str, int]:
    """The largest micro-batch within ``cap`` GiB of device memory, at most ``limit`` and all sequences there are.

    Torch can bound its own allocations only: what the CUDA context takes beside them is taken off the cap.
    """
    limit = min(limit, bench.scale.sequences)
    if bench.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        if cap * GIB > total:
            return {"too_small": 1}
        # Another process on the device is no part of it.
        context = min(total - free - torch.cuda.memory_reserved(), GIB)
        training = Training(bench, contender)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(max(0.0, cap * GIB - context) / total)
    else:
        training = Training(bench, contender)
    return {"batch": largest(training.fits, limit)}


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch up to ``limit`` that fits, 0 for none; above 16 to within a sixteenth."""
    good, step = 0, 1
    while step <= limit and fits(step):
        good, step = step, 2 * step
    bad = min(step, limit + 1)
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def loss_table(rounds: int) -> dict[str, str]:
    """The table of ``loss.py``, which needs CUDA."""
    if not torch.cuda.is_available():
        return {"text": "not measured: no CUDA device"}
    from loss import gpu_table

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        gpu_table(rounds)
    return {"text": printed.getvalue().strip()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(request: dict[str, Any]) -> Any:
    """One measurement: ``measure`` names it, the rest are its arguments."""
    arguments = dict(request)
    name = arguments.pop("measure")
    if name == "machine":
        return machine()
    if name == "loss":
        return loss_table(arguments["rounds"])
    scale = TINY if arguments.pop("tiny") else FULL
    bench = Bench(Path(arguments.pop("work")), scale, arguments.pop("device"))
    known: dict[str, Callable[..., Any]] = {
        "prepare": prepare, "teacher": teacher_pass, "steps": training_steps, "capacity": capacity,
    }  # fmt: skip
    return known[name](bench, **arguments)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quiet_libraries()
    print(json.dumps(measure(json.loads(sys.argv[1]))))
