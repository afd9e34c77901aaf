"""The layers of vit_jax, and the imports between its modules as their source has them."""

import ast
import collections
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vit_jax"
COMMANDS = "commands"
# From bottom to top. A package or module may import what is in its own layer and below. `config` stands for the package
# but for `config.check`; modules at the top level that no layer names are commands and what only commands share.
LAYERS = (
    ("errors", "atomic", "arguments", "machine_errors", "terminal", "progress", "paths", "fonts"),
    ("config",),
    ("models",),
    ("data", "sharding", "runtime"),
    ("checkpoint",),
    ("weights",),
    ("optim", "objectives"),
    ("evaluation", "training", "classifier", "inference"),
    ("visualization", "chart"),
    ("reporting",),
    ("config.check",),
    (COMMANDS,),
)
# What is stricter than the order of the layers: all that these may import besides themselves.
ALLOWED = {
    "models": {"errors", "arguments"},
    "data": {"errors", "atomic", "arguments", "paths", "progress", "terminal", "sharding", "runtime"},
}


def modules() -> dict[str, Path]:
    """The file of every module, by its name without `vit_jax.`; a package goes by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def unit(module: str) -> str:
    """The name under which `LAYERS` lists a module."""
    names = {name for layer in LAYERS for name in layer}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in names:
            return ".".join(parts[:length])
    return COMMANDS if len(parts) == 1 else parts[0]


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of vit_jax that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("vit_jax.") for alias in node.names if alias.name.startswith("vit_jax.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "vit_jax" or (node.module or "").startswith("vit_jax."):
                base = node.module.removeprefix("vit_jax").removeprefix(".")
                names = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
                found |= {name if name in known else base for name in names}
    return found & known.keys()


def module_imports() -> dict[str, set[str]]:
    """What each module imports, by name."""
    known = modules()
    return {name: imported(path, known) - {name} for name, path in known.items()}


def unit_imports(imports: dict[str, set[str]]) -> collections.Counter[tuple[str, str]]:
    """How many imports of modules there are from one unit of the layers to another."""
    pairs = ((unit(source), unit(target)) for source, targets in imports.items() for target in targets)
    return collections.Counter(pair for pair in pairs if pair[0] != pair[1])


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan), each sorted."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)
