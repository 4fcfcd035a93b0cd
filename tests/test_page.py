"""What every page of ours is: one file, whose texts are text, whose colours can be read, and which asks nobody for anything."""

import base64
import hashlib
import itertools
import json
import math
import re
from xml.etree import ElementTree

import jinja2
import pytest
from parsed_page import parse

from jlora.report.page import CHART, HERE, STYLE, page
from jlora.report.page.chart import MOST_POINTS, Chart, Series, thinned, ticks

HOSTILE = "</script><img src=https://example.org/x onerror=alert(1)> & \x1b[2J\r\ud800"


def write_template(tmp_path, main="{{ text }}"):
    path = tmp_path / "some.html"
    path.write_text(
        f'{{% extends "base.html" %}}{{% block title %}}{{{{ text }}}}{{% endblock %}}{{% block main %}}{main}{{% endblock %}}'
    )
    return path


def test_texts_are_texts(tmp_path):
    main = '<p title="{{ text }}">{{ text }}</p><script type="application/json">{{ {"a": text} | json }}</script>'
    found = parse(page(write_template(tmp_path, main), text=HOSTILE))
    assert found.fetched == []
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\r", "\\r").replace("\ud800", "\\ud800")
    assert found.title == shown
    (paragraph,) = found.all("p", title=shown)
    assert paragraph.text == shown
    (data,) = found.all("script", type="application/json")
    assert json.loads(data.text) == {"a": HOSTILE}
    assert "img" not in found.tags


def test_what_a_template_is_not_told_is_an_error(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="'text' is undefined"):
        page(write_template(tmp_path))


@pytest.mark.parametrize("connects", [False, True])
def test_the_policy_lets_our_own_scripts_and_styles_in_and_nothing_else(tmp_path, connects):
    (tmp_path / "a.js").write_text('const text = "grüße";\n')
    found = parse(page(write_template(tmp_path), text="", scripts=[CHART, tmp_path / "a.js"], connects=connects))
    (policy,) = [meta.attributes["content"] for meta in found.all("meta") if "http-equiv" in meta.attributes]
    rules = {name: values for name, *values in (rule.split() for rule in policy.split(";"))}
    codes = [script.text for script in found.all("script")]
    assert codes == [CHART.read_text(), (tmp_path / "a.js").read_text()]

    def named(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["script-src"] == [named(code) for code in codes]
    assert rules["style-src"] == [named(style.text) for style in found.all("style")]
    assert rules["connect-src"] == (["'self'"] if connects else ["'none'"])
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]


def test_a_script_that_would_end_its_element_is_refused(tmp_path):
    (tmp_path / "a.js").write_text('const end = "</script>";')
    with pytest.raises(ValueError, match=r"a.js' must not hold '</'"):
        page(write_template(tmp_path), text="", scripts=[tmp_path / "a.js"])


def test_our_templates_have_no_styles_of_their_own():
    """The policy forbids them; a browser would leave them out in silence."""
    for template in HERE.parent.rglob("*.html"):
        assert not re.search(r"\sstyle=|<style(?!>\{\{)|\son\w+=", template.read_text()), template.name


# Colours: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


PALETTES = {
    name: dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    for name, block in zip(
        ("light", "dark", "print"), re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL), strict=True
    )
}


@pytest.mark.parametrize("palette", PALETTES.values(), ids=PALETTES)
def test_every_text_can_be_read(palette):
    assert palette.keys() == PALETTES["light"].keys()
    texts = [(ink, ground) for ink in ("ink", "muted", "accent") for ground in ("paper", "raised")]
    texts += [("on-accent", "accent")]
    texts += [("ink" if level < 6 else "on-heat", f"heat-{level}") for level in range(10)]
    marks = [*(f"series-{n}" for n in range(6)), "edge"]
    for ink, ground in texts:
        assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    for mark in marks:
        assert contrast(palette[mark], palette["paper"]) >= 3, mark
    darkness = [luminance(palette[f"heat-{level}"]) for level in range(10)]
    assert darkness in (sorted(darkness), sorted(darkness, reverse=True)), "heat rises evenly to the eye"


def test_the_text_turns_over_on_dark_heat():
    """As `test_every_text_can_be_read` has it."""
    by_ink = re.findall(r"^((?:\.heat-\d,? ?)+)\{ color: var\(--(\S+)\)", STYLE.read_text(), re.MULTILINE)
    assert {ink: re.findall(r"\d", levels) for levels, ink in by_ink} == {"ink": [*"012345"], "on-heat": [*"6789"]}


