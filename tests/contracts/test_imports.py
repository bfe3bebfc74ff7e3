"""Who may import whom, and what must not be imported before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
# Lower layers first; a module may import its own layer and those below.
LAYERS = {
    "errors": 0,
    "_lightning": 0,
    "runtime": 0,
    "schedules": 1,
    "guarding": 1,
    "selection": 1,
    "cost": 1,
    "entropy": 1,
    "sparsity": 2,
    "structure": 2,
    "deploy": 2,
    "report": 3,
    "_task": 4,
    "_pipeline": 4,
    "_quantizing": 4,
    "exporting": 4,
    "loading": 4,
    "portable": 4,
    "callbacks": 5,
    "_bundle_commands": 6,
    "_sensitivity_files": 5,
    "planning": 5,
    "_plan_table": 5,
    "sensitivity": 5,
    "_commands": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}
APART = [("sparsity", "structure"), ("sparsity", "deploy"), ("structure", "deploy")]
LIGHTNING = ("pytorch_lightning", "lightning")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield pytest.param(path, parts[0], id=".".join(parts))


def imports_of(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    return name.split(".")[1] if name.startswith("lightning_prune.") else None


@pytest.mark.parametrize(("path", "layer"), list(modules()))
def test_imports_point_one_way(path, layer):
    assert layer in LAYERS, f"{layer} has no place in the layers"
    for name in imports_of(path):
        target = layer_of(name)
        if target in LAYERS:
            assert LAYERS[target] <= LAYERS[layer], f"{path.name} ({layer}) imports {name}"
            assert (layer, target) not in APART, f"{path.name} ({layer}) imports {name}"
            assert (target, layer) not in APART, f"{path.name} ({layer}) imports {name}"


@pytest.mark.parametrize(("path", "layer"), list(modules()))
def test_only_the_namespace_module_names_lightning(path, layer):
    if layer == "_lightning":
        return
    named = [n for n in imports_of(path) if n.split(".")[0] in LIGHTNING]
    assert named == []


@pytest.mark.parametrize(("path", "layer"), list(modules()))
def test_sparsity_and_structure_know_no_lightning(path, layer):
    if layer in ("sparsity", "structure", "schedules", "cost", "selection"):
        assert "lightning_prune._lightning" not in set(imports_of(path))


def test_importing_the_package_does_not_import_what_is_not_always_used():
    # Lightning's own imports are not ours to judge: what matters is what this package adds.
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules); import lightning_prune; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = set(done.stdout.split())
    assert "lightning_prune" in added
    assert not added & {"onnx", "onnxruntime", "onnxscript", "matplotlib", "torch_pruning", "jinja2"}


def test_schedules_and_results_know_no_torch():
    for name in ("schedules.py", "report/results.py"):
        assert not [n for n in imports_of(PACKAGE / name) if n.split(".")[0] == "torch"]
