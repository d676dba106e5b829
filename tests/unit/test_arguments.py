"""Tests of the command line: what is parsed, and that every refusal is one line with exit status 2."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.moevement import arguments
from megatron.moevement.argument_checks import UNSUPPORTED
from megatron.moevement.errors import ConfigError, RecoveryError

ROOT = Path(__file__).resolve().parents[2]
GOOD = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts 4 --micro-batch-size 1"
    " --train-iters 10 --lr 1e-3 --bf16 --disable-bias-linear --data-path corpus"
).split()


def refusal(words: list[str], capsys: pytest.CaptureFixture[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SystemExit) as caught:
        arguments.parse(words, environ=environ or {})
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pretrain_gpt.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_values_reach_the_configuration() -> None:
    config, namespace = arguments.parse([*GOOD, "--clip-grad", "0.5", "--swiglu"], environ={"WORLD_SIZE": "4"})
    assert (config.num_layers, config.clip_grad, config.swiglu, config.world_size) == (4, 0.5, True, 4)
    assert config.data_path == ("corpus",)
    assert namespace.clip_grad == 0.5


def test_a_blend_of_data_keeps_its_order() -> None:
    config, _ = arguments.parse([*GOOD[:-1], "0.3", "a", "0.7", "b"], environ={})
    assert config.data_path == ("0.3", "a", "0.7", "b")


def test_further_flags_can_be_added() -> None:
    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sparse-ckpt-window", type=int)

    _, namespace = arguments.parse([*GOOD, "--sparse-ckpt-window", "3"], extra, environ={})
    assert namespace.sparse_ckpt_window == 3


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED))
def test_unsupported_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} is not supported: " in refusal([*GOOD, flag, "1"], capsys)


@pytest.mark.parametrize("word", ["--fp8-format=hybrid", "--moe-grouped-gemm"])
def test_unsupported_flags_in_either_spelling(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word.split("=")[0] in refusal([*GOOD, word], capsys)


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal([*GOOD, "--num-expert", "4"], capsys)
    assert "--num-expert is not a known flag: did you mean --num-experts?" in line


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--moe-router-top" in refusal([*GOOD, "--moe-router-top", "2"], capsys)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--lr", "fast"], "--lr"),
        (["--num-layers", "0"], "--num-layers"),
        (["--hidden-dropout", "2"], "--hidden-dropout"),
        (["--lr-decay-style", "square"], "--lr-decay-style"),
        (["--fp16"], "--bf16"),
        (["--overlap-param-gather"], "--overlap-param-gather"),
        (["--seed"], "--seed"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["stray"], "stray"),
    ],
)
def test_bad_values_are_named(words: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # A stray word after --data-path would belong to it, so the data path stands first here.
    assert name in refusal(["--data-path", "corpus", *GOOD[:-2], *words], capsys)


def test_missing_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--num-layers" in refusal(["--bf16"], capsys)


def test_a_bad_world_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "WORLD_SIZE" in refusal(GOOD, capsys, {"WORLD_SIZE": "many"})


@pytest.mark.parametrize("message", ["text", ConfigError("text")])
def test_what_all_find_is_left_to_rank_zero_for_a_while(
    message: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[str]()
    monkeypatch.setattr(arguments.time, "sleep", lambda seconds: waited.append(f"{seconds} {capsys.readouterr().err}"))
    for rank in ("1", "0"):
        with pytest.raises(SystemExit) as caught:
            arguments.refuse("program", message, {"RANK": rank})
        assert caught.value.code == 2
    assert waited == ["15.0 "]
    assert capsys.readouterr().err == "program: error: rank 1: text\nprogram: error: text\n"


def test_a_rank_prints_what_it_alone_finds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.refuse("program", RecoveryError("slot file is gone"), {"RANK": "3"})
    assert capsys.readouterr().err == "program: error: rank 3: slot file is gone\n"


def test_parsing_loads_neither_torch_nor_megatron_core() -> None:
    code = (
        "import sys; from megatron.moevement import arguments; arguments.build_parser();"
        "assert not {'torch', 'megatron.core', 'numpy'} & set(sys.modules), 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_refuses_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "pretrain_gpt.py", *GOOD, "--use-megatron-fsdp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--use-megatron-fsdp is not supported" in done.stderr
