"""Runs the dry runs of recipes in one process, whose environment names the Hub: ``published_dry_runs.py FOLDER < JSON > JSON``.

In: recipe file -> further keys of its small cache. Out: recipe file -> [command, exit code, what it printed] of every command, and the teacher's commit in the cache's plan.
"""

import json
import sys
from pathlib import Path

from typer.testing import CliRunner

import kdcache.cli  # noqa: F401 - registers the commands
from kdcache.commands.app import app


def run(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return [arguments[0], done.exit_code, done.output + (repr(done.exception) if done.exit_code else "")]


def dry_runs(recipe, keys, folder):
    if "chains" in Path(recipe).parts:
        return [run("chain", recipe, "--dry-run")]
    cache = f"cache.directory={folder / Path(recipe).stem}"
    before = run("teacher-cache", recipe, "--dry-run")
    if "tasks" in Path(recipe).parts:  # which train as the reference does
        return [before]
    made = run("teacher-cache", recipe, cache, *keys)
    plan = json.loads((folder / Path(recipe).stem / "plan.json").read_text())
    return [
        before,
        made,
        ["commit", 0, plan["teacher"]["revision"]],
        run("train-student", recipe, "--dry-run", cache, *keys),
    ]


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    found = {recipe: dry_runs(recipe, keys, Path(sys.argv[1])) for recipe, keys in wanted.items()}
    json.dump(found, sys.stdout)
