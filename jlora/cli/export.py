"""`jlora export`."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jlora._terminal import console, say
from jlora._typing import PyTree
from jlora.cli.as_trained import as_trained
from jlora.cli.base import Weights, load_weights, mergeable, resolve_model, written_dtype
from jlora.files import save_adapter, save_gguf, save_gguf_adapter, save_mlx_adapter, save_pretrained, save_torch
from jlora.files.gguf import DEFAULT_DTYPE, GGUFDtype
from jlora.files.hf_save import refuse_checkpoint
from jlora.files.ollama import modelfile
from jlora.lora import LoraConfig
from jlora.models import Model
from jlora.storage.whole import refuse_existing, whole_directory, write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Weights):
    """Write the model with the adapter merged in, or the adapter alone, for transformers, PyTorch, llama.cpp, Ollama, MLX."""

    to: Literal["transformers", "torch", "gguf", "gguf-adapter", "ollama", "mlx", "peft"]
    """transformers: a directory with safetensors; torch: a state dict; gguf: a model for llama.cpp; gguf-adapter: the
    adapter alone for llama.cpp's --lora; ollama: a directory with the GGUF model and a Modelfile; mlx, peft: the adapter
    alone, a directory for mlx-lm's --adapter-path or for PEFT."""
    output: str
    """File or directory to write; it must not be there yet."""
    gguf_dtype: GGUFDtype = DEFAULT_DTYPE
    """Type of the matrices in a GGUF model; --dtype is what the weights are loaded as."""


def run(options: Export) -> None:
    if options.to in _OF_ADAPTERS and options.adapter is None:
        raise ValueError("There is no adapter to export without --adapter OUTPUT/adapter.")
    # transformers' goes into an existing directory, too.
    (refuse_checkpoint if options.to == "transformers" else refuse_existing)(options.output)
    options, _ = as_trained(options, "quantize")
    model, params, tokenizer, tokenizer_files = load_weights(options, to_write=True)
    terminal = console()
    if options.to not in _OF_ADAPTERS:  # those are written beside the base as it is
        model, params = mergeable(model, params, terminal)
    said = _WRITERS[options.to](options, model, params, tokenizer_files if options.to == "transformers" else tokenizer)
    say(terminal, (options.output, "bold"), f": {said}")


def _transformers(options: Export, model, params, tokenizer) -> str:
    save_pretrained(
        options.output, model, params, tokenizer=tokenizer, base=resolve_model(options), dtype=written_dtype(options)
    )
    return "a checkpoint that transformers loads"


def _torch(options: Export, model, params, tokenizer) -> str:
    save_torch(options.output, model, params, base=resolve_model(options), dtype=written_dtype(options))
    return "a state dict for torch.load and load_state_dict"


def _gguf(options: Export, model, params, tokenizer) -> str:
    save_gguf(options.output, model, params, tokenizer=tokenizer, dtype=options.gguf_dtype)
    return f"a {options.gguf_dtype} model for llama.cpp (llama-cli -m FILE)"


def _gguf_adapter(options: Export, model, params, tokenizer) -> str:
    save_gguf_adapter(options.output, params, config=LoraConfig.load(str(options.adapter)), model=model)
    return "an adapter for llama.cpp (llama-cli -m BASE.gguf --lora FILE)"


def _ollama(options: Export, model, params, tokenizer) -> str:
    directory = Path(options.output)
    # A Modelfile's lines know no escapes.
    name = f"{directory.name}.gguf" if re.fullmatch(r"[\w.-]+", directory.name) else "model.gguf"
    text = modelfile(name, tokenizer, model.config)
    with whole_directory(directory) as partial:
        save_gguf(partial / name, model, params, tokenizer=tokenizer, dtype=options.gguf_dtype)
        write_text(partial / "Modelfile", text)
    note = ""
    if tokenizer.chat_template and "TEMPLATE" not in text:
        note = "; its chat template does more than Ollama's language says, so Ollama will look for one that it knows"
    return f"a {options.gguf_dtype} model and its Modelfile (ollama create NAME -f Modelfile){note}"


def _mlx(options: Export, model, params, tokenizer) -> str:
    base = resolve_model(options)
    config = LoraConfig.load(str(options.adapter))
    save_mlx_adapter(options.output, params, config=config, model=model, base_model=base)
    return f"an adapter for mlx-lm (mlx_lm.generate --model {base} --adapter-path DIR)"


def _peft(options: Export, model, params, tokenizer) -> str:
    save_adapter(
        options.output, params, config=LoraConfig.load(str(options.adapter)), base_model=resolve_model(options)
    )
    return "an adapter for PEFT (PeftModel.from_pretrained(base, DIR))"


_OF_ADAPTERS = ("gguf-adapter", "mlx", "peft")

_WRITERS: Mapping[str, Callable[[Export, Model, PyTree, Any], str]] = {
    "transformers": _transformers,
    "torch": _torch,
    "gguf": _gguf,
    "gguf-adapter": _gguf_adapter,
    "ollama": _ollama,
    "mlx": _mlx,
    "peft": _peft,
}
