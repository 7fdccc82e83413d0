"""How the package hangs together: imports point one way, and the light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tercet"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of Tercet; every part may import itself.
CONFIG = {"config"}
BASE = CONFIG | {"errors", "files", "distributed", "device", "version"}
ALLOWED = {
    "errors": set(),
    "version": set(),
    "files": {"errors"},
    "distributed": {"errors", "device"},
    "device": {"errors"},
    "config": set(),
    "config_io": CONFIG | {"errors"},
    "arguments": CONFIG | {"config_io", "errors"},
    "data": BASE,
    "model": BASE,
    "objectives": BASE | {"model"},
    "tasks": BASE | {"model", "objectives", "data"},
    "train": BASE | {"config_io", "model", "objectives", "tasks", "data"},
    "search": BASE | {"config_io", "model", "tasks", "predictor", "data"},
    "serve": BASE | {"config_io", "model", "tasks", "predictor", "data", "search"},
    "report": BASE | {"config_io", "model", "tasks", "data"},
    "export": BASE | {"model"},
    "predictor": BASE | {"model", "tasks", "data"},
    "__init__": {"errors", "version", "model", "predictor", "search"},
    "__main__": {"cli"},
}
# A model's folder holds its tokenizer.
EXCEPTIONS = {"model": {"tercet.data.tokenizer"}}
FORBIDDEN = {"torchvision", "timm", "transformers", "lightning", "pytorch_lightning", "pandas"}


def part_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(module: Path) -> set[str]:
    """Dotted names that a module imports, apart from those for type checking alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}:{node.lineno}: write the whole name of the module"
            if node.module == "tercet":
                found.update(f"tercet.{alias.name}" for alias in node.names)
            elif node.module:
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(module.read_text("utf-8")))
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    part = part_of(module)
    if part in ("cli", "commands"):
        return
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    ours = {
        name.split(".")[1] for name in imports_of(module) - EXCEPTIONS.get(part, set()) if name.startswith("tercet.")
    }
    assert ours <= ALLOWED[part] | {part}, f"{part} must not import {sorted(ours - ALLOWED[part] - {part})}"


def test_heavy_or_borrowed_libraries_are_not_imported() -> None:
    for module in MODULES:
        roots = {name.split(".")[0] for name in imports_of(module)}
        assert not roots & FORBIDDEN, f"{module.name} imports {sorted(roots & FORBIDDEN)}"


def test_modules_are_named_for_what_they_hold() -> None:
    vague = {"utils", "util", "misc", "helpers", "helper", "common", "manager"}
    assert not [module for module in MODULES if {*module.relative_to(PACKAGE).with_suffix("").parts} & vague]


def test_files_stay_short_enough_to_read() -> None:
    long = {str(module.relative_to(PACKAGE)): len(module.read_text("utf-8").splitlines()) for module in MODULES}
    assert not {name: lines for name, lines in long.items() if lines > 450}


def imported_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    report = "\nimport sys; print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_light() -> None:
    assert not imported_after("import tercet; tercet.__version__; tercet.TercetError") & {"torch", "numpy", "pydantic"}


def test_help_is_light() -> None:
    code = "from tercet.cli import main; assert main(['--help']) == 0"
    assert not imported_after(code) & {"torch", "numpy", "pydantic", "tyro"}


def test_help_of_train_imports_no_torch() -> None:
    code = "from tercet.cli import main\ntry: main(['train', 'demo', '--help'])\nexcept SystemExit: pass"
    assert not imported_after(code) & {"torch", "numpy"}


def test_the_public_names_are_there() -> None:
    import tercet
    from tercet.predictor import Predictor, load

    assert tercet.Predictor is Predictor
    assert tercet.load is load
    assert dir(tercet) == sorted(tercet.__all__)
    assert all(hasattr(tercet, name) for name in tercet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = tercet.laod  # pyright: ignore[reportAttributeAccessIssue]
