"""``kdcache export-cache``: a cache in the format of another tool, as a folder that is whole or not there, with a README.

One file per split, ``train.parquet`` or ``train.jsonl``. The README says what the format cannot hold, and how the data are used.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache.codec import CachedSequence
from kdcache.cache.files import flush, write_file
from kdcache.cache.reader import Cache, Split
from kdcache.cache.strict_json import canonical, readable
from kdcache.errors import CacheError, StorageError
from kdcache.exchange import axolotl, distillkit, jsonl
from kdcache.exchange.importing import Kind
from kdcache.exchange.plain import Losses, PlainSequence, lost_lines, plain_sequence, temperature_of
from kdcache.markdown import escaped
from kdcache.progress import Progress, Silent

README = "README.md"
_DISTILLKIT_NOTES = (
    "DistillKit's trainer compares row i where labels[i] is learnt, and not labels[i + 1]: the row that predicts the first token of a "
    "response is not used there, and the position of the last learnt token is, whose row says that padding follows",
    "sequences are filled with padding to one length, because batches are stacked as they are (prepacked: true)",
)


@dataclass(frozen=True)
class Options:
    """How a cache is brought to another format.

    Attributes:
        temperature: T of the log-probabilities; None for 1, or the smallest that the cache can give.
        k: largest entries of each row; None for all exact ones.
        keep_mass: axolotl: leave the log-probabilities as they are instead of scaling each row to one.
    """

    temperature: float | None = None
    k: int | None = None
    keep_mass: bool = False


@dataclass(frozen=True)
class ExportedCache:
    """The folder, and what its format could not hold."""

    folder: Path
    notes: list[str]


def export_cache(
    cache: Cache, out: Path, kind: Kind, options: Options | None = None, progress: Progress | None = None
) -> ExportedCache:
    """Write a cache in the format of another tool.

    Args:
        cache: opened.
        out: a folder that is not there, or is empty.
        kind: whose format.
        options: of axolotl and DistillKit.
        progress: told of sequences.

    Raises:
        CacheError: a temperature or an option that the cache or the format cannot have, or a damaged shard.
        StorageError: the folder holds something, or cannot be written; nothing is left of it then.
    """
    options, progress = options or Options(), progress or Silent()
    temperature = _agreed(cache, kind, options)
    # "." and names with ".." have a parent and a name, too.
    shown, out = out, out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} is there already; give another folder, or remove it")
    with _whole(out) as folder:
        if kind == "jsonl":
            notes = _jsonl(cache, folder, progress)
        elif kind == "axolotl":
            notes = _axolotl(cache, folder, temperature, options, progress)
        else:
            notes = _distillkit(cache, folder, temperature, options, progress)
        write_file(folder / README, _readme(cache, kind, temperature, options, notes).encode())
    return ExportedCache(shown, notes)


def _agreed(cache: Cache, kind: Kind, options: Options) -> float:
    """The temperature, once it is sure that the options go with the format."""
    if kind == "jsonl" and options != Options():
        raise CacheError("jsonl holds all of a cache; leave --temperature, --k and --keep-mass out")
    if kind == "distillkit" and options.keep_mass:
        raise CacheError("DistillKit scales rows by itself, so they are always left as they are; leave --keep-mass out")
    temperature = temperature_of(cache, options.temperature)
    if kind == "distillkit" and temperature != 1.0:
        raise CacheError(
            f"DistillKit takes log-probabilities at T = 1 and applies its own temperature; found {temperature:g}. "
            + (
                "Leave --temperature out"
                if options.temperature is not None
                else "Take a cache that declares T = 1 or below"
            )
        )
    return temperature


def _axolotl(cache: Cache, folder: Path, temperature: float, options: Options, progress: Progress) -> list[str]:
    losses = Losses()
    for split in cache.splits.values():
        plain = (
            plain_sequence(s, temperature, k=options.k, renormalise=not options.keep_mass, losses=losses)
            for s in _told(split, progress)
        )
        axolotl.write(folder / f"{split.name}.parquet", plain)
    return lost_lines(cache, temperature, losses, renormalised=not options.keep_mass)


def _distillkit(cache: Cache, folder: Path, temperature: float, options: Options, progress: Progress) -> list[str]:
    losses, widest, longest = Losses(facts=list(_DISTILLKIT_NOTES)), 1, 2
    # Every row there has as many entries as the widest, and every sequence as many tokens as the longest.
    for split in cache.splits.values():
        for sequence in split:
            widest = max(widest, int(sequence.rows.head.max(initial=1)))
            longest = max(longest, len(sequence.token_ids))
    k = widest if options.k is None else min(options.k, widest)
    settings = distillkit.Settings(d=cache.vocab_size, k=k, exact_k=k)
    for split in cache.splits.values():
        plain: Iterator[PlainSequence] = (
            plain_sequence(s, temperature, k=k, renormalise=False, losses=losses) for s in _told(split, progress)
        )
        distillkit.write(
            folder / f"{split.name}.parquet", plain, settings, length=longest, pad_id=cache.plan.tokenizer.pad_id
        )
    write_file(folder / distillkit.SETTINGS, settings.as_yaml())
    return lost_lines(cache, temperature, losses, renormalised=False)


def _jsonl(cache: Cache, folder: Path, progress: Progress) -> list[str]:
    write_file(folder / jsonl.PLAN, cache.plan.to_bytes())
    write_file(folder / jsonl.VOCABULARY, canonical(cache.vocabulary()))
    write_file(folder / jsonl.CACHE, readable({"cache_id": cache.id}))
    for split in cache.splits.values():
        jsonl.write(folder / f"{split.name}.jsonl", _told(split, progress))
    return []


def _told(split: Split, progress: Progress) -> Iterator[CachedSequence]:
    """The sequences of a split, and how far they are."""
    progress.begin(f"export {split.name}", len(split), "sequences")
    try:
        for sequence in split:
            yield sequence
            progress.advance(1)
    finally:
        progress.end()


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside OUT that gets its name once it is whole, and on the disk; nothing else is touched."""
    outer: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A name that nobody has yet, and below it a folder with the usual permissions.
        outer = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-", dir=out.parent))
        made = outer / "made"
        made.mkdir()
        yield made
        for path in [*made.iterdir(), made]:
            flush(path)
        made.rename(out)
    except OSError as exc:
        raise StorageError(
            f"cannot write {out}: {exc.strerror or exc}; look after the disk and run the same command again"
        ) from exc
    finally:
        if outer is not None:
            shutil.rmtree(outer, ignore_errors=True)


