"""`jlora quantize`."""

import dataclasses

import jax.numpy as jnp

from jlora._terminal import console, say
from jlora._typing import DTypeName
from jlora.files import load, save_quantized
from jlora.files.hf_save import refuse_checkpoint
from jlora.files.origin import Origin
from jlora.files.packing import writable, writable_said
from jlora.quant import NF4, FormatName
from jlora.tree.paths import count, nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a checkpoint that is packed: in 4-bit NF4, bitsandbytes' format, which transformers and jlora load."""

    model: str
    """Hugging Face directory or hub id of a dense checkpoint, or a GGUF file."""
    output: str
    """Directory to write; it must not hold weights yet."""
    format: FormatName = "nf4"
    """Of the kernels. Checkpoints hold nf4; any model is packed in the others as it is loaded (--quantize of other commands)."""
    block_size: int = NF4.block_size
    """Elements that share one scale: 32 to 4096."""
    double_quant: bool = NF4.double_quant
    """Quantize the scales themselves to 8 bits (4.127 rather than 4.5 bits a parameter)."""
    dtype: DTypeName = "auto"
    """Of the weights that stay dense, and to which the others decode; auto: as the model is stored."""


def run(options: Quantize) -> None:
    held = writable()
    if options.format not in held:
        raise ValueError(
            f"Checkpoints hold {writable_said()}, not {options.format!r}. Leave the checkpoint dense and give commands that load "
            f"it --quantize {options.format}."
        )
    kind = held[options.format].format
    spec = kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})
    refuse_checkpoint(options.output)
    origin = Origin.read(options.model)
    dtype = origin.dtype if options.dtype == "auto" else jnp.dtype(options.dtype)
    exact = dtype if dtype == jnp.bfloat16 else jnp.float32
    model, params = load(origin.directory, dtype=exact, quantize=spec)
    save_quantized(options.output, model, params, base=origin.directory, dtype=dtype)
    say(
        console(),
        "4-bit checkpoint: ",
        (options.output, "bold"),
        f", {count(params):,} parameters in {nbytes(params) / 2**20:,.1f} MiB ({8 * nbytes(params) / count(params):.2f} bits a "
        f"parameter, {dtype} embeddings and norms included)",
    )
