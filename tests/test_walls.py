"""The walls of the house: which room may import which, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdcache"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Every module that a file imports, at any depth, outside of TYPE_CHECKING blocks."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def offenders(folder, *forbidden):
    return {
        (str(path.relative_to(PACKAGE)), room)
        for path in MODULES
        if str(path.relative_to(PACKAGE)).startswith(folder)
        for name in imports(path)
        for room in forbidden
        if name == room or name.startswith(room + ".")
    }


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        (
            "cache/",
            (
                "torch",
                "transformers",
                "kdcache.recipe",
                "kdcache.models",
                "kdcache.data",
                "kdcache.teacher",
                "kdcache.student",
                "kdcache.sweep",
                "kdcache.evaluate",
                "kdcache.inspection",
                "kdcache.views",
            ),
        ),
        ("teacher/", ("kdcache.student", "kdcache.sweep")),
        ("student/", ("kdcache.teacher", "kdcache.data", "kdcache.sweep")),
        ("evaluate/", ("kdcache.report", "kdcache.sweep", "kdcache.embedded")),
        (
            "report/",
            (
                "torch",
                "transformers",
                "kdcache.models",
                "kdcache.data",
                "kdcache.teacher",
                "kdcache.student",
                "kdcache.sweep",
                "kdcache.evaluate",
                "kdcache.embedded",
            ),
        ),
        *(
            (
                room,
                ("torch", "kdcache.cache", "kdcache.recipe", "kdcache.report", "kdcache.evaluate", "kdcache.student"),
            )
            for room in ("markdown.py", "intervals.py", "run_record.py", "sweep_record.py", "chain_record.py")
        ),
        ("sweep/", ("kdcache.teacher", "kdcache.data", "kdcache.embedded", "kdcache.report")),
        ("chain/", ("kdcache.data", "kdcache.embedded", "kdcache.report", "kdcache.sweep")),
        *((room, ("kdcache.chain",)) for room in ("cache/", "teacher/", "student/", "evaluate/", "report/", "sweep/")),
        (
            "student/loss.py",
            ("kdcache.cache", "kdcache.recipe", "kdcache.models", "kdcache.student.collate", "kdcache.student.trainer"),
        ),
        ("data/", ("kdcache.teacher", "kdcache.student", "kdcache.recipe")),
        ("models.py", ("kdcache.teacher", "kdcache.student", "kdcache.recipe", "kdcache.data")),
        ("", ("kdcache.cli", "kdcache.commands", "kdcache.console", "kdcache.summary")),
    ],
)
def test_no_room_reaches_where_it_must_not(room, forbidden):
    allowed = {
        ("__main__.py", "kdcache.cli"),
        ("summary.py", "kdcache.console"),
        ("cache/reader.py", "kdcache.views"),  # inside Split.to_torch and to_datasets, for who calls them
    }
    found = {(path, name) for path, name in offenders(room, *forbidden) if not path.startswith(("cli.py", "commands/"))}
    assert found <= allowed


ORDER = [
    "layout",
    "strict_json",
    "files",
    "numbers",
    "rows",
    "invariants",
    "codec",
    "shard",
    "selection",
    "manifest",
    "statistics",
    "card",
    "directory",
    "reader",
    "writer",
    "verify",
    "derive",
    "subset",
    "merge",
    "repair",
    "leases",
    "pace",
    "remote",
    "transfer",
    "receive",
    "share",
    "hub",
    "store",
    "mixable",
    "mixture",
]


def test_inside_the_cache_lower_rooms_never_import_higher_ones():
    for path in (PACKAGE / "cache").glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            if name.startswith("kdcache.cache."):
                assert ORDER.index(name.split(".")[2]) < ORDER.index(path.stem), (path.stem, name)


def test_modules_are_one_room_each():
    assert [(p.name, n) for p in MODULES if (n := len(p.read_text().splitlines())) > 300] == []
    assert not [p for p in MODULES if p.name == "utils.py"]


def test_only_the_command_line_prints():
    for path in MODULES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printing or path == PACKAGE / "cli.py" or path.parent.name == "commands", path


def test_help_loads_nothing_heavy():
    code = "import sys, kdcache.cli; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'datasets') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_cache_is_opened_without_torch(shared_cache):
    code = (
        "import sys, kdcache; c = kdcache.open_cache(sys.argv[1]); c.split('train')[0]; kdcache.verify(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(shared_cache)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
