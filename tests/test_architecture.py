"""Rules of the code base: layers, no import circles, where the network is used, nothing unpickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "armorm"

# From the ground up. A package imports only from layers below its own; docs/architecture.md gives the reasons.
LAYERS = [
    {"version", "errors", "moved"},
    {"interruption"},
    {"files", "progress", "conversation", "correlation"},
    {"notebook", "hub_access"},
    {"objectives"},
    {"attribution", "score_batch", "steering", "locks"},
    {"saved_chunks"},
    {"client"},
    {"data"},
    {"backbone"},
    {"features"},
    {"model"},
    {"heads"},
    {"explain"},
    {"reward_model"},
    {"evaluation"},
    {"training"},
    {"monitoring"},
    {"serving", "report", "integrations"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

NETWORK = {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "socket", "ftplib", "websockets", "ssl"}
NETWORK |= {"huggingface_hub", "datasets", "fastapi", "uvicorn", "gradio"}
NETWORK_PACKAGES = {"client", "data", "model", "serving"}
DOWNLOADING = {"armorm.backbone.locate", "armorm.hub_access"}  # backbones from the hub, and whether it answers
UNPICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {("torch", "load"), ("pandas", "read_pickle"), ("pd", "read_pickle")}
RUNNING_CALLS = {"eval", "exec", "compile", "__import__"}
UNPICKLING_ARGUMENTS = {("allow_pickle", True), ("weights_only", False), ("use_safetensors", False)}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name, such as `armorm.data.rows`."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()
# The package itself only maps public names to the modules that define them; it imports those when a name is used.
LAZY = {"armorm"}


def imports(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted name and line of everything a module imports, lazily and for type checking too; `from a import b` is a.b."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(module: ast.Module, known: set[str]) -> Iterator[tuple[str, int]]:
    """Modules of this package that a module imports, each with its line."""
    for name, line in imports(module):
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        if name in known:
            yield name, line


def package(name: str) -> str:
    """First part below `armorm`: a package, or a module of the root."""
    return name.split(".")[1] if "." in name else name


def graph(found: dict[str, ast.Module]) -> dict[str, dict[str, int]]:
    """Imported modules of each module, with the line of one import."""
    return {
        name: {target: line for target, line in own_imports(module, set(found)) if target != name}
        for name, module in found.items()
        if name not in LAZY
    }


def circles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or around a circle (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges.get(name, {}):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def upward(edges: dict[str, dict[str, int]]) -> list[str]:
    """Imports that reach a layer above, or another package of the same layer."""
    return [
        f"{name}:{line} imports {target}"
        for name, targets in edges.items()
        for target, line in targets.items()
        if target != "armorm" and package(name) != package(target) and LEVEL[package(target)] >= LEVEL[package(name)]
    ]


def parsed(**programs: str) -> dict[str, ast.Module]:
    return {name.replace("__", "."): ast.parse(text) for name, text in programs.items()}


def test_every_module_has_a_layer():
    assert {package(name) for name in MODULES} - set(LEVEL) - LAZY == set()


def test_packages_import_only_from_layers_below():
    assert upward(graph(MODULES)) == []


def test_no_import_circle_exists_at_any_level():
    assert circles(graph(MODULES)) == []


def test_the_package_itself_is_imported_by_no_module():
    users = [
        f"{name}:{line}"
        for name, module in MODULES.items()
        for target, line in own_imports(module, set(MODULES))
        if target == "armorm"
    ]
    assert users == []


@pytest.mark.parametrize(
    "program",
    [
        "from armorm.heads.gating import fit_gate",
        "def f():\n    from armorm.heads import gating",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import armorm.heads.gating",
    ],
)
def test_an_upward_import_is_found_however_it_is_written(program):
    found = upward(graph(parsed(armorm__features__extract=program, armorm__heads__gating="", armorm__heads="")))
    assert len(found) == 1 and found[0].startswith("armorm.features.extract:") and "armorm.heads" in found[0]


def test_a_circle_through_a_lazy_import_is_found():
    programs = parsed(
        armorm__data__a="from armorm.data.b import x",
        armorm__data__b="def f():\n    from armorm.data.c import y",
        armorm__data__c="import armorm.data.a",
        armorm__data__d="import armorm.data.a",
    )
    assert circles(graph(programs)) == [["armorm.data.a", "armorm.data.b", "armorm.data.c"]]


def test_the_network_is_used_in_its_packages_only():
    found = [
        f"{name}:{line} {target}"
        for name, module in MODULES.items()
        if package(name) not in NETWORK_PACKAGES and name not in DOWNLOADING
        for target, line in imports(module)
        if target.partition(".")[0] in NETWORK
    ]
    assert found == []


def unpickling(module: ast.Module) -> list[str]:
    found = [f"{line} {name}" for name, line in imports(module) if name.partition(".")[0] in UNPICKLING]
    found += [f"{line} {name}" for name, line in imports(module) if tuple(name.split(".")) in UNPICKLING_CALLS]
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in UNPICKLING_CALLS:
                found.append(f"{node.lineno} {node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNNING_CALLS:
            found.append(f"{node.lineno} {node.func.id}()")
        elif isinstance(node, ast.keyword) and (node.arg, getattr(node.value, "value", "")) in UNPICKLING_ARGUMENTS:
            found.append(f"{node.value.lineno} {node.arg}={ast.unparse(node.value)}")
    return found


def test_nothing_unpickles_or_runs_data_as_code():
    assert [f"{name}:{line}" for name, module in MODULES.items() for line in unpickling(module)] == []


@pytest.mark.parametrize(
    "program",
    ["import pickle", "torch.load(p)", "from torch import load", "np.load(p, allow_pickle=True)", "eval(text)"],
)
def test_unpickling_is_found(program):
    assert unpickling(ast.parse(program))


def test_only_named_errors_are_caught():
    found = []
    for name, module in MODULES.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if {"", "Exception", "BaseException"} & set(caught.strip("()").replace(" ", "").split(",")):
                    found.append(f"{name}:{node.lineno} catches {caught or 'everything'}")
    assert found == []


def test_no_module_is_named_for_nothing():
    parts = {part for name in MODULES for part in name.split(".")}
    assert not parts & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_no_module_is_too_long():
    # The remote-code file is copied beside checkpoints and so must be one file.
    allowed = {"armorm.model.remote_code"}
    lengths = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): len(
            path.read_text(encoding="utf-8").splitlines()
        )
        for path in SOURCE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 500 and name not in allowed} == {}
