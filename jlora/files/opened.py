"""A checkpoint's tensors, whether it is a directory of safetensors or a GGUF file."""

from collections.abc import Iterable
from pathlib import Path

from jlora.files.gguf_read import GGUFCheckpoint
from jlora.files.names import checkpoint_names
from jlora.storage import Checkpoint
from jlora.storage.gguf import is_gguf
from jlora.storage.tensors import Tensors


def open_checkpoint(path: Path) -> Tensors:
    """
    Raises:
        FileNotFoundError: when there are no weights, or a part of them is missing.
        ValueError: when a file is damaged.
    """
    return GGUFCheckpoint(path) if is_gguf(path) else Checkpoint(path)


def names_in(checkpoint: Tensors, paths: Iterable[str]) -> dict[str, str]:
    """Tree path -> name of its tensor there."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.names(paths)
    return checkpoint_names(paths, checkpoint.shapes)
