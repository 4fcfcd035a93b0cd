"""The files of a Hugging Face checkpoint, by what they are for."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jlora.storage.gguf import GGUFFile, is_gguf

CONFIG = "config.json"

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""All that decides what a text's tokens are, and how a conversation is written."""

TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Under which the weights may be passed on; they go with them."""

WEIGHTS = (
    "*.safetensors*", "*.bin", "*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.npz", "*.onnx", "*.ot",
)  # fmt: skip
"""In any format."""

_MODEL = (
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "tf_model*.h5",
    "flax_model*.msgpack",
)  # fmt: skip
"""Weights under the names that transformers looks for in a checkpoint, which are none of an adapter's or an optimizer's."""

_SAMPLE_BYTES = 1 << 20  # hashing all of a large model would take longer than loading it


def holds_checkpoint(directory: Path) -> bool:
    """Whether a directory is a model: its config and its weights."""
    return (directory / CONFIG).is_file() and bool(matching(directory, _MODEL))


def base_fingerprint(directory: Path) -> str:
    """Of a checkpoint: its config, and of each file of weights the name, the size, the start and the end. Of a GGUF file the same,
    whatever its name, with all of its metadata."""
    if is_gguf(directory):
        gguf = GGUFFile(directory)
        with gguf.path.open("rb") as file:
            sha = hashlib.sha256(file.read(gguf.header_size))
        for path in gguf.files:
            _add_sample(sha, path, "")
        return sha.hexdigest()
    sha = hashlib.sha256((directory / CONFIG).read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        _add_sample(sha, path, path.name)
    return sha.hexdigest()


def _add_sample(sha: Any, path: Path, name: str) -> None:
    size = path.stat().st_size
    sha.update(f"{name} {size}".encode())
    with path.open("rb") as file:
        sha.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        sha.update(file.read())


def is_checkpoint(path: Path) -> bool:
    """Whether a model is there that `base_fingerprint` is of: a directory with its config, or a GGUF file."""
    return is_gguf(path) or (path / CONFIG).is_file()


def matching(directory: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Name below the directory -> file, of the files that match."""
    found = (path for pattern in patterns for path in sorted(directory.glob(pattern)))
    return {path.relative_to(directory).as_posix(): path for path in found if path.is_file()}
