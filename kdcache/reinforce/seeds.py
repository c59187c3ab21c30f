"""The same reinforcement under several seeds: what of its effect is chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kdcache.cache.files import write_file
from kdcache.markdown import table
from kdcache.recipe_reinforce import ReinforceRecipe
from kdcache.reinforce.plots import write_plot
from kdcache.run_record import LOG_FILE, read_log

SEED_COLUMNS = ("seed", "reward, first tenth", "last tenth", "held out before", "after", "KL, last tenth")


def seed_recipe(recipe: ReinforceRecipe, seed: int) -> ReinforceRecipe:
    """The recipe under another seed, in a directory below its own."""
    return recipe.model_copy(update={"seed": seed, "output": str(Path(recipe.output) / f"seed-{seed}")})


def compare(folder: Path, seeds: Sequence[int], records: Sequence[dict[str, Any]]) -> list[Path]:
    """Write seeds.json, seeds.md and the plot of all rewards into ``folder``; returns the files."""
    values = {
        "format": "kdcache-reinforce-seeds",
        "seeds": {str(seed): _figures(record) for seed, record in zip(seeds, records, strict=True)},
    }
    write_file(folder / "seeds.json", json.dumps(values, indent=1).encode() + b"\n")
    write_file(folder / "seeds.md", table(SEED_COLUMNS, seed_rows(seeds, records)).encode())
    logs = [(f"seed {seed}", read_log(folder / f"seed-{seed}" / LOG_FILE)) for seed in seeds]
    return [folder / "seeds.json", folder / "seeds.md", *write_plot(folder, logs)]


def seed_rows(seeds: Sequence[int], records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells for `SEED_COLUMNS`: a row for each seed, and their means with standard deviations where there are several."""
    figures = [list(_figures(record).values()) for record in records]
    rows = [[str(seed), *(_text(value) for value in row)] for seed, row in zip(seeds, figures, strict=True)]
    if len(rows) > 1:
        columns = [[v for v in column if v is not None] for column in zip(*figures, strict=True)]
        rows.append(["mean", *(f"{fmean(c):.3f} ± {stdev(c):.3f}" if len(c) > 1 else "-" for c in columns)])
    return rows


def _figures(record: dict[str, Any]) -> dict[str, float | None]:
    """Reward at both ends, held-out share right of the reference and at the end, KL at the end."""
    first, last, held_out = record["reward"]["first_tenth"], record["reward"]["last_tenth"], record["held_out"]
    shares = [found["right"] for name, found in held_out.items() if name != record["reference"]]
    return {
        "reward_first": first.get("reward"),
        "reward_last": last.get("reward"),
        "right_before": held_out.get(record["reference"], {}).get("right"),
        "right_after": shares[-1] if shares else None,
        "kl_last": last.get("kl"),
    }


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
