"""Checkpoints that store kernels packed: a layout is one row of `PACKINGS`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.files import packing
from jlora.tree.paths import flatten


@dataclasses.dataclass(frozen=True)
class Rows8:
    """A layout that no library has: int8 codes with a "codes" field and one float32 scale for each 32 of a row."""

    shape: tuple[int, ...]
    spec = jlora.Int8(block_size=32)

    @classmethod
    def find(cls, checkpoint, name):
        return cls(checkpoint.shapes[name]) if f"{name}.scale" in checkpoint.shapes else None

    def tensors(self, name):
        return {name: (self.shape, ("U8",)), f"{name}.scale": ((self.shape[0], self.shape[1] // 32), ("F32",))}

    def read(self, checkpoint, name):
        q = jax.eval_shape(lambda: jlora.quantize(jnp.zeros(self.shape[::-1]), self.spec))
        leaves = (jnp.array(checkpoint.read(name)), jnp.array(checkpoint.read(f"{name}.scale")))
        return jax.tree.unflatten(jax.tree.structure(q), leaves)


ROWS8 = packing.Packing(
    name="rows of int8",
    declared=lambda says: says.get("quant_method") == "rows8",
    find=Rows8.find,
    format=jlora.Int8,
    tensors=lambda name, q: {name: np.asarray(q.codes), f"{name}.scale": np.asarray(q.absmax)},
    declaration=lambda spec, dtype, skipped: {"quant_method": "rows8"},
)


@pytest.fixture
def packed_dir(llama_dir, tmp_path):
    """The tiny Llama with its `mlp.up_proj` kernels in the layout of `Rows8`."""
    tensors = load_file(f"{llama_dir}/model.safetensors")
    for name in [name for name in tensors if "up_proj" in name]:
        q = jlora.quantize(jnp.asarray(tensors[name].astype(np.float32)).T, Rows8.spec)
        tensors[name], tensors[f"{name}.scale"] = (np.asarray(leaf) for leaf in jax.tree.leaves(q))
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads(Path(llama_dir, "config.json").read_text()) | {"quantization_config": {"quant_method": "rows8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.slow
def test_a_packed_layout_is_one_row(packed_dir, llama_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"quantized \('rows8'\).*bitsandbytes' 4-bit NF4"):
        jlora.load(packed_dir, dtype=jnp.float32)
    monkeypatch.setattr(packing, "PACKINGS", (*packing.PACKINGS, ROWS8))
    for stack in (False, True):
        model, params = jlora.load(packed_dir, dtype=jnp.float32, stack=stack)
        _, dense = jlora.load(llama_dir, dtype=jnp.float32, stack=stack)
        ours, expected = flatten(params), flatten(dense)
        packed = [path for path, leaf in ours.items() if isinstance(leaf, jlora.QuantizedTensor)]
        assert packed and all("up_proj" in path for path in packed)
        for path, leaf in expected.items():
            wanted = jlora.dequantize(jlora.quantize(leaf, Rows8.spec)) if path in packed else leaf
            got = jlora.dequantize(ours[path]) if path in packed else ours[path]
            np.testing.assert_array_equal(got, wanted)
        jlora.save_quantized(tmp_path / f"again {stack}", model, params)
        _, back = jlora.load(tmp_path / f"again {stack}", dtype=jnp.float32, stack=stack)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"quantized already, as Int8.*cannot be loaded as NF4"):
        jlora.load(packed_dir, quantize=jlora.NF4())


def test_what_a_packed_layout_lacks_is_named(packed_dir, monkeypatch):
    monkeypatch.setattr(packing, "PACKINGS", (ROWS8,))
    tensors = load_file(packed_dir / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[f"{name}.scale"] = tensors[f"{name}.scale"].astype(np.float16)
    save_file(tensors, packed_dir / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}.scale is F16, should be F32"):
        jlora.load(packed_dir)
