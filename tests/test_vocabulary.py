"""Tokens beyond the embedding, weights that are not finite, numbers out of range: refused by every command, with the reason."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora._numbers import NotFinite, json_text
from jlora.cli import main
from jlora.generation import generate
from jlora.train import evaluate

pytestmark = pytest.mark.usefixtures("quick_compilation")
ASSET = Path("examples/assets/tiny-gpt2").absolute()


def checkpoint(directory, *, vocabulary=(), added=()):
    """The embedded model with other tokens in its tokenizer.json."""
    shutil.copytree(ASSET, directory)
    file = directory / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"].update(vocabulary)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    fields["added_tokens"] += [{"id": i, "content": token, **plain} for token, i in added]
    file.write_text(json.dumps(fields))
    return directory


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    """A vocabulary with a hole: " and" is number 1600 of 1536."""
    return checkpoint(tmp_path_factory.mktemp("holed") / "m", vocabulary={"Ġand": 1600})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "x.txt").write_text("see and see and see\n" * 60)
    (folder / "x.jsonl").write_text('{"instruction": "see", "output": "see and see"}\n' * 8)
    return folder


@pytest.mark.parametrize("data", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("command", ["evaluate", "finetune", "inspect", "prepare"])
def test_tokens_beyond_the_embedding_are_refused(command, data, holed, files, tmp_path, capsys):
    if command == "prepare" and data == "x.jsonl":
        (tmp_path / "texts").mkdir()
        files = shutil.copy(files / "x.txt", tmp_path / "texts") and tmp_path
        data = "texts"
    flags = {
        "evaluate": ["--split", "all"],
        "finetune": ["--output", tmp_path / "r", "--steps", 1],
        "prepare": ["--output", tmp_path / "p"],
    }
    with pytest.raises(SystemExit):
        main([str(a) for a in (command, "--model", holed, "--data", files / data, *flags.get(command, []))])
    said = " ".join(capsys.readouterr().err.split())
    assert "Token id 1600 ('Ġand') is outside the model's vocabulary 0..1535" in said
    assert not list((tmp_path / "p").glob("*.npy"))


@pytest.mark.slow
def test_padding_that_no_text_holds_may_lie_beyond_the_embedding(files, tmp_path):
    model = checkpoint(tmp_path / "m", added=[("<pad>", 1536)])
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))
    assert jlora.load_tokenizer(model).pad_token_id == 1536
    run = {"data": str(files / "x.jsonl"), "steps": 2, "eval_fraction": 0.25, "rank": 2, "quiet": True}
    result = jlora.finetune(jlora.FinetuneConfig(model=str(model), output=str(tmp_path / "r"), **run))
    assert result.eval_loss is not None and math.isfinite(result.eval_loss)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named():
    model, params = jlora.load(ASSET, dtype="float32")
    ids = np.array([[5, 6, 7, 8]], np.int32)
    scale = params["transformer"]["h"]["1"]["ln_1"]["scale"]
    params["transformer"]["h"]["1"]["ln_1"]["scale"] = scale.at[0].set(jnp.nan)
    for run in (
        lambda: evaluate(model, params, [{"input_ids": ids, "labels": ids}]),
        lambda: generate(model, params, ids, max_new_tokens=2, temperature=0),
        lambda: generate(model, params, ids, max_new_tokens=2, key=jax.random.key(0)),
    ):
        with pytest.raises(NotFinite, match="'transformer/h/1/ln_1/scale' has values that are NaN"):
            run()


def test_json_has_no_nan_and_no_infinity():
    made = json_text({"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}, "d": 1, "e": None, "f": True})
    assert json.loads(made, parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]],
        "b": {"c": None},
        "d": 1,
        "e": None,
        "f": True,
    }


@pytest.mark.parametrize("seed", [2**32, 2**32 + 1, 2**63, 2**64, -1])
@pytest.mark.parametrize("command", ["finetune", "generate", "compare", "evaluate", "inspect"])
def test_seeds_of_more_than_32_bits_are_refused(command, seed, capsys, tmp_path):
    flags = {
        "finetune": ["--data", "x.txt", "--output", tmp_path / "r"],
        "evaluate": ["--data", "x.txt"],
        "inspect": ["--data", "x.txt"],
    }
    with pytest.raises(SystemExit):
        main([str(a) for a in (command, "--model", ASSET, "--seed", seed, *flags.get(command, ["--prompts", "a"]))])
    said = " ".join(capsys.readouterr().err.split())
    assert f"got {seed}" in said and "`seed` must be" in said


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": math.inf},
        {"steps": 10**30},
        {"epochs": math.nan},
        {"learning_rate": math.inf},
        {"weight_decay": math.inf},
        {"batch_size": 2**31},
    ],
    ids=str,
)
def test_numbers_without_bound_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        jlora.FinetuneConfig(model="m", data="d", output="o", **options)


@pytest.mark.slow
def test_sampling_takes_every_number_that_means_something():
    model, params = jlora.load(ASSET, dtype="float32")
    ids, key = [[5, 6, 7]], jax.random.key(0)
    everything = generate(model, params, ids, max_new_tokens=3, top_k=0, key=key)
    assert generate(model, params, ids, max_new_tokens=3, top_k=2**40, key=key) == everything
    assert generate(model, params, ids, max_new_tokens=3, top_p=1e-60, key=key) == generate(
        model, params, ids, max_new_tokens=3, temperature=0
    )
    for options in ({"temperature": 1e-60}, {"max_new_tokens": 10**30}, {"max_new_tokens": 1.5}, {"top_k": 2.0}):
        with pytest.raises(ValueError):
            generate(model, params, ids, **{"max_new_tokens": 3, **options}, key=key)
