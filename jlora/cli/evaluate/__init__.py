"""`jlora evaluate`."""

from jlora.cli.evaluate.command import run as run
from jlora.cli.evaluate.options import Evaluate as Evaluate
