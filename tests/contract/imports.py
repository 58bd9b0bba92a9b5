"""The import graph of the package, read from its source."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "rlhf").rglob("*.py"))


def module_name(file: Path) -> str:
    """Return the dotted name: rlhf/ppo/module.py is rlhf.ppo.module, and rlhf/ppo/__init__.py is rlhf.ppo."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def imports(file: Path) -> frozenset[str]:
    """Return the dotted names that a file imports anywhere: lazily and under ``TYPE_CHECKING`` too.

    ``from package import name`` gives ``package.name`` if that is a module of this project, and ``package`` otherwise.
    """
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(base)
    return frozenset(found)


def package_of(name: str) -> str:
    """Return the part below rlhf: rlhf.ppo.module is in ppo, rlhf.stage is stage; "" for other libraries."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rlhf" and len(parts) > 1 else ""


def file_graph() -> dict[str, set[str]]:
    """Return the modules of this project that each module imports.

    ``rlhf/__init__.py`` is left out: it holds the version and fetches the public names on first use.
    """
    names = MODULES.keys() - {"rlhf"}
    return {name: imports(MODULES[name]) & names for name in names}


def package_graph() -> dict[str, set[str]]:
    """Return the packages and top-level files that each package or top-level file imports."""
    graph: dict[str, set[str]] = {}
    for name, imported in file_graph().items():
        package = package_of(name)
        graph.setdefault(package, set()).update({package_of(other) for other in imported} - {package})
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle, the first one repeated at the end, or an empty list."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if cycle := search(other, [*path, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := search(node, []))), [])
