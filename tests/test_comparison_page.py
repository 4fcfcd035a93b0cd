"""`jlora compare` as pages: what changed, token by token, and the blind test of it."""

import json

import pytest
from handmade_comparison import BASE, HOSTILE, LOUD, SOFT, compared
from parsed_page import parse

from jlora.report.comparison_page import GROUNDS, comparison_html, heat, pairs, preference_html


def test_the_page_shows_every_token_on_its_ground():
    page = parse(comparison_html(compared(SOFT, LOUD)))
    assert page.fetched == [] and "b" not in page.tags and page.title == "Base and adapted · jlora compare"
    spans = [e for e in page.all("span") if (e.attributes.get("class") or "").startswith("heat-")][10:]
    shown = [(e.text, e.attributes["class"], e.attributes.get("title")) for e in spans]
    assert shown == [
        (" a", "heat-0", None), (" frog", "heat-0 changed", None), ("↵\n", "heat-0", None), (" croaks", "heat-0", None),
        (" a", "heat-0", "0.0005 nats"), (" toad", "heat-3 changed", "0.0200 nats"), ("↵\n", "heat-6", "0.5000 nats"),
        (" croaks", "heat-7", "2.0000 nats"), (HOSTILE, "heat-9 changed", "20.0000 nats"),
        ("How", "heat-0", None), (" to", "heat-0", "0.0000 nats"), ("?", "heat-5", "0.2000 nats"),
        *((text, "heat-2", "0.0040 nats") for text in (" a", " frog", "↵\n", " croaks")),
        ("How", "heat-0", None), (" to", "heat-0", "0.0000 nats"), ("?", "heat-0", "0.0000 nats"),
    ]  # fmt: skip


def test_the_page_has_the_figures_of_the_comparison():
    page = parse(comparison_html(compared(SOFT, LOUD)))
    said = [" ".join(e.text.split()) for e in page.all("small")]
    assert said == [
        "1 of 4 tokens kept by no adapter",
        "2 of 5 tokens are new; KL 4.5041 nats in the mean, 0.0005 of the first token; L2 3.50",
        "0 of 4 tokens are new; KL 0.0040 nats in the mean, 0.0040 of the first token; L2 0.25",
    ]
    (_, *held_out), (_, *likeliest) = (table.rows for table in page.all("table"))
    assert held_out == [["base", "2.0000", "7.39"], ["soft", "1.5000", "4.48"], ["loud", "1.7500", "5.75"]]
    assert likeliest[0] == ["1", "␣a", "50.00 %", "␣a", "62.50 %", "<eos>", "75.00 %"]
    assert likeliest[1][:3] == ["2", "↵", "25.00 %"]


@pytest.mark.parametrize("kl, level", [(0.0, 0), (0.00099, 0), (0.001, 1), (0.0999, 4), (0.1, 5), (9.9, 8), (1e3, 9)])
def test_grounds_are_those_of_the_key(kl, level):
    assert heat(kl) == level
    key = [
        e.text for e in parse(comparison_html(compared(SOFT))).all("span") if "heat-" in str(e.attributes.get("class"))
    ]
    assert key[:10] == ["< 0.001", *(f"{ground:g}" for ground in GROUNDS)]


def test_the_files_beside_the_page_have_the_same():
    comparison = compared(SOFT, LOUD)
    fields = json.loads(json.dumps(comparison.to_json()))
    assert fields["adapters"] == ["soft", "loud"] and list(fields["held_out"]) == ["base", "adapted", "loud"]
    (prompt,) = fields["prompts"]
    assert prompt["kl"] == 0.0005 and [model["name"] for model in prompt["models"]] == ["base", "soft", "loud"]
    assert prompt["models"][1]["kl"] == SOFT.kl and prompt["models"][1]["changed"] == SOFT.changed
    markdown = comparison.to_markdown()
    assert (
        "| base | soft | loud |" in markdown
        and "soft: KL 0.0005 nats, L2 3.50; loud: KL 0.0040 nats, L2 0.25" in markdown
    )
    assert "| loud | 1.7500 | 5.75 |" in markdown


# The blind test


def test_sides_and_order_are_drawn_by_the_seed():
    comparison = compared(SOFT, count=60)
    drawn = pairs(comparison, seed=1)
    assert drawn == pairs(comparison, seed=1) != pairs(comparison, seed=2)
    assert sorted(pair["number"] for pair in drawn) == list(range(1, 61)) != [pair["number"] for pair in drawn]
    lefts = sum(pair["adapter_is"] == "left" for pair in drawn)
    assert 15 < lefts < 45
    for pair in drawn:
        other = {"left": "right", "right": "left"}[pair["adapter_is"]]
        assert (pair[pair["adapter_is"]], pair[other]) == (SOFT.text, BASE.text)


def test_each_adapter_is_judged_against_the_base():
    drawn = pairs(compared(SOFT, LOUD, count=3), seed=0)
    assert sorted((pair["number"], pair["adapter"]) for pair in drawn) == [
        (n, name) for n in (1, 2, 3) for name in ("loud", "soft")
    ]


def test_equal_answers_are_counted_and_not_shown():
    page = parse(preference_html(compared(SOFT, LOUD, count=3), seed=5))
    data = json.loads(page.all("script", id="data")[0].text)
    assert data["same"] == {"soft": 0, "loud": 3} and len(data["pairs"]) == 3 and data["aim"] == 0.6
    assert page.fetched == [] and "b" not in page.tags
    (bar,) = page.all("progress")
    assert bar.attributes["max"] == "3"


def test_nobody_is_named_before_the_end():
    page = parse(preference_html(compared(SOFT, count=3), seed=5))
    (main,) = page.all("main")
    (data,) = page.all("script", id="data")
    assert "soft" not in main.text.replace(data.text, "")


def test_nothing_to_judge_is_said():
    page = parse(preference_html(compared(LOUD, count=2), seed=0))
    assert "All answers of base and adapter are the same" in page.all("main")[0].text and not page.all(
        "script", id="data"
    )


def test_other_pairs_are_another_test():
    ids = [
        json.loads(parse(preference_html(compared(SOFT, count=n), seed=seed)).all("script", id="data")[0].text)["id"]
        for n, seed in ((2, 0), (2, 0), (2, 1), (3, 0))
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3