def _readme(cache: Cache, kind: Kind, temperature: float, options: Options, notes: list[str]) -> str:
    plan = cache.plan
    lines = [
        f"# Teacher data in the format of {kind}",
        "",
        f"Exported by kdcache from the cache `{cache.id}`: teacher {escaped(plan.teacher.name)}, tokenizer {escaped(plan.tokenizer.name)} with "
        f"{plan.tokenizer.vocab_size:,} tokens (fingerprint `{plan.tokenizer.fingerprint[:16]}`). It discloses its training text.",
        "",
        "## What is lost",
        "",
        *(f"- {note}" for note in notes or ["nothing: `kdcache import-cache` makes the very same cache of it"]),
        "",
        "## How to use it",
        "",
        *_usage(cache, kind, temperature, options),
        "",
    ]
    return "\n".join(lines)


def _usage(cache: Cache, kind: Kind, temperature: float, options: Options) -> list[str]:
    if kind == "jsonl":
        return [
            "One JSON object per sequence, as docs/exchange.md of kdcache describes it.",
            "",
            "```bash",
            "kdcache import-cache THIS_FOLDER CACHE --from jsonl",
            "```",
        ]
    if kind == "axolotl":
        return [
            "```yaml", "plugins:", "  - axolotl.integrations.kd.KDPlugin", "kd_trainer: true", "kd_alpha: 0.5", "kd_ce_alpha: 0.5",
            f"kd_temperature: {temperature:g}  # these data are at this one", f"kd_normalize_topk: {'false' if options.keep_mass else 'true'}",
            "datasets:", "  - path: THIS_FOLDER/train.parquet", "    ds_type: parquet", "    type:  # tokenised already", "```",
        ]  # fmt: skip
    settings = "\n    ".join((f"d: {cache.vocab_size}", "# and the other lines of compression_config.yaml"))
    return [
        "```yaml", "dataset:", "  train_dataset: {repo_id: THIS_FOLDER, split: train}", "  eval_dataset: {repo_id: THIS_FOLDER, split: validation}",
        "  prepacked: true", "teacher:", "  kind: dataset", "  logprob_compressor:", f"    {settings}", "loss_functions:",
        "  - {function: cross_entropy, weight: 0.5}", "  - {function: kl, weight: 0.5, temperature: 1.0, missing_probability_handling: symmetric_uniform}",
        "training_args:", "  remove_unused_columns: false", "```",
    ]  # fmt: skip
