"""A sequence looked at: numbers are the rows' own, and a stranger's strings reach neither page nor terminal raw."""

import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

import kdcache.commands.caches  # noqa: F401 (registers the command)
from kdcache.cache.reader import open_cache, shard_path
from kdcache.cache.strict_json import canonical
from kdcache.cache.writer import CacheWriter
from kdcache.commands.app import app
from kdcache.errors import CacheError
from kdcache.inspection import Speller, harmless, look_at, size_by_part
from kdcache.inspection_html import page
from tests.cache.samples import SELECTIONS, VOCAB, sample_plan, sample_sequences, selection_plan

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\u202egnp.exe",
    "\ud800", "\x00\x08", "</style><style>*{display:none}", "&lt;b&gt;", "a" * 5000, "\u2066\u2028", "{{x}}", "\r", "\x9b1m", "",
]  # fmt: skip
VOID = {"meta", "br", "img", "link", "input", "hr"}


def make(directory, tokens, method="threshold_sampling", **selection):
    contents = [sample_sequences(6, seed=n, method=method) for n in range(2)]
    plan = sample_plan(contents, selection=selection_plan(method, **selection), name="<b>teacher</b>")
    fingerprint = hashlib.sha256(canonical(tokens)).hexdigest()
    plan = plan.model_copy(update={"tokenizer": plan.tokenizer.model_copy(update={"fingerprint": fingerprint})})
    writer = CacheWriter(directory, plan, tokens)
    for index, content in enumerate(contents):
        writer.commit(index, content)
    writer.finalise()
    return open_cache(directory)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hostile"), [HOSTILE[i % len(HOSTILE)] for i in range(VOCAB)])


def view_of(cache, **options):
    return look_at(cache, Speller(cache.vocabulary()), **{"split": "train", "index": 1, **options})


@pytest.mark.parametrize("temperature", [None, 1.0, 1.5, 2.0, 3.0])
def test_numbers_are_those_of_the_rows(hostile, temperature):
    view, rows = view_of(hostile, temperature=temperature, top=4), hostile.split("train")[1].rows
    t = temperature or 1.0
    assert view.temperature == t
    log_z = rows.log_partition_at(t)
    seen = [token for token in view.tokens if token.probability is not None]
    assert len(seen) == len(rows) == view.targets
    assert view.perplexity == pytest.approx(np.exp(-rows.label_log_prob.astype(float).mean()))
    for p, token in enumerate(seen):
        assert token.probability == pytest.approx(np.exp(float(rows.label_log_prob[p])))
        head = slice(rows.head_offsets[p], rows.head_offsets[p + 1])
        log_p = rows.head_logits[head].astype(float) / t - log_z[p]
        assert token.row.kept == pytest.approx(np.exp(log_p).sum(), rel=1e-6)
        assert (token.row.head, token.row.tail) == (rows.head[p], rows.tail[p])
        exact = [c.probability for c in token.row.choices if not c.drawn]
        assert exact == pytest.approx(sorted(np.exp(log_p), reverse=True)[: len(exact)])
        assert [c.probability for c in token.row.choices] == sorted(
            (c.probability for c in token.row.choices), reverse=True
        )
        assert len(token.row.choices) == min(4, rows.head[p] + rows.tail[p])
        if t in hostile.temperatures:
            assert token.row.kept == pytest.approx(rows.kept_mass()[p, hostile.temperatures.index(t)])
        assert token.row.kept + token.row.rest == pytest.approx(1.0)


@pytest.mark.parametrize("method", SELECTIONS)
def test_every_way_of_selecting_can_be_looked_at(tmp_path, method):
    cache = make(tmp_path, [f"t{i}" for i in range(VOCAB)], method)
    view, rows = view_of(cache), cache.split("train")[1].rows
    first = next(token for token in view.tokens if token.row is not None)
    ids = rows.head_ids[: rows.head[0]]
    assert first.row.choices[0].token == f"t{ids[np.argmax(rows.head_logits[: rows.head[0]])]}"
    assert not first.row.choices[0].drawn
    drawn = any(c.drawn for token in view.tokens if token.row for c in token.row.choices)
    assert drawn == (method in ("threshold_sampling", "random_sampling"))


def test_rows_left_empty_keep_their_label(values):
    from kdcache.recipe import parse_recipe
    from kdcache.teacher.capture import capture

    values["selection"] |= {"positions": "entropy", "quantile": 0.5}
    cache = open_cache(capture(parse_recipe(values)).directory)
    view = view_of(cache)
    empty = [t for t in view.tokens if t.probability is not None and t.row is None]
    assert 0 < len(empty) < view.targets
    html = page(cache, {}, [view])
    assert html.count("its row was left empty") == len(empty)
    code, out = run("inspect", cache.directory, "--sequence", "1")
    assert code == 0
    assert out.count("row left empty") == len(empty)


