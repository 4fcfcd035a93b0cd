"""Fine-tuning runs: the config, the loop, and the directory that a run leaves."""

from jlora.runs.config import FinetuneConfig as FinetuneConfig
from jlora.runs.loop import FinetuneResult as FinetuneResult
from jlora.runs.loop import Stopped as Stopped
from jlora.runs.loop import TrainingDiverged as TrainingDiverged
from jlora.runs.loop import finetune as finetune
