"""The house rules as functions of sources: each yields what breaks it. `tests/test_tidy.py` runs them.

Sources are plain values, so that every rule can be shown a small bad sample and proven able to fail.
"""

import ast
import graphlib
import posixpath
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FILE_LINES_LIMIT = 400
FUNCTION_LINES_LIMIT = 70
PARAMETERS_LIMIT = 8

PACKAGE = "megatron/moevement/"
CORE_FOLDER = PACKAGE + "integration/"
# Whoever stands further right may import from the left, never the other way round.
ORDER = (
    "moevement_ext types errors injection config events operators schedule store transcript snapshot recovery dense "
    "planning slot_memory slot_cycle transcript_memory manager training_config argument_checks arguments agent report "
    "integration scripts pretrain_gpt"
).split()
# Copied as it is from other projects, with its licence beside it: it keeps its own house's rules, not ours.
THIRD_PARTY = "csrc/third_party/"
CODE_SUFFIXES = (".py", ".pyi", ".cpp", ".cu", ".h")
# Spelled with an underscore, and documented all the same.
DOCUMENTED_UNDERSCORES = frozenset({"_replace", "_asdict", "_fields", "_exit"})
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|farm|root)/|/tmp/bash[_]jobs")
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|X{3}|NotImpl[e]mentedError)\b")


@dataclass(frozen=True)
class Source:
    """A file of the repository: path from its root, and text."""

    path: str
    text: str

    @property
    def is_python(self) -> bool:
        """Whether it has a syntax tree."""
        return self.path.endswith((".py", ".pyi"))

    @property
    def is_product(self) -> bool:
        """Whether it belongs to what users run, rather than to the tests."""
        return self.path.startswith(("megatron/", "moevement_ext/", "scripts/")) or self.path == "pretrain_gpt.py"

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.path.removesuffix(".pyi").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Violation:
    """A broken rule. `subject` names the thing itself and not its line, so that an exception survives an edit."""

    path: str
    line: int
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text} [{self.subject}]"


@dataclass(frozen=True)
class Exemption:
    """An entry of the allowlist. `test` names the test that covers the subject, where the rule is `mirror`."""

    rule: str
    subject: str
    reason: str
    test: str = ""


Rule = Callable[[Sequence[Source]], Iterator[Violation]]


