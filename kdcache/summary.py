"""Caches, captures and predictions in lines of text; `kdcache.commands` prints them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.console import byte_size, number_list

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.student.estimate import TrainingEstimate
    from kdcache.teacher.capture import CaptureResult
    from kdcache.teacher.estimate import Estimate

_LOW_MASS = 0.5


def estimate_lines(e: Estimate) -> list[str]:
    """What a dry run predicts."""
    each = e.cache_bytes / e.positions
    return [
        f"measured on {e.sampled_positions:,} of {e.positions:,} positions; the whole run is predicted to take",
        f"  size    {byte_size(e.cache_bytes)} in {e.shards} shards, {each:.1f} bytes per position",
        f"  time    {e.seconds:,.0f} s, {e.positions / e.seconds:,.0f} positions/s",
        f"  memory  {byte_size(e.memory_bytes)} of {e.memory_of} memory at the peak",
    ]


def training_lines(e: TrainingEstimate) -> list[str]:
    """What a dry run of a training predicts."""
    p, plan, probe = e.parameters, e.batches, e.measured
    lora = e.student.lora
    how = "all of them" if lora is None else f"LoRA of rank {lora.r}"
    stored = (
        f", {p.quantised:,} in {e.student.quantization} ({p.quantised_layers} linear layers)" if p.quantised else ""
    )
    about, cut = "about " if e.sampled else "", "" if e.cut_to is None else f", cut to {e.cut_to} tokens"
    share = plan.global_batch / plan.sequences
    epochs = e.steps / plan.steps
    processes = f" x {plan.world} processes" if plan.world > 1 else ""
    lines = [
        f"student     {e.architecture} of {e.layers} layers, {p.total:,} parameters{stored}; {p.trained:,} trained ({how})",
        f"data        {plan.sequences:,} sequences{cut}, {about}{e.tokens:,} tokens and {e.positions:,} targets per epoch",
        f"steps       {e.steps:,} ({epochs:.3g} epochs of {plan.steps:,}) of {plan.global_batch} sequences ({plan.batch_size} x "
        f"{plan.accumulation}{processes}), about {e.tokens * share:,.0f} tokens and {e.positions * share:,.0f} targets each",
    ]
    if probe is not None and e.step_seconds is not None and e.training_seconds is not None:
        scoring = e.evaluations * (e.evaluation_seconds or 0.0)
        lines.append(
            f"time        {e.step_seconds:.3g} s per step, {e.tokens * share / plan.world / e.step_seconds:,.0f} tokens/s"
            f"{' per process' if plan.world > 1 else ''}; {duration(e.training_seconds)} in all, and {duration(scoring)} for "
            f"{e.evaluations} evaluations"
        )
    known = {name: size for name, size in e.memory.items() if size is not None}
    place = (
        ""
        if probe is None
        else f", at the largest of the forward passes looked at ({probe.largest[0]} x {probe.largest[1]} tokens)"
    )
    lines.append(f"memory      {byte_size(sum(known.values()))}{' per process' if plan.world > 1 else ''}{place}")
    lines += [f"  {name:20} {'not known' if size is None else byte_size(size)}" for name, size in e.memory.items()]
    if e.checkpoint_bytes is not None:
        lines.append(
            f"disk        {byte_size(e.checkpoint_bytes)} per checkpoint, at most {e.keep_checkpoints} at a time"
        )
    if probe is not None:
        lines.append(
            f"measured on one and two layers with random weights, in {probe.timed} forward passes each; time to load, to write "
            "checkpoints and between processes is not counted"
        )
    return lines + [f"note: {remark}" for remark in e.remarks]


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def capture_lines(result: CaptureResult) -> tuple[list[str], str | None]:
    """What a teacher run made, and what to warn of."""
    manifest, plan = result.manifest, result.plan
    temperatures = plan.selection.temperatures
    size = sum(s.bytes for s in manifest.shards)
    positions = sum(s.positions for s in manifest.splits)
    did = f"{result.shards_made} shards made in {result.seconds:.0f} s" if result.shards_made else "complete already"
    lines = [
        f"cache {result.directory}: {did}; {positions:,} positions, {byte_size(size)}, {size / positions:.1f} bytes each"
    ]
    for split in manifest.splits:
        mass = ", ".join(f"{m:.4f} at T={t:g}" for m, t in zip(split.kept_mass_mean, temperatures, strict=True))
        lines.append(f"  {split.name}: teacher perplexity {split.teacher_perplexity:.3f}, exactly kept mass {mass}")
    lines.append(f"cache id {manifest.cache_id}")
    masses = manifest.splits[0].kept_mass_mean
    thin = tuple(t for t, m in zip(temperatures, masses, strict=True) if m < _LOW_MASS)
    if not thin or plan.design(0).sampled:
        return lines, None
    return lines, (
        f"at T = {number_list(thin)} most of the probability lies outside the kept entries; keep more, use "
        "selection.method threshold_sampling, or train at a lower temperature"
    )


def cache_facts(cache: Cache) -> dict[str, str]:
    """Facts about a cache as a whole, by name."""
    plan, manifest, selection = cache.plan, cache.manifest, cache.plan.selection
    size, raw = sum(s.bytes for s in manifest.shards), sum(s.raw_bytes for s in manifest.shards)
    positions = sum(s.positions for s in manifest.splits)
    facts = {
        "cache id": cache.id,
        "format": f"{manifest.format} version {manifest.version}, plan {plan.digest[:12]}",
        "teacher": f"{plan.teacher.name} ({plan.teacher.architecture}, {plan.teacher.quantization}, {plan.teacher.dtype})",
        "tokenizer": f"{plan.tokenizer.vocab_size:,} tokens, fingerprint {plan.tokenizer.fingerprint[:12]}",
        "data": f"{plan.data.shape}, prompt {plan.data.prompt}, at most {plan.data.max_length} tokens",
        "kept": f"{selection.describe()}; temperatures {number_list(selection.temperatures)}",
        "size": f"{byte_size(size)} in {len(manifest.shards)} shards ({byte_size(raw)} unpacked), "
        f"{size / positions:.1f} bytes per position",
    }
    if plan.derived is not None:
        settings = "".join(f", {name} {value}" for name, value in plan.derived.settings.items())
        facts["derived"] = f"{plan.derived.operation} of {', '.join(p[:12] for p in plan.derived.parents)}{settings}"
    return facts


def fact_lines(facts: dict[str, str]) -> list[str]:
    """Facts in two columns."""
    return [f"{name:10} {value}" for name, value in facts.items()]


def split_lines(cache: Cache) -> list[str]:
    """Each split of a cache: where it comes from, and what is kept of it."""
    plan, manifest = cache.plan, cache.manifest
    temperatures = number_list(plan.selection.temperatures)
    lines = []
    for summary, split in zip(manifest.splits, plan.data.splits, strict=True):
        left_out = summary.positions - summary.kept_positions
        lines += [
            "",
            f"{summary.name}: {split.source} {split.selected}",
            f"  {summary.sequences:,} sequences, {summary.tokens:,} tokens, {summary.positions:,} positions"
            + (f", {left_out:,} of them left empty" if left_out else ""),
            f"  {split.dropped_empty:,} examples dropped as empty, {split.dropped_no_target:,} with no target left, "
            f"{split.truncated:,} cut",
            f"  {summary.entries / max(1, summary.kept_positions):.1f} entries per position, teacher perplexity "
            f"{summary.teacher_perplexity:.3f}",
            f"  exactly kept mass at T = {temperatures}: mean {number_list(summary.kept_mass_mean, 4)}, "
            f"first percentile {number_list(summary.kept_mass_p1, 3)}",
        ]
    return lines
