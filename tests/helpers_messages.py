"""Every error message in the source, by its syntax: the texts of UserErrors, with what is interpolated in braces."""

import ast
import functools
import itertools

from helpers_imports import PACKAGE


@functools.cache
def parsed() -> list[tuple[str, ast.Module]]:
    """The path in the package and the syntax of every file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]


def user_errors() -> set[str]:
    """The names of UserError and its subclasses whose argument is the message; `super().__init__` of the others."""
    classes = [node for _, tree in parsed() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    classes = [one for one in classes if any(ast.unparse(base) == "UserError" for base in one.bases)]
    own = {one.name for one in classes if any(getattr(node, "name", "") == "__init__" for node in one.body)}
    return {"UserError", *(one.name for one in classes)} - own


def text_functions() -> dict[str, ast.AST]:
    """By the name of a function: the f-string that it returns, for those that return part of a message."""
    found = {}
    for _, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return):
                value = node.body[-1].value
                if isinstance(value, ast.JoinedStr | ast.Constant) and "\\n" in ast.unparse(value):
                    found[node.name] = value
    return found


TEXTS = text_functions()


def texts(node: ast.AST, local: dict[str, list[ast.AST]]) -> list[str]:
    """The texts that an expression may have, with what is interpolated in braces.

    Args:
        node: the expression.
        local: the values of the local names of its function.
    """
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return texts(node.body, local) + texts(node.orelse, local)
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*(texts(part, local) for part in node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(parts) for parts in itertools.product(texts(node.left, local), texts(node.right, local))]
    if isinstance(node, ast.FormattedValue):
        return [f"{{{ast.unparse(node.value)}}}"] if isinstance(node.value, ast.Constant) else texts(node.value, local)
    if isinstance(node, ast.Name):
        values = [value for value in local.get(node.id, []) if is_text(value)]
        return [text for value in values for text in texts(value, {})] or [f"{{{node.id}}}"]
    name = node.func if isinstance(node, ast.Call) else None
    function = getattr(name, "id", getattr(name, "attr", None))
    return texts(TEXTS[function], {}) if function in TEXTS else [f"{{{ast.unparse(node)}}}"]


def is_text(node: ast.AST) -> bool:
    """Whether an expression is an f-string, one of `TEXTS`, or one or the other of such."""
    if isinstance(node, ast.IfExp):
        return is_text(node.body) and is_text(node.orelse)
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", getattr(node.func, "attr", None)) in TEXTS
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def messages() -> list[tuple[str, str, int, str]]:
    """(file, function, line, text) of every UserError in the source."""
    names, found = user_errors(), []
    for file, tree in parsed():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for call in ast.walk(tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names):
                continue
            around = [f for f in functions if f.lineno <= call.lineno <= f.end_lineno]
            inner = max(around, key=lambda f: f.lineno)
            local = {}
            for node in ast.walk(inner):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    local.setdefault(node.targets[0].id, []).append(node.value)
            found += [(file, inner.name, call.lineno, text) for text in texts(call.args[0], local)]
    return found


MESSAGES = messages()
