"""The page of a report in a real browser: it sorts, fetches nothing, and is readable wide, narrow, light and dark."""

import shutil

import pytest

from kdcache.report.write import write_report
from tests.report_examples import example_sweep, hostile_sweep

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pages are not opened")

WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")
# WCAG 2: contrast of normal text, of graphics.
TEXT_CONTRAST, GRAPHIC_CONTRAST = 4.5, 3.0
CONTRAST = """(element) => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).slice(0, 3).map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  while (behind && (channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const style = getComputedStyle(element);
  const front = element instanceof SVGElement ? (style.fill === "none" ? style.stroke : style.fill) : style.color;
  const [a, b] = [luminance(front), luminance(getComputedStyle(behind ?? document.body).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as exc:
            pytest.skip(
                f"no browser ({', '.join(names)}, or playwright install chromium): {exc.message.splitlines()[0]}"
            )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = example_sweep(tmp_path_factory.mktemp("browser") / "sweep")
    return write_report([folder]).files[0].with_name("report.html")


@pytest.fixture
def opened(browser):
    """Open a page; at the end it must have been silent and have asked for nothing but itself."""
    contexts, said, asked, pages = [], [], [], []

    def call(path, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        pages.append(path.as_uri())
        return page

    yield call
    for context in contexts:
        context.close()
    assert said == []
    assert [url.partition("#")[0] for url in asked] == pages


def students(page):
    return page.locator("table").first.locator("tbody tr th").all_inner_texts()


def head(page, name):
    return page.locator("table").first.get_by_role("columnheader", name=name)


def test_the_leaderboard_sorts_by_mouse_and_keyboard(opened, report):
    page = opened(report)
    fixed = ["teacher", "student before"]
    assert students(page) == [*fixed, "A2", "A1", "A4", "A10", "A6", "A5"]
    perplexity, student, minutes = head(page, "perplexity"), head(page, "student"), head(page, "ROUGE-L")
    assert perplexity.get_attribute("aria-sort") == "ascending"
    perplexity.get_by_role("button").click()
    assert students(page) == [*fixed, "A10", "A4", "A1", "A2", "A6", "A5"]
    assert perplexity.get_attribute("aria-sort") == "descending"
    student.get_by_role("button").click()
    assert students(page) == [
        *fixed,
        "A1",
        "A2",
        "A4",
        "A6",
        "A10",
        "A5",
    ]  # 10 behind 6: numbers in names count as numbers
    assert [perplexity.get_attribute("aria-sort"), student.get_attribute("aria-sort")] == ["none", "ascending"]
    minutes.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert students(page)[2:4] == ["A1", "A2"]
    page.keyboard.press("Enter")
    assert students(page)[2:4] == ["A2", "A1"]
    assert students(page)[-1] == "A5"
    assert minutes.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Space")
    assert minutes.get_attribute("aria-sort") == "ascending"


def test_every_control_is_reached_by_the_tab_key(opened, report):
    page = opened(report)
    controls = "[...document.querySelectorAll('a[href], button, summary, .wide')].filter((e) => e.checkVisibility())"
    wanted = page.evaluate(f"{controls}.length")
    assert wanted > 30
    reached = set()
    for _ in range(wanted + 30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f"{controls}.indexOf(document.activeElement)"))
    assert len(reached - {-1}) == wanted


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_readable(opened, report, width, scheme):
    page = opened(report, width, scheme)
    for details in page.locator("details").all():
        details.evaluate("(element) => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator(".wide, pre").evaluate_all(
        "(all) => all.map((b) => [b.getBoundingClientRect().right, getComputedStyle(b).overflowX])"
    )
    assert all(right <= width and overflow == "auto" for right, overflow in boxes)
    scrolls = page.locator(".wide").first.evaluate("(box) => box.scrollWidth > box.clientWidth")
    assert scrolls or width > 400
    for selector in (
        "h1",
        "p",
        ".note",
        "a",
        "figcaption",
        "caption",
        "tbody td",
        ".reference th",
        ".failed td",
        ".open td",
        "dt",
        "dd",
        "code",
        "svg text",
    ):
        for element in page.locator(selector).all()[:12]:
            assert element.evaluate(CONTRAST) >= TEXT_CONTRAST, (selector, scheme)
    # Bars and lines; grid lines are meant to be faint.
    drawn = (
        page.locator("#figure-scores svg path[style*='fill: var(--c']").all()
        + page.locator("#figure-training svg path[style*='stroke: var(--c']").all()
    )
    assert len(drawn) >= 20
    for element in drawn:
        assert element.evaluate(CONTRAST) >= GRAPHIC_CONTRAST
    sizes = page.locator("svg text").evaluate_all(
        "(all) => all.map((t) => t.getBoundingClientRect()).map((b) => Math.min(b.width, b.height)).filter((s) => s > 0)"
    )
    assert sorted(sizes)[len(sizes) // 2] > 6


def test_light_and_dark_differ(opened, report):
    backgrounds = {
        opened(report, scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in SCHEMES
    }
    assert len(backgrounds) == 2


def test_nothing_of_a_stranger_runs(opened, tmp_path):
    folder = hostile_sweep(tmp_path / "sweep")
    page = opened(write_report([folder]).files[0].with_name("report.html"), 400)
    title = page.title()
    page.wait_for_timeout(200)
    assert page.title() == title != "owned"
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert len(students(page)) == 2 * 2 + 3


def test_the_policy_of_the_page_stops_other_scripts(browser, report, tmp_path):
    """Should a string ever slip through: neither an inline script nor a picture of another place gets anywhere."""
    hostile = report.read_text().replace(
        "<main>",
        "<main><script>document.title='owned'</script><img src='https://example.invalid/x.png' onerror=\"document.title='owned'\">",
    )
    (tmp_path / "page.html").write_text(hostile)
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_timeout(200)
    assert page.title() != "owned"
    assert len([text for text in said if "Content Security Policy" in text]) >= 2
    page.close()
