"""The flags of `jlora chat`."""

import dataclasses
from typing import Literal

from jlora._typing import DTypeName
from jlora.cli.prompts import Drawing
from jlora.quant import FormatName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speakers:
    """Who answers: a base model and adapters of it, side by side."""

    model: str | None = None
    """Hugging Face directory or hub id, or a GGUF file; default: the base that --adapter names."""
    adapter: tuple[str, ...] = ()
    """Directories of adapters, such as OUTPUT/adapter, or of several of them, or GGUF files; NAME=DIR calls one by another name."""
    quantize: Literal["none"] | FormatName | None = None
    """Pack the base's linear kernels; default: as the adapter's run did, otherwise none."""
    dtype: DTypeName = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere; float16 is for a GPU without bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Drawing, Speakers):
    """Talk to a model in the terminal, in its own chat template; with a pipe, one turn a line and the answers alone on standard
    output. The first --adapter speaks first, /adapter NAME and /base switch; /help in the chat lists its commands."""

    system: str | None = None
    """What the model is told before the first turn; default: as in the adapter's run."""
    max_new_tokens: int = 512
    """At most this many tokens an answer."""
