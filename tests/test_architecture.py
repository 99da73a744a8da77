"""The house: imports go down, the network has its rooms, nothing unpickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "armorm"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the ground up; a module imports from its own floor and from those below.
FLOORS = [
    {"version", "errors", "files", "progress", "embedded", "conversation", "objectives"},
    {"attribution", "client", "pages", "steering"},
    {"explanation"},
    {"contrast"},
    {"data"},
    {"backbone"},
    {"features"},
    {"heads"},
    {"model"},
    {"reward_model"},
    {"evaluation", "serving", "report", "monitoring", "integrations"},
    {"training"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `armorm` itself hands out lazy names, and `registration` wakes the model when transformers is imported: both know
# modules by name only, and import none of them when they are imported.
DOORS = {"__init__", "registration"}

NETWORK = {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "socket", "ftplib", "websockets", "ssl"}
NETWORK |= {"huggingface_hub", "datasets", "fastapi", "uvicorn", "gradio"}
NETWORK_ROOMS = {"client", "data", "model", "serving"}
UNPICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def place(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room(path: Path) -> str:
    """First part of a module's place: its package, or itself where it stands in the root."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted name and line of everything a module imports, at the top or inside functions; `from a import b` is a.b."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def rooms_used(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted name and line of each module of ours that is imported; a name of the package itself is its module's."""
    for name, line in imports(module):
        parts = name.split(".")
        if parts[0] != "armorm":
            continue
        if len(parts) == 1:  # `import armorm`: what is taken from it decides
            taken = {
                node.attr
                for node in ast.walk(module)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "armorm"
            }
        else:
            taken = {parts[1]}
        for first in taken:
            if first in HEIGHT or first in DOORS:
                yield name, line
            else:
                yield home_of(first), line


def home_of(public: str) -> str:
    """The module that a lazy name of the package comes from."""
    import armorm

    return "armorm.version" if public == "__version__" else armorm._HOMES[public]


def climbs(path: Path, module: ast.Module) -> list[str]:
    """Imports of a module that reach up."""
    own = room(path)
    return [
        f"{place(path)}:{line} imports {name}, which stands above {own}"
        for name, line in rooms_used(module)
        if own not in DOORS and HEIGHT.get(name.split(".")[1], len(FLOORS)) > HEIGHT[own]
    ]


def test_every_module_has_a_floor():
    homeless = {room(path) for path in MODULES} - set(HEIGHT) - DOORS
    assert not homeless, f"say in FLOORS where these stand: {sorted(homeless)}"
    assert len(MODULES) > 40


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_no_floor_imports_from_a_floor_above_it(path):
    assert climbs(path, tree(path)) == []


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("from armorm.heads.gating import fit_gate", "armorm.heads.gating.fit_gate"),
        ("import armorm.training.pipeline", "armorm.training.pipeline"),
        ("def f():\n    from armorm.cli import app", "armorm.cli.app"),
        ("from armorm import reward_model", "armorm.reward_model"),
        ("from armorm import ArmoRM", "armorm.reward_model"),
        ("import armorm\narmorm.train()", "armorm.training.pipeline"),
    ],
)
def test_an_import_that_reaches_up_is_found_and_named(program, name):
    found = climbs(SOURCE / "features" / "extract.py", ast.parse(program))
    line = program.count("\n    ") + 1
    assert found == [f"features/extract.py:{line} imports {name}, which stands above features"]


def test_an_import_that_reaches_down_is_not_found():
    program = (
        "import armorm\nfrom armorm.errors import ArmormError\nfrom armorm import Conversation\narmorm.__version__"
    )
    assert climbs(SOURCE / "features" / "extract.py", ast.parse(program)) == []


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in DOORS], ids=place)
def test_the_doors_import_nothing_when_they_are_imported(path):
    module = tree(path)
    run = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    ours = {name for node in run for name, _ in imports(ast.Module([node], [])) if name.startswith("armorm.")}
    assert ours <= {"armorm.model.auto.register_with_transformers", "armorm.version.__version__"}


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) not in NETWORK_ROOMS], ids=place)
def test_the_network_is_reached_from_its_rooms_only(path):
    found = [f"{place(path)}:{line} {name}" for name, line in imports(tree(path)) if name.partition(".")[0] in NETWORK]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_nothing_unpickles(path):
    module = tree(path)
    found = [f"line {line} {name}" for name, line in imports(module) if name.partition(".")[0] in UNPICKLING]
    found += [f"line {line} {name}" for name, line in imports(module) if name in ("torch.load", "pandas.read_pickle")]
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in {("torch", "load"), ("pandas", "read_pickle"), ("pd", "read_pickle")}:
                found.append(f"line {node.lineno} {node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in {
            ("allow_pickle", "True"),
            ("weights_only", "False"),
            ("use_safetensors", "False"),
        }:
            found.append(f"line {node.value.lineno} {node.arg}={ast.unparse(node.value)}")
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_only_named_errors_are_caught(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = {"", "Exception", "BaseException"} & set(caught.strip("()").replace(" ", "").split(","))
            assert not broad, f"{place(path)}:{node.lineno} catches {caught or 'everything'}"


def test_no_room_is_named_for_nothing():
    names = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(SOURCE).parts}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}
