"""What a tester broke, and what must happen instead."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from clinometer.messages import InputError
from clinometer.training.checkpoints import checkpoint
from clinometer.training.run import prepare
from clinometer.training.run.display import printable
from clinometer.training.run.json_lines import JsonLines
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import DataConfig, OptimConfig, TrainingConfig
from tests.training.conftest import SMALL, Silent, assert_refused, small, small_config, stopped_after


def test_a_run_folder_deleted_while_training_stops_the_run_and_does_not_come_back_as_half_of_one(
    config, tmp_path
):
    session = prepare.start(config, tmp_path / "run", Silent())
    display = Silent()

    def delete(row):
        if row["step"] == 2:
            shutil.rmtree(tmp_path / "run")

    display.step = delete
    with pytest.raises(InputError) as error:
        train(session, display)
    session.close()
    assert error.value.key == "run.vanished"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [0, 0.5, 1])
def test_rows_that_were_lost_are_said_and_not_filled_and_do_not_block_the_weights(config, tmp_path, kept):
    session = prepare.start(config, tmp_path / "run", Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    cut = whole[: int(len(whole) * kept) if kept < 1 else -3]  # 1: only the end of the last row is missing
    metrics.write_bytes(cut)
    display = Silent()
    prepare.resume(tmp_path / "run", None, display).close()
    left = cut[: cut.rfind(b"\n") + 1]
    assert metrics.read_bytes() == left
    assert ("run.lines_lost", {"path": tmp_path / "run", "lost": len(whole) - len(left)}) in display.notices


def _with_two_checkpoints(config, path):
    session = prepare.start(config, path, Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    older, newest = checkpoint.checkpoints(path / "checkpoints")[-2:]
    return older, newest, (newest / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "no state"])
def test_where_nobody_looks_the_newest_whole_checkpoint_is_taken_and_the_run_ends_the_same(
    config, tmp_path, damage
):
    older, newest, weights = _with_two_checkpoints(config, tmp_path / "run")
    if damage == "truncated":
        os.truncate(newest / "model.safetensors", 100)
    elif damage == "one bit":
        changed = bytearray(weights)
        changed[-1] ^= 1
        (newest / "model.safetensors").write_bytes(changed)
    else:
        (newest / "state.json").write_text("{}", encoding="utf-8")
    damaged = (newest / "model.safetensors").read_bytes()
    with pytest.raises(InputError):  # somebody who sits there is asked
        prepare.resume(tmp_path / "run", None, Silent())
    display = Silent()
    session = prepare.resume(tmp_path / "run", None, display, unattended=True)
    assert session.step == checkpoint.step_of(older)
    (said,) = [values for key, values in display.notices if key == "resume.set_aside"]
    assert (said["aside"] / "model.safetensors").read_bytes() == damaged
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert (newest / "model.safetensors").read_bytes() == weights


def test_the_last_checkpoint_is_not_set_aside_even_if_none_is_whole(config, tmp_path):
    path = tmp_path / "run"
    _with_two_checkpoints(config, path)
    saved = checkpoint.checkpoints(path / "checkpoints")
    for each in saved:
        os.truncate(each / "model.safetensors", 100)
    with pytest.raises(InputError) as error:
        prepare.resume(path, None, Silent(), unattended=True)
    assert error.value.key == "checkpoint.torn"
    assert checkpoint.checkpoints(path / "checkpoints") == saved[:1]


def test_more_steps_for_a_run_that_has_ended_say_where_the_rate_goes(config, tmp_path):
    _with_two_checkpoints(config, tmp_path / "run")
    more = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=60))
    display = Silent()
    prepare.resume(tmp_path / "run", more, display).close()
    (said,) = [values for key, values in display.notices if key == "resume.rate"]
    assert float(said["new"]) > 2 * float(said["old"])
    display = Silent()  # now these are its steps
    prepare.resume(tmp_path / "run", more, display).close()
    assert "resume.rate" not in [key for key, _ in display.notices]


def test_json_lines_are_named_as_what_they_are(config, tmp_path):
    chat = tmp_path / "chat.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": "hello there"}]})
    chat.write_text(f"{row}\n" * 400, encoding="utf-8")
    display = Silent()
    chats = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(chat)))
    prepare.start(chats, tmp_path / "chat", display).close()
    assert ("train.json_lines", {"corpus": str(chat), "fields": "messages"}) in display.notices
    display = Silent()
    prepare.start(config, tmp_path / "plain", display).close()
    assert "train.json_lines" not in [key for key, _ in display.notices]


def test_a_damaged_checkpoint_does_not_cost_the_rows_after_it(config, tmp_path):
    session = prepare.start(config, tmp_path / "run", Silent())
    train(session, Silent())
    session.close()
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.append(note="later")
    lines.close()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (last,) = (tmp_path / "run" / "checkpoints").glob("step-00000020")
    os.truncate(last / "optimizer.safetensors", 50)
    with pytest.raises(InputError):
        prepare.resume(tmp_path / "run", None, Silent())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_reader_that_leaves_does_not_stop_the_training(corpus, tmp_path):
    command = [sys.executable, "-m", "clinometer", "train", "--corpus", corpus, "--run", tmp_path / "run"]
    process = subprocess.Popen(
        [*map(str, command), *SMALL, "--training.steps=30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.wait() == 0, process.stderr.read()
    assert (tmp_path / "run" / "checkpoints" / "step-00000030").is_dir()


def test_an_output_that_cannot_show_every_sign_still_works(corpus, tmp_path):
    """Both commands in both languages, in one process: it is the stream that matters."""
    commands = [
        [command, *arguments, "--language", language]
        for language in ("en", "zh")
        for command, *arguments in (
            ["train", "--corpus", str(corpus), "--run", language, *small("--training.steps=2")],
            ["generate", language, "--prompt", "从前", "--tokens", "3"],
        )
    ]
    script = f"""
