"""A model as the judge: both orders, ties, what it does not say, and endpoints that fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jlora.evaluation import Endpoint, Judgement, Pair, judged, win_rate
from jlora.evaluation.judge import Refused


@pytest.fixture
def server():
    """An endpoint that gives the listed (status, headers, body) one after the other, then the last again; and keeps what it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.got.append((self.path, self.headers.get("Authorization"), body))
            status, headers, text = made.answers[0] if len(made.answers) == 1 else made.answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.got, made.answers = [], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def completion(text):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def endpoint(server, pauses):
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    return Endpoint(url, "judge", "key", timeout=20.0, pause=pauses.append)


def test_the_request(server):
    server.answers = [completion("Fine. [[A]]")]
    messages = [{"role": "user", "content": "hello"}]
    assert endpoint(server, []).ask(messages) == "Fine. [[A]]"
    ((path, key, body),) = server.got
    assert path == "/v1/chat/completions" and key == "Bearer key"
    assert body == {"model": "judge", "messages": messages, "temperature": 0}


def test_it_is_asked_again_where_that_may_help(server):
    server.answers = [(503, {}, "busy"), (429, {"Retry-After": "7"}, "{}"), (200, {}, "no JSON"), completion("done")]
    pauses = []
    assert endpoint(server, pauses).ask([]) == "done"
    assert len(server.got) == 4 and pauses[1] == 7.0
    assert 1 <= pauses[0] <= 1.5 and 4 <= pauses[2] <= 6


@pytest.mark.parametrize(
    ("answer", "tries", "says"),
    [
        ((401, {}, '{"error": {"message": "no such key"}}'), 1, "^HTTP 401: no such key$"),
        ((404, {}, "not   here"), 1, "^HTTP 404: not here$"),
        ((500, {}, "down"), 5, r"^HTTP 500: down \(after 5 tries\)$"),
        ((200, {}, '{"choices": []}'), 5, "no chat completion"),
    ],
)
def test_endpoints_that_fail(server, answer, tries, says):
    server.answers = [answer]
    with pytest.raises(Refused, match=says):
        endpoint(server, []).ask([])
    assert len(server.got) == tries


def test_nobody_there():
    with pytest.raises(Refused, match="after 5 tries"):
        Endpoint("http://127.0.0.1:9/v1", "judge", pause=lambda _: None).ask([])


def test_an_address_of_http():
    with pytest.raises(ValueError, match="such as http://localhost:8000/v1; got 'file:///etc/passwd'"):
        Endpoint("file:///etc/passwd", "judge")


def test_the_key_is_not_shown():
    assert "secret" not in repr(Endpoint("http://x/v1", "judge", "secret"))


def says(text_of):
    """A judge that says what `text_of(answer A, answer B)` gives."""

    def ask(messages):
        text = messages[-1]["content"]
        a, b = (text.split(f"[Answer {x}]\n")[1].split(f"\n[End of answer {x}]")[0] for x in "AB")
        return text_of(a, b)

    return ask


PAIRS = [Pair("p", "good", "bad"), Pair("p", "bad", "good"), Pair("p", "bad", "worse")]


@pytest.mark.parametrize(
    ("text_of", "scores"),
    [
        (lambda a, b: "Because. [[A]]" if a == "good" else "[[B]]" if b == "good" else "[[C]]", [1, 0, 0.5]),
        (lambda a, b: "[[A]]", [0.5, 0.5, 0.5]),
        (lambda a, b: "[[B]]", [0.5, 0.5, 0.5]),
        (lambda a, b: "Not [[A]] but\n[[B]]" if b == "good" else "[[A]]" if a == "good" else "none", [1, 0, None]),
        (lambda a, b: "[[A]]" if a == "good" else "[[C]]", [0.5, 0.5, 0.5]),
    ],
    ids=["fair", "the first", "the second", "no verdict", "one order alone"],
)
def test_verdicts_in_both_orders(text_of, scores):
    found = list(judged(says(text_of), PAIRS))
    assert [judgement.score for judgement in found] == scores
    assert [j.why for j in found if j.score is None] == ["the judge gave no verdict"] * scores.count(None)


def test_the_order_that_a_judge_follows_is_seen():
    assert all(judgement.follows_order for judgement in judged(says(lambda a, b: "[[A]]"), PAIRS))
    assert not any(judgement.follows_order for judgement in judged(says(lambda a, b: "[[C]]"), PAIRS))


def test_equal_answers_are_not_asked():
    def ask(messages):
        raise AssertionError

    assert [j.score for j in judged(ask, [Pair("p", "same", "same")])] == [0.5]


def test_a_reference_is_shown():
    seen = []
    list(
        judged(
            lambda messages: seen.append(messages) or "[[C]]",
            [Pair("p", "a", "b", "the right one"), Pair("p", "a", "b")],
        )
    )
    assert ["[A right answer]\nthe right one" in m[1]["content"] for m in seen].count(True) == 2


def test_the_rate_counts_what_is_judged():
    counts = win_rate([Judgement(1.0, 1.0), Judgement(1.0, 0.0), Judgement(None, 1.0, "the judge gave no verdict")])
    assert counts.value() == 0.75 and counts.unscored == {2: "the judge gave no verdict"}


def test_an_endpoint_that_refuses_is_no_verdict():
    def ask(messages):
        raise Refused("HTTP 401: no such key")

    (found,) = judged(ask, PAIRS[:1])
    assert found.score is None and found.why == "the endpoint gave no answer: HTTP 401: no such key"
