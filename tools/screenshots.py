r"""Screenshots of our pages for the documentation, docs/images, of a run and a comparison on SmolLM2:

    jlora finetune --model SmolLM2.gguf --data examples/assets/instructions.jsonl --template chat --output runs/rank-8 --steps 24 \
        --batch-size 4 --max-length 96 --learning-rate 5e-4 --eval-every 6 --sample-prompts "How does a frog sound?"
    jlora compare --adapter runs/rank-8/adapter --prompts "How does a frog sound?" "Where can I find an ant?" \
        "What does a baker make?" --max-new-tokens 40 --temperature 0 --output runs/compared
    python tools/screenshots.py runs/rank-8 runs/compared

It needs Chromium, and Playwright: pip install 'jlora[browser]'.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 200_000
"""Of an image in the repository."""


def main(run: Path, compared: Path) -> None:
    shots = (
        (run / "report.html", "report", 1000),
        (compared / "compare.html", "compare", 1000),
        (compared / "preference.html", "preference", 660),
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Screenshots are taken in Chromium: install it (apt-get install chromium).")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for page_file, name, height in shots:
            page = browser.new_page(viewport={"width": 1200, "height": height}, color_scheme="light")
            page.goto(page_file.absolute().as_uri())
            image = IMAGES / f"{name}.png"
            page.screenshot(path=image)
            if image.stat().st_size > MOST_BYTES:
                sys.exit(
                    f"{image} has {image.stat().st_size:,} bytes, more than {MOST_BYTES:,}: take less of the page."
                )
            page.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
