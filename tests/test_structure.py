"""How the package hangs together: imports point one way, without circles, and the light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tercet"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The foundations, which every part above them may import.
FOUNDATIONS = {
    "version": set(),
    "errors": set(),
    "files": {"errors"},
    "device": {"errors"},
    "distributed": {"errors", "device"},
    "config": {"errors"},
    "config_io": {"errors", "config"},
}
# What else each part may import: cli -> train, search, serve, report, export -> predictor -> tasks -> objectives ->
# model, with `data` beside them.
PARTS = {
    "model": set(),
    "data": set(),
    "objectives": {"model"},
    "tasks": {"model", "objectives", "data"},
    "predictor": {"model", "tasks", "data"},
    "train": {"model", "objectives", "tasks", "predictor", "data"},
    "search": {"model", "tasks", "predictor", "data"},
    "serve": {"model", "tasks", "predictor", "data", "search"},
    "report": {"tasks"},
    "export": {"model"},
    "arguments": set(),
    "commands": {"arguments", "model", "data", "tasks", "predictor", "train", "search", "serve", "report", "export"},
    "cli": {"arguments", "commands"},
    "__main__": {"cli"},
    "__init__": {"model", "predictor", "search"},
}
# A model's folder holds its tokenizer; the commands load models as users do.
EXCEPTIONS = {("model", "tercet.data.tokenizer"), ("commands", "tercet")}
FORBIDDEN = {"torchvision", "timm", "transformers", "lightning", "pytorch_lightning", "pandas"}


def part_of(module: str) -> str:
    """The folder or file of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


@cache
def imports_of(module: str) -> frozenset[str]:
    """What a module imports at the top or within functions, apart from what it imports for type checking alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}:{node.lineno}: write the whole name of the module"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(names & MODULES.keys() or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text("utf-8")))
    return frozenset(found)


@pytest.mark.parametrize("part", sorted({part_of(module) for module in MODULES}))
def test_imports_point_one_way(part: str) -> None:
    allowed = FOUNDATIONS[part] if part in FOUNDATIONS else PARTS[part] | FOUNDATIONS.keys()
    for module in (module for module in MODULES if part_of(module) == part):
        ours = {
            name for name in imports_of(module) if name.split(".")[0] == "tercet" and (part, name) not in EXCEPTIONS
        }
        wrong = {part_of(name) for name in ours} - allowed - {part}
        assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter({module: imports_of(module) & MODULES.keys() - {module} for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_heavy_or_borrowed_libraries_are_not_imported() -> None:
    for module in MODULES:
        roots = {name.split(".")[0] for name in imports_of(module)}
        assert not roots & FORBIDDEN, f"{module} imports {sorted(roots & FORBIDDEN)}"


def test_modules_are_named_for_what_they_hold() -> None:
    vague = {"utils", "util", "misc", "helpers", "helper", "common", "manager"}
    assert not [module for module in MODULES if vague & {*module.split(".")}]


def test_files_stay_short_enough_to_read() -> None:
    lines = {module: len(path.read_text("utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > 450}


def imported_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    report = "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import tercet; tercet.__version__; tercet.TercetError", {"torch", "numpy", "pydantic"}),
        ("from tercet.cli import main; assert main(['--help']) == 0", {"torch", "numpy", "pydantic", "argparse"}),
        ("from tercet.cli import main; assert main(['train', 'demo', '--help']) == 0", {"torch", "numpy"}),
        (
            "from tercet.cli import main; assert main(['search', '--help']) == 0",
            {"torch", "numpy", "lancedb", "pydantic"},
        ),
    ],
)
def test_what_is_light_stays_light(code: str, absent: set[str]) -> None:
    assert not imported_after(code) & absent


def test_the_public_names_are_there() -> None:
    import tercet
    from tercet.predictor import Predictor, load

    assert tercet.Predictor is Predictor
    assert tercet.load is load
    assert dir(tercet) == sorted(tercet.__all__)
    assert all(hasattr(tercet, name) for name in tercet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = tercet.laod  # pyright: ignore[reportAttributeAccessIssue]
