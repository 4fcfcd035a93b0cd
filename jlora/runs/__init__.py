"""Fine-tuning runs: the config, the loop, and the directory that a run leaves."""

from jlora.runs.config import FinetuneConfig as FinetuneConfig
from jlora.runs.job import Stopped as Stopped
from jlora.runs.loop import TrainingDiverged as TrainingDiverged
from jlora.runs.loop import finetune as finetune
from jlora.runs.outcome import FinetuneResult as FinetuneResult
