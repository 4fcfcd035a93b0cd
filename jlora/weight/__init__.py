"""`Weight`, what a stored weight can do; the roles of its axes; the one product everything is made of."""

from jlora.weight.base import EINSUM as EINSUM
from jlora.weight.base import Inseparable as Inseparable
from jlora.weight.base import Parts as Parts
from jlora.weight.base import Update as Update
from jlora.weight.base import Weight as Weight
from jlora.weight.base import as_dense as as_dense
from jlora.weight.base import cast_to as cast_to
from jlora.weight.base import dense_matmul as dense_matmul
from jlora.weight.base import einsum as einsum
from jlora.weight.base import is_adapted as is_adapted
from jlora.weight.base import is_weight as is_weight
from jlora.weight.base import materialize as materialize
from jlora.weight.base import origin as origin
from jlora.weight.base import parts_of as parts_of
from jlora.weight.node import rebuilt as rebuilt
from jlora.weight.node import register_node as register_node
