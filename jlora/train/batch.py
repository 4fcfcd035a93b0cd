"""What a batch of `causal_lm_loss` may hold: checked on the host before a step, and by a NaN where the host cannot look."""

import difflib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._numbers import IGNORED
from jlora._typing import AnyArray, Array, Batch, Bool, Float, Int

REQUIRED = ("input_ids", "labels")
OPTIONAL = ("attention_mask", "position_ids", "positions", "segment_ids", "adapter_ids")

_SUPERVISION = "Set the labels of what is not to be learned to -100, and leave it out."
_BORDERS = "Give `position_ids` that restart at 0, or `segment_ids`, which say the same, and leave it out."
_NOT_TAKEN: Mapping[str, str] = {
    "num_items_in_batch": "The step divides by the supervised tokens that it counts itself; leave it out.",
    "length": "It is the column that transformers groups rows by, and says nothing to the loss; leave it out.",
    "lengths": "Padding is told by `attention_mask` or `segment_ids`; leave it out.",
    "cu_seq_lens_q": _BORDERS,
    "cu_seq_lens_k": _BORDERS,
    "cu_seqlens": _BORDERS,
    "max_length_q": _BORDERS,
    "max_length_k": _BORDERS,
    "seq_idx": _BORDERS,
    "sequence_ids": _BORDERS,
    "special_tokens_mask": _SUPERVISION,
    "loss_mask": _SUPERVISION,
    "assistant_masks": _SUPERVISION,
    "completion_mask": _SUPERVISION,
    "prompt_mask": _SUPERVISION,
    "loss_weights": "Every supervised token counts 1; write a loss of your own for weights.",
    "weights": "Every supervised token counts 1; write a loss of your own for weights.",
    "token_type_ids": "transformers' GPT-2 adds embeddings by them, which models here do not; leave it out.",
    "inputs_embeds": "The models here look embeddings up by `input_ids`.",
    "offset_mapping": "It places tokens in their text, and says nothing to the loss; leave it out.",
    "overflow_to_sample_mapping": "It places rows in their data set, and says nothing to the loss; leave it out.",
}
"""Keys of collators and tokenizers that are refused with the reason: ignoring them would be another loss, or could be."""


class Limits(NamedTuple):
    """What bounds the numbers of a batch."""

    vocabulary: int
    """Rows of the embedding."""
    positions: int | None
    """Learned positions; None where any position can be computed."""


