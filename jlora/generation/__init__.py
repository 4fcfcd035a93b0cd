"""Sampling with a cache of keys and values: whole continuations, or token by token."""

from jlora.generation.api import check_sampling as check_sampling
from jlora.generation.api import generate as generate
from jlora.generation.api import stream as stream
from jlora.generation.decoding import Past as Past
from jlora.generation.decoding import advance as advance
from jlora.generation.decoding import begin as begin
from jlora.generation.decoding import new_cache as new_cache
from jlora.generation.form import for_decoding as for_decoding
from jlora.generation.many import generate_many as generate_many
from jlora.generation.sampling import SAMPLING as SAMPLING
from jlora.generation.sampling import Draws as Draws
from jlora.generation.sampling import Sampling as Sampling
from jlora.generation.sampling import truncate as truncate
from jlora.generation.slots import ALTERNATIVES as ALTERNATIVES
from jlora.generation.slots import Drawn as Drawn
from jlora.generation.slots import fill as fill
from jlora.generation.slots import step as step
