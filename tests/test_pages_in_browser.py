"""The pages in Chromium: nothing in the console, nothing asked of the network, readable in light and dark, usable by keyboard alone
and on a narrow screen; the blind test is played through to its figure."""

import csv
import json
import random

import pytest
from contrasts import CONTRASTS
from handmade_comparison import LOUD, SOFT, compared
from handmade_run import LOG, write_run
from scipy.stats import binomtest

from jlora.report.comparison_page import comparison_html, preference_html
from jlora.report.run_report import report_on, to_html

pytestmark = pytest.mark.slow

PAGES = ("report", "reports", "compare", "preference", "result")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> file of each page; "result" is the blind test when it is over."""
    place = tmp_path_factory.mktemp("pages")
    first, second = (write_run(place / name, config={"rank": rank}) for name, rank in (("letters", 2), ("poems", 4)))
    unfinished = write_run(place / "begun", log=LOG[:3], adapter=False)
    made = {
        "report": to_html(report_on([first])),
        "reports": to_html(report_on([first, second, unfinished])),
        "compare": comparison_html(compared(SOFT, LOUD, count=3)),
        "preference": preference_html(compared(SOFT, LOUD, count=3), seed=1),
    }
    paths = {name: place / f"{name}.html" for name in made}
    for name, path in paths.items():
        path.write_text(made[name])
    return paths | {"result": paths["preference"]}


@pytest.fixture
def opened(browser, files):
    """Opens a page by name in a context of its own; whatever it says or asks for is an error at the end of the test."""
    contexts, said = [], []

    def open_page(name, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "blob:", "data:")) or said.append(request.url)
        )
        page.goto(files[name].as_uri())
        if name == "result":
            while page.locator("#judging").is_visible():
                page.keyboard.press("a")
        for details in page.locator("summary").all():
            details.click()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(name, scheme, opened):
    """Also under the mouse."""
    page = opened(name, color_scheme=scheme)
    assert len(page.evaluate(CONTRASTS)) > 5
    buttons = [button for button in page.get_by_role("button").all() if button.is_visible() and button.is_enabled()]
    for pointed_at in (None, *buttons):
        if pointed_at is not None:
            pointed_at.hover()
        assert [text for text in page.evaluate(CONTRASTS) if text[0] < 4.5] == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_page_is_wider_than_its_screen(name, width, opened):
    page = opened(name, viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        "() => [...document.querySelectorAll('button, summary, svg[role=img], input')]"
        ".filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)"
    )
    assert beyond == []


@pytest.mark.parametrize("name", PAGES)
def test_every_control_has_a_name_and_the_keyboard_reaches_it(name, opened):
    page = opened(name)
    controls = page.evaluate(
        "() => [...document.querySelectorAll('a[href], button, summary, input, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility() && !e.disabled)"
        ".map((e, n) => { e.dataset.number = n; return e.getAttribute('aria-label') || e.textContent.trim(); })"
    )
    assert "To the content" in controls and all(controls), controls
    reached = set()
    for _ in range(len(controls) + 1):  # once round, by way of the browser's own
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.number"))
    assert reached - {None} == {str(n) for n in range(len(controls))}


def test_a_curve_is_read_out_by_arrow_keys_and_by_pointer(opened):
    page = opened("report")
    slider, output = page.locator("figure.chart input").first, page.locator("figure.chart output").first
    slider.focus()
    page.keyboard.press("Home")
    assert output.inner_text() == "step 0 · evaluation 4"
    page.keyboard.press("ArrowRight")
    assert output.inner_text() == slider.get_attribute("aria-valuetext") == "step 1 · training 4.25"
    page.keyboard.press("ArrowRight")
    assert output.inner_text() == "step 2 · training 3.5 · evaluation 3"
    page.locator("figure.chart svg[role=img]").first.hover(position={"x": 5, "y": 20})
    assert output.inner_text() == "step 0 · evaluation 4"


def test_paper_has_no_controls_and_light_ink(opened):
    page = opened("report", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("figure.chart input").first.is_visible()


def test_the_blind_test_is_played_by_keyboard(opened, browser, files, tmp_path):
    count, draw = 24, random.Random(3)
    files["preference"].write_text(preference_html(compared(SOFT, count=count), seed=7))
    page = opened("preference")
    pairs = json.loads(page.locator("#data").text_content())["pairs"]
    keys = {"left": ("a", "ArrowLeft"), "right": ("b", "ArrowRight"), "tie": ("t", "ArrowDown")}
    choices = [draw.choices(["adapter", "base", "tie"], [0.6, 0.3, 0.1])[0] for _ in range(count)]

    def press(index):
        side, other = pairs[index]["adapter_is"], {"left": "right", "right": "left"}[pairs[index]["adapter_is"]]
        page.keyboard.press(draw.choice(keys[{"adapter": side, "base": other, "tie": "tie"}[choices[index]]]))

    for index in range(10):
        assert page.locator("#progress").inner_text() == f"Pair {index + 1} of {count}"
        assert page.locator("#left").inner_text() == pairs[index]["left"].strip()
        press(index)
    page.keyboard.press("t")
    page.keyboard.press("u")  # taken back
    page.reload()
    assert page.locator("#progress").inner_text() == f"Pair 11 of {count}", "answers are kept in the browser"
    assert "soft" not in page.locator("main").inner_text(), "nobody is named before the end"
    for index in range(10, count):
        press(index)
    wins, losses = choices.count("adapter"), choices.count("base")
    readings = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    p = binomtest(wins, wins + losses).pvalue
    share = wins / (wins + losses)
    assert readings["soft better"] == str(wins) and readings["base better"] == str(losses)
    assert readings["neither"] == str(choices.count("tie"))
    assert readings["sign test, two-sided"].startswith(f"p = {p:.4f}")
    aim = "reaches" if share >= 0.6 else "does not reach"
    assert readings["share of the adapter"] == f"{100 * share:.1f} %\n{aim} the aim of 60.0 %; pairs with a winner"

    with page.expect_download() as download:
        page.click("#json")
    saved = json.loads(download.value.path().read_text())
    (result,) = saved["results"]
    assert (result["wins"], result["losses"], result["share"]) == (wins, losses, share)
    assert result["p"] == pytest.approx(p, rel=1e-12)
    expected = [{"adapter": "soft"}.get(choice, choice) for choice in choices]
    assert [row["better"] for row in saved["answers"]] == expected
    with page.expect_download() as download:
        page.click("#csv")
    with download.value.path().open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["better"] for row in rows] == expected and rows[0]["prompt"] == pairs[0]["prompt"]
    assert {row["a_was"] for row in rows} == {"soft", "base"}

    page.keyboard.press("u")
    assert page.locator("#progress").inner_text() == f"Pair {count} of {count}"


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (5, 5), (3, 9), (30, 12), (400, 300), (1500, 900)])
def test_the_sign_test_is_scipys(opened, wins, losses):
    found = opened("preference").evaluate("([wins, losses]) => signTest(wins, losses)", [wins, losses])
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found == pytest.approx(expected, rel=1e-9)
