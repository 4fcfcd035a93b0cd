"""Adapters as values in the parameter tree: the seam, the config, and the functions from tree to tree."""

from jlora.lora.config import LoraConfig as LoraConfig
from jlora.lora.routing import Choice as Choice
from jlora.lora.routing import RoutedWeight as RoutedWeight
from jlora.lora.routing import adapter_names as adapter_names
from jlora.lora.routing import route as route
from jlora.lora.routing import stack_adapters as stack_adapters
from jlora.lora.routing import unstack_adapters as unstack_adapters
from jlora.lora.seam import embed as embed
from jlora.lora.seam import linear as linear
from jlora.lora.stack import is_stacked as is_stacked
from jlora.lora.stack import stack_layers as stack_layers
from jlora.lora.stack import unstack_layers as unstack_layers
from jlora.lora.transform import adapted_leaves as adapted_leaves
from jlora.lora.transform import adapted_modules as adapted_modules
from jlora.lora.transform import adapter_mask as adapter_mask
from jlora.lora.transform import add_lora as add_lora
from jlora.lora.transform import combine as combine
from jlora.lora.transform import merge as merge
from jlora.lora.transform import path_key as path_key
from jlora.lora.transform import remove_lora as remove_lora
from jlora.lora.transform import split as split
from jlora.lora.transform import with_dropout as with_dropout
from jlora.lora.weight import AdaptedWeight as AdaptedWeight
from jlora.lora.weight import FullWeight as FullWeight
from jlora.lora.weight import LoraWeight as LoraWeight
