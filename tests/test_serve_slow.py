"""`jlora serve` as a whole: the command under load from other processes, its end by a signal, and its page in a browser."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from contrasts import CONTRASTS
from served import ADAPTERS, Loaded, write_model

pytestmark = pytest.mark.slow

CLIENTS = 32
WORDS = "keeper lamp wind rain gulls tide salt stars ships bread rope".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture
def command(files):
    """Starts `jlora serve` with flags; gives (address, process)."""
    started = []

    def start(*flags, env=()):
        base, adapters = files
        code = "from jlora.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--model", base, "--adapter", adapters, "--port", "0", *flags],
            stderr=subprocess.PIPE, text=True, env=os.environ | dict(env),
        )  # fmt: skip
        started.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if " at http://" in line:
                return line.partition(" at ")[2].partition("/v1;")[0], process
        raise AssertionError("".join(said))

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_thirty_two_clients_each_get_their_own_answer(files, command):
    """Four adapters and the base, prompts of all lengths, streamed or not, some with a stop string; in between some go away, some
    do not read, and some send what is no request. Every answer is the lone greedy one."""
    url, process = command("--slots", "8", "--queue", "64")
    lone = Loaded(*files)
    draw = random.Random(0)
    asked = []
    for i in range(3 * CLIENTS):
        content = " ".join(draw.choices(WORDS, k=draw.randrange(1, 30)))
        name = [*ADAPTERS, "llama"][i % 5]
        ids = lone.catalogue.encode(_request(name, content))[0]
        asked.append((name, content, lone.alone(name, ids, max_new_tokens=24)))
    memory = []
    asyncio.run(_load(url, asked, lambda: memory.append(_rss_mb(process.pid))))
    assert memory[-1] < memory[0] + 30
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    assert "jlora_slots_busy 0.0" in metrics and "jlora_queue_length 0.0" in metrics


async def _load(url, asked, measure):
    limits = httpx.Limits(max_connections=None)
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client,
        httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as http,
    ):

        async def answered(name, content, wanted, stream):
            options = {
                "model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0,
            }  # fmt: skip
            stop = wanted[8:12]
            if len(stop) == 4 and wanted.find(stop) == 8:
                options["stop"], wanted = stop, wanted[:8]
            if stream:
                chunks = await client.chat.completions.create(**options, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            else:
                text = (await client.chat.completions.create(**options)).choices[0].message.content
            assert text == wanted, (name, content)

        async def nuisance(kind):
            body = {"model": "gull", "prompt": "the lamp", "max_tokens": 200, "ignore_eos": True, "stream": True}
            if kind == 0:
                assert (await http.post("/v1/completions", json=body | {"logit_bias": {"1": 2}})).status_code == 400
            elif kind == 1:  # reads a little, and goes away
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    await anext(response.aiter_bytes())
            else:  # does not read at all
                async with http.stream("POST", "/v1/completions", json=body):
                    await asyncio.sleep(3)

        for turn in range(3):  # CLIENTS at a time
            part = asked[turn * CLIENTS : (turn + 1) * CLIENTS]
            await asyncio.gather(
                *(answered(*one, stream=i % 2 == 0) for i, one in enumerate(part)), *(nuisance(i % 3) for i in range(9))
            )
            measure()


def _request(name, content):
    from jlora.serve.requests import parse

    body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 24}
    return parse(json.dumps(body).encode(), chat=True)


def _rss_mb(pid):
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_lets_answers_end(command, number):
    """What is being said is said to its end; the exit code is 0. A second signal ends it at once."""
    url, process = command("--grace", "60")
    body = {"model": "gull", "prompt": "the lamp", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] and not any('"error"' in line for line in rest)
    assert process.wait(60) == 0


def test_the_key_comes_from_the_environment(command):
    url, _ = command("--host", "0.0.0.0", env={"JLORA_API_KEY": "sesame"}.items())
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_talks_to_base_and_adapter(command, browser, width):
    """By keyboard alone: a turn, the answers of both as they come, a second turn that knows the first, Escape, a new beginning."""
    url, _ = command()
    page = browser.new_page(viewport={"width": width, "height": 800})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request))
    page.goto(url)
    page.keyboard.type("Write of <b>wind</b> & rain.")
    page.get_by_text("Settings", exact=True).click()
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "16")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.locator(".answer[aria-busy=false]").nth(1).wait_for(timeout=60_000)
    assert page.locator(".question").inner_text() == "Write of <b>wind</b> & rain."
    base, adapter = page.locator(".answer").all()
    assert (base.locator("h3").inner_text(), adapter.locator("h3").inner_text()) == ("llama (base)", "gull")
    for name, place in (("llama", base), ("gull", adapter)):
        wanted = _answer(url, name, [{"role": "user", "content": "Write of <b>wind</b> & rain."}])
        assert place.locator(".text").text_content() == wanted
        assert "16 tokens" in place.locator(".figures").inner_text()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert [text for text in page.evaluate(CONTRASTS) if text[0] < 4.5] == []
    page.keyboard.type("More.")
    page.keyboard.press("Enter")
    page.locator(".answer[aria-busy=false]").nth(3).wait_for(timeout=60_000)
    history = json.loads([r for r in asked if r.method == "POST"][-1].post_data)["messages"]
    assert [message["role"] for message in history] == ["user", "assistant", "user"]
    page.fill("#max_tokens", "")
    page.keyboard.press("Tab")
    page.focus("#question")
    page.keyboard.type("On and on.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn:nth-child(3) .answer[aria-busy=true] .text:not(:empty)", timeout=60_000)
    page.keyboard.press("Escape")
    page.locator(".answer[aria-busy=false]").nth(5).wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    page.get_by_role("button", name="Begin anew").click()
    assert not page.locator(".turn").count()
    assert not said and all(request.url.startswith(url) for request in asked), said
    page.close()


def _answer(url, name, messages):
    fields = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 16}
    return httpx.post(f"{url}/v1/chat/completions", json=fields, timeout=60).json()["choices"][0]["message"]["content"]


def test_the_page_says_what_went_wrong_and_asks_for_the_key(command, browser):
    url, process = command("--host", "0.0.0.0", env={"JLORA_API_KEY": "sesame"}.items())
    page = browser.new_page()
    page.goto(url.replace("0.0.0.0", "127.0.0.1"))
    for key, wanted in (("wrong", "The API key is not this server's."), ("sesame", None)):
        page.fill("#key", key)
        page.fill("#question", "Wind.")
        page.get_by_role("button", name="Send").click()
        page.locator(".turn:last-child .answer[aria-busy=false]").nth(1).wait_for(timeout=60_000)
        notices = page.locator(".turn:last-child [role=alert]").all_inner_texts()
        assert notices == ([wanted] * 2 if wanted else [])
    process.send_signal(signal.SIGKILL)
    process.wait()
    page.fill("#question", "Rain.")
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector(".turn:last-child [role=alert]")
    assert "The server cannot be reached." in page.locator(".turn:last-child [role=alert]").first.inner_text()
    page.close()
