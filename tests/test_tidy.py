"""The house rules hold in every file, with named exceptions only; and every rule can fail."""

from pathlib import Path

import pytest

from tests.support.tidy import RULES, Exemption, Source, Violation, mirror_of, read_allowlist, repository

ROOT = Path(__file__).resolve().parent.parent
ALLOWLIST = read_allowlist(ROOT / "tests/tidy_allowlist.toml")


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """Every text file of the repository."""
    return repository(ROOT)


def unexcused(rule: str, found: list[Violation], allowlist: list[Exemption]) -> list[str]:
    """Violations without an exception, and exceptions without a violation."""
    allowed = {entry.subject for entry in allowlist if entry.rule == rule}
    stale = sorted(allowed - {violation.subject for violation in found})
    lines = [str(violation) for violation in found if violation.subject not in allowed]
    return lines + [f"tests/tidy_allowlist.toml: {rule} of {subject} is not needed any more" for subject in stale]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_is_tidy(rule: str, sources: list[Source]) -> None:
    found = unexcused(rule, list(RULES[rule](sources)), ALLOWLIST)
    assert not found, "\n" + "\n".join(found)


def test_every_exception_has_a_reason(sources: list[Source]) -> None:
    paths = {source.path for source in sources}
    for entry in ALLOWLIST:
        assert entry.rule in RULES, f"{entry.rule} is no rule"
        assert len(entry.reason.split()) >= 4, f"{entry.subject}: {entry.reason!r} is no reason"
        assert bool(entry.test) == (entry.rule == "mirrors"), f"{entry.subject}: a test covers a module, nothing else"
        assert not entry.test or entry.test in paths, f"{entry.subject}: there is no {entry.test}"
    subjects = [(entry.rule, entry.subject) for entry in ALLOWLIST]
    assert len(set(subjects)) == len(subjects)


# ------------------------------------------------------------------------------------ every rule can fail

DOC = '"""A module."""\n'
STORE, SNAPSHOT = "megatron/moevement/store/a.py", "megatron/moevement/snapshot/b.py"
LONG_FUNCTION = "def f(a):\n" + "    a += 1\n" * 70
NINE = "a, b, c, d, e, f, g, h, i"

# rule, files, the subjects that must be found in them
BAD: list[tuple[str, dict[str, str], set[str]]] = [
    (
        "import_order",
        {STORE: "from megatron.moevement.snapshot import b\n", SNAPSHOT: ""},
        {f"{STORE} -> megatron.moevement.snapshot.b"},
    ),
    (
        "import_order",
        {"megatron/moevement/errors.py": "def f():\n    import megatron.moevement.config\n"},
        {"megatron/moevement/errors.py -> megatron.moevement.config"},
    ),
    ("import_order", {STORE: "from ..snapshot.b import x\n"}, {f"{STORE} -> megatron.moevement.snapshot.b"}),
    ("import_order", {STORE: "import pretrain_gpt\n"}, {f"{STORE} -> pretrain_gpt"}),
    ("import_order", {STORE: "import scripts.demo\n"}, {f"{STORE} -> scripts.demo"}),
    ("import_order", {STORE: "import megatron.moevement.unplaced\n"}, {f"{STORE} -> megatron.moevement.unplaced"}),
    ("import_order", {"megatron/moevement/unplaced/a.py": ""}, {"megatron/moevement/unplaced/a.py"}),
    (
        "import_cycles",
        {
            "megatron/moevement/store/a.py": "from megatron.moevement.store import b\n",
            "megatron/moevement/store/b.py": "def f():\n    from megatron.moevement.store.a import x\n",
        },
        {"megatron.moevement.store.a -> megatron.moevement.store.b -> megatron.moevement.store.a"},
    ),
    ("core_imports", {STORE: "import megatron.core.optimizer\n"}, {STORE}),
    ("core_imports", {STORE: "from megatron.core import parallel_state\n"}, {STORE}),
    ("core_imports", {"scripts/a.py": "from megatron import core\n"}, {"scripts/a.py"}),
    ("core_imports", {"pretrain_gpt.py": "if 1:\n    import megatron.core as mc\n"}, {"pretrain_gpt.py"}),
    ("namespace", {"megatron/__init__.py": ""}, {"megatron/__init__.py"}),
    ("empty_folders", {"megatron/moevement/agent/__init__.py": DOC}, {"megatron/moevement/agent"}),
    ("file_length", {"csrc/a.cpp": "int a;\n" * 401}, {"csrc/a.cpp"}),
    ("file_length", {"tests/a.py": "a = 1\n" * 401}, {"tests/a.py"}),
    ("function_length", {STORE: LONG_FUNCTION}, {f"{STORE}:f"}),
    ("function_length", {STORE: "class A:\n    " + LONG_FUNCTION.replace("\n", "\n    ")}, {f"{STORE}:A.f"}),
    ("parameters", {STORE: f"def f({NINE}): ...\n"}, {f"{STORE}:f"}),
    ("parameters", {STORE: "def f(a, b, c, d, /, e, f, *g, h=1, **i): ...\n"}, {f"{STORE}:f"}),
    ("parameters", {STORE: f"class A:\n    def f(self, {NINE}): ...\n"}, {f"{STORE}:A.f"}),
    ("parameters", {STORE: f"def g():\n    async def f({NINE}): ...\n"}, {f"{STORE}:g.f"}),
    ("private_access", {STORE: "a._b = 1\n"}, {f"{STORE}:_b"}),
    ("private_access", {STORE: "self.a._b()\n"}, {f"{STORE}:_b"}),
    ("private_access", {STORE: "from a import b, _c\n"}, {f"{STORE}:_c"}),
    ("private_access", {STORE: "getattr(a, '_b')\n"}, {f"{STORE}:_b"}),
    ("broad_excepts", {STORE: "try:\n    f()\nexcept:\n    pass\n"}, {STORE}),
    ("broad_excepts", {STORE: "try:\n    f()\nexcept (OSError, Exception):\n    log()\n"}, {STORE}),
    ("broad_excepts", {STORE: "with contextlib.suppress(BaseException):\n    f()\n"}, {STORE}),
    ("mirrors", {STORE: "", "tests/unit/store/test_b.py": ""}, {STORE}),
    ("mirrors", {"megatron/moevement/config.py": ""}, {"megatron/moevement/config.py"}),
    ("docstrings", {STORE: "a = 1\n"}, {STORE}),
    ("docstrings", {STORE: DOC + "def f(): ...\n"}, {f"{STORE}:f"}),
    ("docstrings", {STORE: DOC + "class A:\n    'Doc.'\n    def f(self): ...\n"}, {f"{STORE}:A.f"}),
    ("machine_paths", {"docs/a.md": "see /" + "root/notes\n"}, {"docs/a.md:/" + "root/"}),
    ("machine_paths", {"Makefile": "A := '/" + "work/main'\n"}, {"Makefile:/" + "work/"}),
    ("unfinished", {"csrc/a.h": "// TO" + "DO: all\n"}, {"csrc/a.h:TO" + "DO"}),
    ("unfinished", {STORE: "raise NotImplemented" + "Error\n"}, {f"{STORE}:NotImplemented" + "Error"}),
]

