"""What a dense checkpoint says of itself, beside Megatron's own files: sizes, digests and the flags it was made with.

The file is `moevement.json`. It is written after all others, so that a checkpoint that has it is whole.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron.moevement.config import MIB
from megatron.moevement.errors import ConfigError, StoreError

MANIFEST = "moevement.json"
FORMAT = 1
_READ_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and XXH3-128 (hexadecimal) of a file of the checkpoint."""

    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `moevement.json`.

    Attributes:
        step: the state is that of `Step step`.
        identity: by flag, every value that must be the same when the checkpoint is loaded.
        sharding_type: core's name of the distributed optimizer's format, empty without that optimizer.
        files: by name, all files but the manifest.
    """

    step: int
    identity: Mapping[str, Any]
    sharding_type: str
    files: Mapping[str, FileEntry]


def describe(path: Path) -> FileEntry:
    """Reads a file back and digests it.

    Raises:
        OSError: it can't be read.
    """
    digest, nbytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            nbytes += len(piece)
    return FileEntry(nbytes, digest.hexdigest())


def write(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of the checkpoint in `directory`, durably.

    Raises:
        OSError: it can't be written.
    """
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "identity": dict(manifest.identity),
        "sharding_type": manifest.sharding_type,
        "files": {name: [entry.nbytes, entry.digest] for name, entry in sorted(manifest.files.items())},
    }
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> Manifest:
    """Reads the manifest.

    Raises:
        ConfigError: there is none, so that an exact restore isn't possible, or it is of another format.
        StoreError: it is damaged or can't be read.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ConfigError(
                f"--load {directory.parent}: {path.name} has format {content['format']}, this version reads {FORMAT}; "
                "load it with the version that wrote it"
            )
        files = {name: FileEntry(int(nbytes), str(digest)) for name, (nbytes, digest) in content["files"].items()}
        return Manifest(int(content["step"]), content["identity"], str(content["sharding_type"]), files)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--load {directory.parent}: {directory.name} has no {MANIFEST}, it was not written by this program; "
            "remove --load or name a directory that this program saved to"
        ) from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged ({error}); use an older checkpoint") from error


def mismatch(directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first flag that differs between checkpoint and job, with the remedy; empty if none does."""
    for flag in wanted:
        then, now = stored.get(flag), wanted[flag]
        if then != now:
            return (
                f"{flag} was {_spoken(then)} when {directory} was written and is {_spoken(now)} now: "
                "set it back, or remove --load"
            )
    return ""


def _spoken(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def verify(directory: Path, manifest: Manifest, names: Iterable[str]) -> str:
    """Compares files with their sizes and digests; what is wrong with the first bad one, else empty."""
    for name in names:
        wanted = manifest.files[name]
        try:
            found = describe(directory / name)
        except OSError as error:
            return f"{directory / name}: {error.strerror}"
        if found.nbytes != wanted.nbytes:
            return f"{directory / name}: {found.nbytes} bytes instead of {wanted.nbytes}"
        if found.digest != wanted.digest:
            return f"{directory / name}: its digest is wrong"
    return ""
