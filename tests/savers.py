"""Every function that writes a model or an adapter, by name."""

import jlora
from jlora.files.torch_file import save_torch


def quantized(trained):
    return jlora.quantize_params(jlora.remove_lora(trained[1]), jlora.NF4(block_size=32, double_quant=False))


SAVERS = {
    "save_adapter": lambda path, t, tok: jlora.save_adapter(path, t[1], config=t[2], base_model="b"),
    "save_mlx_adapter": lambda path, t, tok: jlora.save_mlx_adapter(path, t[1], config=t[2], model=t[0]),
    "save_pretrained": lambda path, t, tok: jlora.save_pretrained(
        path, t[0], t[1], tokenizer=tok, max_shard_bytes=20_000
    ),
    "save_quantized": lambda path, t, tok: jlora.save_quantized(path, t[0], quantized(t), tokenizer=tok),
    "save_gguf": lambda path, t, tok: jlora.save_gguf(path, t[0], t[1], tokenizer=tok),
    "save_gguf_adapter": lambda path, t, tok: jlora.save_gguf_adapter(path, t[1], config=t[2], model=t[0]),
    "save_torch": lambda path, t, tok: save_torch(path, t[0], t[1]),
}
"""Name -> function of (path, (model, adapted params, config), tokenizer)."""
