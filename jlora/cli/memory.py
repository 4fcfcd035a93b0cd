"""`jlora memory`."""

import dataclasses
import json
from typing import Literal

import jax
import jax.numpy as jnp
from rich.table import Table
from rich.text import Text

from jlora._terminal import console, say
from jlora.data import row_length
from jlora.files import find, read_config
from jlora.files.gguf_packed import kept_specs
from jlora.files.opened import open_checkpoint
from jlora.models import Remat, model_from_config
from jlora.quant import KEEP, FormatName, Kept, spec_named
from jlora.runs import FinetuneConfig
from jlora.runs.flags import AdapterFlags, Compute
from jlora.train import causal_lm_loss, make_optimizer, make_step
from jlora.train.memory import Memory as Prediction
from jlora.train.memory import abstract_batch, abstract_state, abstract_tree, halves, planned, predict
from jlora.train.optimizers import OptimizerName
from jlora.tree.paths import count, nbytes

_MEANING = {
    "weights": "frozen parameters as stored",
    "adapter": "what is trained, float32",
    "optimizer": "its state, such as AdamW's two moments",
    "gradients": "of what is trained",
    "activations": "kept from the forward for the backward pass",
    "working": "alive within one layer or one chunk of the loss",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    model: str
    """Hugging Face directory or hub id, of which only config.json is read, or a GGUF file, of which the metadata are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(AdapterFlags, Subject):
    """Predict the memory of a fine-tuning step from config.json alone, before anything is loaded."""

    batch_size: int = FinetuneConfig.batch_size
    """Rows in a micro-batch."""
    accumulate: int = FinetuneConfig.accumulate
    """Micro-batches in a step."""
    max_length: int | None = None
    """Tokens in a row; default: as `jlora finetune`."""
    quantize: FormatName | Kept | None = FinetuneConfig.quantize
    """Pack the frozen linear kernels; keep: as a GGUF file has them."""
    optimizer: OptimizerName = FinetuneConfig.optimizer
    """Whose state is kept."""
    remat: Remat = "none"
    """What the backward pass computes again: as `jlora finetune --remat`."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory: as `jlora finetune --offload-optimizer`."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of the weights that are not packed, and the activations."""
    form: Literal["stacked", "per-layer"] = "stacked"
    """Execution form: as `jlora finetune --form`."""
    compile: bool = False
    """Also compile the step for this machine's device, still without loading anything, and show the compiler's plan."""
    json: bool = False
    """Print JSON: bytes."""


def run(options: Memory) -> None:
    directory = find(options.model)
    model = model_from_config(read_config(directory), dtype=jnp.dtype(options.dtype), remat=options.remat)
    if wrong := list(options.problems()):
        raise ValueError(wrong[0])
    if options.full and options.quantize is not None:
        raise ValueError(f"`full` trains dense parameters; got quantize={options.quantize!r}. Leave one of them out.")
    spec, stack = spec_named(options.quantize), options.form == "stacked"
    length = row_length(options.max_length, model.config.max_length)
    params = abstract_tree(
        model,
        None if options.full else options.lora(),
        dtype=jnp.dtype("float32" if options.full else options.dtype),  # what is trained is float32
        quantize=kept_specs(open_checkpoint(directory), model, stack=stack, where=directory) if spec == KEEP else spec,
        stack=stack,
    )
    compute = Compute(remat=options.remat, offload_optimizer=options.offload_optimizer)
    tx = make_optimizer(options.optimizer, FinetuneConfig.learning_rate, halves(params)[0], max_grad_norm=1.0)
    tx = compute.around(tx, model.dtype)
    sizes = {"batch_size": options.batch_size, "length": length, "accumulate": options.accumulate}
    predicted = predict(model, params, tx, **sizes)
    compiled = _compiled(model, params, tx, options, length) if options.compile else None
    if options.json:
        fields = dataclasses.asdict(predicted) | {"peak": predicted.peak, "compiled_peak": compiled}
        print(json.dumps(fields, indent=2))
        return
    adapter, base = halves(params)
    held = adapter if base is None else base
    terminal = console()
    say(
        terminal,
        (options.model, "bold"),
        f": {count(held):,} parameters at {8 * nbytes(held) / count(held):.2f} bits, "
        f"{count(adapter):,} trained; {options.batch_size} x {length} tokens, {options.dtype}, layers {options.form}",
    )
    terminal.print(table(predicted, compiled))
    for said in compute.without_effect(model, stacked=stack, length=length):
        say(terminal, said)


def _compiled(model, params, tx, options: Memory, length: int) -> int:
    adapter, base = halves(params)
    state = abstract_state(adapter, tx)
    batch = abstract_batch(options.batch_size * options.accumulate, length)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_step(causal_lm_loss(model), tx, accumulate=options.accumulate)
    return planned(step.lower(state, base, batch, key).compile())  # pyright: ignore[reportFunctionMemberAccess]


def table(predicted: Prediction, compiled: int | None) -> Table:
    out = Table(box=None, pad_edge=False, header_style="dim")
    out.add_column("")
    out.add_column("MiB", justify="right")
    out.add_column("")
    for name, meaning in _MEANING.items():
        out.add_row(name, _mib(getattr(predicted, name)), meaning)
    out.add_row(
        Text("peak", "bold"), Text(_mib(predicted.peak), "bold"), "predicted; the runtime's own memory comes on top"
    )
    if predicted.host:
        out.add_row("host", _mib(predicted.host), "the optimizer's state, in the host's memory")
    if compiled is not None:
        plan = f"the compiler's plan for {jax.devices()[0].device_kind}"
        out.add_row(Text("compiled", "bold"), Text(_mib(compiled), "bold"), plan)
    return out


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
