"""The model card of an export: what it is, what it scores, and how each form is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdcache.cache.card import HUB_ID
from kdcache.export.formats import FORMS
from kdcache.markdown import escaped, table
from kdcache.recipe_training import describe
from kdcache.run_record import MODELS, RunRecord, number

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
EXPORT_COLUMNS = ("form", "perplexity", "KL to the run", "same top-1", "tokens/s", "on disk")
NOTE = (
    "KL(run || export) and top-1 are over the next-token distributions at {positions:,} positions of the cache's validation split, "
    "perplexity over all of it. Tokens per second: greedy, one sequence, through transformers; GGUF files are unpacked to float32 for "
    "it, so their figure is not llama.cpp's."
)


def published_name(name: str) -> str | None:
    """A model's name if it can be nothing but an id on the Hub."""
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def licence_of(base: str) -> str | None:
    """The licence that the card of a base model states: in its folder, or where the Hub's cache has it; None if unknown."""
    path: Any = Path(base) / "README.md"
    if not path.is_file():
        if published_name(base) is None:
            return None
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base, "README.md")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    header = re.match(r"---\r?\n(.*?)\n---", Path(path).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        stated = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    found = stated.get("license") if isinstance(stated, dict) else None
    return found if isinstance(found, str) and _LICENCE.fullmatch(found) else None


def model_card(
    record: RunRecord,
    rows: dict[str, dict[str, Any]],
    *,
    base: str,
    licence: str | None,
    teacher: str | None,
    datasets: Sequence[str],
    single: bool,
    made: str | None = None,
    based: bool = True,
) -> str:
    """Markdown with the YAML header that the Hub reads.

    Args:
        record: of the run.
        rows: form -> its figures, in the order of the table.
        base: name of the model the student started from.
        licence: the base's, if it is known.
        teacher: name of the teacher, if it is known.
        datasets: ids on the Hub that the cache was made from.
        single: there is one form, whose files lie beside the card.
        made: what was made of the base for the student to start from, in half a sentence; None where that was the base itself.
        based: the student started from weights of the base, and not from random ones.
    """
    fields: dict[str, Any] = {}
    if based and published_name(base) is not None:
        fields["base_model"] = base
    if licence is not None:
        fields["license"] = licence
    names = [name for name in rows if name != "run"]
    fields["library_name"] = (
        "peft" if names == ["adapter"] else "gguf" if all(FORMS[n].gguf for n in names) else "transformers"
    )
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = ["knowledge-distillation", "kdcache", *(["gguf"] if any(FORMS[n].gguf for n in names) else [])]
    if datasets:
        fields["datasets"] = sorted(datasets)
    loss = record.values["recipe"].get("loss", {})
    lines = [
        "---",
        yaml.safe_dump(fields, sort_keys=False, allow_unicode=False).rstrip(),
        "---",
        "",
        f"# {_title(base, made, based)}, distilled{'' if teacher is None else ' from ' + _name(teacher)}",
        "",
        f"A student trained by kdcache from the teacher cache `{record.values['cache_id']}`, at T = "
        f"{_schedule(loss.get('temperature'))} with weights {_schedule(loss.get('ce_weight'))} (cross-entropy) and "
        f"{_schedule(loss.get('kd_weight'))} (distillation).",
        "",
        *([] if made is None else [f"It did not start from {_name(base)} as it is, but from {escaped(made)}.", ""]),
        *_reinforced(record.values),
        *_before_and_after(record),
        "## Forms",
        "",
        table(EXPORT_COLUMNS, export_rows(rows)),
        note_of(rows),
        "",
        "## How to load it",
        "",
    ]
    for name in names:
        lines += [f"**{name}**: {FORMS[name].what}.", "", *_how(name, rows[name], base, single), ""]
    lines += ["The licences of the base model, of the teacher and of the data apply to what is made from them.", ""]
    return "\n".join(lines)


def _before_and_after(record: RunRecord) -> list[str]:
    """Scores of the training; a reinforcement has none of its own."""
    if not record.scores:
        return []
    cells = [_score(n, record.scores[n]) for n in MODELS if n in record.scores]
    return [
        "## Before and after",
        "",
        "On the validation split, per response token, in nats:",
        "",
        table(("model", "loss", "perplexity", "KL to the teacher"), cells),
    ]


def _reinforced(values: Mapping[str, Any]) -> list[str]:
    """What a reinforcement did to the student after its training, and how well it answered before and after."""
    if not isinstance(held_out := values.get("held_out"), dict):
        return []
    shares = [
        (escaped(str(name)), f"{share:.1%}")
        for name, found in held_out.items()
        if isinstance(found, dict) and (share := number(found.get("right"))) is not None
    ]
    told = f"It was reinforced afterwards, for {values.get('steps', 'unknown')} steps of GRPO."
    return [told, "", *([table(("held-out questions", "right answers"), shares)] if shares else [])]


def export_rows(rows: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of the table of forms; a dash where nothing was measured."""
    cells = []
    for name, row in rows.items():
        figures = [
            _cell(row.get("perplexity"), "{:.3f}"),
            _cell(row.get("kl_to_run"), "{:.2g}"),
            _cell(row.get("top_1"), "{:.2%}"),
            _cell(row.get("tokens_per_second"), "{:,.0f}"),
            _cell(row.get("bytes"), "{:,.0f} bytes")
            if (row.get("bytes") or 0) < 1 << 20
            else f"{row['bytes'] / 2**20:,.1f} MiB",
        ]
        cells.append((name, *figures))
    return cells


def note_of(rows: dict[str, dict[str, Any]]) -> str:
    """What the figures are of; or that none were taken."""
    counts = [row["compared_positions"] for row in rows.values() if "compared_positions" in row]
    if not counts:
        return "The forms were not compared with the run: only their sizes are known."
    return NOTE.format(positions=max(counts))


def _how(name: str, row: dict[str, Any], base: str, single: bool) -> list[str]:
    """Code that loads a form, where PATH is the folder of the card or the repository's id."""
    where = "" if single else f', subfolder="{name}"'
    if FORMS[name].gguf is not None:
        place = row["file"] if single else f"{name}/{row['file']}"
        lines = ["```", f"llama-cli -m {place} -p 'a prompt'", "```"]
        if row.get("pre") == "default":
            lines += [
                "",
                "llama.cpp does not know this tokenizer's rule for cutting text into words and takes its default one: ids may differ from transformers'.",
            ]
        return lines
    if name == "adapter":
        return [
            "```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}"){_as_trained(row)}',
            f'model = PeftModel.from_pretrained(base, "PATH"{where})', "```",
        ]  # fmt: skip
    lines = [
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{where}, dtype="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{where})', "```",
    ]  # fmt: skip
    if FORMS[name].quantization == "nf4":
        lines += [
            "",
            "Needs bitsandbytes. On a CPU with AVX512-BF16 it lays the weights out anew in the first forward pass: do not save or train the model after that.",
        ]
    elif FORMS[name].quantization is not None:
        lines += ["", "Needs bitsandbytes."]
    return lines


def _as_trained(row: dict[str, Any]) -> str:
    kind = row.get("base_quantization", "none")
    return "" if kind == "none" else f"  # trained on it in {kind}"


def _score(name: str, score: dict[str, float]) -> tuple[str, ...]:
    return name, f"{score['loss']:.4f}", f"{score['perplexity']:.3f}", f"{score['kl_to_teacher']:.4f}"


def _schedule(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('start')} to {value.get('end')}"
    return describe(value) if isinstance(value, (int, float)) else "?"


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _title(base: str, made: str | None, based: bool) -> str:
    if made is None:
        return _name(base)
    return f"Some layers of {_name(base)}" if based else f"A student shaped after {_name(base)}"


def _name(path: str) -> str:
    return escaped(Path(path).name)
