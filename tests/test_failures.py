"""docs/failures.md against the code: what it quotes is printed, what it names exists."""

import ast
import re
from pathlib import Path

from kdcache.recipe import Recipe
from kdcache.recipe_keys import recipe_keys
from kdcache.recipe_reinforce import ReinforceRecipe

ROOT = Path(__file__).parent.parent


def messages():
    """Every text in the package's code, with a gap where a value is put in."""
    found = []
    for path in sorted((ROOT / "kdcache").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(text):
    return [line.removeprefix("> ") for line in text.splitlines() if line.startswith("> ")]


def test_every_message_that_the_list_of_failures_quotes_is_really_printed():
    text = (ROOT / "docs" / "failures.md").read_text()
    quotes, texts = quoted(text), messages()
    assert len(quotes) > 10
    lost = []
    for quote in quotes:
        # Parts of a line may come from several places of the code, such as a common way out.
        parts = [part.strip() for part in re.split(r"…|; ", quote) if len(part.strip(" ,.:()")) > 3]
        lost += [part for part in parts if not any(part in said for said in texts)]
    assert not lost


def test_every_key_and_section_that_the_list_of_failures_names_exists():
    text = (ROOT / "docs" / "failures.md").read_text()
    known = set(recipe_keys(Recipe)) | set(recipe_keys(ReinforceRecipe)) | {"sweep.grid"}
    named = set(re.findall(r"`((?:data|teacher|selection|student|loss|training|sweep)\.[a-z_.]+[a-z])", text))
    assert len(named) > 15
    assert not {key for key in named if key not in known and not any(k.startswith(key + ".") for k in known)}
    heads = {
        re.sub(r"[^a-z0-9 -]", "", line.lower().lstrip("# ")).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= heads
