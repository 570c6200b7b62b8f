"""Wrong words on a command line: the message names what was meant, and can be copied."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clinometer import messages
from clinometer.cli import build_app
from clinometer.commands.helpers.other_names import OTHER_NAMES, option_for
from clinometer.commands.helpers.usage_errors import explain_usage


def refused(arguments):
    """The paragraph for a command line that cannot be used."""
    with pytest.raises(Exception) as error:
        build_app(arguments[0])(arguments, exit_on_error=False, print_error=False)
    return explain_usage(error.value)


def options_of(*commands):
    return {
        name
        for command in commands
        for argument in build_app(command)[command].assemble_argument_collection(parse_docstring=False)
        for name in argument.names
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--optim.learning-rate", "--optim.lr"),
        ("--learning_rate", "--optim.lr"),
        ("--max-iters", "--training.steps"),
        ("--block_size", "--model.context-length"),
        ("--n_layer", "--model.num-layers"),
        ("--per-device-train-batch-size", "--training.micro-batch-size"),
        ("--grad-clip", "--optim.max-norm"),
        ("--model.batch-size", "--training.batch-size"),  # the right word in the wrong section
        ("--output_dir", "--run"),
        ("--optim.weigth-decay", "--optim.weight-decay"),  # mistyped
    ],
)
def test_an_option_of_another_tool_is_answered_with_ours(given, meant):
    assert f"{meant}?" in refused(["train", given, "1"])


def test_an_option_that_means_nothing_is_not_guessed_at():
    assert option_for("--sharpness-aware", {"--optim.lr", "--training.steps"}) is None


def test_every_option_in_the_table_is_one_of_ours():
    assert OTHER_NAMES.keys() - options_of("train", "generate", "view", "export") == set()


@pytest.mark.parametrize("language", messages.LANGUAGES)
def test_an_option_given_twice_is_named(language):
    messages.set_language(language)
    try:
        text = refused(["train", "--optim.lr", "1", "--optim.lr", "2"])
        assert text == messages.say("cli.repeated", option="--optim.lr", help="clinometer train --help")
    finally:
        messages.set_language("en")


def test_a_pattern_that_the_shell_has_opened_is_given_back_in_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my books").mkdir()
    files = [f"my books/{name}.txt" for name in "ab"]
    for file in files:
        (tmp_path / file).write_text("text", encoding="utf-8")
    quoted = shlex.quote("my books/*.txt")
    assert f"--data.corpus {quoted}" in refused(["train", *files])
    assert f"--data.corpus {quoted}" in refused(["train", "--data.corpus", *files])
    assert f"--data.corpus {shlex.quote(files[0])}" in refused(["train", files[0]])
    assert "--data.corpus" not in refused(["train", "nothing-of-this-name"])


def test_a_path_in_a_command_to_copy_is_quoted_for_the_shell():
    path = "/tmp/my runs/first"
    assert f"--run {shlex.quote(path)} --resume" in messages.say("train.interrupted_early", run=path)
    assert "--run runs/first --resume" in messages.say("train.interrupted_early", run="runs/first")


def test_ctrl_c_while_python_still_imports_prints_no_traceback():
    """From the first moment that our own first line has run."""
    code = "import clinometer.__main__ as m, sys; print('begun', flush=True); sys.argv[1:] = []; m.main()"
    for wait in (0.0, 0.02, 0.05, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(2)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        assert process.returncode in (0, 130)  # 0: it was done before


def test_the_command_is_the_entry_that_catches_it():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'clinometer = "clinometer.__main__:main"' in project
