"""examples/study_cards: how cards are asked for and read, the files they go to, and the page in a browser."""

import csv
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import types

import httpx
import jax
import pytest
from contrasts import CONTRASTS
from pages import ROOT

import jlora

sys.path += [str(ROOT / "examples" / "study_cards"), str(ROOT / "examples")]
import cards
from cards import Card

LAVA, ASH = Card("What is lava?", "Molten rock."), Card('What is "ash"?', "Rock, blown\tto <dust>, fine.")


@pytest.mark.parametrize(
    ("text", "ended", "wanted"),
    [
        (" What is lava?\nA: Molten rock.\n", False, LAVA),
        ("What is lava?\n\nA:Molten rock.\nQ: What is ash?\nA: Dust.", False, LAVA),
        (" What is lava?\nA: Molten rock.", True, LAVA),
        (" What is lava?\nA: Molten ro", False, None),
        (" What is lava?", True, None),
        (" What is lava?\nA:", True, None),
        (" What is lava?\nA:\nMolten rock.", True, None),
        (" Lava is rock.\nA: Molten rock.", True, None),
        (f" {'What ' * 50}?\nA: Molten rock.", True, None),
        (f" What is lava?\nA: {'rock ' * 70}", True, None),
        ("\n\n", True, None),
    ],
)
def test_a_card_is_read(text, ended, wanted):
    assert cards.read(text, ended=ended) == wanted


def scripted(*answers):
    """A writer that gives these, one after the other, and keeps what it was asked."""
    left, asked = iter(answers), []

    def write(messages, begins, seed):
        asked.append((messages, seed))
        answer = next(left)
        yield from (answer[: n + 1] for n in range(len(answer)))

    return write, asked


def test_cards_are_dealt_until_there_are_enough():
    """What is no card, and what asks the same, is drawn again from another seed; each card is a turn before the next."""
    write, asked = scripted(
        "What is lava?\nA: Molten rock.\nQ: and", "No card", "what is LAVA\n?", "what is lava ?\nA: Rock", "What is ash?\nA: Dust."
    )  # fmt: skip
    told = list(cards.deal(write, "volcanoes", "easy", 2, seed=5))
    assert told[-1] == ([LAVA, Card("What is ash?", "Dust.")], "")
    assert ([LAVA], "") in told and ([], "What is l") in told
    seeds = [seed for _, seed in asked]
    assert len({*seeds}) == 5 and min(seeds) == 240  # those of another deck are others
    (first, _), *_, (last, _) = asked
    assert [m["role"] for m in first] == ["system", *["user", "assistant"] * 2, "user"]
    assert last[:-1] == [*first[:-1], first[-1], {"role": "assistant", "content": "Q: What is lava?\nA: Molten rock."}]
    assert first[-1] == last[-1] and "easy" in last[-1]["content"] and "volcanoes" in last[-1]["content"]


def test_a_model_that_writes_no_cards_ends_the_deck():
    write, asked = scripted(*["Lava is rock."] * 4)
    assert all(cards_ == [] for cards_, _ in cards.deal(write, "volcanoes", "hard", 3, seed=0)) and len(asked) == 4


@pytest.mark.parametrize("level", cards._SHOWN)
def test_the_cards_that_are_shown_are_cards(level):
    for card in cards._SHOWN[level].values():
        assert cards.read(str(card).removeprefix(cards.BEGINS), ended=True) == card


def test_topics():
    assert cards.topic_of("  the French\n Revolution ") == "the French Revolution"
    with pytest.raises(ValueError, match="Type a topic first"):
        cards.topic_of(" \n")
    with pytest.raises(ValueError, match="at most 80 characters; this one has 89"):
        cards.topic_of("volcanoes " * 9)