def check_form(batch: Batch, limits: Limits) -> None:
    """Keys, shapes and dtypes. Looks at no value, so that it works on traced arrays too.

    Raises:
        ValueError: for a key that is missing or that the loss does not take, a value that is no array, a shape or a dtype of
            another kind, keys that exclude each other, and rows longer than the model's learned positions.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"A batch maps names to arrays; got {type(batch).__name__}.")
    for name in batch:
        if name not in (*REQUIRED, *OPTIONAL):
            raise ValueError(_unknown(name))
    missing = [name for name in REQUIRED if name not in batch]
    if missing:
        raise ValueError(
            f"A batch needs `input_ids` and `labels`; got {', '.join(map(repr, batch)) or 'nothing'}. Add {missing[0]!r} (labels "
            "stand at the positions of input_ids, -100 where nothing is to be learned)."
        )
    arrays = {
        name: value for name, value in batch.items() if name != "adapter_ids"
    }  # these may be names: `route` checks them
    for name, value in arrays.items():
        _check_dtype(name, value)
    shape = batch["input_ids"].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"`input_ids` must be [batch, seq], neither of them 0; got {list(shape)}. One row is [1, seq]."
        )
    for name, value in arrays.items():
        if value.shape != shape:
            raise ValueError(
                f"`{name}` must have the shape {list(shape)} of `input_ids`; got {list(value.shape)}.{_EDIT.get(name, '')}"
            )
    choices = np.shape(batch.get("adapter_ids", 0))
    if choices not in ((), shape[:1]):
        raise ValueError(f"`adapter_ids` must be [{shape[0]}], one for each row, or one for all; got {list(choices)}.")
    for one, other in (("positions", "position_ids"), ("attention_mask", "segment_ids")):
        if one in batch and other in batch:
            raise ValueError(f"`{one}` and `{other}` both say {_SAME[one]}. Give one of them.")
    given = "positions" in batch or "position_ids" in batch
    if limits.positions is not None and shape[1] > limits.positions and not given:
        raise ValueError(
            f"The model has {limits.positions} learned positions; got rows of {shape[1]} tokens. Cut them, or give packed rows "
            "`position_ids` that restart."
        )


_EDIT = {
    "attention_mask": " Masks are [batch, seq], 1 for tokens and 0 for padding; give packed rows `segment_ids`.",
    "labels": " Labels stand at the positions of `input_ids`; the shift is made here.",
    "position_ids": " Repeat one row for all: `np.broadcast_to(position_ids, input_ids.shape)`.",
}
_SAME = {"positions": "where tokens stand", "attention_mask": "which tokens are padding"}


def _unknown(name: str) -> str:
    taken = f"The loss takes {', '.join((*REQUIRED, *OPTIONAL))}."
    if name in _NOT_TAKEN:
        return f"A batch must not hold {name!r}. {_NOT_TAKEN[name]} {taken}"
    close = difflib.get_close_matches(str(name), (*REQUIRED, *OPTIONAL), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else " Leave it out, or write a loss of your own that uses it."
    return f"A batch must not hold {name!r}, which would be ignored.{hint} {taken}"


def _check_dtype(name: str, value: object) -> None:
    if not isinstance(value, np.ndarray | jax.Array):
        raise ValueError(
            f"`{name}` must be a NumPy or JAX array; got {type(value).__name__}. Convert it with `np.asarray`."
        )
    dtype = np.dtype(value.dtype) if not jnp.issubdtype(value.dtype, jax.dtypes.extended) else None
    kind = "" if dtype is None else dtype.kind
    allowed = {"attention_mask": "iub", "labels": "i"}.get(name, "iu")
    if kind not in tuple(allowed):
        extra = {
            "attention_mask": " A mask says 1 (attend) or 0 (padding); additive masks are not taken.",
            "labels": f" Labels are signed: {IGNORED} is not supervised.",
        }.get(name, " Convert it with `.astype(np.int32)` where the numbers are whole.")
        raise ValueError(f"`{name}` must be int32; got {value.dtype}.{extra}")


def check_numbers(batch: Batch, limits: Limits, *, wait: bool) -> None:
    """Ids, labels, positions and masks of a batch against what they can be; a few microseconds an array on the host.

    Traced arrays have no values, and are left to `soundness`; so are arrays on an accelerator unless `wait` is set: looking at
    one would hold the host until the device is there.

    Raises:
        ValueError: for a number outside its range, with its place.
    """
    for name, low, high in _ranges(limits):
        value = _on_host(batch.get(name), wait)
        if value is not None and value.size and _leaves(value, low, high, name):
            raise ValueError(_out_of_range(name, value, low, high))


def _ranges(limits: Limits) -> Iterator[tuple[str, int, int | None]]:
    """(key, least, greatest or None for none) of every array that is bounded. Labels may be `IGNORED` too."""
    last = None if limits.positions is None else limits.positions - 1
    yield "input_ids", 0, limits.vocabulary - 1
    yield "labels", 0, limits.vocabulary - 1
    yield "attention_mask", 0, 1
    yield "segment_ids", 0, None
    yield "positions", 0, last
    yield "position_ids", 0, last


def _on_host(value: AnyArray | None, wait: bool) -> np.ndarray | None:
    """The array, or None where it cannot be looked at (for nothing)."""
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, Tracer) or not value.is_fully_addressable:
        return None
    if wait or all(device.platform == "cpu" for device in value.devices()):
        return np.asarray(value)
    return None


def _leaves(value: np.ndarray, low: int, high: int | None, name: str) -> bool:
    """Whether a number leaves its range. The least and the greatest tell, but for labels that are ignored."""
    if high is not None and value.max() > high:
        return True
    return bool(value.min() < low) and (name != "labels" or bool(np.any((value < low) & (value != IGNORED))))


def _out_of_range(name: str, value: np.ndarray, low: int, high: int | None) -> str:
    bad = (value < low) | (False if high is None else value > high)
    if name == "labels":
        bad &= value != IGNORED
    row, column = (int(i) for i in np.argwhere(bad)[0])
    wanted = f"at least {low}" if high is None else f"in {low}..{high}"
    wanted += f" or {IGNORED} (not supervised)" if name == "labels" else ""
    hint = {
        "input_ids": "Is this the model's own tokenizer? Pad with an id that it has.",
        "labels": "Is this the model's own tokenizer?",
        "attention_mask": "Give packed rows `segment_ids`.",
        "segment_ids": "0 is padding, 1 and more are segments.",
    }.get(name, "Positions restart in every segment, and padding may have any of them.")
    return f"`{name}` must be {wanted}; got {value[row, column]} in row {row}, column {column}. {hint}"


def soundness(batch: Batch, limits: Limits) -> Float[Array, ""]:
    """1 where every number of the batch is in its range, NaN where one is not: a factor of the loss, for traced arrays.

    Otherwise an id would be clipped into the vocabulary, and a label beyond it be a target that no logit stands for.
    """
    bad = jnp.zeros((), bool)
    for name, low, high in _ranges(limits):
        if name in batch and batch[name].dtype != bool:
            outside = batch[name] < low
            if high is not None and high <= jnp.iinfo(batch[name].dtype).max:
                outside |= batch[name] > high
            bad |= jnp.any(outside & (batch[name] != IGNORED) if name == "labels" else outside)
    return jnp.where(bad, jnp.nan, 1.0)


def model_arguments(batch: Batch) -> dict[str, Array]:
    """The arrays beside `input_ids` that a model is called with, `position_ids` in transformers' sense.

    Positions that restart are several sequences in a row, which do not see each other, unless an attention mask is given
    (`transformers.masking_utils.find_packed_sequence_indices`).
    """
    arguments = {name: jnp.asarray(batch[name], jnp.int32) for name in ("positions", "segment_ids") if name in batch}
    if "attention_mask" in batch:
        arguments["attention_mask"] = jnp.asarray(batch["attention_mask"], bool)
    if "position_ids" in batch:
        positions = jnp.asarray(batch["position_ids"], jnp.int32)
        arguments["positions"] = positions
        if "attention_mask" not in batch and "segment_ids" not in batch:
            arguments["segment_ids"] = segments_of(positions)
    return arguments


def segments_of(positions: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Segment ids from 1 on: a new one wherever a position does not follow the one before it."""
    starts: Bool[Array, "batch seq"] = jnp.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
    return 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
