"""Tasks of lm-evaluation-harness, on models that are loaded already.

With a folder of data, the tasks that come with kdcache (`tasks/*.yaml`) read local files and need no network. Every other
name is one of the harness's own, whose data comes from the Hub or its local copy. Tasks and their data are built before a
model is loaded, and once for all models.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import DataError, KdcacheError, ModelError
from kdcache.evaluate.generation import greedily, inner
from kdcache.evaluate.perplexity import AUTOCAST
from kdcache.models import first_line
from kdcache.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"
_BOOTSTRAPS = 1000
_OTHER_KEYS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class Measured:
    """A model on a task: how many examples, after how many that were shown, metric -> (value, standard error)."""

    examples: int
    shots: int
    metrics: dict[str, tuple[float, float | None]]
    chat_template: bool = False


def bundled_tasks() -> list[str]:
    """Names of the tasks that come with kdcache."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


class Harness:
    """Tasks that are ready to be put to models.

    Args:
        names: bundled tasks where ``task_data`` is given, or tasks, groups and tags of the harness.
        task_data: folder of the bundled tasks' files; without it every name is one of the harness's own.
        limit: the first so many examples of each task; None for all.
        chat_template: put every prompt through the tokenizer's chat template, as instructed models expect.
        progress: told of the search for tasks.

    Raises:
        KdcacheError: the harness is not installed.
        DataError: an unknown name, a missing file, or a data set that only the network has.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        task_data: Path | None = None,
        limit: int | None = None,
        chat_template: bool = False,
        progress: Progress | None = None,
    ) -> None:
        progress = progress or Silent()
        # Its advice is for who runs it directly.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as exc:
            raise KdcacheError("--tasks needs lm-evaluation-harness: pip install 'kdcache[eval]'") from exc
        if task_data is not None and not task_data.is_dir():
            raise DataError(f"--task-data {task_data} is no folder; it should hold the files of the tasks")
        self.names = list(dict.fromkeys(names))
        self.limit = limit
        self.chat_template = chat_template
        ours = bundled_tasks() if task_data is not None else []
        bundled = TaskManager(
            include_path=str(TASKS), include_defaults=False, metadata={"task_data": str(task_data)}
        )  # fmt: skip
        # Else the harness reads its own index again for every model.
        self._manager = bundled
        others = [name for name in self.names if name not in ours]
        if others:
            progress.message("looking for tasks of lm-evaluation-harness")
        index = TaskManager() if others else bundled
        for name in others:
            if name not in index.all_tasks:
                raise DataError(_unknown(name, index.all_tasks, task_data))
        self._told: set[int] = set()
        self._built: list[Any] = []
        self._leaves: dict[str, list[str]] = {}
        for name in self.names:
            with _silent_bars():
                loaded = _build(name, bundled if name in ours else index)
            unsafe = [leaf for leaf, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
            if unsafe:
                raise DataError(f"task {unsafe[0]} runs code that a model wrote, which kdcache does not do")
            self._leaves[name] = list(loaded["tasks"])
            self._built.append(loaded["groups"].get(name) or list(loaded["tasks"].values()))

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        precision: str = "fp32",
        what: str = "student",
        progress: Progress,
    ) -> dict[str, Measured]:
        """A model on all tasks, greedily where it generates.

        Args:
            model: a causal language model, adapters in place.
            tokenizer: its tokenizer, with the chat template.
            batch_size: requests per forward pass.
            precision: autocast as in training: ``fp32`` for none.
            what: a name for the progress.
            progress: told about every request.

        Raises:
            ModelError: the tasks do not fit the model, such as prompts for a context that it does not have.
        """
        from lm_eval import simple_evaluate

        model = inner(model)
        lm = _watched(
            model, tokenizer, batch_size, None if precision == "fp32" else AUTOCAST[precision], what, progress
        )
        tasks = [task for built in self._built for task in (built if isinstance(built, list) else [built])]
        try:
            with _silent_bars(), greedily(model, lm.eot_token_id, tokenizer.pad_token_id or lm.eot_token_id):
                results = simple_evaluate(
                    model=lm,
                    tasks=tasks,
                    limit=self.limit,
                    log_samples=False,
                    bootstrap_iters=_BOOTSTRAPS,
                    apply_chat_template=self.chat_template,
                    task_manager=self._manager,
                )
        except (AssertionError, ValueError) as exc:
            raise ModelError(f"lm-evaluation-harness cannot put its tasks to {what}: {first_line(exc)}") from exc
        finally:
            progress.end()
        assert results is not None
        if lm.too_long and lm.max_length not in self._told:
            self._told.add(lm.max_length)
            progress.warning(
                f"{lm.too_long:,} of {lm.asked:,} requests are longer than the {lm.max_length:,} tokens that {what} reads and "
                "were cut at the left: some of the examples, or of a passage, were not seen"
            )
        return {leaf: found for name in self.names for leaf, found in self._figures(name, results).items()}

    def _figures(self, name: str, results: dict[str, Any]) -> dict[str, Measured]:
        """A group's figures where it has some for the whole of it, otherwise those of its tasks."""
        whole = _measured(name, results)
        found = {name: whole} if whole else {leaf: _measured(leaf, results) for leaf in self._leaves[name]}
        return {leaf: replace(m, chat_template=self.chat_template) for leaf, m in found.items() if m is not None}