def repository(root: Path) -> list[Source]:
    """Every text file that is tracked, or that is new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    sources = []
    for name in sorted(set(listed.split("\0")) - {""}):
        path = root / name
        if not path.is_file() or name.startswith(THIRD_PARTY):
            continue  # deleted and not yet committed, or not ours
        data = path.read_bytes()
        if b"\0" not in data:
            sources.append(Source(name, data.decode()))
    return sources


def read_allowlist(path: Path) -> list[Exemption]:
    """The exceptions, each with its reason."""
    return [Exemption(**entry) for entry in tomllib.loads(path.read_text())["exception"]]


def _python(sources: Sequence[Source]) -> Iterator[Source]:
    return (source for source in sources if source.is_python)


def _product(sources: Sequence[Source]) -> Iterator[Source]:
    return (source for source in _python(sources) if source.is_product)


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node)


# ------------------------------------------------------------------------------------------------------ imports


def imports(source: Source, known: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Every module that the file imports, anywhere in it, with its line.

    `from package import name` is an import of `package.name` where that is a module.
    """
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = source.module.split(".")
                package = here if source.path.endswith("/__init__.py") else here[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                # `from megatron import core` names the same thing as `import megatron.core`.
                yield (whole if whole in known or base == "megatron" else base), node.lineno


def _place(module: str) -> int | None:
    """Place in the order; None for a part of ours without a place."""
    name = module.removeprefix("megatron.moevement").removeprefix(".").split(".")[0]
    if not name:
        return -1
    return ORDER.index(name) if name in ORDER else None


def _ours(module: str) -> bool:
    return module.split(".")[0] in ("moevement_ext", "scripts", "pretrain_gpt") or (module + ".").startswith(
        "megatron.moevement."
    )


def import_order(sources: Sequence[Source]) -> Iterator[Violation]:
    """Imports go to the left of the order only."""
    known = frozenset(source.module for source in _product(sources))
    for source in _product(sources):
        place = _place(source.module)
        if place is None:
            yield Violation(source.path, 1, source.path, "has no place in the import order")
            continue
        for target, line in imports(source, known):
            if not _ours(target):
                continue
            other = _place(target)
            if other is None or other > place:
                yield Violation(source.path, line, f"{source.path} -> {target}", "imports to the right")


def import_cycles(sources: Sequence[Source]) -> Iterator[Violation]:
    """No module imports itself over others, also not in a function's body."""
    product = {source.module: source for source in _product(sources)}
    known = frozenset(product)
    graph = {name: {t for t, _ in imports(s, known)} & known - {name} for name, s in product.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        chain = list(reversed(error.args[1]))
        yield Violation(product[chain[0]].path, 1, " -> ".join(chain), "imports in a cycle")


def core_imports(sources: Sequence[Source]) -> Iterator[Violation]:
    """megatron.core is touched in one folder only."""
    for source in _product(sources):
        if source.path.startswith(CORE_FOLDER):
            continue
        for target, line in imports(source, frozenset()):
            if (target + ".").startswith("megatron.core."):
                yield Violation(source.path, line, source.path, "imports megatron.core")


def namespace(sources: Sequence[Source]) -> Iterator[Violation]:
    """`megatron` is upstream's namespace package."""
    for source in sources:
        if source.path == "megatron/__init__.py":
            yield Violation(source.path, 1, source.path, "hides the installed megatron.core")


def empty_folders(sources: Sequence[Source]) -> Iterator[Violation]:
    """No folders of things that are planned: a package has a module besides `__init__.py`."""
    paths = [source.path for source in sources]
    for path in paths:
        folder, name = posixpath.split(path)
        if name == "__init__.py" and not any(p.startswith(folder + "/") and p != path for p in paths):
            # moevement_ext and its like do their work in __init__.py.
            tree = next(source.tree for source in sources if source.path == path)
            if all(isinstance(node, ast.Expr) for node in tree.body):
                yield Violation(path, 1, folder, "is a folder with nothing in it")


# --------------------------------------------------------------------------------------------------------- size


def file_length(sources: Sequence[Source]) -> Iterator[Violation]:
    """Files have at most 400 lines."""
    for source in sources:
        lines = source.text.count("\n")
        if source.path.endswith(CODE_SUFFIXES) and lines > FILE_LINES_LIMIT:
            yield Violation(source.path, lines, source.path, f"has {lines} lines, {FILE_LINES_LIMIT} is the limit")


def _functions(
    tree: ast.AST, prefix: str = "", method: bool = False
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function with its qualified name, and whether it is a method."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node, method
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.", method=True)
        else:
            yield from _functions(node, prefix, method)


def function_length(sources: Sequence[Source]) -> Iterator[Violation]:
    """Functions have at most 70 lines, docstring included."""
    for source in _python(sources):
        for name, node, _ in _functions(source.tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_LIMIT:
                text = f"{name} has {lines} lines, {FUNCTION_LINES_LIMIT} is the limit"
                yield Violation(source.path, node.lineno, f"{source.path}:{name}", text)


def parameters(sources: Sequence[Source]) -> Iterator[Violation]:
    """Functions have at most 8 parameters; `self` and `cls` don't count."""
    for source in _python(sources):
        for name, node, method in _functions(source.tree):
            arguments = node.args
            listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            listed += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
            count = len(listed) - (method and bool(listed) and listed[0].arg in ("self", "cls"))
            if count > PARAMETERS_LIMIT:
                text = f"{name} has {count} parameters, {PARAMETERS_LIMIT} is the limit"
                yield Violation(source.path, node.lineno, f"{source.path}:{name}", text)


# ------------------------------------------------------------------------------------------------------- habits


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED_UNDERSCORES


def private_access(sources: Sequence[Source]) -> Iterator[Violation]:
    """Nobody touches another object's `_private`: not as an attribute, not by its name as text, not by import."""
    for source in _python(sources):
        for node in ast.walk(source.tree):
            name, shown = "", ""
            if isinstance(node, ast.Attribute):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                name, shown = "" if own else node.attr, _dotted(node)
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                name = next((alias.name for alias in node.names if _private(alias.name)), "")
                # The compiled core is private to its own typed face.
                name, shown = ("" if name == "_C" and node.module == "moevement_ext" else name), f"import of {name}"
            elif isinstance(node, ast.Call) and _dotted(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
                text = node.args[1] if len(node.args) > 1 else None
                own = isinstance(node.args[0], ast.Name) and node.args[0].id in ("self", "cls")
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and not own:
                    name, shown = text.value, _dotted(node)
            if _private(name):
                yield Violation(source.path, node.lineno, f"{source.path}:{name}", f"{shown} is private")


def broad_excepts(sources: Sequence[Source]) -> Iterator[Violation]:
    """What isn't known isn't swallowed: a bare or broad `except` raises again."""
    for source in _python(sources):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler):
                raised = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if _broad(node.type) and not raised:
                    yield Violation(source.path, node.lineno, source.path, "swallows every exception")
            elif isinstance(node, ast.Call) and _dotted(node.func) in ("contextlib.suppress", "suppress"):
                for _ in filter(_broad, node.args):
                    yield Violation(source.path, node.lineno, source.path, "suppresses every exception")


def _broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_broad(element) for element in kind.elts)
    return kind is None or _dotted(kind) in ("Exception", "BaseException")


def mirror_of(path: str) -> str:
    """The test module of a module of the package."""
    folder, name = posixpath.split(path.removeprefix(PACKAGE))
    return posixpath.join("tests/unit", folder, f"test_{name}")


def mirrors(sources: Sequence[Source]) -> Iterator[Violation]:
    """Each module of the package has its mirror test."""
    paths = {source.path for source in sources}
    for path in sorted(paths):
        module = path.startswith(PACKAGE) and path.endswith(".py") and not path.endswith("/__init__.py")
        if module and mirror_of(path) not in paths:
            yield Violation(path, 1, path, f"has no {mirror_of(path)}")


def docstrings(sources: Sequence[Source]) -> Iterator[Violation]:
    """Every public module, class, function and method of the product says what it is; a protocol says it for its
    implementations."""
    declared = frozenset(name for source in _product(sources) for name in _protocol_methods(source))
    for source in _product(sources):
        if not source.path.endswith(".py"):
            continue
        if not ast.get_docstring(source.tree):
            yield Violation(source.path, 1, source.path, "the module has no docstring")
        yield from _undocumented(source, source.tree, "", declared)


def _protocol_methods(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and any(_dotted(base).split(".")[-1] == "Protocol" for base in node.bases):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            yield from (method.name for method in methods if ast.get_docstring(method))


def _undocumented(
    source: Source, scope: ast.Module | ast.ClassDef, prefix: str, declared: frozenset[str]
) -> Iterator[Violation]:
    for node in scope.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = prefix + node.name
        if not ast.get_docstring(node) and not (prefix and node.name in declared):
            yield Violation(source.path, node.lineno, f"{source.path}:{name}", f"{name} has no docstring")
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(source, node, f"{name}.", declared)


def _matches(sources: Sequence[Source], pattern: re.Pattern[str], text: str) -> Iterator[Violation]:
    for source in sources:
        for number, line in enumerate(source.text.split("\n"), start=1):
            found = pattern.search(line)
            if found:
                yield Violation(source.path, number, f"{source.path}:{found.group()}", text)


def machine_paths(sources: Sequence[Source]) -> Iterator[Violation]:
    """Nothing depends on where somebody's checkout lies."""
    return _matches(sources, MACHINE_PATH, "names a path of one machine")


def unfinished(sources: Sequence[Source]) -> Iterator[Violation]:
    """What is not done is in the issues, not in the code."""
    return _matches(sources, UNFINISHED, "is unfinished")


RULES: dict[str, Rule] = {
    "import_order": import_order,
    "import_cycles": import_cycles,
    "core_imports": core_imports,
    "namespace": namespace,
    "empty_folders": empty_folders,
    "file_length": file_length,
    "function_length": function_length,
    "parameters": parameters,
    "private_access": private_access,
    "broad_excepts": broad_excepts,
    "mirrors": mirrors,
    "docstrings": docstrings,
    "machine_paths": machine_paths,
    "unfinished": unfinished,
}
