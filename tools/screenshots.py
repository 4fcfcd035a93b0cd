r"""Screenshots of our pages for the documentation, docs/images, of a run and a comparison on SmolLM2:

    jlora finetune --model SmolLM2.gguf --data examples/assets/instructions.jsonl --template chat --output runs/rank-8 --steps 24 \
        --batch-size 4 --max-length 96 --learning-rate 5e-4 --eval-every 6 --sample-prompts "How does a frog sound?"
    jlora compare --adapter runs/rank-8/adapter --prompts "How does a frog sound?" "Where can I find an ant?" \
        "What does a baker make?" --max-new-tokens 40 --temperature 0 --output runs/compared
    python tools/screenshots.py runs/rank-8 runs/compared

and of examples/study_cards on the same model. It needs Chromium, Playwright and Gradio: pip install 'jlora[browser,ui]'.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 200_000
"""Of an image in the repository."""


def main(run: Path, compared: Path) -> None:
    shots = (
        (run / "report.html", "report", 1000),
        (compared / "compare.html", "compare", 1000),
        (compared / "preference.html", "preference", 660),
    )
    with chromium() as browser:
        for page_file, name, height in shots:
            page = browser.new_page(viewport={"width": 1200, "height": height}, color_scheme="light")
            page.goto(page_file.absolute().as_uri())
            keep(page, name)
        study_cards(browser)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium, without a window."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("Screenshots are taken in Chromium: install it (apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def study_cards(browser: Browser) -> None:
    """A deck about photosynthesis, by SmolLM2; its second card is turned."""
    sys.path += [str(ROOT / "examples" / "study_cards")]
    import app
    from voices import Jlora, Voices

    source = app.smollm2_file()
    voices = Voices(Jlora(source, {}, dtype="bfloat16", quantize=None), source, {})
    made = app.page(voices, title=Path(source).stem)
    _, url, _ = made.launch(prevent_thread_lock=True, quiet=True, **app.LOOKS)
    page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
    page.goto(url)
    page.get_by_role("textbox", name="Topic").fill("photosynthesis")
    page.keyboard.press("Enter")
    page.get_by_text("cards about photosynthesis, by base.").wait_for(timeout=300_000)
    page.locator(".card").nth(1).click()
    page.wait_for_timeout(1000)  # it turns
    keep(page, "study_cards")
    made.close()


def keep(page: Page, name: str) -> None:
    """Writes what is seen of a page as an image of the documentation, and closes it."""
    IMAGES.mkdir(exist_ok=True)
    image = IMAGES / f"{name}.png"
    page.screenshot(path=image)
    if image.stat().st_size > MOST_BYTES:
        sys.exit(f"{image} has {image.stat().st_size:,} bytes, more than {MOST_BYTES:,}: take less of the page.")
    page.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
