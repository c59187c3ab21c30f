"""The data card that travels with a cache: a README with the YAML header the Hub reads."""

from __future__ import annotations

from kdcache.cache.manifest import Manifest, Plan


def data_card(plan: Plan, manifest: Manifest) -> str:
    """Markdown of the card. Everything in it comes from plan and manifest, so it is reproducible."""
    teacher, tokenizer, selection = plan.teacher, plan.tokenizer, plan.selection
    size = sum(s.bytes for s in manifest.shards)
    positions = sum(s.positions for s in manifest.splits)
    temperatures = ", ".join(f"{t:g}" for t in selection.temperatures)
    lines = [
        "---",
        "tags: [knowledge-distillation, kdcache]",
        "---",
        "",
        f"# Teacher cache: {_plain(teacher.name)}",
        "",
        "Sparse next-token distributions of a teacher language model, one row per response token, made by kdcache.",
        "Train a student from this directory alone: neither the teacher nor the data set is needed.",
        "",
        f"- teacher: {_plain(teacher.name)} ({_plain(teacher.architecture)}, {_plain(teacher.quantization)} weights, "
        f"{_plain(teacher.dtype)} arithmetic, revision {_plain(teacher.revision or 'none')})",
        f"- tokenizer: {tokenizer.vocab_size:,} tokens, fingerprint `{tokenizer.fingerprint[:16]}`",
        f"- kept per position: {selection.describe()}; mass outside at temperatures {temperatures}",
        f"- size: {size:,} bytes in {len(manifest.shards)} shards, {size / positions:.1f} bytes per position",
        "",
        "| split | from | sequences | tokens | positions | entries per position | teacher perplexity | "
        f"kept mass, mean at T = {temperatures} |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for split, source in zip(manifest.splits, plan.data.splits, strict=True):
        mass = ", ".join(f"{m:.4f}" for m in split.kept_mass_mean)
        lines.append(
            f"| {split.name} | {_plain(source.source)} {_plain(source.selected)} | {split.sequences:,} | {split.tokens:,} "
            f"| {split.positions:,} | {split.entries / split.positions:.1f} "
            f"| {split.teacher_perplexity:.3f} | {mass} |"
        )
    lines += [
        "",
        "**This cache discloses its training text**: the token ids of every sequence are in it. Share it only where",
        "the text may be shared, under the licences of the data set and the teacher.",
        "",
        "```python",
        "import kdcache",
        "",
        'cache = kdcache.open_cache("path/to/this/directory")  # verified as it is read',
        'sequence = cache.split("train")[0]                    # token_ids, targets, rows',
        "```",
        "",
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text from a plan without characters that Markdown or a table would interpret."""
    return "".join(c for c in text if c.isalnum() or c in " ._-/:[]%+,()")