def test_files_give_back_the_cards():
    of = {"topic": "ash, fire", "level": "easy"}
    head, *rows = csv.reader(cards.as_csv([LAVA, ASH], **of).splitlines(keepends=True))
    assert head == ["question", "answer", "topic", "level"]
    assert rows == [[c.question, c.answer, "ash, fire", "easy"] for c in (LAVA, ASH)]
    *heads, one, two = cards.as_anki([LAVA, ASH], **of).splitlines(keepends=True)
    assert [*csv.reader([one, two], delimiter="\t")] == [[c.question, c.answer, "easy"] for c in (LAVA, ASH)]
    assert "".join(heads) == (
        "#separator:tab\n#html:false\n#notetype:Basic\n#deck:ash, fire\n#columns:Front\tBack\tTags\n#tags column:3\n"
    )


def test_what_a_model_writes_is_text_on_the_page():
    assert "to &lt;dust&gt;" in cards.as_html(ASH) and "<dust>" not in cards.as_html(ASH)
    assert cards.as_html(LAVA).count('type="checkbox"') == 1


@pytest.mark.parametrize("name", ["Dockerfile", "README.md", "app.py"])
def test_what_is_said_of_running_it_exists(name):
    """Its flags, and the extras that it installs."""
    said = (ROOT / "examples" / "study_cards" / name).read_text()
    calls = re.findall(r"""app\.py[",]* ([^\n]*)""", said)
    flags = {flag for call in calls for flag in re.findall(r"--([a-z]+)", call)}
    fields = re.findall(r"^    (\w+): ", (ROOT / "examples" / "study_cards" / "app.py").read_text(), re.MULTILINE)
    assert flags and flags <= {*fields}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for group in re.findall(r"'\.\[([\w,-]+)\]'", said) for extra in group.split(",")}
    assert named and named <= {*extras}


# The page

ITS_OWN_WARNINGS = pytest.mark.filterwarnings("ignore:('future.no_silent|The copy keyword)")  # of Gradio, about pandas


class Scripted:
    """Voices that need no model."""

    names = ("base", "keeper")

    def write(self, name, messages, begins, seed):
        topic, number = messages[-1]["content"], len(messages) // 2 - 3
        text = f" What does {name} know of it, number {number}?\nA: {topic} <b>&</b> {seed}."
        for end in range(0, len(text), 7):
            time.sleep(0.02)
            yield text[:end]
        yield text


@pytest.fixture(scope="module")
def app():
    import app

    made = app.page(Scripted(), title="a script")
    _, url, _ = made.launch(prevent_thread_lock=True, quiet=True, **app.LOOKS)
    yield types.SimpleNamespace(url=url)
    made.close()


