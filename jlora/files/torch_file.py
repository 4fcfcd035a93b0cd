"""PyTorch state dicts."""

import os
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from jlora._typing import DTypeLike, Params
from jlora.files.hf_save import merged_tensors
from jlora.files.names import HEAD, hf_name
from jlora.files.origin import Origin
from jlora.models import Model
from jlora.storage.whole import refuse_existing, whole_file

if TYPE_CHECKING:
    import torch


def save_torch(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    *,
    base: str | os.PathLike | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """A state dict as `torch.save` writes it, adapters merged as `save_pretrained` merges them.

    Args:
        base, dtype: as in `save_pretrained`.

    It loads with `torch.load(path, weights_only=True)` and fits `load_state_dict` of transformers' model of the same
    config, strictly: a tied head is there under its own name and shares the embedding's storage.

    Raises:
        ImportError: without torch.
        FileExistsError: when `path` exists.
        ValueError: when a merged tensor is not finite, or an adapted embedding is also the output head (`jlora.untie` it).
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            "A PyTorch state dict is written by torch: pip install torch. `save_pretrained` writes safetensors without it."
        ) from error
    path = refuse_existing(path)
    origin = None if base is None else Origin.read(base)
    tensors = merged_tensors(model, params, origin=origin, dtype=dtype)
    state = {name: _tensor(torch, array) for name, array in tensors.items()}
    if model.config.tie_word_embeddings:
        state[HEAD] = state[hf_name(model.config.embedding_path)]
    with whole_file(path, new=True, needed=sum(t.nbytes for t in state.values())) as partial:
        # A file of Python's: torch's own loses what the system says of a full disk.
        with partial.open("wb") as file:
            torch.save(state, file)


def _tensor(torch: ModuleType, array: np.ndarray) -> "torch.Tensor":
    """A copy; NumPy's bfloat16 is not torch's, so its bits are carried over."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
