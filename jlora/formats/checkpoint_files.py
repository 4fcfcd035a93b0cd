"""The files of a Hugging Face checkpoint beside its weights, by what they are for."""

from collections.abc import Iterable
from pathlib import Path

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


def matching(directory: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Name below the directory -> file, of the files that match."""
    found = (path for pattern in patterns for path in sorted(directory.glob(pattern)))
    return {path.relative_to(directory).as_posix(): path for path in found if path.is_file()}
