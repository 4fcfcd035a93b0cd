"""Samples of fixed prompts at every evaluation."""

import copy
import json
import os
from collections.abc import Mapping, Sequence

from jlora._typing import Json
from jlora.data import decode_continuation
from jlora.data.columns import put_system
from jlora.data.prompts import Prompt, check_text, prompts_of, text_ids
from jlora.data.records import Record
from jlora.data.templates import prompt_ids
from jlora.generation import generate
from jlora.runs.callbacks import Callback, View
from jlora.runs.config import FinetuneConfig
from jlora.runs.display import Display
from jlora.storage.structured import parse_json
from jlora.storage.whole import full_disk_said, whole_file

NAME = "samples.jsonl"


class Samples(Callback):
    """Continues the prompts greedily at every evaluation: printed, and an object of step, prompt and text each in
    OUTPUT/samples.jsonl. Prompts are encoded as the data is: through the run's template, or as raw text."""

    def __init__(self, prompts: Sequence[Prompt], *, max_new_tokens: int, display: Display):
        self._prompts, self._max_new_tokens, self._display = prompts, max_new_tokens, display
        self._ids: list[list[int]] = []

    def on_start(self, view: View) -> None:
        """
        Raises:
            ValueError: for a prompt that is too long for the model.
        """
        self._ids = [_encoded(prompt, view) for prompt in self._prompts]
        for prompt, ids in zip(self._prompts, self._ids, strict=True):
            if len(ids) + self._max_new_tokens > view.model.config.max_length:
                raise ValueError(
                    f"A sample has at most the model's {view.model.config.max_length} positions; got a prompt of {len(ids)} "
                    f"tokens ({prompt.text[:40]!r}) and `sample_tokens` {self._max_new_tokens}. Lower --sample-tokens."
                )
        _rewind(view)

    def on_evaluation(self, view: View, entry: Mapping[str, Json]) -> None:
        rows = generate(view.model, view.params, self._ids, max_new_tokens=self._max_new_tokens, temperature=0)
        texts = [decode_continuation(view.tokenizer, ids, row) for ids, row in zip(self._ids, rows, strict=True)]
        lines = [
            {"step": entry["step"], "prompt": prompt.text, "text": text}
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        path = view.directory / NAME
        with full_disk_said(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._display.say(f"step {line['step']}: ", (line["prompt"], "dim"), f" {line['text']}")


def read_prompts(config: FinetuneConfig) -> list[Prompt]:
    """The prompts to sample.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one that is no text.
    """
    found = [
        Prompt(check_text(text, f"sample prompt {n}"), Record(instruction=text))
        for n, text in enumerate(config.sample_prompts, 1)
    ]
    return found + ([] if config.sample_prompts_file is None else prompts_of(config.sample_prompts_file))


def _encoded(prompt: Prompt, view: View) -> list[int]:
    if view.template is None:
        return text_ids(view.tokenizer, prompt.text)
    record = copy.deepcopy(prompt.record)
    if view.config.system is not None:
        put_system(record, view.config.system)
    return prompt_ids(record, view.tokenizer, template=view.template)


def _rewind(view: View) -> None:
    """Drops the samples of steps after the last in the log, and lines that are none."""
    path, last = view.directory / NAME, view.history[-1]["step"] if view.history else -1
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8", errors="replace")
    *lines, _ = before.split("\n")  # behind the last newline is nothing, or what a process wrote when it died
    after = "".join(f"{line}\n" for line in lines if _is_sample(line, last))
    if after != before:
        with whole_file(path) as partial:
            partial.write_text(after, encoding="utf-8")


def _is_sample(line: str, last: int) -> bool:
    """Whether a line is one of a step up to `last`."""
    try:
        sample = parse_json(line, where="it")
    except ValueError:
        return False
    return isinstance(sample, dict) and isinstance(sample.get("step"), int) and sample["step"] <= last
