"""Fine-tuning runs: the config, the loop, and the directory that a run leaves."""

from jlora.runs.callbacks import Callback as Callback
from jlora.runs.callbacks import View as View
from jlora.runs.config import FinetuneConfig as FinetuneConfig
from jlora.runs.endings import CallbackFailed as CallbackFailed
from jlora.runs.endings import OutOfMemory as OutOfMemory
from jlora.runs.endings import Stopped as Stopped
from jlora.runs.endings import TimeIsUp as TimeIsUp
from jlora.runs.endings import TrainingDiverged as TrainingDiverged
from jlora.runs.loop import finetune as finetune
from jlora.runs.outcome import FinetuneResult as FinetuneResult
from jlora.runs.watchers import EarlyStopping as EarlyStopping
