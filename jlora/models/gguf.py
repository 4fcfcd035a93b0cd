"""How llama.cpp has each family, both ways: the hyperparameters of a GGUF file <-> the fields of a config.json.

Reference: llama.cpp, `src/llama-model.cpp` (`load_hparams`) and `conversion/` (`convert_hf_to_gguf.py`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora._typing import Json, JsonObject
from jlora.models.gemma3 import Gemma3Config
from jlora.models.llama import FULL, SLIDING, LlamaConfig
from jlora.models.rope import LinearScaling, Llama3Scaling, rope_frequencies
from jlora.storage.fields import Kind, check_fields, integer, is_integer, number, one_of, positive, shown

FACTORS = "rope_freqs.weight"
"""What the frequencies of the rotation are divided by, where that is not one number."""


class Stored(NamedTuple):
    """What a file says, as far as its config depends on it."""

    where: str
    """Its name, for errors."""
    architecture: str
    said: Mapping[str, Json]
    """Hyperparameters, without the architecture before their names; lists are NumPy arrays."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, in NumPy's order."""
    factors: np.ndarray | None
    """The tensor `FACTORS`, where there is one."""

    def check(self, table: Mapping[str, Kind]) -> None:
        """`check_fields` of the hyperparameters in a table, by their names in the file."""
        named = {f"{self.architecture}.{key}": value for key, value in self.said.items() if key in table}
        check_fields(named, {f"{self.architecture}.{key}": kind for key, kind in table.items()}, where=self.where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFLayout:
    """How llama.cpp has a family. The names of its tensors are those of the package gguf, by architecture."""

    architecture: str
    """`general.architecture`."""
    keys: Mapping[str, str]
    """Hyperparameter, without the architecture before its name -> field of the config and of config.json."""
    more: Callable[[Any], JsonObject] = lambda config: {}
    """The model's config -> hyperparameters beyond `keys`, or in place of theirs."""
    fields_of: Callable[[Stored, JsonObject], JsonObject] = lambda stored, fields: {}
    """The inverse of `more` and `tensors`: (a file, the fields that `keys` give) -> further fields of config.json."""
    reads: tuple[str, ...] = ()
    """Hyperparameters that `fields_of` uses."""
    rotates_pairs: bool = False
    """Whether llama.cpp rotates neighbours where the checkpoints rotate halves, so that rows of queries and keys are permuted."""
    scale_offset: float = 0.0
    """Is added to the scales of norms."""
    tensors: Callable[[Any], Mapping[str, np.ndarray]] = lambda config: {}
    """The model's config -> tensors that are no parameters."""
    beside: tuple[str, ...] = ()
    """The names that `tensors` may give."""
    lacks: Callable[[Any], Iterable[str]] = lambda config: ()
    """The model's config -> what of it llama.cpp does not compute, each as "`field` = value"."""

    def fields(self, config: Any) -> JsonObject:
        """The model's config -> its hyperparameters, without the architecture before their names."""
        return {key: getattr(config, name) for key, name in self.keys.items()} | self.more(config)

    def read(self, stored: Stored) -> JsonObject:
        """The fields of the config.json that a file's hyperparameters and tensors mean.

        Raises:
            ValueError: for hyperparameters that are missing, out of range, or not computed, by their names in the file.
        """
        said = {key: _same(value) if key in self.keys else value for key, value in stored.said.items()}
        named = {f"{self.architecture}.{key}": value for key, value in said.items()}
        table = {f"{self.architecture}.{key}": _FRACTION if key in _FRACTIONS else integer() for key in self.keys}
        required = [f"{self.architecture}.{key}" for key in self.keys if key in _REQUIRED]
        check_fields(named, table, where=stored.where, required=required)
        fields: JsonObject = {}
        for key, name in self.keys.items():
            if key in said and fields.setdefault(name, said[key]) != said[key]:
                other = next(k for k, n in self.keys.items() if n == name and k in said and said[k] != said[key])
                raise ValueError(
                    f"{stored.where} has `{self.architecture}.{key}` = {said[key]} and `{self.architecture}.{other}` = "
                    f"{said[other]}; jlora computes models in which they are the same."
                )
        rest = {key: _same(value) for key, value in said.items() if key not in self.keys and key not in self.reads}
        foreign = [
            f"`{self.architecture}.{key}` = {shown(value)}"
            for key, value in rest.items()
            if key not in _IDLE or not _IDLE[key](value, said)
        ]
        if foreign:
            raise ValueError(
                f"{stored.where} has {', '.join(foreign[:8])}{' and more' if len(foreign) > 8 else ''}; jlora's "
                f"{self.architecture} does not compute that, and other outputs would come of ignoring it."
            )
        embedding = stored.shapes.get("token_embd.weight")
        if embedding is None or len(embedding) != 2:
            raise ValueError(f"{stored.where} has no embedding: no tensor 'token_embd.weight' with two axes.")
        # Files differ in whether they say it; a row is a token.
        fields |= {"vocab_size": embedding[0], "tie_word_embeddings": "output.weight" not in stored.shapes}
        return fields | self.fields_of(stored, fields)


_REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_FRACTIONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "rope.freq_base")
_FRACTION = positive()