import sys
from clinometer import cli
from clinometer.commands.helpers import process_settings
process_settings.restart_with_settings = lambda: None
assert sys.stdout.encoding == "ascii"
for command in {commands!r}:
    sys.argv = ["clinometer", *command]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 0, command
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_seeds_that_torch_cannot_take_are_refused(call, corpus, tmp_path):
    assert_refused(
        call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.seed", 2**64), str(2**64)
    )
    assert not (tmp_path / "run").exists()
    largest = TrainingConfig(seed=2**62)
    assert largest.seed == 2**62
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=1")[0] == 0
    for seed in (-1, 2**70):
        _, out, _ = result = call("generate", "run", "--prompt", "a", "--seed", seed)
        assert_refused(result, str(seed))
        assert out == ""


@pytest.mark.parametrize("wrong", [["--temperature", "nan"], ["--top-k", "0"], ["--top-p", "0"]])
def test_a_wrong_sampling_setting_prints_nothing_before_the_error(call, corpus, wrong):
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=1")[0] == 0
    code, out, _ = call("generate", "run", "--prompt", "hello", *wrong)
    assert (code, out) == (2, "")


def test_a_batch_that_does_not_fit_into_memory_is_explained_and_the_name_stays_free(call, corpus, tmp_path):
    (tmp_path / "big.toml").write_text("[training]\nbatch_size = 100000000000\n")
    result = call("train", "--corpus", corpus, "--config", "big.toml", "--run", "run", *small()[:-5])
    assert_refused(result, "batch_size", "memory")


def test_text_from_a_pipe_is_kept_with_the_run(call, corpus, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(corpus.read_bytes()))
    writer.start()
    assert call("train", "--corpus", "pipe", "--run", "run", *SMALL, "--training.steps=1")[0] == 0
    writer.join()
    assert call("train", "--run", "run", "--resume", "--training.steps=2")[0] == 0
    assert RunFolder(tmp_path / "run").config.data.corpus == str(tmp_path / "run" / "corpus.txt")


def test_an_epsilon_of_zero_is_refused():
    with pytest.raises(InputError) as error:
        OptimConfig(eps=0.0)
    assert error.value.key == "config.above_zero"


def test_an_empty_corpus_name_is_not_the_current_folder(call):
    assert_refused(call("train", "--corpus", "", "--run", "run", *SMALL), "data.corpus is empty")
    with pytest.raises(InputError):
        DataConfig(corpus="")


def test_a_run_whose_weights_end_not_finite_is_not_called_done(corpus, tmp_path):
    session = prepare.start(small_config(corpus, steps=3, sample_tokens=0), tmp_path / "run", Silent())
    display = Silent()

    def spoil(row):
        if row["step"] == 3:
            next(session.model.parameters()).data[0, 0] = float("inf")

    display.step = spoil
    assert train(session, display) is Outcome.NOT_FINITE
    session.close()


def test_text_is_shown_as_it_is_but_for_what_a_terminal_would_obey():
    assert printable("\u3000从前\r\n👨\u200d👩 a\u00a0b\tc") == "\u3000从前\n👨\u200d👩 a\u00a0b\tc"
    assert printable("\x1b[31mred\x00\u202e") == "�[31mred��"