# What a rule must leave alone.
GOOD: list[tuple[str, dict[str, str]]] = [
    ("import_order", {SNAPSHOT: "from megatron.moevement.store import a\nimport torch, moevement_ext\n", STORE: ""}),
    ("import_order", {"tests/a.py": "import pretrain_gpt\n", STORE: "from megatron.moevement.types import Run\n"}),
    ("import_cycles", {STORE: "import megatron.moevement.store.b\n", "megatron/moevement/store/b.py": ""}),
    (
        "core_imports",
        {"megatron/moevement/integration/a.py": "import megatron.core\n", STORE: "import megatron.corex\n"},
    ),
    ("namespace", {"megatron/moevement/__init__.py": ""}),
    ("empty_folders", {"moevement_ext/__init__.py": "from moevement_ext._C import Engine\n"}),
    ("empty_folders", {"megatron/moevement/store/__init__.py": DOC, STORE: ""}),
    ("file_length", {"docs/a.md": "a\n" * 500, "csrc/a.cpp": "int a;\n" * 400}),
    ("function_length", {STORE: "def f(a):\n" + "    a += 1\n" * 69}),
    ("parameters", {STORE: "class A:\n    a: int\n    def f(self, a, b, c, d, e, f, g, h): ...\n"}),
    ("private_access", {STORE: "self._a = cls._b\na.__len__()\nb._replace(c=1)\n_d = getattr(self, '_e')\n"}),
    ("broad_excepts", {STORE: "try:\n    f()\nexcept Exception:\n    undo()\n    raise\n"}),
    ("broad_excepts", {STORE: "try:\n    f()\nexcept OSError:\n    pass\n"}),
    ("mirrors", {STORE: "", "tests/unit/store/test_a.py": "", "megatron/moevement/store/__init__.py": ""}),
    ("docstrings", {STORE: DOC + "def _f(): ...\nclass _A:\n    def f(self): ...\n", "tests/a.py": "a = 1\n"}),
    (
        "docstrings",
        {
            STORE: DOC + "class P(Protocol):\n    'Doc.'\n    def f(self):\n        'Doc.'\n",
            SNAPSHOT: DOC + "class A:\n    'Doc.'\n    def f(self): ...\n",
        },
    ),
    ("machine_paths", {"docs/a.md": "framework/a, ./work/b, /dev/shm and " + "~/root/c\n"}),
    ("unfinished", {STORE: "# xxh3, methods\n"}),
]


def files(texts: dict[str, str]) -> list[Source]:
    """A small repository."""
    return [Source(path, text) for path, text in texts.items()]


@pytest.mark.parametrize(("rule", "texts", "subjects"), BAD)
def test_a_bad_sample_is_found(rule: str, texts: dict[str, str], subjects: set[str]) -> None:
    assert {violation.subject for violation in RULES[rule](files(texts))} == subjects


@pytest.mark.parametrize(("rule", "texts"), GOOD)
def test_a_good_sample_is_left_alone(rule: str, texts: dict[str, str]) -> None:
    assert not list(RULES[rule](files(texts)))


def test_every_rule_has_both_samples() -> None:
    assert {rule for rule, _, _ in BAD} == {rule for rule, _ in GOOD} == set(RULES)


def test_exceptions_excuse_and_grow_stale() -> None:
    found = list(RULES["mirrors"](files({STORE: ""})))
    entry = Exemption("mirrors", STORE, "for a test", "tests/test_tidy.py")
    assert unexcused("mirrors", found, []) == [str(found[0])]
    assert unexcused("mirrors", found, [entry]) == []
    assert "not needed" in unexcused("mirrors", [], [entry])[0]
    other = Exemption("docstrings", STORE, "for another rule")
    assert unexcused("mirrors", found, [other]) == [str(found[0])]


def test_the_mirror_of_a_module() -> None:
    assert mirror_of("megatron/moevement/store/format.py") == "tests/unit/store/test_format.py"
    assert mirror_of("megatron/moevement/config.py") == "tests/unit/test_config.py"


def test_the_repository_is_read(sources: list[Source]) -> None:
    paths = {source.path for source in sources}
    assert {"pretrain_gpt.py", "csrc/bindings.cpp", "tests/test_tidy.py", "Makefile"} <= paths
    assert not any(path.startswith((".venv/", "build/", ".git/")) for path in paths)
