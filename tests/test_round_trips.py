"""The table of adapters and formats in docs/formats.md: every cell that says so is written here and read there, or the reverse."""

from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from gguf_files import IDS, NEEDS_CONFIG, ROWS, read, read_by_transformers
from oracles import make_torch_model, our_logits, torch_logits
from trees import perturbed

import jlora
from jlora import LoraConfig
from jlora.files import save_torch
from jlora.files.peft import to_peft
from jlora.models import has_adapted_tie

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
FAMILIES = ("gpt2", "llama", "qwen2")  # llama has a head of its own, the others tie it to the embedding
LINEAR = {"gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "down_proj"), "qwen2": ("q_proj", "down_proj")}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "qwen2": "embed_tokens"}
NORM = {"gpt2": "ln_f", "llama": "norm", "qwen2": "norm"}
ATOL = 1e-4  # float32 logits of a few units; sums in another order

ADAPTERS = {
    "LoRA": lambda f: {"targets": LINEAR[f]},
    "rsLoRA": lambda f: {"targets": LINEAR[f], "use_rslora": True, "alpha": 3.0},
    "ranks and alphas by pattern, some layers": lambda f: {
        "targets": LINEAR[f], "layers_to_transform": [1], "rank_pattern": {LINEAR[f][0]: 5}, "alpha_pattern": {LINEAR[f][1]: 2.0},
    },
    "DoRA": lambda f: {"targets": LINEAR[f], "use_dora": True},
    "PiSSA": lambda f: {"targets": LINEAR[f], "init": "pissa"},
    "LoHa (`kind`)": lambda f: {"targets": LINEAR[f], "kind": "loha"},
    "MiSS (`kind`)": lambda f: {"targets": LINEAR[f], "kind": "miss", "alpha": LoraConfig.alpha},
    "trained biases": lambda f: {"targets": LINEAR[f], "bias": "all"},
    "modules trained whole": lambda f: {"targets": LINEAR[f], "modules_to_save": [NORM[f]]},
    "on the embedding": lambda f: {"targets": [*LINEAR[f], EMBEDDING[f]]},
}  # fmt: skip
"""Row of the table -> the config of such an adapter. What 4-bit checkpoints there are, is in tests/test_qlora.py."""


def table() -> dict[tuple[str, str], str]:
    """(row, column) -> cell of the page's table: "both" ways, "out", "no", or a note in place of the last."""
    lines = PAGE[PAGE.index("| adapter |") :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {(row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)}


CELLS = table()


def cells(wanted: str) -> list:
    return [
        pytest.param(row, column, family, id=f"{row}-{column}-{family}")
        for (row, column), cell in CELLS.items()
        for family in FAMILIES
        if wanted in meaning(row, cell, family)
    ]


def meaning(row: str, cell: str, family: str) -> tuple[str, ...]:
    if row == "trained biases" and family == "llama":  # which has none
        return ("no",)
    if cell == "not GPT-2":
        return () if family == "gpt2" else ("both", "out")
    if cell == "untied only":
        cell = "both" if family == "llama" else "no"
    return ("both", "out") if cell == "both" else (cell,)


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer(tiny.CHATML)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """family -> (transformers model, our model, parameters), made once each."""
    made = {}

    def get(family):
        if family not in made:
            theirs = make_torch_model(family, vocab_size=ROWS)
            directory = tmp_path_factory.mktemp(family)
            theirs.save_pretrained(directory)
            made[family] = theirs, *jlora.load(directory, dtype="float32")
        return made[family]

    return get


def config_of(row: str, family: str) -> LoraConfig:
    return LoraConfig(**({"rank": 3, "alpha": 7.0} | ADAPTERS[row](family)))


def trained(params, config):
    return perturbed(jlora.add_lora(params, config, key=jax.random.key(0)), seed=1)


def peft_model(family):
    return make_torch_model(family, vocab_size=ROWS)


# Writing: the adapted parameters go out, the peer's logits come back


def out_peft(directory, family, model, params, config, tok):
    jlora.save_adapter(directory, params, config=config, base_model="base")
    return torch_logits(peft.PeftModel.from_pretrained(peft_model(family), directory).eval(), IDS)


def out_mlx(directory, family, model, params, config, tok):
    # tests/test_mlx.py has mlx-lm itself read such files, among the slow tests.
    jlora.save_mlx_adapter(directory, params, config=config, model=model)
    return our_logits(model, jlora.load_adapter(directory, jlora.remove_lora(params)), IDS)


def out_gguf_adapter(directory, family, model, params, config, tok):
    """By llama.cpp's rule, applied to the tensors of the base's file. tests/test_llama_cpp.py has llama.cpp itself do it."""
    jlora.save_gguf_adapter(directory / "adapter.gguf", params, config=config, model=model)
    jlora.save_gguf(directory / "base.gguf", model, jlora.remove_lora(params), tokenizer=tok, dtype="f32")
    jlora.save_gguf(directory / "merged.gguf", model, params, tokenizer=tok, dtype="f32")
    (_, base, _), (fields, factors, _), (_, merged, _) = (
        read(directory / f"{n}.gguf") for n in ("base", "adapter", "merged")
    )
    for name in {key.rpartition(".lora_")[0] for key in factors}:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        base[name] = base[name] + fields["adapter.lora.alpha"] / b.shape[1] * b @ a
    for name, array in merged.items():
        np.testing.assert_allclose(base[name], array, atol=1e-5, err_msg=name)
    return out_gguf(directory / "again", family, model, params, config, tok)


def out_transformers(directory, family, model, params, config, tok):
    jlora.save_pretrained(directory, *jlora.untie(model, params), tokenizer=tok)
    again = jlora.load(directory, dtype="float32")
    np.testing.assert_allclose(our_logits(*again, IDS), our_logits(model, params, IDS), atol=ATOL)
    return torch_logits(transformers.AutoModelForCausalLM.from_pretrained(directory).eval(), IDS)


def out_torch(directory, family, model, params, config, tok):
    model, params = jlora.untie(model, params) if has_adapted_tie(model, params) else (model, params)
    save_torch(directory / "model.pt", model, params)
    again = make_torch_model(family, vocab_size=ROWS, tie_word_embeddings=model.config.tie_word_embeddings)
    again.load_state_dict(torch.load(directory / "model.pt", weights_only=True))
    return torch_logits(again, IDS)


def out_gguf(directory, family, model, params, config, tok):
    directory.mkdir(exist_ok=True)
    fields = make_torch_model(family, vocab_size=ROWS).config
    if has_adapted_tie(model, params):
        model, params = jlora.untie(model, params)
        fields.tie_word_embeddings = False
    jlora.save_gguf(directory / "model.gguf", model, params, tokenizer=tok, dtype="f32")
    untold = family in NEEDS_CONFIG or not fields.tie_word_embeddings
    return torch_logits(read_by_transformers(directory / "model.gguf", fields if untold else None), IDS)


WRITERS = {
    "PEFT": out_peft,
    "mlx-lm": out_mlx,
    "GGUF adapter": out_gguf_adapter,
    "transformers": out_transformers,
    "state dict": out_torch,
    "GGUF model": out_gguf,
}


def test_the_table_is_about_these():
    assert {row for row, _ in CELLS} == set(ADAPTERS)
    assert {column for _, column in CELLS} == set(WRITERS)
    assert set(CELLS.values()) <= {"both", "out", "no", "untied only", "not GPT-2"}


@pytest.mark.few(5)
@pytest.mark.parametrize(("row", "column", "family"), cells("out"))
def test_what_we_write_is_read(row, column, family, loaded, tok, tmp_path):
    _, model, params = loaded(family)
    config = config_of(row, family)
    adapted = trained(params, config)
    expected = our_logits(model, adapted, IDS)
    assert np.abs(expected - our_logits(model, params, IDS)).max() > 0.05, "the adapter must show"
    theirs = WRITERS[column](tmp_path, family, model, adapted, config, tok)
    np.testing.assert_allclose(theirs, expected, atol=ATOL, rtol=ATOL)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "quantize", [pytest.param(jlora.NF4(), id="nf4"), pytest.param(jlora.Int8(), id="int8", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("column", WRITERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_a_packed_base_are_written_alike(column, family, quantize, loaded, tok, tmp_path):
    """The adapter alone is the same file whatever its base; merged, the base is what the codes stand for."""
    _, model, params = loaded(family)
    config = config_of("LoRA", family)
    packed = trained(jlora.quantize_params(params, quantize), config)
    dense = jlora.combine(jlora.split(packed)[0], jlora.split(trained(params, config))[1])
    alone = column in ("PEFT", "mlx-lm", "GGUF adapter")
    expected = our_logits(model, dense if alone else packed, IDS)
    theirs = WRITERS[column](tmp_path, family, model, dense if column == "GGUF adapter" else packed, config, tok)
    if column == "mlx-lm":  # whose base was the packed one here
        expected = our_logits(model, packed, IDS)
    np.testing.assert_allclose(theirs, expected, atol=ATOL, rtol=ATOL)


@pytest.mark.few(5)
@pytest.mark.parametrize(("row", "column", "family"), [c for c in cells("both") if c.values[1] == "PEFT"])
def test_what_peft_writes_is_read(row, column, family, loaded, tmp_path):
    """tests/test_mlx.py has the reverse for mlx-lm, among the slow tests."""
    _, model, params = loaded(family)
    config = config_of(row, family)
    fields = dict(to_peft(config))
    made_by = peft.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")]
    torch.manual_seed(5)
    theirs = peft.get_peft_model(peft_model(family), made_by(**fields, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    read_here = jlora.load_adapter(tmp_path, params)
    near = 3 * ATOL if row == "PiSSA" else ATOL  # each side decomposes the base anew
    np.testing.assert_allclose(our_logits(model, read_here, IDS), torch_logits(theirs, IDS), atol=near, rtol=near)
    assert LoraConfig.load(tmp_path).rank == config.rank


@pytest.mark.parametrize(("row", "column", "family"), cells("no"))
def test_what_a_format_does_not_represent_is_refused(row, column, family, loaded, tok, tmp_path):
    _, model, params = loaded(family)
    config = config_of(row, family)
    if row == "trained biases" and family == "llama":
        with pytest.raises(ValueError, match="finds no bias"):
            trained(params, config)
        return
    adapted = trained(params, config)
    with pytest.raises(ValueError, match="does not represent|cannot|not a low-rank|is refused|holds"):
        WRITERS[column](tmp_path, family, model, adapted, config, tok)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "and nothing is written"
