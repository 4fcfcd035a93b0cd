"""Files of the ecosystem <-> (model, params)."""

from jlora.io.adapters import base_model_of as base_model_of
from jlora.io.adapters import load_adapter as load_adapter
from jlora.io.adapters import load_adapters as load_adapters
from jlora.io.gguf import save_gguf as save_gguf
from jlora.io.gguf import save_gguf_adapter as save_gguf_adapter
from jlora.io.hf import find as find
from jlora.io.hf import load as load
from jlora.io.hf import read_config as read_config
from jlora.io.hf_save import save_pretrained as save_pretrained
from jlora.io.hf_save import save_quantized as save_quantized
from jlora.io.mlx import save_mlx_adapter as save_mlx_adapter
from jlora.io.peft import save_adapter as save_adapter
from jlora.io.tokenizer import load_tokenizer as load_tokenizer
from jlora.io.torch_file import save_torch as save_torch
from jlora.io.untrained import untrained_tokens as untrained_tokens