def test_a_small_text_gets_the_vocabulary_it_can_give_unless_a_size_was_asked_for(call, corpus, tmp_path):
    settings = small("--data.tokenizer=bpe", "--training.steps=1")
    assert call("train", "--corpus", corpus, "--run", "run", *settings)[0] == 0
    assert_refused(
        call("train", "--corpus", corpus, "--run", "other", *settings, "--data.vocab-size=4096"), "4096"
    )


def test_deeply_nested_toml_is_refused(call, tmp_path):
    (tmp_path / "deep.toml").write_text("a=" + "[" * 20_000)
    assert_refused(call("train", "--config", "deep.toml"), "deep.toml")


def test_an_export_is_replaced_when_asked(call, corpus, tmp_path):
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=1")[0] == 0
    assert call("export", "run", "--to", "out")[0] == 0
    assert_refused(call("export", "run", "--to", "out"), "--overwrite")
    assert call("export", "run", "--to", "out", "--overwrite")[0] == 0


def test_a_start_that_was_killed_in_its_first_instant_can_be_made_again(call, corpus, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.toml.123.tmp").touch()
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=1")[0] == 0


def test_a_folder_with_gpt2s_two_files_is_a_tokenizer(call, corpus, tmp_path):
    from clinometer.text.tokenizer import Tokenizer, train_bpe

    texts = [corpus.read_text(encoding="utf-8")]
    model = json.loads(train_bpe(texts, 300).to_json())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    opened = Tokenizer.load(folder)
    assert opened.encode(texts[0]) == train_bpe(texts, 300).encode(texts[0])
    settings = small("--data.tokenizer=gpt2", "--training.steps=1")
    assert call("train", "--corpus", corpus, "--run", "run", *settings)[0] == 0


@pytest.mark.parametrize("jump", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps_changes_no_step_no_row_and_no_name(config, tmp_path, monkeypatch, jump):
    import time

    from clinometer.record.read.reader import RunFile
    from tests.training.test_exact import assert_equal, go, recorded
    from tests.training.test_loop import assert_same_run

    go(config, tmp_path / "whole", False)
    real, moved = time.time, []
    monkeypatch.setattr(time, "time", lambda: real() + (jump if moved else 0.0))
    display = stopped_after(12)
    stop = display.step

    def look(row):
        if row["step"] == 6:
            moved.append(True)
        stop(row)

    display.step = look
    assert go(config, tmp_path / "run", False, display) is Outcome.INTERRUPTED
    moved.clear()  # and back, for the resume
    assert go(config, tmp_path / "run", False) is Outcome.DONE
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert_equal(recorded(tmp_path / "whole"), recorded(tmp_path / "run"))
    file = RunFile.open(tmp_path / "run")
    seconds = [file.row(step)["scalars"].get("seconds", 0.0) for step in range(1, 21)]
    file.close()
    assert all(0 <= value < 1e5 for value in seconds), seconds
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert all(name.startswith("step-000000") for name in names)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_of_two_processes_that_resume_the_same_run_the_second_is_refused(clinometer, config, tmp_path):
    from tests.training.test_loop import assert_same_run, run_whole

    whole = run_whole(config, tmp_path / "whole")
    session = prepare.start(config, tmp_path / "run", Silent())
    display, refused = Silent(), []

    def resume_too(row):
        if row["step"] == 9:
            before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
            refused.append(clinometer("train", "--run", "run", "--resume"))
            assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    display.step = resume_too
    assert train(session, display) is Outcome.DONE
    session.close()
    (result,) = refused
    assert_refused((result.returncode, result.stdout, result.stderr), "another process")
    assert_same_run(whole, tmp_path / "run")


def test_a_checkpoint_being_written_is_not_swept_away_by_the_removal_of_older_ones(corpus, tmp_path):
    """The thread writes step 4 slowly while step 3 is told, and older ones are removed."""
    import time

    from clinometer.training.checkpoints import checkpoint

    config = small_config(corpus, steps=6, checkpoint_every=1, keep=1, async_checkpoints=True, eval_every=6)
    session = prepare.start(config, tmp_path / "run", Silent())
    write = checkpoint.save_file

    def slowly(tensors, path):
        write(tensors, path)
        time.sleep(0.05)

    display = Silent()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", slowly)
        assert train(session, display) is Outcome.DONE
    session.close()
    assert [key for key, _ in display.notices if key == "train.checkpoint_failed"] == []
