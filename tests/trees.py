"""Trees of parameters: adapters that do something, and equality to the bit."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora


def same_bits(a, b):
    """Equal structure, and every array equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return True


def perturbed(params, seed=0, size=0.1):
    """The same adapter with everything that is trained moved."""
    rng = np.random.default_rng(seed)
    adapter, base = jlora.split(params)
    return jlora.combine(jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, size, x.shape), x.dtype), adapter), base)


def adapted(params, config, seed=0):
    """Parameters with an adapter whose update is as large as a trained one's."""
    return perturbed(jlora.add_lora(params, config, key=jax.random.key(seed)), seed)
