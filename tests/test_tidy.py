"""Trip-wires of the house: import order, sizes, privacy, honest error handling, docstrings, a test for each module.

Every check is a pure function from file texts to findings; a small bad sample below shows that it is able to fail.
Exceptions stand in tidy_allowlist.toml with a reason; one that is no longer needed fails the test.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron.moevement"
# Left to right: a module imports from groups further left and from its own folder. The first group's may also import
# each other.
GROUPS = (
    ("types", "errors", "config", "events", "training_config"),
    ("operators",),
    ("schedule",),
    ("snapshot", "store", "transcript"),
    ("replication", "persist"),
    ("recovery",),
    ("dense",),
    ("planning", "argument_checks"),
    ("manager", "arguments"),
    ("agent", "planner", "report"),
    ("integration",),
    ("scripts", "pretrain_gpt"),
)
RANKS = {name: rank for rank, group in enumerate(GROUPS) for name in group}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 70, 8
SOURCE_SUFFIXES = {".py", ".pyi", ".cpp", ".cu", ".cuh", ".h"}
# Public in spite of the underscore: the standard library documents them.
PUBLIC_UNDERSCORED = {"_asdict", "_exit", "_field_defaults", "_fields", "_make", "_replace"}
# Assembled, so that this file passes its own checks.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:" + "|".join(("work", "farm", "root", "tmp/bash_jobs")) + r")(?:/|\b)")
UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error")) + r")\b")

Files = Mapping[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Finding:
    """One breach: which check, in which file, of what (no line numbers, so that an exception stays valid)."""

    check: str
    path: str
    what: str
    size: int = 0


def trees(files: Files) -> Iterator[tuple[str, ast.Module]]:
    """The parsed Python files."""
    for path, text in files.items():
        if path.endswith(".py"):
            yield path, ast.parse(text, path)


def is_ours(path: str) -> bool:
    """Whether the file is product code, not a test."""
    return path.endswith(".py") and path.startswith(("megatron/", "moevement_ext/", "scripts/", "pretrain_gpt.py"))


def module_name(path: str) -> str:
    """Dotted name of a Python file."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: str, tree: ast.Module) -> Iterator[str]:
    """Every dotted name that the file imports, wherever in the file; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = PurePosixPath(path).parent.parts
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def import_graph(files: Files) -> dict[str, set[str]]:
    """Our modules and which of ours each imports."""
    modules = {module_name(path): path for path in files if is_ours(path)}
    graph: dict[str, set[str]] = {}
    for path, tree in trees({path: files[path] for path in modules.values()}):
        found = set()
        for name in imported_names(path, tree):
            found |= {module for module in (name, name.rpartition(".")[0]) if module in modules}
            if name in modules:
                found.discard(name.rpartition(".")[0])
        graph[module_name(path)] = found - {module_name(path)}
    return graph


def place(module: str) -> str:
    """The entry of GROUPS that the module belongs to, or ''."""
    parts = module.removeprefix(PACKAGE + ".").split(".")
    return parts[0] if parts[0] in RANKS else ""


def check_import_order(files: Files) -> Iterator[Finding]:
    """Imports go to the left or stay within the folder."""
    for module, targets in import_graph(files).items():
        where = module.replace(".", "/")
        if module == PACKAGE or module.split(".")[0] == "moevement_ext":
            outside = {target for target in targets if target.split(".")[0] != "moevement_ext"}
            yield from (Finding("order", where, f"{target} (imports nothing of ours)") for target in sorted(outside))
            continue
        here = place(module)
        if not here:
            yield Finding("order", where, "has no place in GROUPS")
            continue
        for target in sorted(targets):
            there = place(target)
            if there and there != here and not (RANKS[there] < RANKS[here] or RANKS[there] == RANKS[here] == 0):
                yield Finding("order", where, target)


def check_cycles(files: Files) -> Iterator[Finding]:
    """No module reaches itself through imports."""
    graph = import_graph(files)
    for start in sorted(graph):
        seen, waiting = set[str](), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph.get(module, ())
        if start in seen:
            yield Finding("cycle", start.replace(".", "/"), start)


def check_upstream(files: Files) -> Iterator[Finding]:
    """Upstream Megatron is imported in integration/ only, and its namespace package stays one."""
    if "megatron/__init__.py" in files:
        yield Finding("upstream", "megatron/__init__.py", "would hide the installed megatron.core")
    for path, tree in trees({path: text for path, text in files.items() if is_ours(path)}):
        if path.startswith("megatron/moevement/integration/"):
            continue
        for name in imported_names(path, tree):
            if name.split(".")[0] == "megatron" and not (name + ".").startswith(PACKAGE + "."):
                yield Finding("upstream", path, name)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, Function | ast.ClassDef):
            inner = f"{prefix}{node.name}."
            if isinstance(node, Function):
                yield inner[:-1], node
        yield from functions(node, inner)


def check_sizes(files: Files) -> Iterator[Finding]:
    """Lines of files and functions, parameters of functions."""
    for path, text in files.items():
        lines = text.count("\n")
        if PurePosixPath(path).suffix in SOURCE_SUFFIXES and lines > FILE_LINES:
            yield Finding("file lines", path, "file", lines)
    for path, tree in trees(files):
        for name, node in functions(tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield Finding("function lines", path, name, lines)
            given = node.args
            names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names += [extra.arg for extra in (given.vararg, given.kwarg) if extra is not None]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > PARAMETERS:
                yield Finding("parameters", path, name, count)


def is_private(name: str) -> bool:
    """A single leading underscore, and not one of the documented names."""
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_UNDERSCORED


def check_private(files: Files) -> Iterator[Finding]:
    """No object's `_private` attribute is used but one's own, and no other module's `_private` name is imported."""
    for path, tree in trees(files):
        classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        own = {"self", "cls", *classes}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                if not (isinstance(node.value, ast.Name) and node.value.id in own):
                    yield Finding("private", path, ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                folder = module_name(str(PurePosixPath(path).parent / "__init__.py"))
                for alias in node.names:
                    if is_private(alias.name) and node.level == 0 and node.module != folder:
                        yield Finding("private", path, f"{node.module}.{alias.name}")


def always_raises(body: list[ast.stmt]) -> bool:
    """Whether the statements end in a raise on every way through them."""
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return always_raises(last.body) and always_raises(last.orelse)
    if isinstance(last, ast.With | ast.AsyncWith):
        return always_raises(last.body)
    return isinstance(last, ast.Raise)


def check_broad_except(files: Files) -> Iterator[Finding]:
    """Whoever catches everything raises it again."""
    for path, tree in trees(files):
        holders = [("module", node) for node in tree.body if not isinstance(node, Function | ast.ClassDef)]
        for where, holder in [*holders, *functions(tree)]:
            for node in ast.walk(holder):
                caught: list[ast.expr | None] = []
                if isinstance(node, ast.ExceptHandler) and not always_raises(node.body):
                    caught = [*node.type.elts] if isinstance(node.type, ast.Tuple) else [node.type]
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                    caught = [*node.args]
                broad = {"Exception", "BaseException", "builtins.Exception", "builtins.BaseException"}
                if any(kind is None or ast.unparse(kind) in broad for kind in caught):
                    yield Finding("broad except", path, where)


def mirror_of(path: str) -> str:
    """The unit test file of a module of megatron/moevement."""
    inside = PurePosixPath(path).relative_to("megatron/moevement")
    return str(PurePosixPath("tests/unit") / inside.parent / f"test_{inside.name}")


def check_mirror(files: Files) -> Iterator[Finding]:
    """Each module has a unit test file of its own."""
    for path in files:
        module = path.startswith("megatron/moevement/") and path.endswith(".py")
        if module and not path.endswith("__init__.py") and mirror_of(path) not in files:
            yield Finding("mirror", path, mirror_of(path))


def public_parts(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes, functions and methods, without overrides and functions inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in child.decorator_list}
            if not marks & {"override", "overload", "setter"}:
                yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_parts(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from public_parts(child, prefix)


def check_docstrings(files: Files) -> Iterator[Finding]:
    """Every public module, class, function and method of ours says what it is."""
    for path, tree in trees({path: text for path, text in files.items() if is_ours(path)}):
        parts: list[tuple[str, ast.Module | ast.ClassDef | Function]] = [("module", tree), *public_parts(tree, "")]
        yield from (Finding("docstring", path, name) for name, node in parts if ast.get_docstring(node) is None)


def check_texts(files: Files) -> Iterator[Finding]:
    """No paths of one machine, and nothing that is marked as unfinished."""
    for path, text in files.items():
        yield from (Finding("machine path", path, found) for found in sorted(set(MACHINE_PATHS.findall(text))))
        yield from (Finding("unfinished", path, found) for found in sorted(set(UNFINISHED.findall(text))))


CHECKS: tuple[Callable[[Files], Iterator[Finding]], ...] = (
    check_import_order,
    check_cycles,
    check_upstream,
    check_sizes,
    check_private,
    check_broad_except,
    check_mirror,
    check_docstrings,
    check_texts,
)


def judge(findings: set[Finding], entries: list[dict[str, object]], paths: set[str]) -> list[str]:
    """What is wrong: breaches without an entry, and entries that are unneeded, outgrown or give no reason."""
    wrong, needed = [], set[tuple[object, ...]]()
    by_key: dict[tuple[object, ...], dict[str, object]] = {
        (entry.get("check"), entry.get("path"), entry.get("what")): entry for entry in entries
    }
    if len(by_key) < len(entries):
        wrong.append("allowlist: two entries for the same breach")
    for finding in sorted(findings):
        key = (finding.check, finding.path, finding.what)
        needed.add(key)
        limit = by_key.get(key, {}).get("limit", 0)
        if key not in by_key or (isinstance(limit, int) and finding.size > limit):
            size = f" ({finding.size})" if finding.size else ""
            wrong.append(f"{finding.check}: {finding.path}: {finding.what}{size}")
    for key, entry in by_key.items():
        if key not in needed:
            wrong.append(f"allowlist: no longer needed, remove it: {key}")
        if not str(entry.get("reason", "")).strip():
            wrong.append(f"allowlist: no reason: {key}")
        if entry.get("check") == "mirror" and entry.get("covered_by") not in paths:
            wrong.append(f"allowlist: covered_by must name an existing test file: {key}")
    return wrong


def repository_files() -> dict[str, str]:
    """The text files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    files = {}
    for path in sorted(filter(None, set(listed))):
        data = (ROOT / path).read_bytes() if (ROOT / path).is_file() else b"\0"
        if b"\0" not in data:
            files[path] = data.decode("utf-8")
    return files


def test_the_tree_is_tidy() -> None:
    files = repository_files()
    entries = tomllib.loads((ROOT / "tests/tidy_allowlist.toml").read_text(encoding="utf-8")).get("allow", [])
    wrong = judge({finding for check in CHECKS for finding in check(files)}, entries, set(files))
    assert not wrong, f"{len(wrong)} breaches of the house rules:\n" + "\n".join(wrong)


M = "megatron/moevement/"
TRY = "def f():\n    try:\n        g()\n    except %s:\n        %s\n"
Bad = tuple[Callable[[Files], Iterator[Finding]], dict[str, str], str]
BAD: list[Bad] = [
    (check_import_order, {M + "types.py": "import megatron.moevement.store.a", M + "store/a.py": ""}, "store.a"),
    (check_import_order, {M + "store/a.py": "from ..recovery import b", M + "recovery/b.py": ""}, "recovery.b"),
    (check_import_order, {M + "store/a.py": "from ..snapshot import b", M + "snapshot/b.py": ""}, "snapshot.b"),
    (check_import_order, {M + "manager.py": "from . import arguments", M + "arguments.py": ""}, "arguments"),
    (check_import_order, {M + "new_folder/a.py": ""}, "has no place in GROUPS"),
    (check_import_order, {M + "__init__.py": "from . import types", M + "types.py": ""}, "nothing of ours"),
    (check_cycles, {M + "types.py": "from . import errors", M + "errors.py": "def f(): from . import types"}, "types"),
    (check_upstream, {M + "store/a.py": "from megatron.core import mpu"}, "megatron.core.mpu"),
    (check_upstream, {"scripts/a.py": "from megatron import core"}, "megatron.core"),
    (check_upstream, {"megatron/__init__.py": ""}, "hide"),
    (check_sizes, {"csrc/a.cpp": "\n" * (FILE_LINES + 1)}, "file"),
    (check_sizes, {"a.py": "class A:\n  def f():\n" + "    g()\n" * FUNCTION_LINES}, "A.f"),
    (check_sizes, {"a.py": "def f(a, b, c, d, *e, g, h, i, j): ..."}, "f"),
    (check_private, {"a.py": "def f(other): return other._x"}, "other._x"),
    (check_private, {"a.py": "class A:\n  def f(self): self.store._x = 1"}, "self.store._x"),
    (check_private, {"a.py": "from b import _c"}, "b._c"),
    (check_broad_except, {"a.py": TRY % ("Exception", "if h():\n            raise")}, "f"),
    (check_broad_except, {"a.py": TRY % ("(ValueError, BaseException)", "return")}, "f"),
    (check_broad_except, {"a.py": "try:\n    g()\nexcept:\n    pass"}, "module"),
    (check_broad_except, {"a.py": "with contextlib.suppress(Exception): g()"}, "module"),
    (check_mirror, {M + "store/a.py": "", "tests/unit/test_a.py": ""}, "tests/unit/store/test_a.py"),
    (check_docstrings, {"scripts/a.py": '"""A."""\nclass B:\n  """B."""\n  def c(self): ...'}, "B.c"),
    (check_docstrings, {"scripts/a.py": "x = 1"}, "module"),
    (check_texts, {"README.md": "see /" + "work/x"}, "/" + "work/"),
    (check_texts, {"csrc/a.h": "// TO" + "DO: more"}, "TO" + "DO"),
]


@pytest.mark.parametrize(("check", "files", "what"), BAD)
def test_a_bad_sample_is_found(check: Callable[[Files], Iterator[Finding]], files: Files, what: str) -> None:
    assert any(what in finding.what for finding in check(files))


def test_good_samples_pass() -> None:
    files = {
        M + "types.py": '"""T."""\nfrom megatron.moevement import errors',
        M + "errors.py": '"""E."""',
        M + "store/a.py": '"""A."""\nfrom . import b\nfrom megatron.moevement.types import T',
        M + "store/b.py": '"""B."""\nclass C:\n  """C."""\n  def _f(self): return self._x, C._y, t._replace()',
        M + "integration/a.py": '"""A."""\nfrom megatron.core import mpu',
        "tests/a.py": TRY % ("BaseException as error", "raise OSError from error"),
    }
    files |= {mirror_of(path): "" for path in list(files) if path.startswith(M)}
    assert [finding for check in CHECKS for finding in check(files)] == []


def test_the_allowlist_only_shrinks() -> None:
    found = Finding("file lines", "a.py", "file", 450)
    entry: dict[str, object] = {"check": "file lines", "path": "a.py", "what": "file", "reason": "r", "limit": 450}
    assert judge({found}, [entry], set()) == []
    assert len(judge({found}, [], set())) == 1
    assert "no longer needed" in judge(set(), [entry], set())[0]
    assert len(judge({found}, [entry | {"limit": 449}], set())) == 1
    assert "no reason" in judge({found}, [entry | {"reason": " "}], set())[0]
    unit = Finding("mirror", "a.py", "test_a.py")
    mirror = {"check": "mirror", "path": "a.py", "what": "test_a.py", "reason": "r", "covered_by": "tests/b.py"}
    assert len(judge({unit}, [dict(mirror)], set())) == 1
    assert judge({unit}, [dict(mirror)], {"tests/b.py"}) == []
