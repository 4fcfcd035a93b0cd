"""Tiny random checkpoints with tokenizers of their own, and data for them: what whole runs are tested on."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jlora
from jlora.data.templates import ALPACA_WITHOUT_INPUT
from jlora.models import model_from_config

EOT = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = "the keeper lit a lamp and wrote of wind rain gulls tide salt stars ships bread while old rope slept".split()
WIDTH, POSITIONS = 32, 64
GPT2 = {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}


def text(words: int = 900, seed: int = 0) -> str:
    """Sentences of a few words, which a model of two layers begins to learn in a few steps."""
    draw = random.Random(seed)
    sentences = (" ".join(draw.choices(_WORDS, k=6)).capitalize() + "." for _ in range(words // 6))
    return "\n".join(sentences) + "\n"


def records(count: int = 24, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"instruction": f"Write {' '.join(draw.choices(_WORDS, k=2))}.", "output": " ".join(draw.choices(_WORDS, k=5))}
        for _ in range(count)
    ]


def write_records(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer(chat: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's end-of-text token, and ChatML's marks for a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOT, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The prompt too, so that it leaves room in a short row.
    backend.train_from_iterator([text(), ALPACA_WITHOUT_INPUT, ALPACA_WITHOUT_INPUT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOT, eos_token=EOT)
    made.chat_template = chat
    return made


def write_checkpoint(directory: Path, fields: dict, *, chat: str | None = None, seed: int = 0) -> str:
    """A checkpoint with random weights of the usual size, as `jlora.save_pretrained` writes it."""
    made = tokenizer(chat)
    ids = {"vocab_size": len(made), "bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    model = model_from_config(fields | ids, dtype=jnp.float32)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    jlora.save_pretrained(directory, model, params, tokenizer=made)
    return str(directory)


def options(**changes) -> jlora.FinetuneConfig:
    """Of a GPT-2's run of four steps, its state kept after the second."""
    fields = {
        "model": "m", "data": "d", "output": "o", "steps": 4, "rank": 2, "targets": ("c_attn",), "batch_size": 2, "max_length": 16,
        "eval_fraction": 0, "checkpoint_every": 2, "quiet": True,
    }  # fmt: skip
    return jlora.FinetuneConfig(**fields | changes)


def read_log(output) -> list[dict]:
    """The entries of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
