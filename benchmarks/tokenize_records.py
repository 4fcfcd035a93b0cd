"""Time to make rows of instruction and chat records, as JSON: rendering, tokenizing, labels.

    python benchmarks/tokenize_records.py                                  # 10,000 records
    python benchmarks/tokenize_records.py --records 1000 --output tokenize_cpu.json

The records are made here, of random words, and the tokenizer is that of examples/assets/tiny-llama (byte-level BPE, 1,500
ids). Seconds are those of the processor, all threads together, so that other work on the machine counts little; the best of
the repeats is given.
"""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import tyro
from bench import ROOT, machine, pin

from jlora.data import InstructDataset
from jlora.files import load_tokenizer

WORDS = "the keeper lit a lamp and wrote of wind rain gulls tide salt, however: (unusual) ships' bread 12 345".split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Tokenize records by both templates."""

    records: int = 10_000
    """How many, of each kind."""
    repeats: int = 5
    """The best counts."""
    output: Path | None = None
    """JSON file; default: standard output."""


def instructions(count: int) -> list[dict[str, Any]]:
    """Half of them with an input."""
    draw = random.Random(0)
    return [
        {
            "instruction": words(draw, 5, 40),
            "input": words(draw, 0, 30) if i % 2 else "",
            "output": words(draw, 10, 120),
        }
        for i in range(count)
    ]


def chats(count: int) -> list[dict[str, Any]]:
    """Of one to three questions and answers."""
    draw = random.Random(0)
    return [
        {
            "messages": [
                message
                for _ in range(1 + i % 3)
                for message in (
                    {"role": "user", "content": words(draw, 5, 40)},
                    {"role": "assistant", "content": words(draw, 10, 80)},
                )
            ]
        }
        for i in range(count)
    ]


def words(draw: random.Random, least: int, below: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(least, below)))


def measure(records: list[dict[str, Any]], tokenizer: Any, template: str, repeats: int) -> dict[str, Any]:
    named = [(f"record {i}", record) for i, record in enumerate(records)]
    seconds, tokens = [], 0
    for _ in range(repeats):
        start = time.process_time()
        data = InstructDataset(named, tokenizer, template=template, max_length=4096)
        seconds.append(time.process_time() - start)
        tokens = data.stats.tokens
    best = min(seconds)
    return {"seconds": best, "all_seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / best}


def main(args: Args) -> None:
    threads = pin()
    tokenizer = load_tokenizer(ROOT / "examples" / "assets" / "tiny-llama")
    result = {
        "machine": machine(threads),
        "records": args.records,
        "alpaca": measure(instructions(args.records), tokenizer, "alpaca", args.repeats),
        "chat": measure(chats(args.records), tokenizer, "chat", args.repeats),
    }
    text = json.dumps(result, indent=2)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