# Charts


def drawn(tmp_path, chart):
    template = write_template(tmp_path, '{% from "chart.html" import draw %}{{ draw(chart) }}')
    html = page(template, text="", chart=chart, scripts=[CHART])
    return ElementTree.fromstring(html[html.index('<svg viewBox="0 0 640') : html.rindex("</svg>") + len("</svg>")])


POINTS = [(1, 4.0), (2, 3.0), (3, None), (4, 2.5), (5, 2.0)]


def test_a_chart_says_what_it_shows(tmp_path):
    chart = Chart(
        "loss",
        "Loss <b>",
        "nats",
        [Series("training", POINTS), Series("evaluation", [(0, 4.5), (5, 2.2)], marked=True)],
    )
    svg = drawn(tmp_path, chart)
    assert svg.get("role") == "img"
    names = {element.get("id"): element.text for element in svg.iter() if element.get("id")}
    title, described = (names[name] for name in svg.get("aria-labelledby").split())
    assert title == "Loss <b>, nats, by step"
    assert described == (
        "training: from 4 at step 1 to 2 at step 5; lowest 2 at step 5, highest 4 at step 1. "
        "evaluation: from 4.5 at step 0 to 2.2 at step 5; lowest 2.2 at step 5, highest 4.5 at step 0."
    )
    assert chart.left_out == "1 value is not finite and not drawn"
    assert [element.get("class") for element in svg.iter() if element.tag == "circle"] == ["series-1"] * 2


def test_a_line_stands_where_its_values_are(tmp_path):
    svg = drawn(tmp_path, chart := Chart("loss", "Loss", "nats", [Series("training", POINTS)]))
    (path,) = [e.get("d") for e in svg.iter() if "line" in (e.get("class") or "").split()]
    assert re.sub(r"[\d. ]+", "", path) == "MLML", "a value that is not finite leaves a gap"
    places = [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path)]
    (left, top, right, bottom), (x0, x1), (y0, y1) = chart.plot, chart.x_range, chart.y_range
    back = [
        (x0 + (x - left) / (right - left) * (x1 - x0), y0 + (bottom - y) / (bottom - top) * (y1 - y0))
        for x, y in places
    ]
    for found, expected in zip(back, [(x, y) for x, y in POINTS if y is not None], strict=True):
        assert found == pytest.approx(expected, abs=0.02)
    assert chart.readings["series"][0]["points"] == POINTS


def test_lines_are_told_apart_without_colour():
    chart = Chart("c", "c", "", [Series(str(n), [(0, n)]) for n in range(24)])
    looks = [(line["colour"], line["dash"]) for line in chart.drawn]
    assert len(set(looks)) == 24
    assert all(a[1] != b[1] for a, b in itertools.pairwise(looks))


@pytest.mark.parametrize("points", [[], [(1, None)]])
def test_a_chart_of_nothing_is_refused(points):
    with pytest.raises(ValueError, match="'Loss' has no finite point"):
        Chart("loss", "Loss", "nats", [Series("training", points)])


@pytest.mark.parametrize("points", [[(3, 2.0)], [(3, 0.0), (4, 0.0)], [(0, -1e-12), (1, 1e12)]])
def test_a_chart_of_little_can_be_drawn(tmp_path, points):
    chart = Chart("c", "c", "", [Series("s", points)])
    svg = drawn(tmp_path, chart)
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode").lower() and 1 <= len(chart.y_ticks) <= 6


def test_a_long_line_keeps_its_peaks_and_gaps():
    points = [(n, math.sin(n / 100)) for n in range(20_000)]
    points[7_777], points[12_345], points[15_000] = (7_777, 9.0), (12_345, -9.0), (15_000, None)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 3 and kept == sorted(kept, key=lambda p: p[0])
    assert {points[0], points[-1], points[7_777], points[12_345], points[15_000]} <= set(kept)
    assert Chart("c", "c", "", [Series("s", points)]).left_out.endswith("the lowest and the highest values are drawn")


@pytest.mark.parametrize("low, high", [(0, 1), (2.1, 2.2), (-5, 7), (1e-6, 3e-6), (0, 123456), (0.999, 1.001)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high, 6)
    assert 2 <= len(found) <= 6 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    gap = found[1] - found[0]
    assert round(gap / 10 ** math.floor(math.log10(gap * 1.0001)), 6) in (1, 2, 5)
