"""Fine-tuning runs: the config, the loop, and the directory that a run leaves."""

from jlora.finetuning.config import FinetuneConfig as FinetuneConfig
from jlora.finetuning.loop import FinetuneResult as FinetuneResult
from jlora.finetuning.loop import Stopped as Stopped
from jlora.finetuning.loop import TrainingDiverged as TrainingDiverged
from jlora.finetuning.loop import finetune as finetune
