"""The flags of a run in groups, each a dataclass with what can be wrong in it; and the one home of each default."""

from jlora.runs.flags.adapter import AdapterFlags as AdapterFlags
from jlora.runs.flags.compute import Compute as Compute
from jlora.runs.flags.optimization import Optimization as Optimization
from jlora.runs.flags.records import RecordFlags as RecordFlags
from jlora.runs.flags.saving import Saving as Saving
from jlora.runs.flags.source import Source as Source
from jlora.runs.flags.teaching import Teaching as Teaching
from jlora.runs.flags.watching import Watching as Watching
