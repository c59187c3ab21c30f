"""Directories of runs and sweeps -> report.md, report.html, plots and the recipes that repeat them, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.cache.files import make_directory, write_file
from kdcache.errors import StorageError
from kdcache.report.blocks import Document
from kdcache.report.collect import Collection, collect
from kdcache.report.drawing import figure_files
from kdcache.report.markdown import markdown
from kdcache.report.page import page
from kdcache.report.recipes import bases
from kdcache.report.sections import compose


@dataclass(frozen=True)
class Written:
    """A report on disk: what it holds, and its files."""

    found: Collection
    document: Document
    files: tuple[Path, ...]


def write_report(paths: Sequence[Path], output: Path | None = None) -> Written:
    """Collect the rows of runs and sweeps and write their report.

    Args:
        paths: run directories and sweep directories.
        output: folder to write to; by default ``report`` inside the one directory given, or ``runs/report`` for several.

    Raises:
        TrainingError: a path does not exist or is no directory.
        StorageError: the report cannot be written.
    """
    found = collect(paths)
    if output is None:
        output = paths[0] / "report" if len(paths) == 1 else Path("runs/report")
    if output.exists() and not output.is_dir():
        raise StorageError(f"{output} is a file; --output should name a directory for the report")
    document = compose(found, title=_title(found, paths), folder=str(output))
    contents = {f"{base.file}": base.yaml().encode() for base in bases(found)}
    for figure in document.figures():
        contents |= figure_files(figure)
    contents["report.md"] = markdown(document).encode()
    contents["report.html"] = page(document).encode()
    make_directory(output)
    for name, data in contents.items():
        write_file(output / name, data)
    return Written(found, document, tuple(output / name for name in contents))


def _title(found: Collection, paths: Sequence[Path]) -> str:
    if len(found.sweeps) == 1 and len(paths) == 1:
        name = found.sweeps[0].name
        return "Sweep" if name == "sweep" else f"Sweep {name}"
    if len(paths) == 1:
        return f"Run {found.rows[0].name}"
    return f"{len(found.rows)} students"
