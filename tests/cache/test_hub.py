"""Caches published to and read from a Hub on loopback, by the commands, each in a process of its own.

The endpoints are those that the installed huggingface_hub calls. Not spoken: Xet transfers, multipart uploads, redirects
to a content network, pull requests, resource groups.
"""

import os
import subprocess
import sys

import pytest
import yaml

from kdcache.cache import layout
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from tests.cache.hub_server import HubServer, Repository
from tests.cache.transfer_trials import files, make_cache

URL = "hf://datasets/user/name"
# The entry point as the installed script has it.
MAIN = "import sys, kdcache.commands.sharing; sys.argv[0] = 'kdcache'; from kdcache.cli import main; main()"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("made") / "cache")


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("another") / "cache", sizes=(4, 5))


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server
        assert server.unknown == []
        assert server.tokens <= {"Bearer hf_sample"}


@pytest.fixture
def python(hub, tmp_path):
    """Runs code that finds the Hub; gives (exit code, standard output, standard error)."""

    def run(code, *arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_sample", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "KDCACHE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def kdcache(python):
    return lambda *arguments: python(MAIN, *arguments)


def test_one_commit_holds_everything_and_its_tag_is_the_cache_id(hub, kdcache, python, made, tmp_path):
    own = open_cache(made).id
    code, out, err = kdcache("push", made, URL, "--license", "cc-by-4.0")
    assert (code, err) == (0, "")
    assert f"for good: {URL}@{own}" in out
    repository = hub.repositories["user/name"]
    assert repository.private
    assert len(repository.commits) == 2
    commit, contents, summary = repository.commits[1]
    assert repository.tags == {own: commit}
    assert own[:16] in summary
    card = contents[layout.CARD_FILE].decode()
    pushed = {**files(made), layout.CARD_FILE: card.encode()}
    assert {name: data for name, data in contents.items() if name != ".gitattributes"} == pushed
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    assert card.split("---\n", 2)[2] == (made / layout.CARD_FILE).read_text().split("---\n", 2)[2]
    # Large contents are there before the commit that names them, and nothing is committed besides.
    order = [path for method, path in hub.calls if method in ("PUT", "POST")]
    uploads = [i for i, path in enumerate(order) if path.startswith("/contents/")]
    commits = [i for i, path in enumerate(order) if "/commit/" in path]
    assert len(uploads) == 4
    assert len(commits) == 1
    assert max(uploads) < commits[0]

    # The same again changes nothing.
    code, out, err = kdcache("push", made, URL, "--license", "cc-by-4.0")
    assert (code, err) == (0, "")
    assert len(repository.commits) == 2

    for number, source in enumerate((URL, f"{URL}@{own}", f"{URL}@{commit}", f"{URL}#cache-id={own[:12]}")):
        code, out, err = kdcache("pull", source, tmp_path / f"arrived-{number}")
        assert (code, err) == (0, "")
        assert files(tmp_path / f"arrived-{number}") == pushed
        assert verify(tmp_path / f"arrived-{number}") == []

    # By URL from the library; a second time by the tag without asking anybody.
    read = "import sys; from kdcache.cache.store import open_cache; c = open_cache(sys.argv[1]); print(c.id, len(c.split('train')))"
    assert python(read, f"{URL}@{own}")[1].split() == [own, "8"]
    hub.calls.clear()
    assert python(read, f"{URL}@{own}")[1].split() == [own, "8"]
    assert hub.calls == []


def test_another_cache_is_only_replaced_on_demand_and_the_old_one_stays_by_its_tag(
    hub, kdcache, made, another, tmp_path
):
    assert kdcache("push", made, URL, "--public")[0] == 0
    repository = hub.repositories["user/name"]
    assert not repository.private
    code, _, err = kdcache("push", another, URL)
    assert code == 2
    assert err.startswith(f"error: {URL} holds another cache")
    assert err.count("\n") == 1
    assert len(repository.commits) == 2
    assert kdcache("push", another, URL, "--overwrite")[0] == 0
    assert set(repository.commits[-1][1]) == {*files(another), ".gitattributes"}
    assert len(repository.commits) == 3
    for cache in (made, another):
        own = open_cache(cache).id
        assert kdcache("pull", f"{URL}@{own}", tmp_path / own)[0] == 0
        assert files(tmp_path / own) == files(cache)
    code, _, err = kdcache("pull", f"{URL}#cache-id={open_cache(made).id}", tmp_path / "x")
    assert code == 2
    assert "pinned is" in err


def test_what_fails_is_one_line(hub, kdcache, made, tmp_path):
    def refused(match, *arguments):
        code, _, err = kdcache(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert match in err

    refused("does not exist", "pull", URL, tmp_path / "x")
    refused("hf://datasets/USER/NAME", "push", made, "hf://user/name")
    refused("hf://datasets/USER/NAME", "push", made, f"{URL}@v1")
    hub.refuse = lambda method, path: 403 if path.endswith("/create") else None
    refused("refuses access", "push", made, URL)
    assert hub.repositories == {}
    hub.refuse = lambda method, path: None
    assert kdcache("push", made, URL)[0] == 0
    refused("does not exist", "pull", f"{URL}@{'0' * 40}", tmp_path / "x")
    hub.repositories["user/name"].add({"train.csv": b"x"}, "somebody's data")
    refused("train.csv", "push", made, URL)
    refused("--license is for hf://", "push", made, tmp_path / "there", "--license", "mit")


def test_somebodys_own_readme_is_not_written_over(hub, kdcache, made):
    hub.repositories["user/name"] = Repository(private=True)
    repository = hub.repositories["user/name"]
    repository.add({".gitattributes": b"", layout.CARD_FILE: b"my notes"}, "by hand")
    commits = len(repository.commits)
    code, _, err = kdcache("push", made, URL)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"it holds {layout.CARD_FILE}" in err
    assert "--overwrite" in err
    assert len(repository.commits) == commits
    assert kdcache("push", made, URL, "--overwrite")[0] == 0
    assert repository.commits[-1][1][layout.CARD_FILE] == (made / layout.CARD_FILE).read_bytes()
    # A card of a cache that lies there is people's to edit and ours to renew.
    assert kdcache("push", made, URL, "--license", "mit")[0] == 0


def test_a_commit_that_fails_once_is_made_once(hub, kdcache, made):
    failures = [503]
    hub.refuse = lambda method, path: failures.pop() if "/commit/" in path and failures else None
    assert kdcache("push", made, URL)[0] == 0
    assert [len(hub.repositories["user/name"].commits), failures] == [2, []]
    assert len([1 for method, path in hub.calls if path.startswith("/contents/")]) == 4