_IDLE: Mapping[str, Callable[[Json, Mapping[str, Json]], bool]] = {
    "vocab_size": lambda value, said: True,
    "attention.causal": lambda value, said: value is True,
    "expert_count": lambda value, said: value == 0,
    "expert_used_count": lambda value, said: value == 0,
    "rope.scale_linear": lambda value, said: value == 1,
    "rope.scaling.attn_factor": lambda value, said: value == 1,
    # Of a rotation scaled otherwise, whose type is refused.
    "rope.scaling.original_context_length": lambda value, said: True,
    "rope.scaling.finetuned": lambda value, said: True,
    "attention.sliding_window": lambda value, said: (
        value == 0 or (is_integer(value) and is_integer(said.get("context_length")) and value >= said["context_length"])
    ),
    "tensor_data_layout": lambda value, said: value == "Meta AI original pth",
}
"""Hyperparameters of any architecture that change nothing of what is computed, and the values of which that is true."""


def _same(value: Json) -> Json:
    """One number for a list that has the same for each layer."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        return value[0].item()
    return value.tolist()[:8] if isinstance(value, np.ndarray) else value


_GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}

_LLAMA_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}

_SCALING = ("rope.scaling.type", "rope.scaling.factor")


def _llama_more(config: LlamaConfig) -> JsonObject:
    # These graphs of llama.cpp have no windows: up to the narrowest they compute the same.
    window = config.sliding_window or config.max_position_embeddings
    return {"context_length": min(config.max_position_embeddings, window), **_linear_scaling(config)}


def _linear_scaling(config: LlamaConfig) -> JsonObject:
    scaling = config.rope_scaling
    return (
        {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor} if type(scaling) is LinearScaling else {}
    )


def _llama_fields(stored: Stored, fields: JsonObject) -> JsonObject:
    """What llama.cpp takes for absent hyperparameters, which is not what config.json means by absent fields."""
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    absent = {"num_key_value_heads": heads, "head_dim": width // heads, "rope_theta": 10000.0}
    found = {name: fields.get(name, value) for name, value in absent.items()}
    found |= {"attention_bias": "blk.0.attn_q.bias" in stored.shapes, "mlp_bias": "blk.0.ffn_up.bias" in stored.shapes}
    return found | _read_scaling(stored, found["head_dim"], found["rope_theta"])


def _read_scaling(stored: Stored, head_dim: int, theta: float) -> JsonObject:
    kind = stored.said.get("rope.scaling.type", "none")
    stored.check({"rope.scaling.type": one_of("none", "linear"), "rope.scaling.factor": number(0, 1e6)})
    factor = stored.said.get("rope.scaling.factor") or 1.0
    scaling: Llama3Scaling | LinearScaling | None = LinearScaling(float(factor)) if kind == "linear" else None
    if stored.factors is not None:
        if scaling is not None:
            raise ValueError(f"{stored.where} scales its rotation twice: linearly, and by the tensor {FACTORS!r}.")
        scaling = scaling_of(stored.factors, head_dim, theta, where=stored.where)
    if scaling is None:
        return {}
    name = "linear" if type(scaling) is LinearScaling else "llama3"
    return {"rope_scaling": {"rope_type": name, **scaling._asdict()}}


def _rope_factors(config: LlamaConfig) -> dict[str, np.ndarray]:
    """What llama.cpp divides the frequencies by, where that is not one number."""
    if type(config.rope_scaling) is not Llama3Scaling:
        return {}
    return {FACTORS: _factors(config.head_dim, config.rope_theta, config.rope_scaling)}


def _factors(head_dim: int, theta: float, scaling: Llama3Scaling) -> np.ndarray:
    plain, scaled = (rope_frequencies(head_dim, theta, s) for s in (None, scaling))
    return plain / scaled


_PUBLISHED = (1.0, 4.0)
"""`low_freq_factor` and `high_freq_factor` of every Llama 3 there is."""


def scaling_of(factors: np.ndarray, head_dim: int, theta: float, *, where: str) -> Llama3Scaling | LinearScaling | None:
    """The scaling that a file's factors are of: `rope_type: llama3`, whose four numbers a file does not say.

    Raises:
        ValueError: when no such scaling gives them, as those of Phi's LongRoPE.
    """
    factors = factors.astype(np.float64)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or factors.min() < 1e-3:
        raise ValueError(
            f"{where} has a {FACTORS!r} of {factors.shape} and heads of {head_dim}; there is a positive factor for each pair."
        )
    if np.ptp(factors) < 1e-6:
        return None if abs(factors[0] - 1) < 1e-6 else LinearScaling(float(factors[0]))
    for scaling in _candidates(factors, head_dim, theta):
        if np.allclose(_factors(head_dim, theta, scaling), factors, rtol=1e-5):
            return scaling
    raise ValueError(
        f"{where} has a {FACTORS!r} that no rotation of the type 'llama3' gives, and jlora computes no other that is not the same "
        "for all frequencies."
    )


def _candidates(factors: np.ndarray, head_dim: int, theta: float) -> Iterable[Llama3Scaling]:
    """Scalings that may give these factors: one published, or the line through what lies between kept and slowed ones."""
    turning = rope_frequencies(head_dim, theta, None).astype(np.float64) / (2 * np.pi)  # turns per position
    factor = float(f"{factors.max():.6g}")
    between = (factors > 1 + 1e-5) & (factors < factors.max() * (1 - 1e-5))
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    low, high = _PUBLISHED
    contexts = [1 << k for k in range(4, 21)]
    if between.any():
        contexts.insert(0, round(float(np.median((smooth * (high - low) + low)[between] / turning[between]))))
    yield from (Llama3Scaling(factor, low, high, context) for context in contexts if context > 0)
    if (
        between.sum() > 1
    ):  # smooth = turning * slope - offset; the three other numbers may all be so many times as large
        slope, offset = np.polyfit(turning[between], smooth[between], 1)
        if slope > 0 > offset:
            context = max(1, round(low * slope / -offset))
            width = context / slope
            low = float(f"{-offset * width:.6g}")
            yield Llama3Scaling(factor, low, float(f"{low + width:.6g}"), context)


def _lacks(*, biases: tuple[str, ...] = (), factors: bool = False):
    """What a graph like Llama's does not compute: these biases of `LlamaConfig`, and factors of the frequencies."""

    def found(config: LlamaConfig) -> list[str]:
        names = [f"`{name}` = True" for name in biases if getattr(config, name)]
        return names + [f"`rope_scaling` = {config.rope_scaling}"] * (not factors and bool(_rope_factors(config)))

    return found


