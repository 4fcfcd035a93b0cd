"""`wrap`: adapters and 4-bit weights for any JAX function, by evaluating its jaxpr with rules that keep weights factored.

The words of this room, on one example::

    def model(params, x):                                       # params["up"]: a LoraWeight [4, 6], rank 2
        h = jnp.einsum("td,df->tf", x, params["up"].astype(x.dtype))
        return jnp.tanh(h) @ params["up"].T

    jlora.wrap(model)(params, x)

1.  `api` traces `model` on dense stand-ins of shape [4, 6] to a *jaxpr*, a list of *equations*: convert_element_type,
    dot_general, tanh, transpose, dot_general. `liveness` tells which of them the results need.
2.  Each adapted or quantized *leaf* becomes a *value* (`values`): `Factored`, which is `base + scaling * lora_A @ lora_B` and
    what was done to it since; or `Split`, several of them concatenated. A value keeps its arrays as they are stored, in
    *canonical* order, stack axes first, then inputs, then outputs; `axes` says which of them each axis of the program is. Here
    (0, 1) after the cast, and (1, 0) after the transpose.
3.  `interpreter` evaluates the equations in order. Those without a value among their operands are bound as they are. The
    others have a rule, by the name of their primitive:
    -   a *view* (`views`) gives a value again: the cast is one of every part, the transpose a permutation of `axes`; what it
        does to the input or output side alone, a reshape or a slice of it, is a `SideOp` (`sides`) on one factor;
    -   a *consumer* (`consumers`) gives an array: the first dot_general contracts inputs, so x meets the base, and A, then B;
        the second contracts outputs ("factored(T)"), so it meets B, then A. Nowhere is the dense [4, 6] update formed;
    -   *control* (`control`) enters the bodies of `jit`, `scan`, `while`, `cond`, `checkpoint` and `shard_map`, and builds the
        same call around what it finds there, with the value's arrays among its operands.
    Anything else is *unhandled* (`w.sum()`): an error, or under another *policy* the dense array is formed, *materialized*.
4.  Each *use* is a row of the `Report` (`report`) that `.check` returns. An adapted leaf without a factored use is *unused*.

`frameworks` binds this to Linen, NNX and Equinox.
"""

from jlora.wrapping.api import wrap as wrap
from jlora.wrapping.frameworks import wrap_equinox as wrap_equinox
from jlora.wrapping.frameworks import wrap_linen as wrap_linen
from jlora.wrapping.frameworks import wrap_nnx as wrap_nnx
from jlora.wrapping.report import Report as Report
from jlora.wrapping.report import UnhandledUse as UnhandledUse
from jlora.wrapping.report import UnusedTarget as UnusedTarget
from jlora.wrapping.report import Use as Use
