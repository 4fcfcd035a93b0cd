"""File formats: bytes <-> named arrays, no models."""

from jlora.formats.safetensors import Checkpoint as Checkpoint
from jlora.formats.safetensors import save_sharded as save_sharded
from jlora.formats.safetensors import save_tensors as save_tensors
