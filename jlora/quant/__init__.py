"""Blockwise quantized weights: NF4 with double quantization, int8, int4, MXFP4, and the blocks of GGUF files."""

from jlora.quant.blocks import from_file as from_file
from jlora.quant.blocks import to_file as to_file
from jlora.quant.formats import MXFP4 as MXFP4
from jlora.quant.formats import NF4 as NF4
from jlora.quant.formats import SPECS as SPECS
from jlora.quant.formats import FormatName as FormatName
from jlora.quant.formats import Int4 as Int4
from jlora.quant.formats import Int4G128 as Int4G128
from jlora.quant.formats import Int8 as Int8
from jlora.quant.ggml import GGML_TYPES as GGML_TYPES
from jlora.quant.ggml import Q4_0 as Q4_0
from jlora.quant.ggml import Q4_1 as Q4_1
from jlora.quant.ggml import Q4_K as Q4_K
from jlora.quant.ggml import Q5_0 as Q5_0
from jlora.quant.ggml import Q5_1 as Q5_1
from jlora.quant.ggml import Q6_K as Q6_K
from jlora.quant.ggml import Q8_0 as Q8_0
from jlora.quant.params import dequantize as dequantize
from jlora.quant.params import quantizable as quantizable
from jlora.quant.params import quantize as quantize
from jlora.quant.params import quantize_params as quantize_params
from jlora.quant.spec import QuantSpec as QuantSpec
from jlora.quant.tensor import NF4Tensor as NF4Tensor
from jlora.quant.tensor import QuantizedTensor as QuantizedTensor
from jlora.quant.tensor import quantize_rows as quantize_rows
