"""`FinetuneConfig`: every option of a fine-tuning run, and the one home of each default."""

import dataclasses
import math
import os
from typing import Literal

from jlora._numbers import MAX_COUNT, check_seed
from jlora.quant import FormatName, Kept
from jlora.runs.flags import AdapterFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a run reads, and where it writes."""

    model: str
    """Hugging Face directory or hub id of the base model, or a GGUF file."""
    data: str
    """A .txt file or folder of them (raw text), a .jsonl or .json file, or the id of a hub data set (records with
    instruction, input, output; or messages)."""
    output: str
    """Directory of the run. An existing one is refused without --resume."""

    eval_data: str | None = None
    """Evaluate on this file instead of a share of --data."""
    eval_fraction: float | None = None
    """Share of --data to evaluate on (default 0.1 without --eval-data); 0: no evaluation."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How records become text: Alpaca's prompt, or the tokenizer's own chat template."""
    max_length: int | None = None
    """Tokens in a row; longer records are cut. Default: 512, or the model's limit if that is less."""
    pack: bool = False
    """Put several records into a row; they do not see each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(AdapterFlags, Source):
    """Fine-tune a GPT-2, Llama, Qwen, SmolLM3, Mistral or Gemma 3 checkpoint with LoRA on text, instructions or chats."""

    epochs: float | None = None
    """Passes over the data; default 3 where --steps is not given."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    batch_size: int = 8
    """Records in a micro-batch, short ones together in a row; of raw text and with --pack, rows."""
    accumulate: int = 1
    """Micro-batches in a step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the rate rises linearly; then it falls along a cosine to 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    beta1: float = 0.9
    """Decay of AdamW's average of gradients."""
    beta2: float = 0.999
    """Decay of AdamW's average of squared gradients."""
    seed: int = 0
    """Of initialization, data order and dropout."""

    eval_every: int | None = None
    """Evaluate every so many steps; default: ten times a run. Always before the first step and after the last."""
    checkpoint_every: int | None = None
    """Save the state every so many steps; default: ten times a run, but no oftener than every 25 steps. Always after the last
    step, and when a signal ends the run."""
    keep: int = 2
    """How many of the last checkpoints to keep, besides the best."""
    save: Literal["last", "best"] = "last"
    """Which state becomes OUTPUT/adapter: the last, or that of the lowest evaluation loss."""

    quantize: FormatName | Kept | None = None
    """Pack the frozen linear kernels: nf4 is QLoRA, 4.127 bits a parameter; int4-g128 has 4.125, mxfp4 4.25, int8 8.5;
    q4_0 and the like are ggml's. keep: a GGUF file's own blocks. A bitsandbytes 4-bit checkpoint is used as it is."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the base and the activations; auto: float32 on CPU, bfloat16 elsewhere. Adapters are trained in float32."""
    form: Literal["auto", "per-layer", "stacked"] = "auto"
    """Layers unrolled, or stacked under one scan, which compiles in the time of one layer; auto: stacked, unless single layers are
    named or packed differently, or the CPU has no bfloat16 and the model is in it."""
    remat: Literal["none", "layer"] = "none"
    """layer: recompute each layer in the backward pass, for less memory."""

    resume: bool = False
    """Continue the run in --output from its last checkpoint, to the same result as if it had not stopped."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self):
        for name in ("model", "data", "output", "eval_data"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        super().__post_init__()
        problems = list(self._problems())
        if problems:
            raise ValueError("This run cannot start:\n  " + "\n  ".join(problems))
        self.lora()  # raises for adapter options out of their range

    def _problems(self):
        for name in ("batch_size", "accumulate", "keep", "steps", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"`{name}` must be at least 1; got {value}."
            elif value is not None and value > MAX_COUNT:
                yield f"`{name}` must be at most {MAX_COUNT}; got {value}."
        if self.max_length is not None and self.max_length < 2:
            yield f"`max_length` must be at least 2, a token and the one it predicts; got {self.max_length}."
        if self.steps is not None and self.epochs is not None:
            yield f"`steps` and `epochs` exclude each other; got steps={self.steps} and epochs={self.epochs}."
        if self.epochs is not None and not 0 < self.epochs <= MAX_COUNT:
            yield f"`epochs` must be positive; got {self.epochs}. At most {MAX_COUNT}."
        if not 0 < self.learning_rate < math.inf:
            yield f"`learning_rate` must be positive; got {self.learning_rate}. It is finite; LoRA runs use 1e-4 to 1e-3."
        if not 0 <= self.warmup_fraction < 1:
            yield f"`warmup_fraction` must be in [0, 1); got {self.warmup_fraction}."
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"`{name}` must be 0 or positive; got {getattr(self, name)}."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"`{name}` must be in [0, 1); got {getattr(self, name)}."
        try:
            check_seed(self.seed)
        except ValueError as error:
            yield str(error)
        if self.eval_data is not None and self.eval_fraction:
            yield "`eval_data` and `eval_fraction` exclude each other; leave one out."
        if self.init == "pissa" and self.quantize is not None:
            yield f"`init` 'pissa' needs dense kernels; got quantize={self.quantize!r}. Use init='kaiming', or no `quantize`."
        if self.save == "best" and self.eval_data is None and self.eval_fraction == 0:
            yield "`save` 'best' needs an evaluation: give `eval_data` or an `eval_fraction` above 0."
