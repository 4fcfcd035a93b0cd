"""A kind of adapter is one class: LoHa, whose update is the elementwise product of two low-rank products.

    python examples/custom_adapter.py

It trains, merges, stacks, drops out and is wrapped, counted, inspected and saved as jlora's own kinds are (kind="loha" is one).
"""

import jax
import jax.numpy as jnp
import optax
import rich

import jlora
from jlora.cli.inspect import adapter_table
from jlora.lora.kinds import LowRankWeight, PeftForm, frozen, kind, trained


@kind
class Hadamard(LowRankWeight):
    """Stands for `base + scaling * (a1 @ b1) * (a2 @ b2)`: one product of rank**2 columns of a1 and a2, multiplied in pairs."""

    NAME = "hadamard"
    FIELDS = {"rank": ("r", 8), "alpha": ("alpha", 8)}  # of the config: as PEFT calls them, and their defaults there
    TENSORS = {f"{x}{i}": (f".hada_w{i}_{y}", True) for i in (1, 2) for x, y in ("ab", "ba")}
    PEFT = PeftForm("LOHA", fields=FIELDS, tensors=TENSORS, unwritten=("dropout",))
    base: jax.Array = frozen()
    a1: jax.Array = trained()  # [in, rank], with layers stacked [layers, in, rank]
    b1: jax.Array = trained()  # [rank, out]
    b2: jax.Array = trained()
    a2: jax.Array = trained()  # zero at first
    scaling: float
    dropout: float = 0.0
    key: jax.Array | None = frozen(default=None)

    @classmethod
    def draw(cls, key, d_in, d_out, rank):
        a1, b1, b2 = jnp.split(jax.random.normal(key, (rank, d_in + 2 * d_out)), (d_in, d_in + d_out), axis=1)
        return {"a1": a1.T, "b1": b1, "b2": b2, "a2": jnp.zeros((d_in, rank))}

    def factors(self):
        a, b = self.a1[..., :, None] * self.a2[..., None, :], self.b1[..., :, None, :] * self.b2[..., None, :, :]
        return a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:-3], -1, b.shape[-1])


def train(directory="custom-adapter"):
    model, params = jlora.load("examples/assets/tiny-llama", dtype=jnp.float32)
    config = jlora.LoraConfig(kind=Hadamard, rank=4, targets=["q_proj", "down_proj"], dropout=0.1)
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    tx, batch = optax.adam(1e-2), dict.fromkeys(("input_ids", "labels"), jnp.arange(64).reshape(4, 16))
    state, step = jlora.train.init_state(adapter, tx), jlora.train.make_step(jlora.train.causal_lm_loss(model), tx)
    for n in range(20):
        state, metrics = step(state, base, batch, jax.random.key(n))
        print(f"step {n}: loss {metrics['loss']:.3f}, {jlora.count(state.adapter)} parameters trained")
    jlora.save_adapter(directory, params := jlora.combine(state.adapter, base), config=config, base_model="tiny-llama")
    rich.print(adapter_table(str(directory)))
    return model, params


if __name__ == "__main__":
    train()
