"""The optimizers of a run, optax's own and 8-bit AdamW, by name: one row each. All come after clipping by the global norm.

Every array is updated as PyTorch updates a parameter: layers of a stack each by themselves, weight decay on matrices alone and
decoupled (times the learning rate), but for sgd, whose decay is added to the gradient.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import optax
from optax import contrib

from jlora._typing import PyTree
from jlora.train.adam8bit import adamw8bit
from jlora.train.offload import to_device
from jlora.train.parameters import Parameter, Parameters, labels, parameters_of
from jlora.train.step import TrainState

OptimizerName = Literal["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free_adamw", "adamw8bit"]
EPSILON = 1e-8  # torch.optim.AdamW's


class Settings(NamedTuple):
    """What the makers go by."""

    rate: optax.ScalarOrSchedule
    parameters: Parameters
    """Of the tree that is trained."""
    weight_decay: float
    own: Mapping[str, float]
    """The optimizer's own: those of its row's `defaults`."""

    @property
    def decayed(self) -> Callable[[PyTree], PyTree]:
        """The mask of weight decay."""
        return labels(self.parameters, lambda parameter: parameter.is_matrix)

    @property
    def decay_a_step(self) -> optax.ScalarOrSchedule:
        """Weight decay times the learning rate."""
        rate = self.rate
        return (lambda count: self.weight_decay * rate(count)) if callable(rate) else self.weight_decay * rate


def _adamw(s: Settings) -> optax.GradientTransformation:
    return optax.adamw(
        s.rate, b1=s.own["beta1"], b2=s.own["beta2"], eps=EPSILON, weight_decay=s.weight_decay, mask=s.decayed
    )


def _adamw8bit(s: Settings) -> optax.GradientTransformation:
    return adamw8bit(
        s.rate,
        b1=s.own["beta1"],
        b2=s.own["beta2"],
        eps=EPSILON,
        weight_decay=s.weight_decay,
        mask=s.decayed,
        stacked=labels(s.parameters, lambda parameter: parameter.stacked),
    )


def _adafactor(s: Settings) -> optax.GradientTransformation:
    """As transformers' Trainer sets it: with the rate given, and factored however narrow the matrix is."""
    return _each_layer(
        optax.adafactor(
            s.rate,
            multiply_by_parameter_scale=False,
            min_dim_size_to_factor=1,
            momentum=s.own["momentum"] or None,
            weight_decay_rate=s.decay_a_step,
            weight_decay_mask=s.decayed,
        ),
        s.parameters,
    )


def _each_layer(tx: optax.GradientTransformation, parameters: Parameters) -> optax.GradientTransformation:
    """`tx` on each layer of a stack by itself, where it looks at an array as a whole."""
    if not any(parameter.stacked for parameter in parameters.values()):
        return tx
    by_layer = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    return optax.partition({True: by_layer, False: tx}, labels(parameters, lambda parameter: parameter.stacked))


def _lion(s: Settings) -> optax.GradientTransformation:
    return optax.lion(s.rate, b1=s.own["beta1"], b2=s.own["beta2"], weight_decay=s.weight_decay, mask=s.decayed)


def _sgd(s: Settings) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(s.weight_decay, s.decayed), optax.sgd(s.rate, momentum=s.own["momentum"] or None)
    )


def _muon(s: Settings) -> optax.GradientTransformation:
    """Muon for the matrices in layers, AdamW for the others. Updates are as large as AdamW's, so that its rates fit (Liu et al.,
    Muon is Scalable for LLM Training, 2025, arXiv:2502.16982, section 2.2; PyTorch's "match_rms_adamw")."""
    muon = contrib.muon(
        s.rate,
        beta=s.own["momentum"],
        weight_decay=s.weight_decay,
        # [in, out], after the layers of a stack: each matrix is orthogonalized by itself.
        muon_weight_dimension_numbers=contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1),
        consistent_rms=0.2,
    )

    def orthogonal(parameter: Parameter) -> bool:
        return len(parameter.shape) == 2 and not (parameter.embedding or parameter.head)

    return optax.partition({True: muon, False: _adamw(s)}, labels(s.parameters, orthogonal))


