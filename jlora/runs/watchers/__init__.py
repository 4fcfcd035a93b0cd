"""The callbacks that a run's own flags ask for."""

from jlora.runs.callbacks import Callback
from jlora.runs.config import FinetuneConfig
from jlora.runs.display import Display
from jlora.runs.watchers.early_stopping import EarlyStopping
from jlora.runs.watchers.profile import Profile
from jlora.runs.watchers.samples import Samples, read_prompts
from jlora.runs.watchers.table import MetricsTable
from jlora.runs.watchers.tensorboard import TensorBoard
from jlora.runs.watchers.trackers import Trackio, Wandb

_LOGS: dict[str, type[Callback]] = {
    "csv": MetricsTable,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}
"""--log-to -> what writes there."""


def watchers(config: FinetuneConfig, display: Display) -> list[Callback]:
    """Those of a run.

    Raises:
        FileNotFoundError, ValueError: for prompts to sample that cannot be read.
        ImportError: for a package that --log-to needs, with the command that installs it.
    """
    made: list[Callback] = [_LOGS[name]() for name in config.log_to if name in _LOGS]
    if prompts := read_prompts(config):
        made.append(Samples(prompts, max_new_tokens=config.sample_tokens, display=display))
    if config.early_stopping_patience is not None:
        made.append(EarlyStopping(config.early_stopping_patience, threshold=config.early_stopping_threshold))
    if config.profile is not None:
        made.append(Profile(config.profile, display=display))
    return made
