"""The command line: generated from `TrainingConfig`, strict, and refused in one line.

`parse` turns the words into a checked `TrainingConfig` before torch or megatron.core is imported, so that a
mistake costs no start-up time and shows no traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from megatron.moevement import argument_checks
from megatron.moevement.argument_checks import UsageError
from megatron.moevement.errors import ConfigError, StoreError
from megatron.moevement.training_config import FlagSpec, TrainingConfig, field_specs, flag_name

PROGRAM = "pretrain_gpt.py"
EXIT_USAGE = 2
_RANK_0_SECONDS = 15.0


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose every error is `program: error: ...` on one line, exit status 2.

    Under a launcher every rank finds the same error; only rank 0 prints it.
    """

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def refuse(program: str, message: object, environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Print one error line and exit with status 2.

    What every rank finds or agrees on (a text, a `ConfigError`, a `StoreError`) is rank 0's to print: its launcher ends
    the others then. They wait for that, because a launcher that sees one of them end would end rank 0 before it has
    said anything. Any other error is printed by each rank that has it.
    """
    rank = environ.get("RANK", "0")
    if rank != "0" and isinstance(message, (str, ConfigError, StoreError)):
        time.sleep(_RANK_0_SECONDS)
    line = " ".join(str(message).split())
    where = "" if rank == "0" else f" rank {rank}:"
    print(f"{program}: error:{where} {line}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USAGE)


def build_parser(extra: Callable[[argparse.ArgumentParser], None] | None = None) -> OneLineParser:
    """The parser of the training script.

    Args:
        extra: adds further flags to the parser, such as those of sparse checkpointing.
    """
    parser = OneLineParser(
        prog=PROGRAM, allow_abbrev=False, description="Train a Mixture-of-Experts GPT with megatron.core."
    )
    for field, spec in field_specs():
        _add(parser, field.name, field.default, spec)
    if extra is not None:
        extra(parser)
    return parser


def _add(parser: argparse.ArgumentParser, name: str, default: object, spec: FlagSpec) -> None:
    text = spec.help.replace("%", "%%")
    if spec.parse is None:
        parser.add_argument(flag_name(name), action="store_true", help=text)
        return
    required = default is dataclasses.MISSING
    parser.add_argument(
        flag_name(name),
        type=spec.parse,
        required=required,
        default=None if required else default,
        choices=spec.choices,
        nargs="+" if spec.many else None,
        help=text,
    )


def parse(
    argv: Sequence[str] | None = None,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[TrainingConfig, argparse.Namespace]:
    """Parse and check the command line.

    Args:
        argv: the words after the program name; the process's own where None.
        extra: see `build_parser`.
        environ: where WORLD_SIZE is read (1 where it is absent, as without a launcher).

    Returns:
        the checked configuration, and the namespace with every value, those of `extra` included.

    Raises:
        SystemExit: with status 2 after one line on standard error.
    """
    parser = build_parser(extra)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_flags(parser, words)
        namespace = parser.parse_args(words)
        config = config_from(namespace, _world_size(environ))
        argument_checks.check(config)
    except UsageError as error:
        parser.error(str(error))
    return config, namespace


def config_from(namespace: argparse.Namespace, world_size: int) -> TrainingConfig:
    """The configuration that a namespace of `build_parser` describes, not yet checked."""
    values = {field.name: getattr(namespace, field.name) for field, _ in field_specs()}
    values["data_path"] = tuple(values["data_path"])
    return TrainingConfig(world_size=world_size, **values)


def _world_size(environ: Mapping[str, str]) -> int:
    text = environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise UsageError("WORLD_SIZE", f"is {text!r}", "start the script with torchrun")
    return int(text)


def _check_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse unsupported and unknown flags, before argparse can misread the words after them."""
    known = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        if word == "--":
            return
        name = word.split("=", 1)[0]
        if not name.startswith("--") or name in known:
            continue
        argument_checks.check_supported(name)
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        remedy = (
            f"did you mean {nearest[0]}?"
            if nearest
            else "docs/flags.md lists all; launchers' flags go before the script"
        )
        raise UsageError(name, "is not a known flag", remedy)
