"""Our models in lm-evaluation-harness, beside its own Hugging Face model on the same checkpoint."""

import json
import logging
import subprocess
import sys

import jax
import lm_eval
import pytest
import tiny
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import jlora
from jlora.lm_eval import JloraLM

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow, pytest.mark.filterwarnings("default")]

KINDS = {
    "choose": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": ["lamp", "rope and salt", "rain"],
        "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 20}, "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Local tasks, one of each kind of request."""
    place = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"The {row['instruction']}",
            "answer": row["output"],
            "label": i % 3,
            "text": tiny.text(6 * i + 6, seed=i),
        }
        for i, row in enumerate(tiny.records(7))
    ]
    data = tiny.write_records(place / "docs.jsonl", rows)
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
    for name, kind in KINDS.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **kind}))
    return TaskManager(include_path=str(place), include_defaults=False), place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, llama_dir):
    """Written by transformers."""
    place = tmp_path_factory.mktemp("hf") / "model"
    transformers.AutoModelForCausalLM.from_pretrained(llama_dir).save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(llama_dir).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return HFLM(pretrained=checkpoint, device="cpu", batch_size=3, dtype="float32")


@pytest.fixture(scope="module")
def ours(checkpoint):
    return JloraLM.load(checkpoint, batch_size=3)


def evaluated(model, tasks, **options):
    logging.disable(logging.WARNING)
    try:
        manager, _ = tasks
        return lm_eval.simple_evaluate(model, tasks=list(KINDS), task_manager=manager, bootstrap_iters=0, **options)
    finally:
        logging.disable(logging.NOTSET)


def responses(result):
    """Task -> what the model gave, document by document."""
    return {task: [sample["filtered_resps"] for sample in samples] for task, samples in result["samples"].items()}


@pytest.mark.parametrize("chat", [False, True])
def test_any_task_gives_what_it_gives_with_hf(ours, theirs, tasks, chat):
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": False}
    a, b = evaluated(ours, tasks, **options), evaluated(theirs, tasks, **options)
    assert [s["arguments"] for s in a["samples"]["choose"]] == [s["arguments"] for s in b["samples"]["choose"]]
    a_given, b_given = responses(a), responses(b)
    assert a_given["write"] == b_given["write"] and len({text for (text,) in a_given["write"]}) > 1
    assert [g for (_, g) in sum(a_given["choose"], [])] == [g for (_, g) in sum(b_given["choose"], [])]
    for ours_, theirs_ in zip(sum(a_given["choose"], []), sum(b_given["choose"], []), strict=True):
        assert ours_[0] == pytest.approx(theirs_[0], abs=1e-4)
    for ours_, theirs_ in zip(a_given["roll"], b_given["roll"], strict=True):
        assert ours_ == pytest.approx(theirs_, abs=1e-4, rel=1e-6)
    assert a["results"]["choose"]["acc,none"] == b["results"]["choose"]["acc,none"]
    assert a["results"]["roll"]["word_perplexity,none"] == pytest.approx(
        b["results"]["roll"]["word_perplexity,none"], rel=1e-5
    )


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_contexts_longer_than_the_window_are_cut_on_the_left(ours, theirs):
    long = tiny.text(200)
    pairs = requests("loglikelihood", (long, " the keeper"), ("", "the lamp"), ("a lamp ", "lit"))
    for (a, a_greedy), (b, b_greedy) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert a == pytest.approx(b, abs=1e-4) and a_greedy == b_greedy
    texts = requests("generate_until", (long, {"until": [], "max_gen_toks": 30}), ("The", {"max_gen_toks": 5}))
    assert ours.generate_until(texts) == theirs.generate_until(texts)


def test_greedy_continuations_are_told(ours, checkpoint):
    model, params = jlora.load(checkpoint)
    context = ours.tok_encode("The keeper")
    (new,) = jlora.generate(model, params, [context], max_new_tokens=3, temperature=0, eos_token_id=[])
    rows = [(None, context, new), (None, context, [*new[:2], (new[2] + 1) % 300])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(rows)] == [True, False]


def test_an_adapter_by_name(ours, checkpoint, tasks, tmp_path):
    model, params = jlora.load(checkpoint)
    config = jlora.LoraConfig(rank=2)
    adapter, base = jlora.split(jlora.add_lora(params, config, key=jax.random.key(0)))
    adapter = jax.tree.map(lambda x: x + 0.2, adapter)
    jlora.save_adapter(tmp_path / "adapter", jlora.combine(adapter, base), config=config, base_model=checkpoint)
    given = evaluated("jlora", tasks, model_args={"adapter": str(tmp_path / "adapter")}, batch_size=4)
    direct = evaluated(JloraLM(model, jlora.combine(adapter, base), ours.tokenizer), tasks)
    assert responses(given)["write"] == responses(direct)["write"] != responses(evaluated(ours, tasks))["write"]


def test_the_harness_command(checkpoint, tasks, tmp_path):
    _, place = tasks
    flags = [
        "--model",
        "jlora",
        "--model_args",
        f"pretrained={checkpoint}",
        "--tasks",
        "choose",
        "--include_path",
        str(place),
    ]
    command = [
        sys.executable,
        "-m",
        "jlora.lm_eval",
        "run",
        *flags,
        "--batch_size",
        "2",
        "--output_path",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["choose"]["acc,none"] >= 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"device": "mps"}, "`device` is not of this model; got 'mps'. Use JAX_PLATFORMS"),
        ({"batch_size": "auto"}, "`batch_size` must be a number"),
        ({"max_length": 1000}, "`max_length` in 1..64"),
    ],
)
def test_arguments_that_are_refused(checkpoint, arguments, says):
    with pytest.raises(ValueError, match=says):
        JloraLM.create_from_arg_obj({"pretrained": checkpoint}, arguments)


def test_generation_that_is_not_computed_is_refused(ours):
    with pytest.raises(ValueError, match=r"num_beams=4, which is not computed here"):
        ours.generate_until(requests("generate_until", ("The", {"num_beams": 4})))
    with pytest.raises(ValueError, match="asks for 64 new tokens, and a window has 64"):
        ours.generate_until(requests("generate_until", ("The", {"max_gen_toks": 64})))
