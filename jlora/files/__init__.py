"""Files of the ecosystem <-> (model, params)."""

from jlora.files.adapters import base_model_of as base_model_of
from jlora.files.adapters import load_adapter as load_adapter
from jlora.files.adapters import load_adapters as load_adapters
from jlora.files.gguf import save_gguf as save_gguf
from jlora.files.gguf import save_gguf_adapter as save_gguf_adapter
from jlora.files.hf import find as find
from jlora.files.hf import load as load
from jlora.files.hf import read_config as read_config
from jlora.files.hf_save import save_pretrained as save_pretrained
from jlora.files.hf_save import save_quantized as save_quantized
from jlora.files.mlx import save_mlx_adapter as save_mlx_adapter
from jlora.files.peft import save_adapter as save_adapter
from jlora.files.tokenizer import load_tokenizer as load_tokenizer
from jlora.files.torch_file import save_torch as save_torch
from jlora.files.untrained import untrained_tokens as untrained_tokens