def _scale_by_rms(s: Settings) -> optax.GradientTransformation:
    """AdamW without its average of gradients, as `contrib.schedule_free_adamw` takes it; here with a mask of what is decayed."""
    return optax.chain(
        optax.scale_by_rms(decay=s.own["beta2"], eps=EPSILON, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(s.weight_decay, s.decayed),
        optax.scale_by_learning_rate(s.rate),
    )


class Row(NamedTuple):
    """An optimizer."""

    make: Callable[[Settings], optax.GradientTransformation]
    defaults: Mapping[str, float]
    """Of the betas and the momentum, where it has them."""
    around: Callable[[optax.GradientTransformation, Settings], optax.GradientTransformation] | None = None
    """What takes the updates of `make` for steps of its own."""
    falls: bool = True
    """Whether its rate falls towards the end of a run."""


_BETAS = {"beta1": 0.9, "beta2": 0.999}
OPTIMIZERS: Mapping[str, Row] = {
    "adamw": Row(_adamw, _BETAS),
    "adafactor": Row(_adafactor, {"momentum": 0.0}),
    "lion": Row(_lion, {"beta1": 0.9, "beta2": 0.99}),
    "sgd": Row(_sgd, {"momentum": 0.0}),
    "muon": Row(_muon, {"momentum": 0.95} | _BETAS),
    "schedule_free_adamw": Row(
        _scale_by_rms, _BETAS, lambda tx, s: contrib.schedule_free(tx, s.rate, b1=s.own["beta1"]), falls=False
    ),
    "adamw8bit": Row(_adamw8bit, _BETAS),
}
"""AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101; Adafactor: Shazeer and Stern 2018, arXiv:1804.04235; Lion: Chen et al. 2023,
arXiv:2302.06675; Muon: Jordan 2024, kellerjordan.github.io/posts/muon; schedule-free: Defazio et al. 2024, arXiv:2405.15682; 8-bit
moments: Dettmers et al. 2022, arXiv:2110.02861."""
SETTINGS = ("beta1", "beta2", "momentum")
"""The settings that some of them have."""


def make_optimizer(
    name: OptimizerName,
    learning_rate: optax.ScalarOrSchedule,
    adapter: PyTree,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    beta1: float | None = None,
    beta2: float | None = None,
    momentum: float | None = None,
    lora_plus_ratio: float | None = None,
) -> optax.GradientTransformation:
    """The named optimizer for the arrays of `adapter`, after clipping to the global norm `max_grad_norm` (0: no clipping).

    Args:
        adapter: the tree that is trained, arrays or their shapes.
        beta1, beta2, momentum: default: the optimizer's own.
        lora_plus_ratio: the learning rate of lora_B, and of vectors, is so many times that of lora_A (Hayou et al., LoRA+, 2024,
            arXiv:2402.12354, section 4). An embedding's factors, of which A is zero at first, have the rate of lora_A.

    Raises:
        ValueError: for one that the optimizer does not have.
    """
    row = OPTIMIZERS[name]
    given = {"beta1": beta1, "beta2": beta2, "momentum": momentum}
    if wrong := idle_settings(name, given):
        raise ValueError(wrong[0])
    own = {**row.defaults, **{key: value for key, value in given.items() if value is not None}}
    settings = Settings(learning_rate, parameters_of(adapter), weight_decay, own)
    tx = row.make(settings)
    if lora_plus_ratio is not None:  # every update is the rate times something
        faster = labels(settings.parameters, lambda parameter: parameter.is_faster)
        tx = optax.chain(tx, optax.partition({True: optax.scale(lora_plus_ratio), False: optax.identity()}, faster))
    return _clipped(max_grad_norm, tx if row.around is None else row.around(tx, settings))


def idle_settings(name: OptimizerName, given: Mapping[str, float | None]) -> list[str]:
    """What is wrong with settings that have no effect on the optimizer; None is not given."""
    return [
        f"`{key}` has no effect on {name}; got {value}. Leave it out, or choose one of "
        f"{', '.join(other for other, row in OPTIMIZERS.items() if key in row.defaults)}."
        for key, value in given.items()
        if value is not None and key not in OPTIMIZERS[name].defaults
    ]


def evaluated(state: TrainState) -> PyTree:
    """The adapter to evaluate and to save: the state's, or with a schedule-free optimizer the average of what it went through."""
    states = jax.tree.leaves(state.opt_state, is_leaf=_is_schedule_free)
    averaging = next(filter(_is_schedule_free, states), None)
    if averaging is None:
        return state.adapter
    averaging = averaging._replace(z=to_device(averaging.z))
    return contrib.schedule_free_eval_params(averaging, state.adapter)


def _is_schedule_free(state: object) -> bool:
    return isinstance(state, contrib.ScheduleFreeState)


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float, max_grad_norm: float, b1: float, b2: float
) -> optax.GradientTransformation:
    """AdamW with torch's epsilon for any tree, all of which is decayed; `max_grad_norm=0` clips nothing."""
    return _clipped(max_grad_norm, optax.adamw(learning_rate, b1=b1, b2=b2, eps=EPSILON, weight_decay=weight_decay))


def _clipped(max_grad_norm: float, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(*[optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm > 0 else [], tx)
