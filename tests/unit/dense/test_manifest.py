"""What a dense checkpoint says of itself is read back exactly, and every damage to it is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.moevement.dense import manifest
from megatron.moevement.dense.manifest import Manifest
from megatron.moevement.errors import ConfigError, StoreError

IDENTITY = {
    "--hidden-size": 64,
    "--bf16": True,
    "--fp16": False,
    "--ffn-hidden-size": None,
    "--normalization": "RMSNorm",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Manifest]:
    path = tmp_path / "iter_0000007"
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(bytes(range(256)) * 20_000)
    (path / "empty").write_bytes(b"")
    written = Manifest(7, IDENTITY, "dp_reshardable", {p.name: manifest.describe(p) for p in path.iterdir()})
    manifest.write(path, written)
    return path, written


def test_it_is_read_back_and_its_files_verify(checkpoint: tuple[Path, Manifest]) -> None:
    path, written = checkpoint
    assert manifest.read(path) == written
    assert manifest.verify(path, written, written.files) == ""


def test_a_flipped_bit_a_short_and_a_missing_file_are_named(checkpoint: tuple[Path, Manifest]) -> None:
    path, written = checkpoint
    victim = path / "__0_0.distcp"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert manifest.verify(path, written, written.files) == f"{victim}: its digest is wrong"
    victim.write_bytes(content[:-1])
    assert "5119999 bytes instead of 5120000" in manifest.verify(path, written, written.files)
    victim.unlink()
    assert "No such file" in manifest.verify(path, written, written.files)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "step": "x", "files": {"a": 1}}', "\x00"]
)
def test_a_damaged_manifest_is_a_store_error(checkpoint: tuple[Path, Manifest], text: str) -> None:
    path, _ = checkpoint
    (path / manifest.MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=r"moevement.json: damaged"):
        manifest.read(path)


def test_a_foreign_one_and_another_format_are_refused(checkpoint: tuple[Path, Manifest]) -> None:
    path, _ = checkpoint
    (path / manifest.MANIFEST).write_text('{"format": 9}')
    with pytest.raises(ConfigError, match=r"--load .* has format 9, this version reads 1"):
        manifest.read(path)
    (path / manifest.MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"--load .*iter_0000007 has no moevement.json"):
        manifest.read(path)


@pytest.mark.parametrize(
    ("flag", "now", "said"),
    [
        ("--hidden-size", 128, "--hidden-size was 64 when somewhere was written and is 128 now"),
        ("--hidden-size", 1, "was 64 when"),
        ("--bf16", False, "--bf16 was on when somewhere was written and is off now"),
        ("--ffn-hidden-size", 8, "was not given when"),
        ("--added-since", 1, "was not given when"),
    ],
)
def test_a_mismatch_names_flag_and_remedy(flag: str, now: object, said: str) -> None:
    assert manifest.mismatch(Path("somewhere"), IDENTITY, IDENTITY) == ""
    answer = manifest.mismatch(Path("somewhere"), IDENTITY, {**IDENTITY, flag: now})
    assert said in answer and "set it back, or remove --load" in answer
