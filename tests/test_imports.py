"""How the modules of titan_ext depend on each other."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "titan_ext"


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """Modules of the package that one names in an import, wherever it stands: in a function, for type checkers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found |= {
                f"{node.module}.{each.name}" if f"{node.module}.{each.name}" in known else node.module
                for each in node.names
            }
    return found & known.keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = [stack.pop()]
            while component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {name: imports(tree, known) - {name} for name, tree in known.items()}
    assert circles(graph) == []


def test_the_outer_loop_and_the_optimizers_need_nothing_of_torchtitan():
    known = modules()
    allowed = ("titan_ext.semi_sync", "titan_ext.optim", "titan_ext.errors", "titan_ext.error_text", "titan_ext.files")
    for name, tree in known.items():
        if name.startswith(("titan_ext.semi_sync", "titan_ext.optim")):
            foreign = [each for each in imports(tree, known) if not each.startswith(allowed)]
            assert not foreign, f"{name} imports {foreign}"


def test_the_outer_loop_is_importable_without_torchtitan_and_torchft():
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torchtitan', 'torchft'))\n"
        "import titan_ext.semi_sync, titan_ext.optim\n"
        "assert titan_ext.semi_sync.resolve(titan_ext.semi_sync.SemiSyncConfig()).rules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_needs_no_torch_does_not_load_it():
    program = (
        "import sys\n"
        "import titan_ext, titan_ext.errors, titan_ext.config, titan_ext.data, titan_ext.cli, titan_ext.train\n"
        "assert 'torch' not in sys.modules and 'torchtitan' not in sys.modules\n"
        "import titan_ext.semi_sync, titan_ext.optim\n"
        "assert 'torchtitan' not in sys.modules and 'torchft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
