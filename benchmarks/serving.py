"""`jlora serve` on SmolLM2-135M-Instruct with four adapters: tokens a second of eight clients against one's, time to the first
token, and, with --minutes, whether every answer under load is the one that its request gets alone, and whether memory grows.

    python benchmarks/serving.py --output benchmarks/results/serving_cpu.json
    python benchmarks/serving.py --minutes 10 --output benchmarks/results/serving_load_cpu.json

The server is the command, in a process of its own; the clients are of this process and stream. One client is measured at the same
server, whose step has eight rows whoever is there, and at one of a single slot, which is the fastest that one client can have.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
import jax
import tyro
from bench import machine, median, pin, quartiles, smollm2, write

import jlora

ADAPTERS = ("gull", "tide", "star", "salt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    slots: int = 8
    max_length: int = 512
    new_tokens: int = 48
    prompt_tokens: int = 30
    turns: int = 5
    """How often one client and all of them take turns."""
    minutes: float = 0.0
    """Load for so long instead, of --clients."""
    clients: int = 32
    threads: int = 0
    """0: all cores."""
    output: Path | None = None


class Answer(NamedTuple):
    text: str
    tokens: int
    first: float
    """Seconds to the first token."""
    seconds: float


def main(args: Args) -> None:
    threads = pin(args.threads)
    report = {"machine": machine(threads), "arguments": dataclasses.asdict(args) | {"output": None}}
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(Path(directory))
        for dtype in args.dtypes:
            report[dtype] = load(args, adapters, dtype) if args.minutes else speed(args, adapters, dtype)
            write(args.output, report)


def write_adapters(directory: Path) -> Path:
    """Adapters of rank 8 on all linear modules, which change what the model says."""
    _, params = jlora.load(smollm2(), dtype="float32")
    config = jlora.LoraConfig(rank=8, init="gaussian")
    for seed, name in enumerate(ADAPTERS, 1):
        adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(seed)))
        leaves, structure = jax.tree.flatten(adapter)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        moved = [x + 0.02 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
        whole = jlora.combine(jax.tree.unflatten(structure, moved), base)
        jlora.save_adapter(directory / name, whole, config=config, base_model=str(smollm2()))
    return directory


@contextlib.contextmanager
def server(args: Args, adapters: Path, dtype: str, slots: int) -> Iterator[tuple[str, int]]:
    """(the address, the process' id) of a server that is ready."""
    command = [
        sys.executable, "-c", "from jlora.cli import main; main()", "serve", "--model", str(smollm2()), "--adapter", str(adapters),
        "--port", "0", "--dtype", dtype, "--slots", str(slots), "--max-length", str(args.max_length), "--queue", "256",
        "--grace", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if " at http://" in line:
            break
    else:
        sys.exit("".join(said))
    try:
        yield said[-1].partition(" at ")[2].partition("/v1;")[0], process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


async def ask(
    client: httpx.AsyncClient, model: str, prompt: list[int], tokens: int, *, until: int | None = None
) -> Answer:
    """A greedy answer.

    Args:
        until: go away after so many pieces.
    """
    fields = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began, first, text, pieces = time.perf_counter(), 0.0, "", 0
    async with client.stream("POST", "/v1/completions", json=fields | {"logprobs": 0}) as response:
        response.raise_for_status()
        count = 0
        async for event in events(response):
            first = first or time.perf_counter() - began
            (choice,) = event["choices"]
            text += choice["text"]
            count += len(choice["logprobs"]["tokens"])
            pieces += 1
            if pieces == until:
                break
    return Answer(text, count, first, time.perf_counter() - began)


async def events(response: httpx.Response) -> AsyncIterator[dict]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def prompts(args: Args, count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(100, 40000) for _ in range(args.prompt_tokens)] for _ in range(count)]


def speed(args: Args, adapters: Path, dtype: str) -> dict:
    found = {}
    with server(args, adapters, dtype, args.slots) as (url, _):
        found |= asyncio.run(together_and_alone(args, url))
    with server(args, adapters, dtype, 1) as (url, _):
        found |= {"one client, one slot": asyncio.run(turns_of(args, url, 1))}
    rate = {name: found[name]["tokens_per_s"]["median"] for name in found}
    eight, one, lone = rate[f"{args.slots} clients"], rate["one client"], rate["one client, one slot"]
    found["ratios"] = {"to one client": eight / one, "to one client, one slot": eight / lone, "target": 4.0}
    print(f"{dtype}, {args.new_tokens} tokens after {args.prompt_tokens}, {machine(0)['cpu']}")
    for name in rate:
        first = 1000 * found[name]["first_token_s"]["median"]
        print(f"  {name:<22}{rate[name]:8.1f} tokens/s, the first token after {first:.0f} ms")
    print(f"  ratio {eight / one:.2f} to one client, {eight / lone:.2f} to one at a single slot (target 4)", flush=True)
    return found


async def together_and_alone(args: Args, url: str) -> dict:
    names = {"one client": 1, f"{args.slots} clients": args.slots}
    rounds = {name: [] for name in names}
    for _ in range(args.turns):
        for name, clients in names.items():
            rounds[name].append(await one_round(args, url, clients))
    return {name: figures(each) for name, each in rounds.items()}


async def turns_of(args: Args, url: str, clients: int) -> dict:
    return figures([await one_round(args, url, clients) for _ in range(args.turns)])


async def one_round(args: Args, url: str, clients: int) -> tuple[float, list[Answer]]:
    """(tokens a second of all together, their answers)."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        jobs = [
            ask(client, ADAPTERS[i % len(ADAPTERS)], prompt, args.new_tokens)
            for i, prompt in enumerate(prompts(args, clients))
        ]
        answers = await asyncio.gather(*jobs)
        return sum(answer.tokens for answer in answers) / (time.perf_counter() - began), answers


def figures(rounds: list[tuple[float, list[Answer]]]) -> dict:
    firsts = [answer.first for _, answers in rounds for answer in answers]
    return {"tokens_per_s": quartiles([rate for rate, _ in rounds]), "first_token_s": quartiles(firsts)}


def load(args: Args, adapters: Path, dtype: str) -> dict:
    with server(args, adapters, dtype, args.slots) as (url, pid):
        found = asyncio.run(under_load(args, url, pid))
    print(
        f"{dtype}: {found['answers']} answers, {found['tokens_per_s']:.1f} tokens/s, {found['wrong']} other than alone, "
        f"{found['left']} clients left early; memory {found['rss_mb'][0]:.0f} MB after a tenth of the time, "
        f"{found['rss_mb'][-1]:.0f} MB at the end, {found['first_token_s']['median']:.2f} s to the first token"
    )
    assert not found["wrong"], "answers differ from those of the same requests alone"
    return found


async def under_load(args: Args, url: str, pid: int) -> dict:
    """Every client asks one after the other, prompts and lengths at random; one in ten goes away in the middle."""
    asked = [(name, prompt) for name in ADAPTERS for prompt in prompts(args, 4)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        alone = {i: await ask(client, *one, args.new_tokens) for i, one in enumerate(asked)}
        end, began = time.monotonic() + 60 * args.minutes, time.monotonic()
        answers, counts, memory = [], {"wrong": 0, "left": 0}, []

        async def talk(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < end:
                i = draw.randrange(len(asked))
                if draw.random() < 0.1:
                    await ask(client, *asked[i], args.new_tokens, until=draw.randrange(1, 8))
                    counts["left"] += 1
                else:
                    answers.append(await ask(client, *asked[i], args.new_tokens))
                    counts["wrong"] += answers[-1].text != alone[i].text

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(min(10.0, 6 * args.minutes))
                memory.append(rss_mb(pid))

        await asyncio.gather(watch(), *(talk(seed) for seed in range(args.clients)))
    settled = memory[len(memory) // 10 :]
    return {
        "answers": len(answers), **counts, "tokens_per_s": sum(a.tokens for a in answers) / (time.monotonic() - began),
        "first_token_s": quartiles([a.first for a in answers]), "rss_mb": settled, "growth_mb": settled[-1] - median(settled[:3]),
    }  # fmt: skip


def rss_mb(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