def _smollm3_lacks(config: LlamaConfig) -> list[str]:
    """llama.cpp leaves the rotation out in every fourth layer, whatever the file says."""
    rotated = [kind.rope is not None for kind in config.kinds]
    fourth = rotated == [(i + 1) % 4 != 0 for i in range(config.depth)]
    found = _lacks(biases=("o_bias", "mlp_bias"))(config)
    return found if fourth else [*found, f"`no_rope_layers` = {[int(turns) for turns in rotated]}"]


_GEMMA3_WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa")


def _gemma3_more(config: Gemma3Config) -> JsonObject:
    fields = _linear_scaling(config)
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
        fields["attention.sliding_window_pattern"] = [kind.window is not None for kind in config.kinds]
        fields["rope.freq_base_swa"] = config.rope_local_base_freq
    if config.final_logit_softcapping is not None:
        fields["final_logit_softcapping"] = config.final_logit_softcapping
    return fields


def _gemma3_fields(stored: Stored, fields: JsonObject) -> JsonObject:
    said, depth = stored.said, fields["num_hidden_layers"]
    fractions = ("rope.freq_base_swa", "final_logit_softcapping")
    stored.check({"attention.sliding_window": integer(), **dict.fromkeys(fractions, positive())})
    found = _llama_fields(stored, fields)
    window = said.get("attention.sliding_window")
    found |= {
        "sliding_window": window,
        "layer_types": [SLIDING if window and narrow else FULL for narrow in _pattern(stored, depth)],
        "rope_local_base_freq": said.get("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _gemma3_scalar(
            fields["hidden_size"], fields["num_attention_heads"], depth, found["head_dim"]
        ),
        "final_logit_softcapping": said.get("final_logit_softcapping"),
    }
    return found


