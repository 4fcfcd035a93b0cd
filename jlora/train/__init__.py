"""The loss, the step, the optimizer, the evaluation and the checkpoints of training."""

from jlora.train.adam8bit import adamw8bit as adamw8bit
from jlora.train.checkpoints import Checkpoints as Checkpoints
from jlora.train.evaluation import Evaluation as Evaluation
from jlora.train.evaluation import NotFinite as NotFinite
from jlora.train.evaluation import evaluate as evaluate
from jlora.train.evaluation import perplexity as perplexity
from jlora.train.loss import LossFn as LossFn
from jlora.train.loss import causal_lm_loss as causal_lm_loss
from jlora.train.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from jlora.train.memory import Memory as Memory
from jlora.train.memory import planned as planned
from jlora.train.memory import predict as predict
from jlora.train.offload import offloaded as offloaded
from jlora.train.optimizers import adamw as adamw
from jlora.train.optimizers import evaluated as evaluated
from jlora.train.optimizers import make_optimizer as make_optimizer
from jlora.train.schedules import make_schedule as make_schedule
from jlora.train.schedules import warmup_cosine as warmup_cosine
from jlora.train.step import Step as Step
from jlora.train.step import TrainState as TrainState
from jlora.train.step import init_state as init_state
from jlora.train.step import make_step as make_step
