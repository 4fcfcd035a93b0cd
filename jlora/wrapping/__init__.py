"""`wrap`: adapters and 4-bit weights for any JAX function, by evaluating its jaxpr with rules that keep weights factored."""

from jlora.wrapping.api import wrap as wrap
from jlora.wrapping.frameworks import wrap_equinox as wrap_equinox
from jlora.wrapping.frameworks import wrap_linen as wrap_linen
from jlora.wrapping.frameworks import wrap_nnx as wrap_nnx
from jlora.wrapping.report import Report as Report
from jlora.wrapping.report import UnhandledUse as UnhandledUse
from jlora.wrapping.report import UnusedTarget as UnusedTarget
from jlora.wrapping.report import Use as Use
