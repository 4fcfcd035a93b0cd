"""config.json of the families that Llama's graph runs, both ways."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora._typing import Json, JsonObject
from jlora.models.config import MAX_HEADS, MAX_LAYERS, ConfigReader
from jlora.models.llama import FULL, SLIDING, LlamaConfig, each
from jlora.models.rope import LinearScaling, Llama3Scaling
from jlora.storage.fields import shown

_SCALINGS: Mapping[str, type[Llama3Scaling] | type[LinearScaling]] = {"llama3": Llama3Scaling, "linear": LinearScaling}
"""`rope_type` -> what it says."""

_ROPE_OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Fields of the rotation that may stand outside its object; transformers 4 has the first two there."""


def _rope_fields(fields: Mapping[str, Json]) -> JsonObject:
    """What config.json says of the rotation: in transformers 5's `rope_parameters`, in transformers 4's `rope_scaling`, and
    outside of these.

    Raises:
        ValueError: when two of them say different things. Which one counts, versions of transformers differ in.
    """
    said: dict[str, tuple[Any, str]] = {}
    for place in ("rope_parameters", "rope_scaling", None):
        found = {name: fields.get(name) for name in _ROPE_OUTSIDE} if place is None else fields.get(place) or {}
        if not isinstance(found, Mapping):
            raise ValueError(f"`{place}` in config.json must be an object; got {shown(found)}.")
        for name, value in found.items():
            where = f"`{place}.{name}`" if place else f"`{name}`"
            if isinstance(value, Mapping):
                raise ValueError(
                    f"{where} in config.json is an object: a rotation for each type of layer. This family has one for all."
                )
            name = "rope_type" if name == "type" else name
            if value is not None and said.setdefault(name, (value, where))[0] != value:
                other, elsewhere = said[name]
                raise ValueError(
                    f"{elsewhere} and {where} in config.json disagree: {shown(other)} and {shown(value)}. Keep the one that "
                    "the checkpoint was trained with."
                )
    return {name: value for name, (value, _) in said.items()}


def read_rope(reader: ConfigReader, theta: float) -> tuple[float, Llama3Scaling | LinearScaling | None]:
    """theta, that given when it is absent, and scaling."""
    fields = _rope_fields(reader.fields)
    rope = ConfigReader({"model_type": reader.fields.get("model_type"), **fields})
    theta = rope.number("rope_theta", theta)
    rope.require("partial_rotary_factor", None, (None, 1.0))
    kind = fields.get("rope_type", "default")
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"config.json asks for rope type {shown(kind)}; jlora computes 'default', {', '.join(map(repr, _SCALINGS))}. Its "
            "positions would be wrong beyond the original context with any other, so it is refused."
        )
    made = _SCALINGS[kind]
    missing = [name for name in made._fields if name not in fields]
    if missing:
        raise ValueError(f"The {kind} rope scaling in config.json lacks {', '.join(missing)}; got {sorted(fields)}.")
    integers = ("original_max_position_embeddings",)
    values: JsonObject = {
        name: rope.integer(name, 1) if name in integers else rope.number(name, 1.0) for name in made._fields
    }
    scaling = made(**values)
    low, high = (getattr(scaling, f"{end}_freq_factor", None) for end in ("low", "high"))
    if low is not None and high is not None and high <= low:
        raise ValueError(
            f"`high_freq_factor` in config.json must be greater than `low_freq_factor`; got {high} and {low}."
        )
    return theta, scaling


def write_rope(theta: float, scaling: Llama3Scaling | LinearScaling | None) -> JsonObject:
    """As in transformers 5's `rope_parameters`."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    (kind,) = [name for name, made in _SCALINGS.items() if type(scaling) is made]
    return {"rope_type": kind, **scaling._asdict(), "rope_theta": theta}


class LayerFields(NamedTuple):
    """What a family's config.json says of its layers, both ways, of `LlamaConfig`'s last three fields."""

    read: Callable[[ConfigReader, int], JsonObject]
    """(config.json, number of layers) -> those that are not as by default."""
    write: Callable[[LlamaConfig], JsonObject]


def layers_of(
    reader: ConfigReader, window: int | None, types: Sequence[str], rotated: Sequence[int] = (1,)
) -> JsonObject:
    """`LlamaConfig`'s fields. A window that no layer has is none, and what all layers share is said once."""
    if SLIDING in types and window is None:
        raise ValueError(
            f"config.json of a {reader.fields['model_type']} has {SLIDING!r} in `layer_types` and no `sliding_window` that is "
            "used. Say how wide it is, or make the layers 'full_attention'."
        )
    return {
        "sliding_window": window if SLIDING in types else None,
        "layer_types": tuple(types[: 1 if len(set(types)) == 1 else None]),
        "no_rope_layers": tuple(rotated[: 1 if len(set(rotated)) == 1 else None]),
    }


def _read_alike(reader: ConfigReader, depth: int) -> JsonObject:
    reader.each("layer_types", depth, (FULL,))
    return {}


ALIKE = LayerFields(_read_alike, lambda config: {})
"""All layers see everything."""


def _read_window(reader: ConfigReader, depth: int) -> JsonObject:
    window = reader.optional_integer("sliding_window", 4096)
    kind = FULL if window is None else SLIDING
    reader.each("layer_types", depth, (kind,))
    return layers_of(reader, window, [kind])


WINDOW = LayerFields(_read_window, lambda config: {"sliding_window": config.sliding_window})
"""One window in all layers, unless it is null."""


