"""Tests of the data preparation script: which texts it finds, and one-line errors."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folders_are_searched_in_a_fixed_order(script: ModuleType, tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "image.png", "sub/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = script.input_files([tmp_path])
    assert [path.name for path in found] == ["a.md", "b.txt", "c.py"]
    assert list(script.texts(found, "text", float("inf"))) == ["a.md", "b.txt", "sub/c.py"]


def test_a_json_line_is_a_document(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"body": "one"}) + "\n\n" + json.dumps({"body": "two"}) + "\n")
    assert list(script.texts([path], "body", float("inf"))) == ["one", "two"]
    with pytest.raises(script.BadInput, match=r"lines.jsonl:1 is not a JSON object with the key 'text'"):
        list(script.texts([path], "text", float("inf")))


def test_a_line_of_json_ends_with_a_newline_only(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert list(script.texts([path], "text", float("inf"))) == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 at byte 3"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half.jsonl:1 holds half of a surrogate pair"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1 is not a JSON object"),
    ],
)
def test_text_that_cannot_be_kept_is_refused(
    script: ModuleType, tmp_path: Path, name: str, content: bytes, text: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(script.BadInput, match=text):
        list(script.texts([tmp_path / name], "text", float("inf")))


def test_the_size_limit_cuts_the_last_text_between_characters(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("éé")
    found = script.input_files([tmp_path])
    assert list(script.texts(found, "text", 6)) == ["abc", "é"]


def test_the_standard_library_is_there(script: ModuleType) -> None:
    names = {path.name for path in script.stdlib_files()}
    assert {"argparse.py", "json"} & names
    assert not any("site-packages" in path.parts for path in script.stdlib_files())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--output-prefix", "x"], "--input --python-stdlib is required"),
        (["--input", "/nowhere", "--output-prefix", "x"], "--input /nowhere does not exist"),
        (["--python-stdlib", "--max-megabytes", "nan", "--output-prefix", "x"], "--max-megabytes must be above 0"),
        (["--python-stdlib", "--max-megabytes", "0", "--output-prefix", "x"], "--max-megabytes must be above 0"),
    ],
)
def test_errors_are_one_line(
    script: ModuleType, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare_data.py: error: ")
    assert error.count("\n") == 1
    assert part in error
