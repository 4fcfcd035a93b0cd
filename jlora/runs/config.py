"""`FinetuneConfig`: every option of a fine-tuning run."""

import dataclasses
from collections.abc import Iterator

from jlora.runs.flags import AdapterFlags, Compute, Optimization, RecordFlags, Saving, Source, Teaching, Watching


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Compute, Watching, Saving, Teaching, Optimization, AdapterFlags, RecordFlags, Source):
    """Fine-tune a GPT-2, Llama, Qwen, SmolLM3, Mistral or Gemma 3 checkpoint with LoRA on text, instructions or chats."""

    def __post_init__(self):
        for group in (Source, RecordFlags, AdapterFlags, Teaching, Watching):
            group.__post_init__(self)
        problems = list(self._problems())
        if problems:
            raise ValueError("This run cannot start:\n  " + "\n  ".join(problems))
        self.lora()  # raises for adapter options out of their range

    def _problems(self) -> Iterator[str]:
        for group in (Source, RecordFlags, AdapterFlags, Optimization, Teaching, Saving, Watching):
            yield from group.problems(self)
        # What groups must have in common:
        if self.system is not None and self.template == "alpaca":
            yield "`system` needs a template with a place for it, and alpaca's has none. Use --template chat, or one by name."
        if self.init == "pissa" and self.quantize is not None:
            yield f"`init` 'pissa' needs dense kernels; got quantize={self.quantize!r}. Use init='kaiming', or no `quantize`."
        if self.full and self.quantize is not None:
            yield f"`full` trains dense parameters; got quantize={self.quantize!r}. Leave one of them out."
        for name in ("lora_plus_ratio", "init_adapter", "new_tokens") if self.full else ():
            if (value := getattr(self, name)) is not None:
                yield f"`{name}` is of an adapter, and `full` trains none; got {value!r}. Leave one of them out."
        if self.init_adapter is not None and self.init != "kaiming":
            yield f"`init` has no effect with `init_adapter`, whose weights are taken; got {self.init!r}. Leave one of them out."
        if self.new_tokens is not None and self.kind != "lora":
            yield f"`new_tokens` go with kind 'lora', which PEFT's files hold them with; got kind={self.kind!r}."
        if self.lora_plus_ratio is not None and self.kind != "lora":
            yield f"`lora_plus_ratio` is for the factors of kind 'lora'; got kind={self.kind!r}. Leave it out."
        if self.save == "best" and self.eval_data is None and self.eval_fraction == 0:
            yield "`save` 'best' needs an evaluation: give `eval_data` or an `eval_fraction` above 0."
        if self.early_stopping_patience is not None and self.eval_data is None and self.eval_fraction == 0:
            yield "`early_stopping_patience` needs evaluations: give `eval_data` or an `eval_fraction` above 0."