def as_record(measured: dict[str, dict[str, Measured]]) -> dict[str, Any]:
    """Results by model -> what evaluation.json holds by task: the task's first metric, the others under ``also``."""
    tasks: dict[str, Any] = {}
    for model, results in measured.items():
        for name, result in results.items():
            first, *rest = result.metrics
            task = tasks.setdefault(
                name,
                {
                    "metric": first,
                    "examples": result.examples,
                    "shots": result.shots,
                    "chat_template": result.chat_template,
                    "models": {},
                },
            )
            task["models"][model] = _figures(result.metrics[first])
            for metric in rest:
                also = task.setdefault("also", {}).setdefault(metric, {})
                also[model] = _figures(result.metrics[metric])
    return tasks


def _figures(found: tuple[float, float | None]) -> dict[str, float | None]:
    return {"value": found[0], "stderr": found[1]}


def _unknown(name: str, known: Sequence[str], task_data: Path | None) -> str:
    bundled = bundled_tasks()
    if task_data is None and name in bundled:
        return f"task {name} comes with kdcache and reads local files: say where they lie with --task-data DIR"
    near = difflib.get_close_matches(name, {*bundled, *known}, n=4, cutoff=0.6)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    return f"there is no task {name!r}{hint}. With --task-data DIR kdcache has {', '.join(bundled)}"


def _build(name: str, manager: Any) -> Any:
    try:
        return manager.load([name])
    except KdcacheError:
        raise
    except Exception as exc:
        # Whatever a task's data set, its loader or its imports raise.
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        if isinstance(exc, OSError):
            why = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
            local = " --task-data DIR takes local files for it instead." if name in bundled_tasks() else ""
            raise DataError(
                f"task {name} of lm-evaluation-harness needs the network: its data set is not on this machine and {why} "
                f"({first_line(exc)}).{local} Nothing was loaded or measured"
            ) from exc
        raise DataError(f"task {name} of lm-evaluation-harness cannot be set up: {first_line(exc)}") from exc


def _measured(name: str, results: dict[str, Any]) -> Measured | None:
    found = results["results"].get(name, {})
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in found.items():
        metric, _, chosen = key.partition(",")
        if key in _OTHER_KEYS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{chosen}")
        metrics[metric if chosen in ("", "none") else f"{metric} ({chosen})"] = (
            float(value),
            float(error) if isinstance(error, int | float) else None,
        )
    if not metrics:
        return None
    count = results["n-samples"].get(name, {}).get("effective") or found.get("sample_len") or 0
    return Measured(int(count), int(results["n-shot"].get(name) or 0), metrics)


def _watched(model: Any, tokenizer: Any, batch_size: int, autocast: Any, what: str, progress: Progress) -> Any:
    """The harness's view of a model, telling how far it is."""
    from lm_eval.models.huggingface import HFLM

    class Hook:
        """Called with every answer, where the harness would write it to its cache."""

        def add_partial(self, *_: Any) -> None:
            progress.advance(1)

    class Watched(HFLM):  # type: ignore[misc]
        too_long = 0
        asked = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            progress.begin(f"choose {what}", len(requests), "choices")
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            progress.begin(f"answer {what}", len(requests), "answers")
            return super().generate_until(requests, disable_tqdm=True)

        # What does not fit the context is cut at the left, of which nothing can be seen in the results.
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self.asked += len(requests)
            self.too_long += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

        def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **options: Any) -> Any:
            self.asked += len(strings)
            self.too_long += sum(len(self.tok_encode(s)) > (left_truncate_len or self.max_length) for s in strings)
            return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **options)

    lm = Watched(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        softmax_dtype="float32",
        mixed_precision_dtype=autocast,
    )
    lm.cache_hook = Hook()
    return lm


@contextmanager
def _silent_bars() -> Iterator[None]:
    """Without the harness's and `datasets`' own bars, which write over ours."""
    import tqdm.std  # type: ignore[import-untyped]

    own = tqdm.std.tqdm.__init__
    tqdm.std.tqdm.__init__ = partialmethod(own, disable=True)
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__ = own
