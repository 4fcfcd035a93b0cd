"""What `jlora serve` is asked and says, without a model: parameters, stop strings, who is let in."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.serve.errors import Refused
from jlora.serve.guard import is_loopback
from jlora.serve.requests import COMPLETION_TOKENS, Sampling, parse
from jlora.serve.text import StopStrings, Text

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": "m", "prompt": "a"}


def parsed(fields, chat=True):
    return parse(json.dumps((CHAT if chat else TEXT) | fields).encode(), chat=chat)


REFUSED = [
    (True, {"frequency_penalty": 0.5}, "frequency_penalty", "`frequency_penalty` is not supported; got 0.5. Leave it out."),
    (True, {"tools": [{"type": "function"}]}, "tools", "`tools` is not supported"),
    (True, {"parallel_tool_calls": 0}, "parallel_tool_calls", "is not supported; got 0"),
    (True, {"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    (True, {"temprature": 1}, "temprature", "'temprature' is no parameter of this request"),
    (True, {"prompt": "a"}, "prompt", "'prompt' is no parameter of this request"),
    (True, {"temperature": 3}, "temperature", "`temperature` must be 0 or a number from 1e-06 to 2"),
    (True, {"temperature": 1e-9}, "temperature", "got 1e-09"),
    (True, {"temperature": True}, "temperature", "got True"),
    (True, {"top_p": 1.5}, "top_p", "`top_p` must be a number from 0 to 1 or null; got 1.5"),
    (True, {"seed": 2**32}, "seed", "`seed` must be an integer from 0 to 4294967295"),
    (True, {"n": 0}, "n", "`n` must be an integer from 1 to 128"),
    (True, {"max_tokens": 0}, "max_tokens", "`max_tokens` must be an integer from 1"),
    (True, {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "not both"),
    (True, {"stop": ["a"] * 5}, "stop", "a list of at most 4 texts"),
    (True, {"stop": ""}, "stop", "none of them empty"),
    (True, {"stop": ["a", ""]}, "stop", "none of them empty"),
    (True, {"top_logprobs": 3}, "top_logprobs", "`top_logprobs` needs `logprobs`: true"),
    (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    (True, {"stream_options": {"include_usage": True}}, "stream_options", "`stream_options` needs `stream`: true"),
    (True, {"stream": True, "stream_options": {"usage": True}}, "stream_options", "`stream_options.usage` is not known"),
    (True, {"messages": []}, "messages", "must be a list of messages"),
    (True, {"messages": [{"role": "user"}]}, "messages", "`messages[0].content` must be text"),
    (True, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "must be one of system, developer, user, assistant"),
    (True, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages", "`messages[0].name` is not supported"),
    (True, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "a list of parts of the type"),
    (True, {"model": None}, "model", "`model` must be text"),
    (False, {"best_of": 2}, "best_of", "`best_of` is not supported"),
    (False, {"echo": True, "logprobs": 0}, "echo", "`echo` does not go together with `logprobs`"),
    (False, {"logprobs": 6}, "logprobs", "from 0 to 5"),
    (False, {"prompt": [1, "a"]}, "prompt", "a text, a list of texts, a list of token ids or a list of such lists"),
    (False, {"prompt": [-1]}, "prompt", "a list of token ids"),
    (False, {"prompt": [[]]}, "prompt", "a list of such lists"),
]  # fmt: skip


@pytest.mark.parametrize(("chat", "fields", "param", "said"), REFUSED, ids=[str(sorted(r[1])) for r in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(chat, fields, param, said):
    with pytest.raises(Refused) as refused:
        parsed(fields, chat)
    error = refused.value.to_json()["error"]
    assert refused.value.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and said in error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"{", "The body must be JSON"), (b"[1]", "must be a JSON object"), (b"\xff", "JSON in UTF-8"), (b"[" * 99999, "JSON"),
     (b'{"messages": []}', "`messages` must be a list of messages"), (b'{"messages": [{"role": "user"}]}', "`model` is missing"),
     (b'{"model": "m"}', "`messages` is missing"), (b'{"model": "m", "temperature": NaN, "messages": [{}]}', "got nan")],
)  # fmt: skip
def test_what_is_no_request_is_refused(body, said):
    with pytest.raises(Refused, match="(?s).*") as refused:
        parse(body, chat=True)
    assert said in str(refused.value) and refused.value.status == 400


def test_requests_as_openai_writes_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    full = parsed(
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}], "max_completion_tokens": 5,
            "stop": "x", "seed": 3, "n": 2, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
            "top_logprobs": 4, "user": "u", "presence_penalty": 0.0, "tools": None, "top_p": 0, "ignore_eos": True,
        }
    )  # fmt: skip
    assert full.messages[1] == {"role": "user", "content": "ab"}
    assert (full.max_tokens, full.stop, full.n, full.alternatives) == (5, ("x",), 2, 4)
    assert full.stream and full.include_usage and full.ignore_eos
    assert full.sampling == Sampling(temperature=None, top_k=None, top_p=0, seed=3)
    assert parsed({}).max_tokens is None and parsed({}).alternatives is None
    plain = parsed({}, chat=False)
    assert (plain.max_tokens, plain.prompts) == (COMPLETION_TOKENS, ("a",))
    assert parsed({"prompt": [1, 2]}, chat=False).prompts == ((1, 2),)
    assert parsed({"prompt": [[1], [2, 3]], "logprobs": 0}, chat=False).prompts == ((1,), (2, 3))
    assert parsed({"prompt": ["a", "b"], "logprobs": 0}, chat=False).alternatives == 0


@settings(deadline=None)
@given(st.text("ab#", max_size=30), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text, stops, data):
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    # What ends first, as it comes in: of two that are there at once the one that begins first.
    found, told = StopStrings(stops), []
    for piece in pieces:
        told.append(found.add(piece))
        so_far = "".join(told)
        assert text.startswith(so_far) and not any(stop in so_far for stop in stops)
        if found.hit:
            break
    else:
        told.append(found.rest())
    whole = "".join(told)
    if found.hit:
        assert any(text[len(whole) :].startswith(stop) for stop in stops)
    else:
        assert whole == text and not any(stop in text for stop in stops)


class _Letters:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    eos_token_id = bos_token_id = pad_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


@settings(deadline=None)
@given(st.text("aé#€", max_size=20), st.sampled_from([(), ("#a",), ("€#", "a#")]))
def test_tokens_are_counted_with_the_text_that_they_begin(text, stops):
    made = Text(_Letters(), [65], stops)
    told, counts = "", 0
    for token in text.encode():
        piece = made.add(token)
        told, counts = told + piece.text, counts + piece.tokens
        assert counts <= len(text.encode())
        if made.stopped:
            break
    else:
        last = made.rest()
        told, counts = told + last.text, counts + last.tokens
        assert told == text
    assert counts == len(told.encode())  # each byte is a token here


def test_hosts_that_only_this_machine_reaches():
    assert [host for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9") if not is_loopback(host)] == []
    assert [host for host in ("0.0.0.0", "::", "192.168.0.2", "example.org", "") if is_loopback(host)] == []
