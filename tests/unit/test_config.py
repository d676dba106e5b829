"""Knobs: refused out of range by the name of their flag, parsed back to the value that they say."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from megatron.moevement.config import (
    SparseCheckpointConfig,
    add_sparse_checkpoint_flags,
    config_from_namespace,
    flag_of,
    on_off_argument,
    window_argument,
)
from megatron.moevement.errors import ConfigError


def parse(words: str) -> SparseCheckpointConfig:
    """The configuration of a command line."""
    parser = argparse.ArgumentParser()
    add_sparse_checkpoint_flags(parser)
    return config_from_namespace(parser.parse_args(words.split()))


def test_no_flags_are_the_defaults() -> None:
    assert parse("") == SparseCheckpointConfig()


def test_flags_reach_their_knobs() -> None:
    config = parse(
        "--sparse-ckpt --sparse-ckpt-window 3 --sparse-ckpt-window-mode fixed --sparse-ckpt-reorder off "
        "--sparse-ckpt-dir /a --sparse-ckpt-name b --sparse-ckpt-host-memory-gib 1.5 --sparse-ckpt-log-dir c"
    )
    assert config.enabled and config.window == 3 and config.window_mode == "fixed" and config.reorder is False
    assert config.job_directory == Path("/a/b") and config.host_memory_gib == 1.5 and config.log_directory == Path("c")
    assert parse("--sparse-ckpt --sparse-ckpt-window auto").window is None


def test_a_knob_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sparse-ckpt-window does nothing without --sparse-ckpt"):
        parse("--sparse-ckpt-window 3")


def test_every_knob_has_a_flag_of_its_own_and_a_text() -> None:
    knobs = fields(SparseCheckpointConfig)
    flags = [knob.metadata["flag"] for knob in knobs]
    assert len(set(flags)) == len(flags) and all(flag.startswith("--sparse-ckpt") for flag in flags)
    assert all(knob.metadata["text"].endswith(".") or ";" in knob.metadata["text"] for knob in knobs)
    assert flag_of("dense_interval") == "--sparse-ckpt-dense-interval"


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("max_window", 0),
        ("transcript_memory_gib", -1.0),
        ("measure_iterations", 1),
        ("chunk_mib", 1025),
        ("chunks_in_flight", -1),
        ("host_memory_gib", -0.1),
        ("bandwidth_gib_per_second", -1.0),
        ("dense_interval", -1),
        ("reorder_change", 1.01),
        ("reorder_share", -0.01),
        ("copy_share", 0.0),
        ("copy_share", 1.1),
        ("copy_share", float("nan")),
        ("host_memory_gib", float("nan")),
        ("host_memory_gib", float("inf")),
        ("bandwidth_gib_per_second", float("nan")),
        ("chunk_mib", 1 << 40),
        ("chunks_in_flight", 1 << 40),
        ("name", ""),
        ("name", "a" * 256),
        ("name", "a\nb"),
        ("name", "a/b"),
        ("name", ".hidden"),
    ],
)
def test_values_out_of_range_are_refused_by_flag(knob: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseCheckpointConfig(enabled=True, **{knob: value})  # type: ignore[arg-type]
    assert flag_of(knob) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5"])
def test_a_window_is_a_positive_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="auto"):
        window_argument(text)


def test_on_and_off() -> None:
    assert on_off_argument("on") is True and on_off_argument("off") is False
    with pytest.raises(argparse.ArgumentTypeError, match="'true'"):
        on_off_argument("true")
