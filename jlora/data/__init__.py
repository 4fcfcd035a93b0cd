"""Data: raw text, instruction and chat records -> tokens, labels, segments; stateless batches."""

from jlora.data.batches import IGNORED as IGNORED
from jlora.data.batches import Dataset as Dataset
from jlora.data.batches import Row as Row
from jlora.data.batches import batch as batch
from jlora.data.batches import batch_tokens as batch_tokens
from jlora.data.batches import eval_batches as eval_batches
from jlora.data.batches import steps_per_epoch as steps_per_epoch
from jlora.data.batches import supervised_tokens as supervised_tokens
from jlora.data.instruct import InstructDataset as InstructDataset
from jlora.data.preview import preview as preview
from jlora.data.preview import summary as summary
from jlora.data.records import read_records as read_records
from jlora.data.sources import EVAL_FRACTION as EVAL_FRACTION
from jlora.data.sources import is_hub_data as is_hub_data
from jlora.data.sources import kind_of as kind_of
from jlora.data.sources import load_data as load_data
from jlora.data.sources import split_records as split_records
from jlora.data.stats import Stats as Stats
from jlora.data.templates import TEMPLATES as TEMPLATES
from jlora.data.templates import prompt_ids as prompt_ids
from jlora.data.templates import render as render
from jlora.data.text import TextDataset as TextDataset
from jlora.data.text import prepare_text as prepare_text
from jlora.data.tokens import pad_id as pad_id
