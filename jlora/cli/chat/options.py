"""The flags of `jlora chat`."""

import dataclasses
from typing import Literal

from jlora.cli.prompts import Drawing
from jlora.quant import FormatName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Drawing):
    """Talk to a model in the terminal, in its own chat template; with a pipe, one turn a line and the answers alone on standard
    output. /help in the chat lists its commands."""

    model: str | None = None
    """Hugging Face directory or hub id, or a GGUF file; default: the base that --adapter names."""
    adapter: tuple[str, ...] = ()
    """Directories of adapters, such as OUTPUT/adapter, or of several of them, or GGUF files. The first one speaks first;
    /adapter NAME and /base switch."""
    quantize: Literal["none"] | FormatName | None = None
    """Pack the base's linear kernels; default: as the adapter's run did, otherwise none."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    system: str | None = None
    """What the model is told before the first turn; default: as in the adapter's run."""
    max_new_tokens: int = 512
    """At most this many tokens an answer."""