def _read_switched(reader: ConfigReader, depth: int) -> JsonObject:
    window = reader.optional_integer("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None
    first = reader.integer("max_window_layers", 28, least=0)
    types = [FULL if window is None or i < first else SLIDING for i in range(depth)]
    return layers_of(reader, window, reader.each("layer_types", depth, (FULL, SLIDING)) or types)


def write_types(config: LlamaConfig) -> JsonObject:
    """The window and which layers have it."""
    types = each(config.layer_types, config.depth)
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": list(types),
        "max_window_layers": types.index(SLIDING),  # which transformers 4 reads
    }


SWITCHED = LayerFields(_read_switched, lambda config: {} if config.sliding_window is None else write_types(config))
"""A window that is off by default, and then of the layers from the `max_window_layers`th on, or of those listed."""


def _read_no_rope(reader: ConfigReader, depth: int) -> JsonObject:
    interval = reader.integer("no_rope_layer_interval", 4)
    rotated = reader.each("no_rope_layers", depth, (0, 1)) or [int((i + 1) % interval != 0) for i in range(depth)]
    window = reader.optional_integer("sliding_window", None) if reader.flag("use_sliding_window", False) else None
    types = [SLIDING if window is not None and not turns else FULL for turns in rotated]
    return layers_of(reader, window, reader.each("layer_types", depth, (FULL, SLIDING)) or types, rotated)


def _write_no_rope(config: LlamaConfig) -> JsonObject:
    fields: JsonObject = {"no_rope_layers": list(each(config.no_rope_layers, config.depth))}
    return fields if config.sliding_window is None else fields | write_types(config)


NO_ROPE = LayerFields(_read_no_rope, _write_no_rope)
"""Layers without rotation, every so many-th or as listed; a window in those, where one is switched on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaFields:
    """A family's config.json: what differs from Llama's."""

    defaults: Mapping[str, Json]
    """What transformers' config class has for an absent field, where it is not Llama's."""
    attention_bias: tuple[bool, bool] | None = None
    """Whether (queries, keys and values; the output) have biases; None: the field `attention_bias` says it of all four."""
    mlp_bias: bool = False
    """Whether the field `mlp_bias` says that the MLP has biases; without it there are none."""
    qk_norm: bool = False
    layers: LayerFields = ALIKE

    @property
    def absent(self) -> JsonObject:
        return {**_LLAMA, **self.defaults}

    def read(self, reader: ConfigReader) -> LlamaConfig:
        return LlamaConfig(**self.fields(reader))

    def fields(self, reader: ConfigReader) -> JsonObject:
        reader.require("hidden_act", "silu", ("silu",))
        reader.require("pretraining_tp", 1, (1,))
        theta, scaling = read_rope(reader, self.absent["rope_theta"])
        return self.sizes(reader) | {"rope_theta": theta, "rope_scaling": scaling}

    def sizes(self, reader: ConfigReader) -> JsonObject:
        """All but the rotation."""
        absent = self.absent
        width = reader.integer("hidden_size", absent["hidden_size"])
        heads = reader.integer("num_attention_heads", absent["num_attention_heads"], most=MAX_HEADS)
        null = "num_key_value_heads" in reader.fields  # transformers: null is one a head, absence the family's default
        kv_heads = heads if null else absent.get("num_key_value_heads", heads)
        head_dim = reader.integer("head_dim", absent.get("head_dim", width // heads), most=MAX_HEADS)
        if head_dim % 2:
            raise ValueError(f"`head_dim` in config.json must be even, for its rotation by pairs; got {head_dim}.")
        depth = reader.integer("num_hidden_layers", absent["num_hidden_layers"], most=MAX_LAYERS)
        qkv_bias, o_bias = self.attention_bias or 2 * (reader.flag("attention_bias", False),)
        return {
            "model_type": reader.fields["model_type"],
            "vocab_size": reader.integer("vocab_size", absent["vocab_size"]),
            "hidden_size": width,
            "intermediate_size": reader.integer("intermediate_size", absent["intermediate_size"]),
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": reader.divisor(
                "num_key_value_heads", kv_heads, of=heads, of_name="num_attention_heads"
            ),
            "head_dim": head_dim,
            "max_position_embeddings": reader.integer("max_position_embeddings", absent["max_position_embeddings"]),
            "rms_norm_eps": reader.number("rms_norm_eps", 1e-6, most=1.0),
            "tie_word_embeddings": reader.flag("tie_word_embeddings", absent["tie_word_embeddings"]),
            "qkv_bias": qkv_bias,
            "o_bias": o_bias,
            "mlp_bias": self.mlp_bias and reader.flag("mlp_bias", False),
            "qk_norm": self.qk_norm,
            "bos_token_id": reader.token_id("bos_token_id"),
            "eos_token_id": reader.token_ids("eos_token_id"),
            **self.layers.read(reader, depth),
        }

    def write(self, config: LlamaConfig) -> JsonObject:
        fields = dataclasses.asdict(config)
        for ours in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "rope_scaling", "sliding_window", "layer_types"):
            del fields[ours]
        del fields["no_rope_layers"]
        rope = write_rope(config.rope_theta, config.rope_scaling)
        if self.attention_bias is None:
            fields["attention_bias"] = config.qkv_bias
        if self.mlp_bias:
            fields["mlp_bias"] = config.mlp_bias
        if config.rope_scaling is not None:
            fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        # transformers 5 reads rope_parameters, 4 reads rope_theta and rope_scaling.
        return fields | {"hidden_act": "silu", "rope_parameters": rope} | self.layers.write(config)


_LLAMA: Mapping[str, Json] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
"""What transformers' LlamaConfig has for an absent field. One head of keys a head where nothing else is said."""
