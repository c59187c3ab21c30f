"""Every published pipeline in miniature: does its effect show?

    python benchmarks/pipelines.py                                   # all parts, one after the other
    python benchmarks/pipelines.py --only pruned chain               # some of them; the others' last results stay on the page
    python benchmarks/pipelines.py --shared ../shared                # with real text besides, where there is some

Each part runs commands of kdcache on the embedded models (recipes in pipelines/), with three seeds where a claim depends on
luck, and says from the numbers alone whether the published effect shows. Stopped at any time, the same command goes on. Writes
pipelines.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from pipelines_parts import PARTS  # noqa: E402
from pipelines_sizes import published  # noqa: E402
from pipelines_work import Part, Work  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that are wanted, write the page from all that have been run."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="parts to run; all unless given")
    parser.add_argument("--work", type=Path, default=Path("runs/pipelines"), help="where everything goes")
    parser.add_argument("--shared", type=Path, help="folder with data/ and models/ of real text")
    parser.add_argument("--page", type=Path, default=HERE / "pipelines.md")
    args = parser.parse_args(arguments)
    work = Work(args.work, args.shared)
    work.embedded()
    for part in PARTS:
        if part.name in args.only:
            kept = args.work / f"{part.name}.json"
            before = json.loads(kept.read_text())["seconds"] if kept.exists() else 0.0
            started = time.monotonic()
            found = part.run(work)
            seconds = time.monotonic() - started
            # A part that was finished before only reads its results.
            kept.write_text(json.dumps({**asdict(found), "seconds": max(before, seconds)}))
    args.page.write_text(page(PARTS, args.work))
    print(args.page.read_text())
    print(f"written: {args.page}")


def page(parts: list[Part], work: Path) -> str:
    """pipelines.md."""
    from gpu_workers import machine

    from kdcache.markdown import table

    results = {p.name: json.loads(f.read_text()) for p in parts if (f := work / f"{p.name}.json").exists()}
    found = machine()
    summary = [
        (f"[{p.title}](#{anchor(p.title)})", p.published,
         results[p.name]["shows"] if p.name in results else "not run",
         f"{results[p.name]['seconds'] / 60:.1f}" if p.name in results else "")
        for p in parts
    ]  # fmt: skip
    lines = [
        "# The published pipelines in miniature",
        "",
        "Written by `python benchmarks/pipelines.py` ([pipelines.py](pipelines.py), recipes in [pipelines](pipelines)). The models are of "
        "some millions of parameters and the text is made up by a generator unless a table says otherwise: whether an effect shows here "
        "says that the pipeline works and which way it points, not how large it is at published size. Verdicts come from the numbers: "
        "an effect shows, or does not, where every seed agrees.",
        "",
        f"{found['device']['name']} {found['device'].get('capability', '')}, {found['cpus']} cores.",
        "",
        table(("pipeline", "published", "in miniature", "minutes"), summary).rstrip(),
    ]
    for part in parts:
        if part.name not in results:
            continue
        values = results[part.name]
        lines += ["", f"## {part.title}", "", f"At published size: {part.recipe}. Published: {part.published}.", ""]
        lines += [f"**{values['shows'].capitalize()}**: {values['because']}", ""]
        lines += [table(values["columns"], values["rows"]).rstrip()]
        for text in values["more"]:
            lines += ["", text]
    lines += [
        "",
        "## At published size",
        "",
        "What the recipes take, by `python benchmarks/pipelines_sizes.py`: counted on models of the published shapes without values. "
        "Activations and speed depend on the machine, where `--dry-run` measures them.",
        "",
        published().rstrip(),
    ]
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """Of a heading, as Markdown renderers make it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


if __name__ == "__main__":
    main()
