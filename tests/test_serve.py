"""`jlora serve` over HTTP, with OpenAI's own client."""

import json
import socket
import threading

import httpx
import openai
import pytest
from served import ADAPTERS, SLOTS, Loaded, Served, serving, write_model

from jlora.data import prompt_ids
from jlora.serve import guard
from jlora.serve.schedule import Row

pytestmark = pytest.mark.usefixtures("quick_compilation")

ASKED = [{"role": "user", "content": "Write wind rain."}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def loaded(files):
    return Loaded(*files)


@pytest.fixture(scope="module")
def served(loaded):
    with serving(loaded) as made:
        yield made


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def ids(loaded):
    """The tokens of `ASKED`."""
    return prompt_ids({"messages": ASKED}, loaded.tokenizer, template="chat")


def test_models_are_the_base_and_its_adapters(client):
    found = client.models.list().data
    assert [model.id for model in found] == ["llama", *sorted(ADAPTERS)]
    assert [model.parent for model in found] == [None, *["llama"] * len(ADAPTERS)]
    assert client.models.retrieve("gull").max_model_len == 256
    with pytest.raises(openai.NotFoundError, match="There is no model 'moon'; there are 'llama', 'gull'"):
        client.models.retrieve("moon")


@pytest.mark.parametrize("name", ["llama", "tide"])
def test_a_chat_is_answered_as_generate_answers_it(loaded, ids, client, name):
    wanted = loaded.alone(name, ids, max_new_tokens=12)
    options = {"model": name, "messages": ASKED, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == wanted and whole.model == name
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    said = [c.choices[0] for c in chunks if c.choices]
    assert "".join(c.delta.content or "" for c in said) == wanted
    assert said[0].delta.role == "assistant"
    assert [c.finish_reason for c in said if c.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and len({c.id for c in chunks}) == 1


def test_sampling_follows_the_seed(client):
    def drawn(seed, **options):
        found = client.chat.completions.create(
            model="gull", messages=ASKED, max_tokens=10, temperature=1.2, seed=seed, **options
        )
        return [choice.message.content for choice in found.choices]

    assert drawn(1, n=3) == drawn(1, n=3)
    assert len(set(drawn(1, n=3))) > 1 and drawn(1) != drawn(2)
    assert drawn(1)[0] == drawn(1, n=3)[0]


def test_completions(loaded, client):
    prompts = ["the keeper", "rain gulls tide"]
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    wanted = [loaded.alone("salt", row, max_new_tokens=16) for row in ids]
    found = client.completions.create(model="salt", prompt=prompts, temperature=0)
    assert [choice.text for choice in found.choices] == wanted
    assert client.completions.create(model="salt", prompt=ids, temperature=0).choices[1].text == wanted[1]
    echoed = client.completions.create(model="salt", prompt=ids[0], temperature=0, echo=True)
    assert echoed.choices[0].text == prompts[0] + wanted[0]
    streamed = list(client.completions.create(model="salt", prompt=prompts, temperature=0, stream=True, echo=True))
    for index in range(2):
        own = [c.choices[0].text for c in streamed if c.choices[0].index == index]
        assert "".join(own) == prompts[index] + wanted[index]


def test_an_answer_ends_before_a_stop_string_over_several_tokens(loaded, served, ids, client):
    whole = loaded.alone("gull", ids, max_new_tokens=24)
    cut = next(c for c in range(6, len(whole) - 4) if whole.find(whole[c : c + 4]) == c)
    options = {
        "model": "gull",
        "messages": ASKED,
        "max_tokens": 24,
        "temperature": 0,
        "stop": [whole[cut : cut + 4], "zzz"],
    }
    found = client.chat.completions.create(**options).choices[0]
    assert (found.message.content, found.finish_reason) == (whole[:cut], "stop")
    chunks = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == whole[:cut] and chunks[-1].finish_reason == "stop"
    served.until(lambda: served.engine.running == 0)


def test_logprobs_belong_to_the_tokens(ids, client):
    options = {"model": "star", "temperature": 0, "max_tokens": 6}
    found = client.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=2, **options).choices[0]
    for token in found.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    # A token may be a part of a character, which only all of its tokens spell.
    parted = any(token.bytes is None for token in found.logprobs.content)
    assert parted or "".join(token.token for token in found.logprobs.content) == found.message.content
    old = client.completions.create(prompt=ids, logprobs=2, **options).choices[0]
    assert old.logprobs.token_logprobs == pytest.approx([t.logprob for t in found.logprobs.content], abs=1e-5)
    assert old.logprobs.tokens == [t.token for t in found.logprobs.content]
    streamed = client.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=2, stream=True, **options)
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [t.token for piece in pieces for t in piece.content] == [t.token for t in found.logprobs.content]


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"logit_bias": {"1": 1}}, openai.BadRequestError, "`logit_bias` is not supported"),
        ({"model": "moon"}, openai.NotFoundError, "There is no model 'moon'"),
        ({"max_tokens": 1000}, openai.BadRequestError, "have room for 256 tokens together"),
        ({"messages": [{"role": "user", "content": "the " * 300}]}, openai.BadRequestError, "Shorten the prompt"),
        ({"n": 50}, openai.BadRequestError, "A request may have 20 answers here; this one has 50"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, openai.BadRequestError, "must not be the assistant's"),
    ],
)  # fmt: skip
def test_errors_are_openais(client, fields, error, said):
    with pytest.raises(error) as raised:
        client.post("/chat/completions", body={"model": "gull", "messages": ASKED} | fields, cast_to=object)
    assert said in raised.value.body["message"] and raised.value.body["type"] == "invalid_request_error"


