"""Answers scored: metrics of text, code and JSON, a model as the judge, and how sure the figures are."""

from jlora.evaluation.bootstrap import LEVEL as LEVEL
from jlora.evaluation.bootstrap import Estimate as Estimate
from jlora.evaluation.bootstrap import difference as difference
from jlora.evaluation.bootstrap import estimate as estimate
from jlora.evaluation.code import Sandbox as Sandbox
from jlora.evaluation.embedding import Embedder as Embedder
from jlora.evaluation.example import Counts as Counts
from jlora.evaluation.example import Example as Example
from jlora.evaluation.judge import Endpoint as Endpoint
from jlora.evaluation.judge import Judgement as Judgement
from jlora.evaluation.judge import Pair as Pair
from jlora.evaluation.judge import judged as judged
from jlora.evaluation.judge import win_rate as win_rate
from jlora.evaluation.metrics import METRICS as METRICS
from jlora.evaluation.metrics import Metric as Metric
from jlora.evaluation.metrics import Tools as Tools
from jlora.evaluation.metrics import metrics_named as metrics_named
from jlora.evaluation.results import Results as Results
from jlora.evaluation.results import reasons as reasons
from jlora.evaluation.results import scored as scored
