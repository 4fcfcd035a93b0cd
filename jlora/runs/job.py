"""What a run is made of before its first step: the model, the adapter, the data, how many steps."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp

from jlora import data as data_lib
from jlora._processor import compiler_options
from jlora._typing import Batch, JsonObject, Params, PretrainedTokenizer, PyTree
from jlora.data import InstructDataset, TextDataset
from jlora.files import find, load, load_tokenizer, read_config, untrained_tokens
from jlora.files.gguf_packed import stacks_as_packed
from jlora.files.run_settings import OF_RECORDS, RunSettings
from jlora.lora import LoraConfig, adapted_leaves, combine
from jlora.models import Model, grow, model_from_config, replace
from jlora.quant import KEEP, spec_named
from jlora.runs.config import FinetuneConfig
from jlora.runs.display import Display, device_name
from jlora.runs.endings import Stopped
from jlora.runs.halves import Halves, adapted, digest
from jlora.runs.run import Run
from jlora.runs.signals import StopSignals
from jlora.runs.teacher import LoadedTeacher, load_teacher
from jlora.storage.checkpoint_files import base_fingerprint
from jlora.train import causal_lm_loss, evaluate
from jlora.train.loss import CausalLMLoss, Taught
from jlora.tree.paths import count, flatten, nbytes
from jlora.weight import is_weight, origin

DEFAULT_EPOCHS = 3.0
_TIMES_A_RUN = 10  # evaluations and checkpoints, where nothing is said
_APART = 25  # and steps between two checkpoints, at least: those of a short run cost more than the steps that they save


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything of a run that is fixed before its first step."""

    config: FinetuneConfig
    lora: LoraConfig | None
    """None: every parameter is trained."""
    run: Run
    display: Display
    model: Model
    tokenizer: PretrainedTokenizer
    adapter: Params
    base: Params | None
    """What is frozen; None: nothing."""
    teacher: LoadedTeacher | None
    fingerprint: str
    """Of the base's files."""
    train: TextDataset | InstructDataset
    layout: data_lib.Layout
    began: data_lib.Layout
    """With which the run began."""
    evaluation: TextDataset | InstructDataset | None
    eval_layout: data_lib.Layout | None
    max_length: int
    """Tokens in a row, at most."""
    steps: int

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.config.batch_size * self.config.accumulate

    @property
    def loss(self) -> CausalLMLoss:
        """Of training."""
        config = self.config
        return causal_lm_loss(
            self.model,
            label_smoothing=config.label_smoothing,
            neftune_alpha=config.neftune_alpha,
            teacher=None if self.teacher is None else config.taught_by(self.teacher.model),
        )

    @property
    def frozen(self) -> PyTree:
        """What a step of `loss` takes beside its state."""
        return self.base if self.teacher is None else Taught(self.base, self.teacher.params)

    @property
    def eval_every(self) -> int:
        return self.config.eval_every or max(1, self.steps // _TIMES_A_RUN)

    @property
    def checkpoint_every(self) -> int:
        return self.config.checkpoint_every or max(_APART, self.steps // _TIMES_A_RUN)

    @classmethod
    def prepare(cls, config: FinetuneConfig, run: Run, display: Display) -> "Job":
        """
        Raises:
            FileNotFoundError: a model or data file that is not there.
            ValueError: a model, data or a resumed run that do not fit.
        """
        directory = find(config.model)
        # A family that there is no model for is said before what is wrong with its tokenizer.
        settings = read_config(directory)
        model_from_config(settings, dtype=jnp.float32)
        tokenizer = load_tokenizer(directory)
        if config.template in data_lib.CHAT_TEMPLATES and (said := data_lib.put_template(tokenizer, config.template)):
            display.warn(said)
        ids, new = (), ()
        if config.new_tokens is not None:
            ids, new = data_lib.add_tokens(tokenizer, data_lib.read_new_tokens(config.new_tokens))
        with TemporaryDirectory() as place:  # one that cannot be saved is found before the training
            tokenizer.save_pretrained(place)
        lora = None if config.full else config.lora()
        on_cpu = jax.default_backend() == "cpu"
        dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
        stack, why = _form(config, widened=on_cpu and dtype == "bfloat16" and not compiler_options())
        if config.quantize == KEEP and config.form == "auto" and stack and not stacks_as_packed(directory):
            stack, why = False, "packed in several formats"
        model, params = load(
            directory,
            dtype=jnp.dtype("float32" if lora is None else dtype),  # what is trained is float32
            quantize=spec_named(config.quantize),
            stack=stack,
            remat=config.remat,
        )
        if ids:
            model, params = grow(model, params, len(tokenizer), new=new)
            lora = lora and dataclasses.replace(lora, trainable_token_indices=_rows_of(model, ids))
        max_length = data_lib.row_length(config.max_length, model.config.max_length)
        if lora is None:
            model, (adapter, base) = replace(model, dtype=jnp.dtype(dtype)), Halves(params, None)
        else:
            key = jax.random.key(config.seed)
            adapter, base = adapted(params, lora, key=key, init_adapter=config.init_adapter, model=model)
        del params
        teacher = load_teacher(config, model, tokenizer, dtype=dtype, length=max_length)
        train, evaluation = data_lib.load_data(
            config.data,
            tokenizer,
            eval_data=config.eval_data,
            eval_fraction=config.eval_fraction,
            template=config.template,
            max_length=max_length,
            seed=config.seed,
            directory=run.data,
            pack=config.pack,
            vocab_size=model.config.vocab_size,
            bad_records=run.bad_records if config.skip_bad_records else None,
            **config.of_records(),
        )
        template = train.template if isinstance(train, InstructDataset) else None
        if config.template == data_lib.AUTO and template == "alpaca" and not tokenizer.chat_template:
            data_lib.put_template(tokenizer, template)
        rows = config.batch_size * config.accumulate
        per_epoch = data_lib.steps_per_epoch(train, batch_size=rows)
        widest = model.config.max_length
        # A step has the records that it had when the run began, into however many micro-batches it is cut now.
        began = data_lib.lay_out(train, batch_size=rows, accumulate=run.began["accumulate"], widest=widest)
        layout = began
        if config.accumulate != run.began["accumulate"]:
            layout = data_lib.lay_out(
                train, batch_size=rows, accumulate=config.accumulate, widest=widest, batches_of=began
            )
        job = cls(
            config=config,
            lora=lora,
            run=run,
            display=display,
            model=model,
            tokenizer=tokenizer,
            adapter=adapter,
            base=base,
            teacher=teacher,
            fingerprint=base_fingerprint(directory),
            train=train,
            layout=layout,
            began=began,
            evaluation=evaluation,
            eval_layout=None
            if evaluation is None
            else data_lib.lay_out(evaluation, batch_size=config.batch_size, widest=widest),
            max_length=max_length,
            steps=config.steps or max(1, math.ceil((config.epochs or DEFAULT_EPOCHS) * per_epoch)),
        )
        for said in config.without_effect(model, stacked=stack, length=layout.widths[-1]):
            display.warn(said)
        if said := run.check_origin(job.origin()):
            display.warn(said)
        if train.stats.bad:
            display.warn(f"{train.stats.bad:,} bad records are left out, and written to {run.bad_records}")
        of_teacher = {} if teacher is None else {"teacher": _said(config.teacher, teacher.model, teacher.params, dtype)}
        display.facts(
            {
                "model": _said(config.model, model, *((adapter, "float32") if base is None else (base, dtype))),
                **of_teacher,
                "data": _describe(config.data, train, evaluation),
                **_records(train, config),
                "device": f"{device_name()}; layers {'stacked' if stack else 'unrolled'}: {why}",
                "batch": f"{config.batch_size} x {config.accumulate} = {layout}",
                "compiled": _kept(),
                "steps": f"{job.steps} ({job.steps / per_epoch:.3g} epochs of {per_epoch})",
            }
        )
        used, learned = train.tokens()
        whole = {} if base is None else {path: w for path, w in adapted_leaves(adapter).items() if not w.in_part}
        trained = flatten(adapter) if base is None else whole
        used, learned = used - {*ids}, learned - {*ids}  # their rows are trained
        said = untrained_tokens(directory, model, tokenizer, used=used, learned=learned, trained=trained)
        if said is not None:
            display.warn(said)
        display.trained(combine(adapter, base), adapter)
        run.note({"figures": job.figures(dtype)})
        return job

    def origin(self) -> JsonObject:
        """What a resumed run must have in common with the one that it continues."""
        origin: JsonObject = {
            "steps": self.steps,
            "data": self.train.digest(),
            "evaluation": self.evaluation and self.evaluation.digest(),
            "base": self.fingerprint,
        }
        if self.teacher is not None:
            origin["teacher"] = self.teacher.fingerprint
        if self.config.new_tokens is not None:
            origin["new_tokens"] = data_lib.read_new_tokens(self.config.new_tokens)
        if self.config.init_adapter is not None:
            origin["init_adapter"] = digest(self.config.init_adapter)
        # Without slots the order is that of versions which knew no other, and their runs go on.
        return origin if self.began.slots is None else origin | {"layout": self.began.record()}

    def figures(self, dtype: str) -> JsonObject:
        """What the run is of, in numbers."""
        params, stats, evaluation = combine(self.adapter, self.base), self.train.stats, self.evaluation
        weights, stored = (self.adapter, "float32") if self.base is None else (self.base, dtype)
        return {
            "model": {
                "type": self.model.config.model_type,
                "layers": self.model.config.depth,
                "parameters": count(params),
                "trained": count(self.adapter),
                "bytes": nbytes(weights),
                "stored": _stored(weights, stored),
            },
            "data": {
                "records": stats.records,
                "tokens": stats.tokens,
                "supervised_tokens": stats.supervised_tokens,
                "truncated": stats.truncated,
                "dropped": stats.dropped,
                "evaluation_tokens": None if evaluation is None else evaluation.stats.supervised_tokens,
                "template": self.settings().template,
                "max_length": self.max_length,
                "efficiency": self.layout.efficiency,
            },
            "device": device_name(),
        }

    def settings(self) -> RunSettings:
        """What stands beside the adapter."""
        config = self.config
        share = config.eval_fraction
        if share is None:
            share = data_lib.EVAL_FRACTION if config.eval_data is None else 0.0
        return RunSettings(
            template=self.train.template if isinstance(self.train, InstructDataset) else None,
            data=config.data,
            eval_data=config.eval_data,
            eval_fraction=share,
            seed=config.seed,
            max_length=self.max_length,
            pack=config.pack,
            quantize=config.quantize,
            base=self.fingerprint,
            **{name: getattr(config, name) for name in OF_RECORDS},
        )

    def evaluate(self, adapter: Params, stop: StopSignals) -> float:
        """The loss on the evaluation data.

        Raises:
            Stopped: when a signal came.
        """
        assert self.evaluation is not None
        every = data_lib.eval_batches(self.evaluation, batch_size=self.config.batch_size, layout=self.eval_layout)

        def batches() -> Iterator[Batch]:
            for batch in every:
                if stop.asked:
                    raise Stopped
                yield batch

        return evaluate(self.model, combine(adapter, self.base), batches()).loss


def _rows_of(model: Model, ids: Sequence[int]) -> Sequence[int] | dict[str, Sequence[int]]:
    """The rows of these tokens, as `trainable_token_indices` names them: the embedding's, and a head's own."""
    if model.config.tie_word_embeddings:
        return ids
    return {model.config.embedding_path.split("/")[-2]: ids, "lm_head": ids}


def _form(config: FinetuneConfig, *, widened: bool) -> tuple[bool, str]:
    """(stacked?, the reason in words). `widened`: XLA would make float32 of the stacks (see `compiler_options`)."""
    if config.form != "auto":
        return config.form == "stacked", "as asked"
    names = (*config.targets, *config.modules_to_save)
    if config.layers_to_transform is not None or any(re.search(r"\.\d+\.|\\d|\[\d", name) for name in names):
        return False, "single layers are named"
    if widened and config.remat in ("none", "attention"):  # the others have no effect on unrolled layers of a CPU
        return False, "faster on this CPU"
    return True, "one compilation for all"


def _said(name: str | None, model: Model, params: PyTree, dtype: str) -> str:
    """What a model is, and how large."""
    size = f"{count(params):,} parameters, {nbytes(params) / 2**20:,.0f} MiB as {_stored(params, dtype)}"
    return f"{name} ({model.config.model_type}, {model.config.depth} layers, {size})"


def _stored(base: PyTree, dtype: str) -> str:
    """How the weights are stored, such as "bfloat16" or "nf4 (4.13 bits a parameter) and bfloat16"."""
    packed: list[Any] = [kernel for leaf in flatten(base).values() if is_weight(kernel := origin(leaf))]
    if not packed:
        return dtype
    bits = 8 * sum(q.nbytes for q in packed) / sum(q.size for q in packed)
    names = ", ".join(sorted({q.spec.name for q in packed}))
    return f"{names} ({bits:.2f} bits a parameter) and {dtype}"


def _kept() -> str:
    """Where compiled programs are kept."""
    directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not (directory and jax.config.jax_enable_compilation_cache):  # pyright: ignore[reportAttributeAccessIssue]
        return "for this run alone"
    return f"once, and kept in {directory}"


def _records(train: TextDataset | InstructDataset, config: FinetuneConfig) -> dict[str, str]:
    """What the records were taken for."""
    if not isinstance(train, InstructDataset):
        return {}
    formats = ", ".join(f"{count:,} of format {name}" for name, count in train.stats.formats)
    learned = config.supervise or "assistant"
    facts = {"records": f"{formats}; template {train.template}; supervised: {learned}"}
    return facts | ({"an epoch has": "; ".join(train.stats.sources)} if train.stats.sources else {})


def _describe(data: str | Sequence[str], train: TextDataset | InstructDataset, evaluation: Any) -> str:
    stats, source = train.stats, data if isinstance(data, str) else ", ".join(data)
    said = [*stats.cut(), *stats.odd()]
    parts = [f"{source}: {stats.tokens:,} tokens, {stats.supervised_tokens:,} supervised", *said]
    if evaluation is not None:
        said = [f"of the evaluation data {part}" for part in (*evaluation.stats.cut(), *evaluation.stats.odd())]
        parts += [f"{evaluation.stats.supervised_tokens:,} to evaluate on", *said]
        if (both := data_lib.trained_too(train, evaluation)) is not None:
            parts.append(both)
    return "; ".join(parts)