def test_what_is_no_json_or_too_large_or_nowhere_is_refused(served, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY", 1000)
    with httpx.Client(base_url=served.url) as http:
        post = "/v1/chat/completions"
        wrong = http.post(post, content=b"{", headers={"content-type": "application/json"})
        assert wrong.status_code == 400 and "must be JSON" in wrong.json()["error"]["message"]
        half = json.dumps({"model": "gull", "prompt": "a\ud800"})
        half = http.post("/v1/completions", content=half, headers={"content-type": "application/json"})
        assert half.status_code == 400 and "half of a surrogate pair" in half.json()["error"]["message"]
        assert http.post(post, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        assert http.post(post, json={"model": "x" * 2000}).status_code == 413
        parts = http.post(post, content=iter([b"x" * 600] * 3), headers={"content-type": "application/json"})
        assert parts.status_code == 413  # without a Content-Length
        assert http.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
        assert http.get(post).status_code == 405
        strange = http.get("/v1/models", headers={"host": "elsewhere.example"})
        assert strange.status_code == 403 and "elsewhere.example" in strange.json()["error"]["message"]


def test_the_page_and_the_metrics(served):
    with httpx.Client(base_url=served.url) as http:
        page = http.get("/")
        assert page.status_code == 200 and "<h1" in page.text
        assert http.get("/health").json() == {"status": "ok"}
        lines = http.get("/metrics").text.splitlines()
    assert f"jlora_slots {served.engine.slots:.1f}" in lines and "jlora_slots_busy 0.0" in lines
    assert any(line.startswith('jlora_generated_tokens_total{model="gull"}') for line in lines)


def request_bytes(served, fields):
    body = json.dumps({"model": "gull", "messages": ASKED, "ignore_eos": True, "stream": True} | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {served.url.removeprefix('http://')}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def test_who_goes_away_frees_the_slot(served):
    """In the middle of a stream, and while an answer is awaited whole."""
    for stream in (True, False):
        with socket.create_connection(served.socket.getsockname()) as gone:
            gone.sendall(request_bytes(served, {"stream": stream}))
            served.until(lambda: served.engine.running)
            assert not stream or gone.recv(100)
        served.until(lambda: served.engine.running == 0)


def test_who_does_not_read_holds_up_nobody(loaded, served, ids, client):
    """Their answer is computed to its end meanwhile; what they have not read is no more than that."""
    with socket.create_connection(served.socket.getsockname()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        slow.sendall(request_bytes(served, {"n": 3, "logprobs": True, "top_logprobs": 20}))
        served.until(lambda: served.engine.running == 3)
        asked = {"model": "tide", "messages": ASKED, "max_tokens": 8, "temperature": 0}
        found = client.chat.completions.create(**asked).choices[0].message.content
        assert found == loaded.alone("tide", ids, max_new_tokens=8)
        served.until(lambda: served.engine.running == 0)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            received += slow.recv(1 << 16)
    assert received.count(b'"finish_reason": "length"') == 3


def test_a_full_queue_and_a_late_answer_say_so(loaded):
    go_on = threading.Event()
    with serving(loaded, queue=1) as made:
        made.engine.submit([Row(prompt=[1], max_new_tokens=250, tell=lambda _: go_on.wait()) for _ in range(SLOTS)])
        with openai.OpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": "gull", "prompt": "a", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(**asked, n=2)
            assert full.value.response.headers["retry-after"] and full.value.body["code"] == "queue_full"
            made.engine._clock = lambda: 1e18
            go_on.set()
            with pytest.raises(openai.InternalServerError, match="--timeout") as late:
                client.completions.create(**asked)
            assert late.value.response.status_code == 504


def test_the_key_is_asked_for(loaded):
    with serving(loaded, api_key="sesame") as made:
        for key in ("sesam", "sesame!", "x", "é"):
            response = httpx.get(f"{made.url}/v1/models", headers=[(b"authorization", f"Bearer {key}".encode())])
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{made.url}/metrics").status_code == 401
        assert httpx.get(f"{made.url}/health").status_code == httpx.get(made.url).status_code == 200
        with openai.OpenAI(base_url=f"{made.url}/v1", api_key="sesame") as client:
            assert client.models.list().data
        elsewhere = {"host": "my.example", "authorization": "Bearer sesame"}
        assert httpx.get(f"{made.url}/v1/models", headers=elsewhere).status_code == 200


def test_stopping_ends_streams_with_an_error(loaded):
    made = Served(loaded)
    made.start()
    with openai.OpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="gull", messages=ASKED, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        made.server.should_exit = True
        with pytest.raises(openai.APIError, match="The server is stopping"):
            list(stream)
    made.stop()


def test_what_the_command_refuses(fails, files, monkeypatch):
    monkeypatch.delenv("JLORA_API_KEY", raising=False)
    base, adapters = files
    assert "needs an API key: set JLORA_API_KEY" in fails("serve", "--model", base, "--host", "0.0.0.0")
    assert "`slots` must be at least 1; got 0" in fails("serve", "--model", base, "--slots", "0")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with taken:
        assert "Nothing can listen at 127.0.0.1" in fails("serve", "--model", base, "--port", port)
    assert "The model has 256 positions; got --max-length 300" in fails(
        "serve", "--model", base, "--port", 0, "--max-length", 300
    )
    assert "is called 'llama', as the base is" in fails(
        "serve", "--model", base, "--port", 0, "--adapter", f"llama={adapters}/gull"
    )
    assert "gives one name to the adapters gull, salt" in fails("serve", "--model", base, "--adapter", f"x={adapters}")
