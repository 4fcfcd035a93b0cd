"""Our models in lm-evaluation-harness (the extra `lm-eval`), which brings hundreds of tasks.

    python -m jlora.lm_eval run --model jlora --model_args adapter=OUTPUT/adapter --tasks arc_easy --batch_size 8

is the harness's own command line with `jlora` among its models; in Python, `import jlora.lm_eval` registers the name:
`lm_eval.simple_evaluate(model="jlora", model_args={"pretrained": "gpt2"}, tasks=["lambada_openai"])`. A model that is loaded is
`JloraLM(model, params, tokenizer)`.

Reference: https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md. Figures are those of its `hf` model on the same
weights: the same tokens, windows and stops.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from jlora._typing import DTypeName, Json, JsonObject, Params, PretrainedTokenizer
from jlora.cli.as_trained import as_trained
from jlora.cli.base import Weights, load_weights, resolve_model
from jlora.evaluation.likelihood import likelihoods
from jlora.generation import generate_many
from jlora.models import Model
from jlora.quant import FormatName, Kept

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise ImportError("The harness is not installed: pip install 'jlora[lm-eval]'.") from error
from tqdm import tqdm

_MAX_NEW_TOKENS = 256
"""Where a task does not say; the harness's own."""
_DEFAULT_DEVICE = "cuda:0"
"""What the harness's command line gives every model where nobody named a device; where we compute is JAX's choice."""
_SAMPLING = {"temperature", "top_k", "top_p"}


@register_model("jlora")
class JloraLM(TemplateLM):
    """A model of `jlora.models`, adapted or not, with its tokenizer.

    Args:
        batch_size: rows at once.
        max_length: tokens of a window; None: the model's positions.
        add_bos_token: whether texts begin with the tokenizer's beginning-of-text; None: as it does by itself.
        name: of the model, for the harness's records.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: PretrainedTokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        name: str = "jlora",
    ):
        super().__init__()
        positions = model.config.max_length
        if batch_size < 1 or not 1 <= (max_length or positions) <= positions:
            raise ValueError(
                f"`batch_size` must be at least 1 and `max_length` in 1..{positions}, the model's positions; got {batch_size} and "
                f"{max_length}."
            )
        self._model, self._params, self.tokenizer = model, params, tokenizer
        self._batch_size, self._max_length = batch_size, max_length or positions
        self._add_bos, self._name = add_bos_token, name

    @classmethod
    def load(
        cls,
        pretrained: str | None = None,
        adapter: str | None = None,
        *,
        quantize: Literal["none"] | FormatName | Kept | None = None,
        dtype: DTypeName = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> "JloraLM":
        """What `--model_args` name, as `jlora evaluate` loads it.

        Args:
            pretrained: directory or hub id, or a GGUF file; default: the base that `adapter` names.
            adapter: directory such as OUTPUT/adapter.
            quantize, dtype: as the flags of `jlora evaluate`; the base is packed as in the adapter's run where nothing is said.

        Raises:
            ValueError: for another batch size than a number.
        """
        if not str(batch_size).isdigit():
            raise ValueError(f"`batch_size` must be a number, since it is not searched for here; got {batch_size!r}.")
        weights, _ = as_trained(Weights(model=pretrained, adapter=adapter, quantize=quantize, dtype=dtype), "quantize")
        model, params, tokenizer, _ = load_weights(weights)
        return cls(
            model,
            params,
            tokenizer,
            batch_size=int(batch_size),
            max_length=max_length,
            add_bos_token=add_bos_token,
            name=adapter or resolve_model(weights),
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: JsonObject | None = None) -> "JloraLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: JsonObject, additional_config: JsonObject | None = None) -> "JloraLM":
        given = dict(arg_dict) | {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == _DEFAULT_DEVICE:
            del given["device"]
        for name, instead in (("device", "JAX_PLATFORMS in the environment"), ("max_batch_size", "batch_size")):
            if name in given:
                raise ValueError(f"`{name}` is not of this model; got {given[name]!r}. Use {instead}.")
        return cls.load(**given)

    # What the harness asks of a model's texts

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the `hf` model: with what the tokenizer adds, unless the text begins with it."""
        added = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            added = False
        return list(self.tokenizer(string, **({} if added is None else {"add_special_tokens": added}))["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # What it asks of the model

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"A continuation must have at most the {self.max_length} tokens of a window; got {len(continuation)}."
                )
            kept = max(self.max_length + 1 - len(continuation), 1)  # cut on the left, as `hf` does
            rows.append((context[-kept:], continuation))
        found: dict[int, tuple[float, bool]] = {}
        made = likelihoods(self._model, self._params, rows, batch_size=self.batch_size)
        for i, likelihood in tqdm(made, total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests"):
            found[i] = likelihood.log, likelihood.greedy
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += log
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        asked: list[tuple[Any, ...]] = [request.args for request in requests]
        alike: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            alike.setdefault(repr(settings), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for chosen in alike.values():
                settings = _settings(asked[chosen[0]][1], self.tokenizer.decode([self.eot_token_id]))
                for place, text in self._continued([asked[i][0] for i in chosen], **settings):
                    found[chosen[place]] = text
                    self.cache_hook.add_partial("generate_until", asked[chosen[place]], text)
                    bar.update()
        return [found[i] for i in range(len(requests))]

    def _continued(
        self, contexts: Sequence[str], *, until: list[str], max_new_tokens: int, seed: int, **sampling: Any
    ) -> Iterator[tuple[int, str]]:
        """(index of a context, what follows it until one of the texts of `until`)."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"A task asks for {max_new_tokens} new tokens, and a window has {self.max_length}. Give the task a smaller "
                "`max_gen_toks`, or --gen_kwargs max_gen_toks=N."
            )

        def said(new: Sequence[int]) -> str:
            return self.tokenizer.decode(new, skip_special_tokens=True)

        def ended(_: int, new: list[int]) -> bool:
            text = said(new)
            return any(stop and stop in text for stop in until)

        prompts = [self.tok_encode(context)[-room:] for context in contexts]  # cut on the left, as `hf` does
        made = generate_many(
            self._model,
            self._params,
            prompts,
            batch_size=self.batch_size,
            max_new_tokens=max_new_tokens,
            key=jax.random.key(seed),
            ended=ended,
            **sampling,
        )
        for i, new in made:
            yield i, postprocess_generated_text(said(new), until, None)


def _settings(given: JsonObject, eos: str) -> JsonObject:
    """The arguments of `_continued` of a request's.

    Raises:
        ValueError: for one that is not computed here.
    """
    kwargs: dict[str, Json] = dict(normalize_gen_kwargs(given, _MAX_NEW_TOKENS))
    until = handle_stop_sequences(kwargs.pop("until", None), eos)
    new, sample = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", False)
    seed = kwargs.pop("seed", 0)
    if others := sorted(kwargs.keys() - _SAMPLING):
        raise ValueError(
            f"A task asks for generation with {', '.join(f'{n}={kwargs[n]!r}' for n in others)}, which is not computed here; there "
            f"are until, max_gen_toks, do_sample, seed and {', '.join(sorted(_SAMPLING))}."
        )
    drawn = {"top_k": int(kwargs.get("top_k", 0)), "top_p": float(kwargs.get("top_p", 1.0))}
    temperature = float(kwargs.get("temperature", 1.0)) if sample else 0.0
    return {"until": until, "max_new_tokens": int(new), "seed": seed, "temperature": temperature, **drawn}


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