def test_how_tokens_read():
    byte_level = Speller(["Ġthe", "Ċ", "Ã©", "Ã", "<|im_end|>", "Ġ", None, "ĉ"])
    assert [byte_level.text(i) for i in range(8)] == [" the", "\n", "é", "\\xc3", "<|im_end|>", " ", "⟨6⟩", "\\t"]
    assert [byte_level.name(i) for i in (0, 1, 5)] == ["␣the", "↵", "␣"]
    pieces = Speller(["▁the", "<0x0A>", "é", "<0xE2>", "</s>", "Ġ", "▁"])
    assert [pieces.text(i) for i in range(6)] == [" the", "\n", "é", "\\xe2", "</s>", "Ġ"]
    plain = Speller(["the", "##re", ""])
    assert [plain.text(i) for i in range(2)] == ["the", "##re"]
    assert plain.name(2) == "⟨empty⟩"


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(Speller(["Ġ"])._bytes) == set(ByteLevel.alphabet())
    for character in "\x00 \n\x7f\xa0\xad~ÿ":
        (spelled,) = (s for s, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character))
        assert bytes(Speller(["Ġ"])._bytes[c] for c in spelled) == character.encode()


def test_harmless_text_has_nothing_that_steers():
    for token in HOSTILE:
        assert all(c == "\n" or c.isprintable() for c in harmless(token))
    assert harmless("é 漢\n") == "é 漢\n"


class Reader(HTMLParser):
    """Holds the page to balanced tags and collects elements, attributes and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_hostile_cache_makes_a_harmless_page(hostile):
    views = [view_of(hostile, split=name, index=i, top=100) for name in ("train", "validation") for i in range(6)]
    html = page(hostile, {"teacher": "<b>\x1b[1m", "<i>": "'\u202e\""}, views)
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "dl", "dt", "dd", "div", "table", "tr", "th",
               "td", "p", "span", "bdi", "b", "i"}  # fmt: skip
    assert {tag for tag, _ in reader.elements} <= allowed
    attributes = {name for _, attrs in reader.elements for name in attrs}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "tabindex", "style", "dir"}
    for _, attrs in reader.elements:
        assert re.fullmatch(r"width:\d{1,3}\.\d%", attrs.get("style", "width:0.0%"))
    assert all(c == "\n" or c.isprintable() for c in html)
    assert "://" not in html
    text = "".join(reader.text)
    assert "<script>alert(1)</script>" in text
    assert "\\x1b[31mred" in text
    assert "a" * 60 not in text


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_a_hostile_cache_does_not_steer_the_terminal(hostile, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    for split in ("train", "validation"):
        for index in range(6):
            code, out = run("inspect", hostile.directory, "--sequence", index, "--split", split, "--top", 50)
            assert code == 0
            left = re.sub(r"\x1b\[[\d;]*m", "", out)
            assert left != out  # colours of our own were there
            assert all(c == "\n" or c.isprintable() for c in left)
            assert "\x1b[31mred" not in out
    code, out = run("inspect", hostile.directory)
    assert code == 0
    assert "\x1b" not in out


def test_without_a_terminal_there_is_no_colour(shared_cache):
    code, out = run("inspect", shared_cache, "--sequence", 0)
    assert code == 0
    assert "\x1b" not in out
    view = view_of(open_cache(shared_cache), index=0)
    assert out.startswith(view.title)
    for token in view.tokens:
        if token.probability is not None:
            assert f"{token.probability:.4f}" in out
            assert f"{token.row.kept:.4f}" in out


def test_the_command_writes_a_page(shared_cache, tmp_path):
    target = tmp_path / "page.html"
    for _ in range(2):  # a page is written again without being asked
        code, out = run("inspect", shared_cache, "--html", target)
        assert code == 0
        assert str(target) in out
    html = target.read_text()
    assert html.count('class="text"') == 6
    assert open_cache(shared_cache).id in html
    code, _ = run(
        "inspect", shared_cache, "--html", target, "--sequence", 2, "--split", "validation", "--temperature", 2
    )
    assert code == 0
    assert target.read_text().count('class="text"') == 1
    assert "choices at T = 2" in target.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": 10**6}, "there is no sequence 1,000,000"),
        ({"index": -1}, "there is no sequence -1"),
        ({"split": "test"}, "no split 'test'"),
        ({"temperature": 0.5}, "below the cache's smallest"),
        ({"temperature": float("nan")}, "at most 100"),
        ({"temperature": -1.0}, "at most 100"),
    ],
)
def test_what_is_not_there_is_refused(shared_cache, options, message):
    with pytest.raises(CacheError, match=message):
        view_of(open_cache(shared_cache), **options)


def test_sizes_by_part_come_to_about_the_whole(shared_cache):
    cache = open_cache(shared_cache)
    whole = cache.manifest.shards[0].bytes / cache.plan.shards[0].positions
    assert sum(size_by_part(cache).values()) == pytest.approx(whole, rel=0.25)


def test_facts_of_a_damaged_cache_are_shown_all_the_same(tmp_path):
    cache = make(tmp_path, [f"t{i}" for i in range(VOCAB)])
    shard_path(tmp_path, 0).write_bytes(b"gone")
    code, out = run("inspect", tmp_path)
    assert code == 0
    assert cache.id in out
    assert "is damaged" in out
    with pytest.raises(CacheError, match="is damaged"):
        run("inspect", tmp_path, "--sequence", 0)
