"""The data card that travels with a cache: a README with the YAML header the Hub reads."""

from __future__ import annotations

import re

import yaml

from kdcache.cache.manifest import Manifest, Plan
from kdcache.errors import CacheError

# As data sets are sorted on the Hub, by their number of sequences.
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_UNKNOWN_LICENCE = "unknown"


def data_card(plan: Plan, manifest: Manifest) -> str:
    """Markdown of the card. Everything in it comes from plan and manifest, so it is reproducible."""
    teacher, tokenizer, selection = plan.teacher, plan.tokenizer, plan.selection
    size = sum(s.bytes for s in manifest.shards)
    positions = sum(s.positions for s in manifest.splits)
    temperatures = ", ".join(f"{t:g}" for t in selection.temperatures)
    lines = [
        "---",
        yaml.safe_dump(_metadata(plan), sort_keys=False, allow_unicode=False).rstrip(),
        "---",
        "",
        f"# Teacher cache: {_plain(teacher.name)}",
        "",
        "Sparse next-token distributions of a teacher language model, one row per response token, made by kdcache.",
        "Train a student from this directory alone: neither the teacher nor the data set is needed.",
        "",
        "**This cache discloses its training text**: the token ids of every sequence are in it. Share it only where",
        "the text may be shared.",
        "",
        "## Licence",
        "",
        "Whoever publishes this cache states its licence in the header above; until then it is `unknown`. The licences",
        "of the data set and of the teacher apply in any case.",
        "",
        "## Teacher",
        "",
        f"- model: {_plain(teacher.name)}, revision {_plain(teacher.revision or 'none stated')}",
        f"- {_plain(teacher.architecture)}, {_plain(teacher.quantization)} weights, {_plain(teacher.dtype)} arithmetic",
        f"- fingerprint of its weights and configuration: `{teacher.fingerprint[:16]}`",
        f"- tokenizer: {tokenizer.vocab_size:,} tokens, fingerprint `{tokenizer.fingerprint[:16]}`",
        "",
        "## Data",
        "",
        "| split | from | revision | selected | sequences | tokens | positions |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for source in plan.data.splits:
        lines.append(
            f"| {source.name} | {_plain(source.source)} | {_plain(source.revision or 'none stated')} "
            f"| {_plain(source.selected)} | {source.sequences:,} | {source.tokens:,} | {source.positions:,} |"
        )
    lines += [
        "",
        f"Shape {_plain(plan.data.shape)}, prompt {_plain(plan.data.prompt)}, cut to {plan.data.max_length:,} tokens.",
        *_origin(plan),
        "",
        "## What is kept",
        "",
        f"- per position: {selection.describe()}; mass outside at temperatures {temperatures}",
        f"- size: {size:,} bytes in {len(manifest.shards)} shards, {size / positions:.1f} bytes per position",
        "",
        f"| split | entries per position | teacher perplexity | kept mass, mean at T = {temperatures} | first percentile |",
        "|---|---:|---:|---|---|",
    ]
    for split in manifest.splits:
        mean, low = (", ".join(f"{m:.4f}" for m in values) for values in (split.kept_mass_mean, split.kept_mass_p1))
        lines.append(
            f"| {split.name} | {split.entries / split.positions:.1f} | {split.teacher_perplexity:.3f} | {mean} | {low} |"
        )
    lines += [
        "",
        "## How to load it",
        "",
        "```python",
        "import kdcache",
        "",
        'cache = kdcache.open_cache("path/to/this/directory")  # or its URL, such as "hf://datasets/user/name"',
        f'sequence = cache.split("{manifest.splits[0].name}")[0]  # token_ids, targets, rows; verified as it is read',
        "```",
        "",
        "`kdcache pull hf://datasets/user/name DIRECTORY` brings it to a disk, `kdcache verify DIRECTORY` checks every byte.",
        "The cache id is the SHA-256 of `manifest.json`; `@CACHE-ID` behind the URL of a repository asks for this very cache.",
        "",
    ]
    return "\n".join(lines)


def with_licence(card: str, licence: str) -> str:
    """The card with ``licence`` in its header, all else as people left it.

    Raises:
        CacheError: not a licence identifier of the Hub's, or the card has no header.
    """
    if _LICENCE.fullmatch(licence) is None:
        raise CacheError(f"expected a licence identifier such as cc-by-4.0, found {licence!r}")
    header = re.match(r"---\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if header is None:
        raise CacheError(
            "the data card has no YAML header between two lines of ---; put one there, or leave --license out"
        )
    line = f"license: {licence}\n"
    start, end = header.span(1)
    fields, replaced = re.subn(r"(?m)^license:.*\n", line, header[1], count=1)
    return card[:start] + (fields if replaced else line + fields) + card[end:]


def _metadata(plan: Plan) -> dict[str, object]:
    """The header's fields. Names from the plan only where they can be nothing but identifiers of the Hub."""
    sequences = sum(s.sequences for s in plan.data.splits)
    fields: dict[str, object] = {
        "license": _UNKNOWN_LICENCE,
        "tags": ["knowledge-distillation", "kdcache"],
        "size_categories": [next((name for limit, name in _SIZES if sequences < limit), "n>1B")],
    }
    # A local folder can look like an identifier too; it has no commit.
    sources = [s.source for s in plan.data.splits if _is_hub_id(s.source, s.revision)]
    if sources:
        fields["source_datasets"] = sorted(set(sources))
    if _is_hub_id(plan.teacher.name, plan.teacher.revision):
        fields["base_model"] = plan.teacher.name
    return fields


def _origin(plan: Plan) -> list[str]:
    """A line on the caches that this one was made from, if it was."""
    if plan.derived is None:
        return []
    parents = ", ".join(f"`{parent[:16]}`" for parent in plan.derived.parents[:8])
    more = len(plan.derived.parents) - 8
    return [f"Made from other caches ({plan.derived.operation}): {parents}{f' and {more} more' if more > 0 else ''}."]


def _is_hub_id(name: str, revision: str | None) -> bool:
    return revision is not None and bool(_COMMIT.fullmatch(revision)) and bool(HUB_ID.fullmatch(name))


def _plain(text: str) -> str:
    """Text from a plan without characters that Markdown or a table would interpret; brackets, which make links, escaped."""
    return re.sub(r"[\[\]()]", r"\\\g<0>", "".join(c for c in text if c.isalnum() or c in " ._-/:[]%+,()"))
