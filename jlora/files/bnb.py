"""bitsandbytes 4-bit checkpoints, as transformers writes them <-> `NF4Tensor`. The bytes are the same; only names change.

Reference: bitsandbytes `QuantState.as_dict(packed=True)`.
"""

import dataclasses
import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jlora._typing import Json, JsonObject
from jlora.quant import NF4, NF4Tensor
from jlora.quant.codes import DYNAMIC_CODE, NF4_CODE
from jlora.quant.scales import NESTED_BLOCK, Absmax, NestedAbsmax
from jlora.quant.spec import BLOCK_SIZES
from jlora.quant.tensor import keeps_rows
from jlora.storage import Checkpoint
from jlora.storage.fields import Kind, check_fields, integer, is_number, list_of, one_of, shown
from jlora.storage.structured import parse_json

STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
_DTYPES = ("float32", "bfloat16", "float16")
_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Dtypes that the packed bytes may be stored as -> bytes of one element. FSDP shards nothing but floats."""

_AXES = list_of(integer())
_STATE = {
    "shape": Kind(f"two axes, {_AXES.says}", lambda v: _AXES.holds(v) and len(v) == 2),
    "blocksize": one_of(*BLOCK_SIZES),
    "quant_type": one_of("nf4"),
    "dtype": one_of(*_DTYPES),
    "nested_blocksize": one_of(NESTED_BLOCK),
    "nested_dtype": one_of("float32"),
    "nested_offset": Kind("a finite number", is_number),
}
"""Fields of a quantization state that are read."""
_REQUIRED = ("shape", "blocksize", "quant_type", "dtype")


@dataclasses.dataclass(frozen=True)
class QuantState:
    """What a checkpoint says of one quantized weight [out, in]."""

    shape: tuple[int, int]
    spec: NF4
    dtype: str
    nested_offset: float | None
    state_shape: tuple[int, ...]
    """Of the tensor that holds all this as JSON text."""
    storage: str = "U8"
    """safetensors' name of `bnb_4bit_quant_storage`: the dtype that the packed bytes are stored as."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> "QuantState | None":
        """The state of the weight called `name`; None: it is dense.

        Raises:
            ValueError: when it is quantized in another format than NF4, or the state is malformed.
        """
        if f"{name}{STATE_SUFFIX}" not in checkpoint.shapes:
            marks = (f"{name}.quant_state.", f"{name}.absmax", name.removesuffix("weight") + "SCB")
            others = [n for n in checkpoint.shapes if n.startswith(marks)]
            if others:
                telling = min(others, key=lambda n: [not n.startswith(mark) for mark in marks])
                raise ValueError(
                    f"{name!r} is quantized in another way than NF4: there is {telling!r}. Load the dense original with "
                    "`quantize=jlora.NF4()`."
                )
            return None
        where = f"The quantization state of {name!r}"
        fields = _state_fields(checkpoint, f"{name}{STATE_SUFFIX}", where)
        nested = "nested_offset" in fields
        return cls(
            shape=tuple(fields["shape"]),
            spec=NF4(block_size=fields["blocksize"], double_quant=nested),
            dtype=fields["dtype"],
            nested_offset=float(fields["nested_offset"]) if nested else None,
            state_shape=checkpoint.shapes[f"{name}{STATE_SUFFIX}"],
            storage=checkpoint.dtypes.get(name, "U8"),
        )

    def tensors(self, name: str) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Tensor name -> (shape, dtype) of everything that is stored for the weight."""
        count = self.shape[0] * self.shape[1]
        blocks = -(-count // self.spec.block_size)
        nested = self.spec.double_quant
        packed = -(-count // 2)
        size = _STORAGE.get(self.storage, 0)
        fits = size and packed % size == 0
        stored = {
            name: ((packed // size, 1), (self.storage,)) if fits else ((packed, 1), ("U8",)),
            f"{name}.absmax": ((blocks,), ("U8",) if nested else ("F32",)),
            f"{name}.quant_map": ((16,), ("F32",)),
            f"{name}{STATE_SUFFIX}": (self.state_shape, ("U8",)),
        }
        if nested:
            stored[f"{name}.nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), ("F32",))
            stored[f"{name}.nested_quant_map"] = ((256,), ("F32",))
        return stored

    def read(self, checkpoint: Checkpoint, name: str) -> NF4Tensor:
        """The weight, from tensors that `tensors` lists.

        Raises:
            ValueError: when a code table is not bitsandbytes'.
        """
        for part, code in (("quant_map", NF4_CODE), ("nested_quant_map", DYNAMIC_CODE)):
            if f"{name}.{part}" in self.tensors(name) and not np.array_equal(checkpoint.read(f"{name}.{part}"), code):
                raise ValueError(
                    f"'{name}.{part}' is another code table than bitsandbytes'; jlora decodes that one only."
                )
        kernel_shape = self.shape[::-1]
        rows = (self.shape[0], -1) if keeps_rows(kernel_shape, self.spec.block_size) else (-1,)
        blocks = jnp.array(checkpoint.read(f"{name}.absmax").reshape(rows))
        if self.nested_offset is None:
            scales = Absmax(blocks)
        else:
            nested = jnp.array(checkpoint.read(f"{name}.nested_absmax"))
            scales = NestedAbsmax(blocks, nested, jnp.float32(self.nested_offset))
        codes = jnp.array(checkpoint.read(name).view(np.uint8).reshape(rows))
        return NF4Tensor(codes, scales, kernel_shape, self.spec, self.dtype)


def _state_fields(checkpoint: Checkpoint, tensor: str, where: str) -> Mapping[str, Json]:
    if checkpoint.dtypes[tensor] != "U8":
        raise ValueError(f"{where} must be stored as U8; got {checkpoint.dtypes[tensor]}.")
    try:
        stored = checkpoint.read(tensor).tobytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8.") from error
    fields = parse_json(stored, where=where)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must be a JSON object; got {shown(fields)}.")
    check_fields(fields, _STATE, where=where, required=_REQUIRED)
    return fields


def to_tensors(name: str, q: NF4Tensor) -> dict[str, np.ndarray]:
    """Everything a checkpoint stores for the weight called `name`."""
    d_in, d_out = q.kernel_shape
    state: JsonObject = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": q.logical_dtype,
        "shape": [d_out, d_in],
    }
    tensors = {
        name: np.asarray(q.codes).reshape(-1, 1),
        f"{name}.absmax": np.asarray(q.scales.blocks).reshape(-1),
        f"{name}.quant_map": NF4_CODE,
    }
    if isinstance(q.scales, NestedAbsmax):
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(q.scales.offset)}
        tensors |= {f"{name}.nested_absmax": np.asarray(q.scales.nested), f"{name}.nested_quant_map": DYNAMIC_CODE}
    tensors[f"{name}{STATE_SUFFIX}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def is_declared(quantization: Mapping[str, Json]) -> bool:
    """Whether a `quantization_config` says that the checkpoint is bitsandbytes' in 4 bits."""
    return quantization.get("quant_method") == "bitsandbytes" and quantization.get("load_in_4bit") is True


def quantization_config(spec: NF4, dtype: str, skipped: list[str]) -> Mapping[str, Json]:
    """The field of config.json by which transformers knows that the checkpoint is quantized."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": spec.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
