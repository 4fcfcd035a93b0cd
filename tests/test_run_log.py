"""metrics.jsonl under fault: what can be kept is kept, what cannot is named, and no step stands twice."""

import json
import math

import pytest

from jlora.runs.log import Log, lowest
from jlora.storage.whole import NoSpace


def entry(step, **more):
    if step == 0:
        return {"step": 0, "eval_loss": 3.5, "perplexity": 33.1} | more
    return {
        "step": step,
        "loss": 3 - step / 10,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens_per_second": 9.5,
    } | more


def lines(*entries):
    return [json.dumps(e).encode() for e in entries]


GOOD = lines(*map(entry, range(5)))


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "metrics.jsonl")


def rewind(log, content, last=4, first=0):
    log.path.write_bytes(content)
    entries, wrong = log.rewind(last, first=first)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == entries
    assert log.rewind(last, first=first)[0] == entries, "once more changes nothing"
    return [e["step"] for e in entries], wrong


def joined(parts):
    return b"".join(part + b"\n" for part in parts)


def test_a_whole_log_is_left_as_it_is(log):
    log.path.write_bytes(joined(GOOD))
    before = log.path.stat().st_mtime_ns, log.path.stat().st_ino
    assert log.rewind(4, first=0) == ([json.loads(line) for line in GOOD], [])
    assert (log.path.stat().st_mtime_ns, log.path.stat().st_ino) == before
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_later_entries_go(log):
    assert rewind(log, joined(GOOD), last=2) == ([0, 1, 2], [])
    assert rewind(log, joined(GOOD), last=-1) == ([], [])


def test_no_log(log):
    assert log.rewind(-1, first=0) == ([], [])
    assert log.rewind(2, first=1) == ([], ["no entry for step 1-2"])


@pytest.mark.parametrize("end", [b'{"step": 4, "los', b"{", b"\x00\x00", GOOD[4][:-1]])
def test_a_line_that_was_cut_off_by_a_kill_is_not_worth_a_word(log, end):
    assert rewind(log, joined(GOOD[:4]) + end, last=3) == ([0, 1, 2, 3], [])


def test_a_last_line_without_its_newline(log):
    assert rewind(log, joined(GOOD[:4]) + GOOD[4]) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "it is empty"),
        (b"   ", "it is empty"),
        (b"garbage", "it is no JSON"),
        (GOOD[2][:20], "it is no JSON"),
        (b"\xff\xfe\x00", "it is no JSON"),
        (bytes(64), "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"9" * 100_000, "it is no JSON"),
        (b"7", "it is no JSON object"),
        (b"[1]", "it is no JSON object"),
        (b"null", "it is no JSON object"),
        (b'"text"', "it is no JSON object"),
        (b'{"loss": 1}', "its `step` is no whole number"),
        (b'{"step": "2"}', "its `step` is no whole number"),
        (b'{"step": 2.0}', "its `step` is no whole number"),
        (b'{"step": true}', "its `step` is no whole number"),
        (b'{"step": -2}', "its `step` is no whole number"),
        (b'{"step": 2, "loss": 1}', "it has no `learning_rate`"),
        (b'{"step": 0, "loss": 1}', "it has no `eval_loss`"),
        (json.dumps(entry(2, loss="low")).encode(), "its `loss` is no number"),
        (json.dumps(entry(2, loss=None)).encode(), "its `loss` is no number"),
        (json.dumps(entry(2, eval_loss="low")).encode(), "its `eval_loss` is no number"),
        (json.dumps(entry(2, eval_loss=math.nan)).encode(), "its `eval_loss` is no number"),
        (json.dumps(entry(2, grad_norm=[1])).encode(), "its `grad_norm` is no number"),
    ],
)  # fmt: skip
def test_a_damaged_line_costs_no_other(log, line, why):
    steps, wrong = rewind(log, joined([*GOOD[:2], line, *GOOD[2:]]))
    assert steps == [0, 1, 2, 3, 4]
    (said,) = wrong
    assert said.startswith(f"line 3 is left out: {why} (")
    assert len(said) < 250
    steps, wrong = rewind(log, joined([*GOOD[:2], line, *GOOD[3:]]))
    assert steps == [0, 1, 3, 4] and wrong[1:] == ["no entry for step 2"]


def test_no_step_stands_twice(log):
    again = lines(entry(2, loss=9.0))
    steps, wrong = rewind(log, joined([*GOOD, *again, GOOD[3]]))
    assert steps == [0, 1, 2, 3, 4]
    assert wrong == [f"line {n} is left out: step {s} stands above already" for n, s in ((6, 2), (7, 3))]
    assert log.rewind(4, first=0)[0][2]["loss"] == 2.8, "the first stays"


def test_two_processes_wrote_at_once(log):
    steps, wrong = rewind(log, joined([GOOD[0], GOOD[2], GOOD[1], GOOD[4], GOOD[3]]))
    assert (steps, wrong) == ([0, 1, 2, 3, 4], [])


def test_missing_steps_are_named(log):
    assert rewind(log, joined([GOOD[1], GOOD[4]]))[1] == ["no entry for step 0, 2-3"]
    assert rewind(log, joined(GOOD[1:]), first=1) == ([1, 2, 3, 4], [])


@pytest.mark.parametrize("ends", [b"\r\n", b"\n\n"])
def test_other_ends_of_lines(log, ends):
    steps, wrong = rewind(log, ends.join(GOOD) + ends)
    assert steps == [0, 1, 2, 3, 4] and len(wrong) == (4 if ends == b"\n\n" else 0) + (ends == b"\n\n")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_does_not_have(log, value):
    written = log.append(entry(0, perplexity=value))
    assert written["perplexity"] is None
    (line,) = log.path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == written
    assert log.rewind(0, first=0) == ([written], [])
    log.path.write_text(json.dumps(entry(0, perplexity=value)) + "\n")  # as older versions wrote it
    assert log.rewind(0, first=0) == ([written], [])


def test_lowest():
    assert lowest([entry(0, eval_loss=0.1), entry(1), entry(2, eval_loss=2.0), entry(3, eval_loss=1.0)]) == 1.0
    assert lowest([entry(0, eval_loss=0.1), entry(1)]) == math.inf


def test_a_full_disk_is_named(log, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NoSpace, match="no space left on .* for '.*metrics.jsonl'"):
        log.append(entry(1))
