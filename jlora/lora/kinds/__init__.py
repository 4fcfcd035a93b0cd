"""The kinds of adapter, one file each; `base` says what a kind is, and how to write one."""

from jlora.lora.kinds.base import KINDS as KINDS
from jlora.lora.kinds.base import AdaptedWeight as AdaptedWeight
from jlora.lora.kinds.base import Misfit as Misfit
from jlora.lora.kinds.base import PeftForm as PeftForm
from jlora.lora.kinds.base import Place as Place
from jlora.lora.kinds.base import Site as Site
from jlora.lora.kinds.base import Unwritable as Unwritable
from jlora.lora.kinds.base import frozen as frozen
from jlora.lora.kinds.base import kind as kind
from jlora.lora.kinds.base import kind_named as kind_named
from jlora.lora.kinds.base import kind_of_peft as kind_of_peft
from jlora.lora.kinds.base import trained as trained
from jlora.lora.kinds.full import FullWeight as FullWeight
from jlora.lora.kinds.loha import LohaWeight as LohaWeight
from jlora.lora.kinds.lora import LoraWeight as LoraWeight
from jlora.lora.kinds.lora import as_lora as as_lora
from jlora.lora.kinds.lora import column_norms as column_norms
from jlora.lora.kinds.low_rank import LowRankWeight as LowRankWeight
from jlora.lora.kinds.miss import MissWeight as MissWeight
from jlora.lora.kinds.routed import RoutedWeight as RoutedWeight
from jlora.lora.kinds.tokens import TokensWeight as TokensWeight