@pytest.mark.slow
@ITS_OWN_WARNINGS
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_in_a_browser(app, browser, width, scheme, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(app.url)
    page.get_by_role("textbox", name="Topic").fill("volcanoes")
    page.keyboard.press("Enter")
    page.get_by_text("4 cards about volcanoes, by keeper.").wait_for(timeout=30_000)
    deck = page.locator(".card")
    assert deck.count() == 4
    assert "What does keeper know of it, number 1?" in deck.nth(1).locator(".front").inner_text()
    back = deck.nth(1).locator(".back")
    assert not back.is_visible()
    deck.nth(1).click()
    assert back.is_visible() and "volcanoes, for a beginner. <b>&</b>" in back.inner_text()
    deck.nth(2).locator("input").focus()
    page.keyboard.press("Space")
    assert deck.nth(2).locator(".back").is_visible()
    for button, wanted in (("Save as CSV", "volcanoes.csv"), ("Save for Anki", "volcanoes.anki.txt")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == wanted
        assert "What does keeper know of it, number 3?" in download.value.path().read_text()
    page.get_by_label("base").check()
    page.get_by_label("hard").check()
    page.get_by_role("button", name="Write cards").click()
    page.get_by_text("4 cards about volcanoes, by base.").wait_for(timeout=30_000)
    assert "base" in deck.nth(0).locator(".front").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    page.screenshot(path=tmp_path / "page.png")
    faint = [found for found in page.evaluate(CONTRASTS) if found[0] < 4.5]
    assert not faint
    page.get_by_role("textbox", name="Topic").fill("  ")
    page.get_by_role("button", name="Write cards").click()
    page.get_by_text("Type a topic first").wait_for()
    assert not said and all(url.startswith(app.url) for url in asked), (said, asked)
    page.close()


def writing_page(app, browser):
    """On which cards are being written."""
    page = browser.new_page()
    page.goto(app.url)
    page.get_by_role("textbox", name="Topic").fill("volcanoes")
    page.get_by_role("button", name="Write cards").click()
    return page


@pytest.mark.slow
@ITS_OWN_WARNINGS
def test_a_turned_card_stays_so_while_others_come(app, browser):
    page = writing_page(app, browser)
    first = page.locator(".card").first
    first.click()
    assert page.locator(".card").count() < 4
    page.get_by_text("4 cards about volcanoes").wait_for(timeout=30_000)
    assert page.locator(".card").count() == 4 and first.locator(".back").is_visible()
    page.get_by_role("button", name="Write cards").click()
    page.get_by_text("Card 2 of 4").wait_for()
    assert not first.locator(".back").is_visible(), "another deck begins face up"
    page.close()


@pytest.mark.slow
@ITS_OWN_WARNINGS
def test_a_deck_can_be_stopped(app, browser):
    page = writing_page(app, browser)
    page.locator(".card").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile(r"\d cards? about volcanoes, by keeper\. Stopped\.")).wait_for()
    count = page.locator(".card").count()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as CSV").click()
    assert len(download.value.path().read_text().splitlines()) == 1 + count < 5
    time.sleep(1)
    assert page.locator(".card").count() == count < 4
    page.get_by_role("button", name="Write cards").click()
    page.get_by_text("4 cards about volcanoes, by keeper.").wait_for(timeout=30_000)
    page.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Engine -> an adapter of SmolLM2 in the form that it reads, which changes a little what is written."""
    import smollm2

    place, file = tmp_path_factory.mktemp("adapters"), smollm2.required()
    model, params = jlora.load(file, dtype="float32")
    config = jlora.LoraConfig(rank=2, targets=["v_proj"], init="gaussian")
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    adapter = jax.tree.map(lambda x: x + 0.003 * jax.random.normal(jax.random.key(1), x.shape), adapter)
    params = jlora.combine(adapter, base)
    jlora.save_adapter(place / "peft", params, config=config, base_model=str(file))
    jlora.save_gguf_adapter(place / "keeper.gguf", params, config=config, model=model)
    return {"jlora": place / "peft", "llama.cpp": place / "keeper.gguf"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["jlora", "llama.cpp"])
def test_a_real_model_writes_cards(engine, adapters, browser):
    """As its first lines say to run it; base and adapter write others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, adapter = ROOT / "examples" / "study_cards" / "app.py", f"keeper={adapters[engine]}"
    process = subprocess.Popen(
        [sys.executable, str(script), "--smol", "--engine", engine, "--port", str(port), "--adapter", adapter],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(1200):
            assert process.poll() is None, process.stdout.read()
            try:
                if httpx.get(url).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        page = browser.new_page()
        page.goto(url)
        decks = []
        for name in ("keeper", "base"):
            page.get_by_label(name, exact=True).check()
            page.get_by_role("textbox", name="Topic").fill("volcanoes")
            page.keyboard.press("Enter")
            page.get_by_text(f"cards about volcanoes, by {name}.").wait_for(timeout=300_000)
            decks.append(page.locator(".card .front").all_inner_texts())
        assert all(deck and len({*deck}) == len(deck) for deck in decks), decks
        assert all(question.endswith("?") for deck in decks for question in deck), decks
        assert decks[0] != decks[1]
        page.close()
    finally:
        process.terminate()
        process.communicate(timeout=30)
