"""moevement_ext/_C.pyi says what the built module has: same names, same parameters, same defaults."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import moevement_ext
from moevement_ext import _C

Parameters = list[tuple[str, str | None]]
STUB = ast.parse((Path(moevement_ext.__file__).parent / "_C.pyi").read_text())
# What Python itself or the buffer protocol gives a class, without a docstring of pybind11's to compare.
UNDOCUMENTED = {"__buffer__", "__exit__", "__enter__", "__len__"}


def stub_members(node: ast.Module | ast.ClassDef) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    return {child.name: child for child in node.body if isinstance(child, ast.FunctionDef | ast.ClassDef)}


def stub_constants() -> set[str]:
    annotated = [node.target for node in STUB.body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in annotated if isinstance(target, ast.Name)}


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


def stub_parameters(node: ast.FunctionDef) -> Parameters:
    """Names and default expressions, `*` included, without self."""
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(plain) - len(node.args.defaults)) + [ast.unparse(value) for value in node.args.defaults]
    found: Parameters = [(name.arg, default) for name, default in zip(plain, defaults, strict=True)]
    if node.args.kwonlyargs:
        found.append(("*", None))
        for name, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            found.append((name.arg, None if value is None else ast.unparse(value)))
    return [parameter for parameter in found if parameter[0] != "self"]


def runtime_parameters(function: object) -> Parameters:
    """The same, from the signature line that pybind11 writes into the docstring."""
    signature = (inspect.getdoc(function) or "").splitlines()[0]
    node = ast.parse(f"def {re.sub(r'-> (.*)$', r'-> object', signature)}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return stub_parameters(node)


def public(owner: object) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


CLASSES = {name: node for name, node in stub_members(STUB).items() if isinstance(node, ast.ClassDef)}
FUNCTIONS = {name: node for name, node in stub_members(STUB).items() if isinstance(node, ast.FunctionDef)}


def test_module_names_agree() -> None:
    assert set(stub_members(STUB)) | (stub_constants() - {"_Words"}) == public(_C)
    assert set(moevement_ext.__all__) - {"BuildInfo"} == public(_C)


@pytest.mark.parametrize("name", CLASSES)
def test_class_members_agree(name: str) -> None:
    owner = getattr(_C, name)
    members = stub_members(CLASSES[name])
    assert {member for member in members if not member.startswith("_")} == public(owner)
    for member in members:
        # __buffer__ is a slot until Python 3.12 and shows up as a method only there.
        assert member == "__buffer__" or hasattr(owner, member)


@pytest.mark.parametrize("name", CLASSES)
def test_properties_and_parameters_agree(name: str) -> None:
    owner = getattr(_C, name)
    for member, node in stub_members(CLASSES[name]).items():
        assert isinstance(node, ast.FunctionDef)
        if member in UNDOCUMENTED:
            continue
        assert is_property(node) == isinstance(vars(owner)[member], property), member
        if not is_property(node):
            assert stub_parameters(node) == runtime_parameters(getattr(owner, member)), member


def test_function_parameters_agree() -> None:
    for name, node in FUNCTIONS.items():
        assert stub_parameters(node) == runtime_parameters(getattr(_C, name)), name


def test_everything_public_has_a_docstring() -> None:
    for name in CLASSES:
        owner = getattr(_C, name)
        assert inspect.getdoc(owner), name
        for member in public(owner):
            doc = inspect.getdoc(getattr(owner, member)) or ""
            lines = doc.splitlines() if isinstance(vars(owner)[member], property) else doc.splitlines()[1:]
            assert any(line.strip() for line in lines), f"{name}.{member}"
