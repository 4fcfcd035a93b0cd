"""jlora: LoRA and QLoRA for JAX."""

from jlora import train as train
from jlora._tree import cast as cast
from jlora._tree import count as count
from jlora._tree import nbytes as nbytes
from jlora._weight import Weight as Weight
from jlora.finetuning import FinetuneConfig as FinetuneConfig
from jlora.finetuning import FinetuneResult as FinetuneResult
from jlora.finetuning import finetune as finetune
from jlora.generation import generate as generate
from jlora.io import load as load
from jlora.io import load_adapter as load_adapter
from jlora.io import load_tokenizer as load_tokenizer
from jlora.io import save_adapter as save_adapter
from jlora.io import save_pretrained as save_pretrained
from jlora.lora import LoraConfig as LoraConfig
from jlora.lora import LoraWeight as LoraWeight
from jlora.lora import adapter_mask as adapter_mask
from jlora.lora import add_lora as add_lora
from jlora.lora import combine as combine
from jlora.lora import embed as embed
from jlora.lora import linear as linear
from jlora.lora import merge as merge
from jlora.lora import remove_lora as remove_lora
from jlora.lora import split as split
from jlora.lora import stack_layers as stack_layers
from jlora.lora import unstack_layers as unstack_layers
from jlora.lora import with_dropout as with_dropout
from jlora.report import compare as compare
from jlora.train import evaluate as evaluate

__version__ = "0.1.0"