def _pattern(stored: Stored, depth: int) -> list[bool]:
    """Which layers have the window: said of each, or by the number after which one sees everything, which is 6."""
    pattern = stored.said.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray) and pattern.shape == (depth,) and set(pattern.tolist()) <= {0, 1}:
        return [bool(narrow) for narrow in pattern]
    stored.check({"attention.sliding_window_pattern": integer()})
    return [(i + 1) % pattern != 0 for i in range(depth)]


def _gemma3_scalar(width: int, heads: int, depth: int, head_dim: int) -> int:
    """llama.cpp knows the scale of the scores by the number of layers: 62 are of the 27B model."""
    return width // heads if depth == 62 else head_dim


def _gemma3_lacks(config: Gemma3Config) -> list[str]:
    scalar = _gemma3_scalar(config.hidden_size, config.num_attention_heads, config.depth, config.head_dim)
    wrong = (
        [] if config.query_pre_attn_scalar == scalar else [f"`query_pre_attn_scalar` = {config.query_pre_attn_scalar}"]
    )
    return _lacks(biases=("o_bias",))(config) + wrong


def _like_llama(architecture: str, **changes: Any) -> GGUFLayout:
    layout = GGUFLayout(
        architecture=architecture,
        keys=_LLAMA_KEYS,
        more=_llama_more,
        fields_of=_llama_fields,
        reads=_SCALING,
        lacks=_lacks(),
    )
    return dataclasses.replace(layout, **changes)


GPT2 = GGUFLayout(architecture="gpt2", keys=_GPT2_KEYS)
LLAMA = _like_llama("llama", rotates_pairs=True, tensors=_rope_factors, beside=(FACTORS,), lacks=_lacks(factors=True))
QWEN2 = _like_llama("qwen2")
QWEN3 = _like_llama("qwen3", lacks=_lacks(biases=("o_bias",)))
SMOLLM3 = _like_llama("smollm3", rotates_pairs=True, lacks=_smollm3_lacks)
GEMMA3 = _like_llama(
    "gemma3",
    more=_gemma3_more,
    fields_of=_gemma3_fields,
    reads=(*_SCALING, *_GEMMA3_WINDOW, "final_logit_softcapping"),
    scale_offset=1.0,
    lacks=_gemma3_lacks,
)
