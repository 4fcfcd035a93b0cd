"""docs/pictures/*.svg are what tools/pictures.py draws."""

import re
import sys

import pytest
from pages import PAGES, ROOT

sys.path.append(str(ROOT / "tools"))
import pictures

DRAWN = ROOT / "docs" / "pictures"


def test_every_picture_is_drawn_by_the_script_and_shown_on_a_page():
    assert {file.stem for file in DRAWN.iterdir()} == {*pictures.DRAWN}
    shown = re.findall(r"!\[[^\]]+\]\((?:\.\./)?pictures/([\w-]+)\.svg\)", "".join(PAGES.values()))
    assert sorted(shown) == sorted(pictures.DRAWN)


def _said(file):
    """Words, numbers and how many strokes, which do not hang on the version of matplotlib."""
    svg = file.read_text()
    return re.findall(r">([^<>\n]+)</text>", svg), len(re.findall(r"<g id=\"patch_|<g id=\"line2d_", svg))


@pytest.mark.slow
@pytest.mark.parametrize("name", pictures.DRAWN)
def test_a_picture_is_what_the_code_computes(name, tmp_path):
    assert _said(pictures.write(name, tmp_path)) == _said(DRAWN / f"{name}.svg")


@pytest.mark.slow
def test_the_memory_of_the_page_is_what_is_predicted():
    rows = re.findall(r"^\| ([\w, ]+?) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$",
                      PAGES["docs/concepts/memory.md"], re.MULTILINE)  # fmt: skip
    assert [name for name, *_ in rows] == [*pictures.TRAININGS]
    for name, *sizes in rows:
        of = pictures.predicted(**pictures.TRAININGS[name])
        parts = of.weights, of.adapter + of.gradients + of.optimizer, of.activations, of.working, of.peak
        assert [*map(float, sizes)] == pytest.approx([part / 1e9 for part in parts], abs=0.011)
