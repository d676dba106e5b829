import dataclasses
from pathlib import Path

import pytest

from megatron.moevement.config import SparseCheckpointConfig
from megatron.moevement.training_config import field_specs, flag_name
from scripts import generate_flags


def test_the_document_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_flags.main(["--check"]) == 0, capsys.readouterr().err


def test_every_flag_stands_in_it_once() -> None:
    text = generate_flags.document()
    flags = [knob.metadata["flag"] for knob in dataclasses.fields(SparseCheckpointConfig)]
    flags += [flag_name(field.name) for field, _ in field_specs()]
    for flag in flags:
        assert text.count(f"| `{flag}` |") == 1, flag


def test_check_fails_on_an_old_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate_flags, "ROOT", tmp_path)
    monkeypatch.setattr(generate_flags, "TARGET", tmp_path / "docs" / "flags.md")
    assert generate_flags.main(["--check"]) == 1
    assert generate_flags.main([]) == 0
    assert generate_flags.main(["--check"]) == 0
    (tmp_path / "docs" / "flags.md").write_text("old")
    assert generate_flags.main(["--check"]) == 1
    assert "docs/flags.md is not up to date" in capsys.readouterr().err
