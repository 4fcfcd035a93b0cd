"""The structure of the house: who imports whom, and what `import jlora` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import jlora

PACKAGE = Path(jlora.__file__).parent
FLOORS = [
    {"_start", "_terminal", "_typing", "_processor", "weight", "tree", "_numbers"},
    {"quant", "storage"},
    {"lora"},
    {"wrapping", "models"},
    {"files", "data", "train", "generation", "evaluation"},
    {"report"},
    {"runs", "publish", "serve"},
    {"cli"},
    {"lm_eval"},
    {"__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Within the lowest floor: the tree functions know values, values know the vocabulary.
GROUND = ["_start", "_terminal", "_typing", "_processor", "weight", "tree", "_numbers"]
USES_FLAX_FROM = FLOOR_OF["models"]


PUBLIC_JAX = {
    "jax", "jax.numpy", "jax.lax", "jax.core", "jax.extend", "jax.extend.core", "jax.custom_derivatives", "jax.sharding",
    "jax.tree_util", "jax.typing", "jax.ad_checkpoint",
}  # fmt: skip
OUTSIDE = {"data": {"numpy", "datasets", "pyarrow"}}
"""Room -> all that it imports besides jlora and the standard library: records are read and tokenized without jax."""
LATE = {"data": {"datasets", "pyarrow", "pyarrow.parquet", "jlora.storage.jinja"}}
"""Room -> what is imported where it is used, not with the room."""


def modules():
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        yield file, parts[0]


def imports(file, late=True):
    """Names of the modules that a file imports; without `late`, those that its own import brings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (
                (f"jlora.{alias.name}" for alias in node.names) if node.module == "jlora" else (node.module or "",)
            )


def test_every_room_has_a_floor():
    assert {room for _, room in modules()} <= set(FLOOR_OF)


def test_imports_go_down():
    wrong = []
    for file, room in modules():
        for name in imports(file):
            root, _, rest = name.partition(".")
            if root != "jlora" or not rest:
                continue
            other = rest.partition(".")[0]
            if other == "__version__" or other == room:
                continue
            lower = GROUND.index(other) < GROUND.index(room) if {room, other} <= set(GROUND) else None
            if not (lower if lower is not None else FLOOR_OF[other] < FLOOR_OF[room]):
                wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_flax_only_from_the_models_up():
    for file, room in modules():
        if FLOOR_OF[room] < USES_FLAX_FROM:
            assert not [n for n in imports(file) if n.split(".")[0] == "flax"], file


def test_what_rooms_import_from_outside():
    """Public modules of jax and flax everywhere; of `OUTSIDE` and `LATE`, no more and no earlier than they say."""
    wrong = []
    for file, room in modules():
        names = set(imports(file))
        outside = {n.partition(".")[0] for n in names} - {"jlora"} - sys.stdlib_module_names
        wrong += [(file.name, n) for n in names if n.partition(".")[0] in ("jax", "jaxlib") and n not in PUBLIC_JAX]
        wrong += [(file.name, n) for n in names if n.startswith("flax.core.scope")]
        wrong += [(file.name, n) for n in outside - OUTSIDE.get(room, outside)]
        wrong += [(file.name, n) for n in LATE.get(room, set()).intersection(imports(file, late=False))]
        attributes = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        wrong += [(file.name, "_src")] if "_src" in attributes else []
    assert not wrong


def test_import_is_light():
    code = (
        "import sys, jlora\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from jax.extend import backend\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'nonexistent')\n"  # would fail if a backend were up already: it is only read then
        "try:\n"
        "    backend.get_backend()\n"
        "except RuntimeError:\n"
        "    print('no backend was started')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no backend was started" in out.stdout


def test_tests_import_no_tests():
    """What several of them need is a module of its own; fixtures are in conftest.py."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        assert not [name for name in imports(file) if name.startswith("test_") or name == "conftest"], file.name
