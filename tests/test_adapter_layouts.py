"""Adapter layouts: a layout is one row, and a writer's errors name its own format."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.files import adapters
from jlora.files.adapters import Layout, layouts, register
from jlora.files.mlx import MLX
from jlora.files.peft import PEFT
from jlora.storage import save_tensors
from jlora.storage.whole import write_text

MODEL, _ = jlora.load(Path(__file__).parents[1] / "examples/assets/tiny-llama")

WRITERS = {
    "PEFT": lambda path, params, config: jlora.save_adapter(path, params, config=config, base_model="base"),
    "mlx-lm": lambda path, params, config: jlora.save_mlx_adapter(path, params, config=config, model=MODEL),
    "GGUF": lambda path, params, config: jlora.save_gguf_adapter(path / "a.gguf", params, config=config, model=MODEL),
}


@pytest.mark.parametrize("format", WRITERS)
def test_a_writer_names_its_own_format(format, tmp_path):
    config = jlora.LoraConfig(rank=2, targets=["w"])
    tree = {"w": jnp.ones((4, 8))}
    with pytest.raises(ValueError, match="found no adapter") as error:
        WRITERS[format](tmp_path, tree, config)
    assert ("save_adapter`" in str(error.value)) == (format == "PEFT")
    adapted = jlora.add_lora(tree, config, key=jax.random.key(0), roles={"w": "oi"})
    with pytest.raises(ValueError, match=rf"{format}'s files hold adapters of kernels.*w 'oi'"):
        WRITERS[format](tmp_path, adapted, config)
    assert not list(tmp_path.iterdir())


def test_an_adapter_layout_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "_LAYOUTS", dict(adapters._LAYOUTS))
    assert layouts() == [PEFT, MLX]
    register(
        Layout(
            name="tiny",
            weights="tiny.safetensors",
            marks=("tiny",),
            base="of",
            read=lambda found, params: {"read": dict(found.fields), "onto": params},
            config=lambda found: jlora.LoraConfig(rank=found.fields["tiny"]),
            module=str,
            children=lambda kind: {},
        )
    )
    write_text(tmp_path / "adapter_config.json", '{"tiny": 3, "of": "base"}')
    save_tensors(tmp_path / "tiny.safetensors", {"x": np.ones(2, np.float32)})
    assert jlora.LoraConfig.load(tmp_path).rank == 3
    assert jlora.load_adapter(tmp_path, {})["read"]["tiny"] == 3
    assert adapters.base_model_of(tmp_path) == "base"
    with pytest.raises(FileExistsError, match=r"tiny's layout .*Write PEFT's into another"):
        adapters.refuse_mixture(tmp_path, PEFT)
    save_tensors(tmp_path / MLX.weights, {"x": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="is tiny's, and adapters.safetensors is mlx-lm's"):
        jlora.LoraConfig.load(tmp_path)
