"""Each page and action in a real browser: nothing comes from elsewhere, no text runs, all can be read."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from unbraid.ui.app import create_app

from .conftest import World

pytest.importorskip("playwright", reason="playwright is not installed")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 60_000
"""Milliseconds to wait for what comes at once on a machine that has nothing else to do."""
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[str]:
    config = uvicorn.Config(create_app(world.shelf, world.bench), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium on this machine; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS, timeout=2 * PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, server: str) -> Iterator[BrowserContext]:
    """A fresh profile; afterwards nothing was asked of others, refused by the policy, or went wrong."""
    context = browser.new_context(
        base_url=server,
        color_scheme="light",
        reduced_motion="reduce",  # a colour that is on its way to another has no contrast to measure
        viewport={"width": 1280, "height": 800},
    )
    context.set_default_timeout(PATIENCE)
    asked: list[str] = []
    wrong: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.add_init_script(
        "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective))"
    )
    yield context
    context.close()
    assert [url for url in asked if not url.startswith(server)] == []
    # A page that is not there says so in its status, which the console repeats.
    assert [text for text in wrong if "status of 404" not in text and "status of 400" not in text] == []


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def opened(page: Page, path: str) -> Page:
    page.goto(path)
    return ready(page)


def ready(page: Page) -> Page:
    """The page when its script listens: a click before that would go to nobody."""
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    return page


def led(page: Page, selector: str) -> Page:
    """The page that a click leads to, wholly loaded: what is typed before that may be lost, as a page that
    finds the place its address names takes the focus away."""
    with page.expect_navigation():
        page.click(selector)
    return ready(page)


def violations(page: Page, **options: Any) -> list[str]:
    found = Axe().run(page, options=options or None).response["violations"]
    return [f"{v['id']}: {n['target']} {n['failureSummary']}" for v in found for n in v["nodes"]]


PAGES = {
    "home": "/", "overview": "{base}", "empty overview": "{empty}", "latent": "{base}/latents/3",
    "hostile text": "{base}/latents/5", "right to left": "{base}/latents/6", "dead": "{base}/latents/0",
    "search": "{base}/search", "found": "{base}/search?q=delayed", "prompt": "{base}/prompt?text=the+package",
    "contrast": "{base}/contrast?a=the+package&b=red+ball", "lists": "{base}/lists",
    "list": "{base}/lists/bookmarks", "review": "{base}/review?by=Kim", "empty review": "{empty}/review",
    "login": "/login", "error": "/nothing",
}  # fmt: skip


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_a_page_can_be_read_by_everybody_in_both_themes(page: Page, world: World, path: str) -> None:
    world.source.labels.keep("bookmarks", 3)
    opened(page, path.format(base=world.base, empty=world.empty))
    if path == PAGES["latent"]:
        page.check("input[value=full]")
        for row in page.locator(".group:visible .example").all()[:3]:
            row.scroll_into_view_if_needed()
            expect(row.locator(".full .t").first).to_be_visible()
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    if page.locator("button.pick").count():
        page.locator("button.pick").last.click()
    assert violations(page) == []
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert violations(page, runOnly=["color-contrast"]) == []  # nothing but colours is different


def test_nothing_is_wider_than_a_telephone(page: Page, world: World) -> None:
    page.set_viewport_size({"width": 360, "height": 800})
    for path in (*(f"/latents/{j}" for j in (0, 3, 5, 6, 7)), "", "/search?q=delayed", "/prompt?text=a+b",
                 "/contrast?a=the+package&b=red+ball", "/lists", "/review"):  # fmt: skip
        opened(page, world.base + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert page.evaluate("window.pwned") is None


def test_the_theme_is_the_systems_until_one_is_chosen(context: BrowserContext, world: World) -> None:
    def background(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page = opened(context.new_page(), world.base)
    light = background(page)
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert light != dark
    page.click("#theme")
    assert background(page) == light
    opened(page, f"{world.base}/search")
    assert background(page) == light


def test_hovering_shows_the_value(page: Page, world: World) -> None:
    opened(page, f"{world.base}/latents/3")
    page.hover(".group.top .peak .t >> nth=0")
    expect(page.locator("#tip")).to_have_text("3.860")
    page.hover(".strip .chips li >> nth=0")
    expect(page.locator("#tip")).to_have_text("1.000")
    page.hover(".strip rect >> nth=0")
    expect(page.locator("#tip")).to_contain_text(" to ")
    page.hover("h1")
    expect(page.locator("#tip")).to_be_hidden()


def test_the_highlight_is_the_formulas(page: Page, world: World) -> None:
    opened(page, f"{world.base}/latents/3")
    peak = page.locator(".group.top .peak .t").nth(0)
    assert peak.evaluate("e => getComputedStyle(e).getPropertyValue('--a')") == "1"
    weak = page.locator(".group.top .peak .t").nth(1)
    assert weak.inner_text() == " package"
    opacity = float(weak.evaluate("e => getComputedStyle(e).getPropertyValue('--a')"))
    # 0.05 + 0.95 · log10(1 + 9 · 1.5 / 3.86)
    assert opacity == pytest.approx(0.05 + 0.95 * 0.6533, abs=0.006)


def test_examples_can_be_stacked_widened_expanded_and_regrouped(page: Page, world: World) -> None:
    opened(page, f"{world.base}/latents/3")
    first = page.locator(".group.top .example").nth(0)
    page.check("input[value=stacked]")
    assert page.locator(".group.top .example .t.far:visible").count() == 0
    page.check("input[value=full]")
    expect(first.locator(".full")).to_contain_text("wait here")
    assert first.locator(".full .t").count() == 44
    page.check("input[value=snippet]")
    expect(first.locator(".full")).to_be_hidden()
    first.locator(".expand").click()
    expect(first.locator(".full")).to_be_visible()
    expect(first.locator(".expand")).to_have_attribute("aria-expanded", "true")
    first.locator(".tokens:not(.full)").click()
    expect(first.locator(".full")).to_be_hidden()

    assert (
        page.locator(".group.quantile:visible").count() == 0 < page.locator(".group.interval:visible").count()
    )
    page.check("input[value=quantile]")
    assert (
        page.locator(".group.interval:visible").count() == 0 < page.locator(".group.quantile:visible").count()
    )
    expect(page.locator(".group.quantile h3").nth(0)).to_have_text(
        re.compile(r"Quantile .+–.+ \(contains .+%\)")
    )

    breaks = page.locator(".group.top .tokens:visible br").nth(0)
    assert breaks.evaluate("e => getComputedStyle(e).display") == "none"
    page.check("input[name=breaks]")
    assert breaks.evaluate("e => getComputedStyle(e).display") != "none"
    page.reload()  # what was chosen stays
    expect(page.locator("input[value=quantile]")).to_be_checked()
    expect(page.locator("input[name=breaks]")).to_be_checked()


def test_what_is_not_known_far_from_an_example_is_grey_and_said_to_be(page: Page, world: World) -> None:
    def colour(locator: Locator) -> str:
        return locator.evaluate("e => getComputedStyle(e).color")

    opened(page, f"{world.base}/latents/8")  # its examples are in the first half of a passage of 44 tokens
    first, beyond = page.locator(".group.top .example").nth(0), page.locator(".beyond")
    expect(beyond).to_be_hidden()
    page.check("input[value=full]")
    expect(first.locator(".full .t")).to_have_count(44)
    known, unknown = first.locator(".full .t[data-v]"), first.locator(".full .t:not([data-v])")
    assert known.count() > 0 and unknown.count() > 0
    expect(beyond).to_have_text(re.compile("^Grey tokens lie more than 3 tokens from an example: "))
    assert colour(unknown.last) == colour(beyond) != colour(known.first)
    page.check("input[value=snippet]")
    expect(beyond).to_be_hidden()
    first.locator(".expand").click()
    expect(beyond).to_be_visible()


def test_searching_and_going_places(page: Page, world: World) -> None:
    opened(page, world.base)
    led(page, "nav >> text=Search")
    page.fill("#q", "delayed package")
    led(page, "main button.primary")
    expect(page).to_have_url(re.compile("q=delayed"))  # a link that can be kept
    led(page, "table a:text-is('3')")
    expect(page.locator("h1")).to_have_text("Latent 3")
    led(page, "a[rel=next]")
    expect(page.locator("h1")).to_have_text("Latent 4")
    page.fill("#go-latent", "6")
    led(page, ".go button")
    expect(page.locator("h1")).to_have_text("Latent 6")
    page.click("text=JSON")
    expect(page).to_have_url(re.compile(r"/latents/6\.json$"))


def test_the_parts_of_a_latent_lead_to_the_wider_index(page: Page, world: World) -> None:
    wider = next(s for s in world.shelf.sources if s.name == "wider")
    opened(page, f"{world.base}/latents/3")
    parts = page.locator("#contained a.num")
    expect(parts).to_have_text(["97", "98"])
    expect(page.locator("#contained")).to_contain_text("97 (6 of its 6 firings, 61")
    expect(page.locator("#children a.num")).to_have_text(["97", "98"])
    parts.nth(1).click()
    expect(page).to_have_url(re.compile(f"/i/{wider.key}/latents/98$"))
    expect(page.locator("h1")).to_have_text("Latent 98")
    page.go_back()
    page.click("#contained a:not(.num)")
    expect(page).to_have_url(re.compile(f"/i/{wider.key}$"))
    page.go_back()
    beside = page.locator("#neighbours li", has_text="of wider")
    expect(beside.locator("a")).to_have_text("98")
    elsewhere = page.locator("#neighbours li", has_text="of an autoencod")
    expect(elsewhere.locator("a")).to_have_count(0)


def test_the_table_of_latents_filters(page: Page, world: World) -> None:
    opened(page, world.base)
    page.fill("input[name=token]", "refund")
    led(page, "text=Show")
    expect(page.locator("#latents tbody tr")).to_have_count(1)
    page.fill("input[name=token]", "")
    page.fill("input[name=least]", "0.001")
    page.select_option("select[name=sort]", "-max")
    led(page, "text=Show")
    expect(page.locator("#latents tbody th").nth(0)).to_have_text("5")


def test_trying_a_text_and_steering(page: Page, world: World) -> None:
    latent = 3
    opened(page, f"{world.base}/latents/{latent}")
    strength = float(page.input_value("#strength"))
    assert strength == pytest.approx(3 * world.source.index.latent(latent).max, rel=1e-3)
    slider = page.locator("#strength-slider")
    assert float(slider.input_value()) == pytest.approx(0.48, abs=0.01)  # log10 of 3
    slider.focus()
    slider.press("End")
    assert float(page.input_value("#strength")) == pytest.approx(strength / 3 * 10**1.5, rel=1e-2)

    page.click("#try-form button.primary")
    expect(page.locator("#try-problem")).to_contain_text("empty")
    page.fill("#try-text", "<b>the</b> delayed package\nשלום 👩‍👩‍👧")
    page.click("#try-form button.primary")
    expect(page.locator("#try-result")).to_contain_text("delayed package")
    expect(page.locator("#try-problem")).to_be_hidden()
    assert page.locator("#try-result b").count() == 0
    page.hover("#try-result .t >> nth=0")
    expect(page.locator("#tip")).to_have_text(re.compile(r"^\d+\.\d{3}$"))

    page.fill("#new-tokens", "5")
    page.click("#steer")
    expect(page.locator("#steer-proof")).to_contain_text("fired at")
    expect(page.locator("#steer")).to_have_text("Steer")
    default, steered = (page.locator(f"#reply-{name}").inner_text() for name in ("default", "steered"))
    assert default != steered
    page.fill("#new-tokens", "200")
    page.click("#steer")
    expect(page.locator("#try-problem")).to_contain_text("1 to 32")


def test_a_bookmark_and_a_proposal_stay(page: Page, world: World) -> None:
    opened(page, f"{world.base}/latents/8")
    page.click("#bookmark")
    expect(page.locator("#bookmark")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(page.locator("#bookmark")).to_have_text("★ Bookmarked")
    assert 8 in world.source.labels.list("bookmarks")
    page.fill("#propose-by", "Ann")
    page.fill("#propose-text", "the word <i>the</i>")
    page.click("#propose button")
    expect(page.locator(".label bdi").nth(0)).to_have_text("the word <i>the</i>")
    ready(page)
    page.click("#bookmark")
    expect(page.locator("#bookmark")).to_have_attribute("aria-pressed", "false")
    assert 8 not in world.source.labels.list("bookmarks")


def test_a_prompts_tokens_open_their_latents(page: Page, world: World) -> None:
    opened(page, f"{world.base}/prompt")
    page.fill("#text", "the delayed package")
    page.click("main button.primary")
    expect(page).to_have_url(re.compile("text=the"))
    ready(page)
    token = page.locator("button.pick").nth(3)
    token.click()
    expect(page.locator("#token-3")).to_be_visible()
    token.click()
    expect(page.locator("#token-3")).to_be_hidden()
    assert page.locator(".readings li").count() > 3


def test_two_prompts_are_compared(page: Page, world: World) -> None:
    opened(page, f"{world.base}/contrast")
    page.fill("#a", "the package")
    page.fill("#b", "red ball")
    page.click("main button.primary")
    expect(page.locator("main h2").nth(0)).to_have_text("More in the first")
    assert page.locator("table tbody tr").count() > 2


def test_labels_are_reviewed_from_the_keyboard(page: Page, world: World) -> None:
    labels = world.source.labels
    mine = [labels.propose(90, f"for the queue {i}", by="test", kind="person") for i in range(3)]
    queue = [q.id for q in labels.queue(by="Kim", limit=500)]
    at = queue.index(mine[0].id)
    opened(page, f"{world.base}/review?by=Kim&at={at}")
    question = page.locator(".question bdi")

    def asks(text: str) -> None:
        expect(question).to_have_text(text)
        ready(page)

    asks("for the queue 0")
    page.keyboard.press("j")
    asks("for the queue 1")
    page.keyboard.press("k")
    asks("for the queue 0")
    page.keyboard.press("a")
    asks("for the queue 1")
    page.keyboard.press("r")  # asks for a reason first
    expect(page.locator("#why")).to_be_focused()
    page.keyboard.type("a jar, nothing else")
    page.keyboard.press("Enter")
    asks("for the queue 2")
    page.keyboard.press("n")
    expect(page.locator("#why")).to_be_focused()
    page.keyboard.type("too broad")
    page.keyboard.press("Enter")
    expect(question).not_to_have_text("for the queue 2")
    found = {m.id: labels.label(m.id) for m in mine}
    assert [found[m.id].status for m in mine] == ["accepted", "rejected", "needs work"]
    assert (
        found[mine[1].id].reviews[0].by == "Kim" and found[mine[1].id].reviews[0].why == "a jar, nothing else"
    )


def test_a_review_without_a_name_asks_for_it(page: Page, world: World) -> None:
    opened(page, f"{world.base}/review")
    page.keyboard.press("a")
    expect(page.locator("#review-problem")).to_contain_text("your name")


def test_pages_that_have_nothing_to_show_say_so(page: Page, world: World) -> None:
    opened(page, "/nothing")
    expect(page.locator("h1")).to_have_text("There is no such page")
    opened(page, world.empty)
    expect(page.locator("main")).to_contain_text("None of them fired")
    opened(page, f"{world.empty}/latents/0")
    expect(page.locator("#examples")).to_contain_text("never fired")
    opened(page, f"{world.empty}/review")
    expect(page.locator("main")).to_contain_text("unbraid label")


def test_hostile_text_is_shown_and_does_nothing(page: Page, world: World) -> None:
    for latent, shown in ((5, "<script>window.pwned=1</script>"), (6, "שלום"), (7, "(10,000 characters)")):
        opened(page, f"{world.base}/latents/{latent}")
        expect(page.locator(".group.top .tokens").nth(0)).to_contain_text(shown)
        page.check("input[value=full]")
        expect(page.locator(".group.top .full").nth(0)).to_contain_text(shown)
        if latent == 6:
            expect(page.locator(".group.top .full").nth(0)).to_contain_text("👩‍👩‍👧🇪🇺")
        page.check("input[value=stacked]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        page.check("input[value=snippet]")
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script").count() == 0
