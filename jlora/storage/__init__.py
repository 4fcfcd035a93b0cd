"""Files from outside read within bounds, ours written whole; bytes <-> named arrays, no models."""

from jlora.storage.safetensors import Checkpoint as Checkpoint
from jlora.storage.safetensors import save_sharded as save_sharded
from jlora.storage.safetensors import save_tensors as save_tensors
