"""`LoraWeight`: a frozen weight plus a low-rank update that is never formed; with DoRA, its columns at trained norms."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora._typing import Array, Float, Key, PRNGKeyArray
from jlora.lora.kinds.base import AdaptedWeight, PeftForm, Site, frozen, kind, trained
from jlora.lora.kinds.low_rank import LowRankWeight, product
from jlora.lora.seam import embed, linear
from jlora.quant.tensor import unfold
from jlora.weight import Inseparable, Weight, as_dense, cast_to, is_weight
from jlora.weight.roles import LINEAR, sizes

_TINY = 1e-30
"""Floor of a squared norm: a column of zeros is scaled by 0 / 1e-15, not 0 / 0."""

_OFF = (None, False, [], {})
_NEUTRAL: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        *("lora_bias", "target_parameters", "layer_replication", "alora_invocation_tokens"),
        *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        "ensure_weight_tying",  # here a tied head keeps the base embedding, but for trained tokens
    ),
    _OFF,
)
"""Fields of PEFT 0.21 that change the outputs, with the values under which they do not."""
_IDLE = (
    *(
        "fan_in_fan_out",
        "runtime_config",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
    ),
    *("lora_ga_config", "qalora_group_size"),
)
"""Fields of PEFT 0.21 that change nothing of a trained adapter."""
_TENSORS = {
    "lora_A": (".lora_A.weight", True),
    "lora_B": (".lora_B.weight", True),
    "magnitude": (".lora_magnitude_vector", False),
}
_OF_EMBEDDINGS = _TENSORS | {"lora_A": (".lora_embedding_A", True), "lora_B": (".lora_embedding_B", True)}


@kind
class LoraWeight(LowRankWeight):
    """Stands for `base + scaling * lora_A @ lora_B`; with a `magnitude` (DoRA) for that with its columns scaled to these norms.

    Invariants: the sum is never formed by `matmul`; `base` gets no gradient from `split`; with `key` None the value
    is deterministic. Every child may carry the same leading axes (stacked layers).

    With other `roles` than "io" the base has its own axes, lora_A [*stack, *in, rank] all of its in-axes and lora_B
    [*stack, rank, *out] all of its out-axes; such a weight is used through `jlora.wrap`.

    References: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685, section 4.1; Liu et
    al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2402.09353, section 4.
    """

    NAME = "lora"
    PEFT = PeftForm(
        type="LORA",
        fields={
            "rank": ("r", 8),
            "alpha": ("lora_alpha", 8),
            "dropout": ("lora_dropout", 0.0),
            "use_rslora": ("use_rslora", False),
            "use_dora": ("use_dora", False),
            "init": ("init_lora_weights", True),
            "rank_pattern": ("rank_pattern", {}),
            "alpha_pattern": ("alpha_pattern", {}),
            "bias": ("bias", "none"),
            "trainable_token_indices": ("trainable_token_indices", None),
        },
        tensors=_TENSORS,
        neutral=_NEUTRAL,
        idle=_IDLE,
    )

    base: Float[Array, "*stack_and_axes"] | Weight = frozen()
    """The frozen weight: a dense array [*stack, d_in, d_out] or another `Weight` (a quantized base makes this QLoRA). With
    PiSSA the residual, a `LoraWeight` that takes the initial update away from the original. None in the adapter half of
    `split`, as the trained children are in the other half: what trees are made of need not be what values are made of."""
    lora_A: Float[Array, "*stack_and_in rank"] = trained()
    """[*stack, d_in, rank]. Trained; float32 whatever the base."""
    lora_B: Float[Array, "*stack_rank_and_out"] = trained()
    """[*stack, rank, d_out]. Trained; float32, zero at first (lora_A in an embedding), so that training starts at the base
    model."""
    scaling: float
    """`alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA."""
    dropout: float = 0.0
    """Probability that an element of the update's input is dropped, when there is a key. Lookups drop nothing, as in PEFT."""
    key: Key[Array, "*stack"] | None = frozen(default=None)
    """This step's dropout key; put there by `with_dropout` and nowhere else."""
    magnitude: Float[Array, "*stack d_out"] | None = trained(default=None)
    """DoRA: trained, float32; the norms of the base's columns at first. None: plain LoRA."""
    base_norm: Float[Array, "*stack d_out"] | None = frozen(default=None)
    """DoRA: norms of the base's columns, float32; a constant that a step would otherwise read the whole kernel for."""
    roles: str = LINEAR
    """What each of the trailing axes of the base is for; see `add_lora`."""

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading stack axes."""
        return self.lora_A.shape[: self.lora_A.ndim - 1 - self.roles.count("i")]

    @property
    def settings(self):
        return {**super().settings, "use_dora": self.magnitude is not None}

    def factors(self):
        return self.lora_A, self.lora_B

    def without_residual(self) -> "LoraWeight":
        """The same weight as an update of its original, `[A, A0] @ [B, -B0]`: with PiSSA the base is a residual, the
        original less A0 B0. Twice the rank also without a residual: then A0 and B0 are zeros."""
        if self.origin() is not self.base:
            return as_lora(self)
        a, b = jnp.zeros_like(self.lora_A), jnp.zeros_like(self.lora_B)
        return dataclasses.replace(
            self, lora_A=jnp.concatenate([self.lora_A, a], axis=-1), lora_B=jnp.concatenate([self.lora_B, b], axis=-2)
        )

    def matmul(self, x, *, transpose, out_dtype):
        self._check_linear("multiplied by")
        if self.magnitude is None:
            return super().matmul(x, transpose=transpose, out_dtype=out_dtype)
        if transpose:
            # The columns are this product's inputs: scaling them is scaling x.
            x = x * self._column_scale(self._cross(x.dtype)).astype(x.dtype)
            return dataclasses.replace(self, magnitude=None).matmul(x, transpose=True, out_dtype=out_dtype)
        return self._dora_matmul(x, out_dtype)

    def _dora_matmul(self, x, out_dtype):
        """base(x) + (m / norm - 1) base(x') + (m / norm) scaling x' A B, where x' is x after dropout.

        Term by term as in PEFT: what is not dropped of x and what is scaled meet different inputs.
        """
        flat, dropped = x.reshape(-1, x.shape[-1]), self.drop(x).reshape(-1, x.shape[-1])
        rows = [flat] if self._keeps_all else [flat, dropped]
        # One product for all that meets the base: a quantized kernel is unpacked once, and not before x is there.
        probe = jax.lax.stop_gradient(self.lora_A).T.astype(x.dtype)
        products = linear(jnp.concatenate([*rows, probe]), self.base, out_dtype=out_dtype)
        tokens, rank = flat.shape[0], self.rank
        base, scaled, cross = products[:tokens], products[-tokens - rank : -rank], products[-rank:]
        scale = self._column_scale(cross)
        change = (scale - 1.0) * scaled + scale * self.update(dropped, transpose=False)
        return (base + change.astype(out_dtype)).reshape(*x.shape[:-1], -1)

    def _cross(self, dtype):
        """`A^T W` [rank, d_out], the product that the norm needs of the base."""
        return linear(jax.lax.stop_gradient(self.lora_A).T.astype(dtype), self.base, out_dtype=jnp.float32)

    def _column_scale(self, cross: Float[Array, "rank d_out"]) -> Float[Array, " d_out"]:
        """`magnitude / norm`, where norm is that of the columns of `base + scaling * A @ B`, detached (DoRA, section 4.3).

        |W + s A B|^2 = |W|^2 + 2 s sum((A^T W) * B) + s^2 sum((A^T A B) * B), column by column: no product is of W's size.
        """
        assert self.magnitude is not None and self.base_norm is not None
        a, b, cross = jax.lax.stop_gradient((self.lora_A, self.lora_B, cross.astype(jnp.float32)))
        change = 2.0 * cross + self.scaling * product(product(a.T, a), b)
        squared = jnp.square(self.base_norm) + self.scaling * jnp.sum(change * b, axis=0)
        return self.magnitude / jnp.sqrt(jnp.maximum(squared, _TINY))

    def take(self, ids):
        self._check_linear("looked up in")
        if self.magnitude is None:
            return super().take(ids)
        rows = embed(ids, self.base)
        update = self.scaling * linear(embed(ids, self.lora_A), self.lora_B)
        return (self._column_scale(self._cross(rows.dtype)) * (rows + update)).astype(rows.dtype)

    def dense(self, dtype=None):
        if self.magnitude is None:
            return super().dense(dtype)
        total = as_dense(self.base, jnp.float32) + self.scaling * self.delta()
        squared = jnp.sum(jnp.square(total), axis=-2)
        total = total * (self.magnitude / jnp.sqrt(jnp.maximum(squared, _TINY)))[..., None, :]
        return total.astype(dtype or self.dtype)

    def delta(self):
        a, b = self.lora_A, self.lora_B
        if self.roles == LINEAR:
            return product(a, b)
        stack = self.stack
        flat = product(a.reshape(*stack, -1, self.rank), b.reshape(*stack, self.rank, -1))
        return unfold(flat, self.roles, self.shape[len(stack) :])

    def _check_linear(self, verb: str) -> None:
        if self.roles.lstrip("b") != LINEAR:
            raise ValueError(
                f"Only kernels [in, out] are {verb} directly; this one has the axes {self.shape} with roles {self.roles!r}. "
                "Call the function that uses it through `jlora.wrap`."
            )

    def cast(self, dtype):
        if self.base is None:  # the adapter half of `split`
            return self
        base = cast_to(self.base, dtype)
        return dataclasses.replace(self, base=base, base_norm=None if self.base_norm is None else column_norms(base))

    @property
    def _keeps_all(self) -> bool:
        return self.key is None or self.dropout == 0.0

    def parts(self):
        return super().parts()._replace(magnitude=self.magnitude, base_norm=self.base_norm)

    def peft_tensors(self, place):
        names = _OF_EMBEDDINGS if place.leaf == "embedding" else _TENSORS
        return {child: name for child, name in names.items() if getattr(self, child) is not None}

    @classmethod
    def peft_suffixes(cls):
        return {suffix: child for names in (_TENSORS, _OF_EMBEDDINGS) for child, (suffix, _) in names.items()}

    @classmethod
    def adapt(cls, site):
        dora, pissa = site.options["use_dora"], site.options["init"] == "pissa"
        if site.roles != LINEAR and (dora or pissa):
            raise ValueError(
                f"{'`use_dora`' if dora else '`init`, pissa,'} adapts kernels [in, out]; {site.path!r} has the roles "
                f"{site.roles!r}. Use plain LoRA there."
            )
        base = site.leaf
        if pissa and not site.is_embedding:
            a, b = _principal(site)
            # The residual stays a value, so that the original is never copied. Copies: what is trained may be donated.
            base = cls(base=site.leaf, lora_A=jnp.copy(a), lora_B=jnp.copy(b), scaling=-site.scaling)
        else:
            a, b = _drawn(site)
        return cls(
            base=base,
            lora_A=a,
            lora_B=b,
            scaling=site.scaling,
            dropout=site.dropout,
            magnitude=column_norms(site.leaf) if dora else None,
            base_norm=column_norms(base) if dora else None,
            roles=site.roles,
        )

    def __repr__(self):
        rank = "?" if self.lora_A is None else self.rank
        kind = "" if self.magnitude is None else ", DoRA"
        kind += "" if self.roles == LINEAR else f", roles={self.roles!r}"
        return f"LoraWeight(base={self.base!r}, rank={rank}, scaling={self.scaling}, dropout={self.dropout}{kind})"


def as_lora(w: AdaptedWeight) -> LoraWeight:
    """The plain LoRA, or DoRA, on the original weight that a weight is, whatever its kind and rank.

    Raises:
        Inseparable: when it is none.
    """
    parts = w.parts()
    if not parts.updates or parts.base is not w.origin():
        raise Inseparable(w, "is no update of its frozen base")
    last = parts.updates[-1]
    # The trained factors first; the others at their scaling.
    factors = [
        (u.A, u.B if u.scaling == last.scaling else u.B * (u.scaling / last.scaling)) for u in parts.updates[::-1]
    ]
    nested = len(factors) > 1
    base: Any = parts.base
    norm = column_norms(base) if nested and parts.base_norm is not None else parts.base_norm
    made = LoraWeight(
        base=last.A if base is None else base,
        lora_A=jnp.concatenate([a for a, _ in factors], axis=-1) if nested else last.A,
        lora_B=jnp.concatenate([b for _, b in factors], axis=-1 - parts.roles.count("o")) if nested else last.B,
        scaling=last.scaling,
        dropout=last.dropout,
        key=last.key,
        magnitude=parts.magnitude,
        base_norm=norm,
        roles=parts.roles,
    )
    return made if base is not None else made.with_children(base=None)


def _drawn(site: Site) -> tuple[Array, Array]:
    """The factors at first, whose product is zero: drawn for each layer by itself, so that both forms have the same."""
    init = _init_embedding if site.is_embedding else functools.partial(_init_kernel, init=site.options["init"])
    if site.roles == LINEAR:
        d_in, d_out = site.leaf.shape[-2:]
        factors = [init(key, d_in, d_out, site.rank) for key in site.keys]
    else:
        own = site.leaf.shape[site.leaf.ndim - len(site.roles) :]
        factors = [_init_axes(init, site.roles, own, site.rank, key) for key in site.keys]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *factors) if site.stacked else factors[0]


def _init_axes(init, roles: str, shape: tuple[int, ...], rank: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Factors [*stack, *in, rank] and [*stack, rank, *out] of a kernel of `shape`, drawn as those of its [in, out]."""
    stack, ins, outs = (sizes(roles, role, shape) for role in "bio")
    keys = jax.random.split(key, stack).reshape(-1) if stack else key[None]
    a, b = jax.vmap(lambda key: init(key, math.prod(ins), math.prod(outs), rank))(keys)
    return a.reshape(*stack, *ins, rank), b.reshape(*stack, rank, *outs)


def _init_kernel(key, d_in: int, d_out: int, rank: int, *, init: str) -> tuple[Array, Array]:
    """PEFT's `reset_lora_parameters`: A by kaiming_uniform(a=sqrt(5)), which is U(-1/sqrt(in), 1/sqrt(in)), or N(0, 1/rank)."""
    zero = jnp.zeros((rank, d_out), jnp.float32)
    if init == "gaussian":
        return jax.random.normal(key, (d_in, rank), jnp.float32) / rank, zero
    bound = 1.0 / math.sqrt(d_in)
    return jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound), zero


def _init_embedding(key, vocab: int, d_model: int, rank: int) -> tuple[Array, Array]:
    """PEFT's initialization of embeddings, whatever that of kernels: A zero, B from N(0, 1)."""
    return jnp.zeros((vocab, rank), jnp.float32), jax.random.normal(key, (rank, d_model), jnp.float32)


def _principal(site: Site) -> tuple[Array, Array]:
    """PiSSA: factors of the `rank` largest singular values of each layer's kernel, divided by the scaling.

    Reference: Meng et al., PiSSA, 2024, arXiv:2404.02948.
    """
    path, leaf, rank = site.path, site.leaf, site.rank
    if is_weight(leaf):
        raise ValueError(
            f"`init` 'pissa' takes the singular values of dense kernels; {path!r} is a {type(leaf).__name__}, as PEFT refuses it "
            "too. Use init='kaiming' on a quantized base."
        )
    if rank > min(leaf.shape[-2:]):
        raise ValueError(
            f"`init` 'pissa' needs a `rank` of at most the kernel's smaller side; got rank {rank} for {path!r} "
            f"{tuple(leaf.shape)}. Use a smaller rank there (`rank_pattern`)."
        )
    return _singular_factors(leaf, rank, site.scaling)


@functools.partial(jax.jit, static_argnames=("rank", "scaling"))
def _singular_factors(w: Array, rank: int, scaling: float) -> tuple[Array, Array]:
    if w.ndim > 2:
        return jax.lax.map(lambda row: _singular_factors(row, rank, scaling), w)
    u, s, vt = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank] / scaling)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


@jax.jit
def column_norms(w: Float[Array, "*stack d_in d_out"] | Weight) -> Float[Array, "*stack d_out"]:
    """Euclidean norm of every column of a weight, one layer of a stack at a time, in float32."""
    if w.ndim > 2:
        return jax.lax.map(column_norms, w)
    return jnp.sqrt(jnp.sum(jnp.square(as_dense(w, jnp.float32)), axis=0))
