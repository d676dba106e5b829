"""Turn text into the .bin/.idx files that training reads.

    python scripts/prepare_data.py --input notes.txt corpus/ more.jsonl --output-prefix data/corpus
    python scripts/prepare_data.py --python-stdlib --max-megabytes 8 --output-prefix data/stdlib

One document per text file, or per line of a .jsonl file (its `text` value).
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron.moevement.arguments import OneLineParser, refuse
from megatron.moevement.errors import ConfigError

if TYPE_CHECKING:
    from megatron.moevement.integration.corpus import CorpusSize

PROGRAM = "prepare_data.py"
MEGABYTE = 10**6
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".jsonl"})
PROGRESS_SECONDS = 1.0


class BadInput(Exception):
    """An input that cannot be read; the message names it."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog=PROGRAM, description="Turn text into .bin/.idx files.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", type=Path, help="text files, .jsonl files or folders of them")
    source.add_argument("--python-stdlib", action="store_true", help="the sources of Python's standard library")
    parser.add_argument("--output-prefix", required=True, help="path of the files without .bin and .idx")
    parser.add_argument("--max-megabytes", type=float, default=None, help="stop after this much text (10^6 bytes)")
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON line")
    parser.add_argument(
        "--tokenizer-type",
        default="ByteLevelTokenizer",
        choices=("ByteLevelTokenizer", "NullTokenizer", "HuggingFaceTokenizer"),
    )
    parser.add_argument("--tokenizer-model", default=None, help="name or folder of a Hugging Face tokenizer")
    parser.add_argument("--vocab-size", type=int, default=None, help="ids of a NullTokenizer")
    return parser


def input_files(inputs: Iterable[Path]) -> list[Path]:
    """The files to read, folders searched for known suffixes, in a fixed order.

    Raises:
        BadInput: for a path that does not exist.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise BadInput(f"--input {path} does not exist: name a file or folder")
    return files


def stdlib_files() -> list[Path]:
    """The Python sources of the standard library, without tests and installed packages, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib"}
    return sorted(p for p in root.rglob("*.py") if not left_out.intersection(p.relative_to(root).parts))


def texts(files: Iterable[Path], json_key: str, limit_bytes: float) -> Iterator[str]:
    """The documents, until `limit_bytes` bytes of UTF-8 were given; the last one is cut there.

    Raises:
        BadInput: for a file that is not UTF-8, and for a line that is not JSON or has no text.
    """
    left = limit_bytes
    for path in files:
        for text in _documents(path, json_key):
            size = len(text.encode())
            if size >= left:
                yield text.encode()[: int(left)].decode(errors="ignore")
                return
            left -= size
            yield text


def _documents(path: Path, json_key: str) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--input {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"--input {path} is not UTF-8 at byte {error.start}: convert it or leave it out") from error
    if path.suffix != ".jsonl":
        yield content
        return
    # Not splitlines: JSON text may hold other line separators, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[json_key]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"--input {path}:{number} is not a JSON object with the key {json_key!r}") from error
        if not isinstance(text, str):
            raise BadInput(f"--input {path}:{number} has no text under the key {json_key!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadInput(f"--input {path}:{number} holds half of a surrogate pair: mend or leave out the line")
        yield text


class Progress:
    """Prints the size so far, at most once a second."""

    def __init__(self) -> None:
        self.printed_at = time.monotonic()

    def __call__(self, size: CorpusSize) -> None:
        if time.monotonic() - self.printed_at >= PROGRESS_SECONDS:
            self.printed_at = time.monotonic()
            print(f"{size.documents:,} documents, {size.tokens:,} tokens", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit status is 0, or 2 after a one-line error."""
    args = build_parser().parse_args(argv)
    limit = float("inf") if args.max_megabytes is None else args.max_megabytes * MEGABYTE
    if not limit > 0:
        refuse(PROGRAM, "--max-megabytes must be above 0: raise it")
    if args.output_prefix.endswith("/"):
        refuse(PROGRAM, f"--output-prefix {args.output_prefix}: is a folder; add the name of the files in it")
    args.output_prefix = Path(args.output_prefix)
    from megatron.moevement.integration.quiet import quiet_core_warnings

    quiet_core_warnings()
    from megatron.moevement.integration.corpus import write_corpus

    try:
        files = stdlib_files() if args.python_stdlib else input_files(args.input)
        args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
        size = write_corpus(
            texts(files, args.json_key, limit),
            str(args.output_prefix),
            args.tokenizer_type,
            args.tokenizer_model,
            args.vocab_size,
            Progress(),
        )
    except (BadInput, ConfigError) as error:
        refuse(PROGRAM, error)
    except ValueError as error:
        refuse(PROGRAM, f"--input: {error}")
    except OSError as error:
        refuse(PROGRAM, f"--output-prefix {args.output_prefix}: {error}")
    print(f"{args.output_prefix}.bin and .idx: {size.documents:,} documents, {size.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
