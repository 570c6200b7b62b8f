"""The command line as a user meets it: what it says, its exit codes, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from clinometer.training.checkpoints import checkpoint
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.precision import choose_device
from tests.training.conftest import SMALL, assert_refused, small

# Wrong use


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--model.d-modle", "8"], ["--model.d-modle", "--model.d-model"]),
        (["train", "--optim.name", "adamm"], ["adamm", "adamw"]),
        (["train", "--optim.lr", "fast"], ["--optim.lr", "fast"]),
        (["train", "--resume"], ["--run"]),
        (["generate", "somewhere"], ["--prompt"]),
        (["generate"], ["--run"]),
        (["--language", "fr", "doctor"], ["fr", "en, zh"]),
        (["doctor", "--language"], ["en", "zh"]),
        (["learn", "x"], ["LESSON", "'x'"]),
        (["doctor", "now"], ["now", "clinometer doctor --help"]),
        (["train", "--model.d-model", "1.5"], ["--model.d-model", "whole", "1.5"]),  # and not rounded to 2
        (["train", "--training.micro-batch-size", "0x"], ["--training.micro-batch-size", "0x"]),
        (["train", "--model.rope-scaling", "8", "5", "4", "64"], ["rope_scaling", "5.0, 4.0"]),
        (["--language", "zh", "trian"], ["没有 trian", "是不是 train"]),
        (["--language", "zh", "train", "--optim.lr", "fast"], ["--optim.lr 需要一个数", "'fast'"]),
        (["--language", "zh", "generate", "somewhere"], ["缺少 --prompt", "clinometer generate --help"]),
    ],
)
def test_wrong_use_is_explained(call, arguments, words):
    assert_refused(call(*arguments), *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--model.d-model=100", "--model.num-heads=3"], ["100", "3"]),
        (["--model.d-model=20", "--model.num-heads=4"], ["even"]),
        (["--training.steps=0"], ["training.steps = 0"]),
        (["--training.batch-size=6", "--training.micro-batch-size=4"], ["6", "4"]),
        (["--training.device=cuda:7"], ["cuda:7", "cpu"]),
        (["--training.device=gpu"], ["gpu"]),
        (["--optim.lr=nan"], ["nan"]),
        (["--data.vocab-size=0"], ["0"]),
        (["--training.steps=1e3", "--training.batch-size=0x0"], ["training.batch_size = 0"]),
    ],
)
def test_wrong_settings_are_explained_and_leave_no_run(call, corpus, tmp_path, settings, words):
    result = call("train", "--corpus", corpus, "--run", "run", *small(*settings))
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_key_in_the_file_names_file_and_line(call, tmp_path):
    (tmp_path / "my.toml").write_text("[optim]\nlr = 0.1\nweigth_decay = 0.2\n")
    assert_refused(call("train", "--config", "my.toml"), "my.toml", "line 3", "weight_decay")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(call, corpus, tmp_path):
    (tmp_path / "my.toml").write_text("[optim]\nlr = 0.125\nweight_decay = 0.25\n[training]\nsteps = 9\n")
    code, *_ = call(
        "train", "--corpus", corpus, "--config", "my.toml", "--run", "run", *SMALL, "--training.steps=1"
    )
    assert code == 0
    config = RunFolder(tmp_path / "run").config
    assert (config.optim.lr, config.optim.weight_decay) == (0.125, 0.25)
    assert config.training.steps == 1
    assert config.optim.eps == 1e-8
    assert config.data.corpus == str(corpus)


def test_a_file_of_settings_alone_is_used(call, corpus, tmp_path):
    (tmp_path / "my.toml").write_text(
        f"""
        [model]
        context_length = 16
        d_model = 16
        num_layers = 1
        num_heads = 2
        [data]
        corpus = {str(corpus)!r}
        tokenizer = "bytes"
        [training]
        steps = 2
        batch_size = 2
        sample_tokens = 0
        """
    )
    code, *_ = call("train", "--config", "my.toml", "--run", "run")
    assert code == 0
    assert RunFolder(tmp_path / "run").config.model.d_model == 16


# Bad text


def long_text(words):
    return " ".join(f"{w} {i}" for i in range(600) for w in words)


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        (None, [], ["corpus.txt"]),
        (b"", [], ["empty"]),
        (b"\x7fELF\x00\x00" + bytes(2000), [], ["zero byte"]),
        (b"good text " * 50 + b"\xff\xfe" + b" more" * 50, [], ["UTF-8", "500"]),
        (b"x", [], []),
        (b"a few words", [], ["16"]),
        (
            b"a small text that says little " * 20,
            ["--data.tokenizer=bpe", "--data.vocab-size=5000"],
            ["5000"],
        ),
        (b"a small text that says little " * 20, ["--data.tokenizer=bpe", "--data.vocab-size=100"], ["100"]),
        (b"some text " * 100, ["--data.tokenizer=nowhere/tokenizer.json"], ["nowhere"]),
    ],
)
def test_bad_text_is_explained_and_leaves_no_run(call, tmp_path, content, settings, words):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(call("train", "--corpus", path, "--run", "run", *small(*settings)), *words)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_text_is_explained(call, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(call("train", "--corpus", "empty", "--run", "run", *SMALL), "empty")


# Runs


def test_a_run_folder_that_exists_is_not_overwritten(call, corpus, tmp_path):
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=2")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert_refused(call("train", "--corpus", corpus, "--run", "run", *SMALL), "run", "--resume")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert_refused(call("train", "--corpus", corpus, "--run", "full", *SMALL), "full")


def test_text_from_standard_input_is_kept_so_that_the_run_can_go_on(clinometer, corpus, tmp_path):
    text = corpus.read_text(encoding="utf-8")
    done = clinometer("train", "--corpus", "-", "--run", "run", *small("--training.steps=2"), input=text)
    assert done.returncode == 0, done.stderr
    done = clinometer("train", "--run", "run", "--resume", "--training.steps=3", input="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "corpus.txt").read_text(encoding="utf-8") == text


def test_resuming_from_nothing_is_explained(call, tmp_path):
    assert_refused(call("train", "--run", "nothing", "--resume"), "nothing")
    (tmp_path / "other").mkdir()
    assert_refused(call("train", "--run", "other", "--resume"), "other", "config.toml")


def test_resuming_with_other_settings_says_which(call, corpus):
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=2")[0] == 0
    assert_refused(call("train", "--run", "run", "--resume", "--optim.lr=0.5"), "optim.lr", "0.001", "0.5")
    code, out, _ = call("train", "--run", "run", "--resume", "--training.steps=3")
    assert code == 0
    assert "after step 2 of 3" in out
    code, out, _ = call("train", "--run", "run", "--resume")
    assert code == 0
    assert "all its 3 steps" in out


@pytest.mark.parametrize("command", ["generate", "export"])
def test_using_what_is_not_a_trained_run_is_explained(call, tmp_path, command):
    more = ["--prompt", "a"] if command == "generate" else ["--to", "out"]
    assert_refused(call(command, "nothing", *more), "nothing")
    (tmp_path / "bare").mkdir()
    assert_refused(call(command, "bare", *more), "bare")
    (tmp_path / "bare" / "config.toml").write_text("")
    assert_refused(call(command, "bare", *more), "checkpoint")
    assert not (tmp_path / "out").exists()


def test_from_text_to_generated_text_to_transformers_and_back(call, corpus, tmp_path):
    code, out, _ = call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=30")
    assert code == 0
    assert "30/30" in out
    assert "clinometer generate run" in out
    arguments = ["--prompt", "the quick", "--tokens", "12", "--seed", "5"]
    code, first, err = call("generate", "run", *arguments)
    assert code == 0
    assert first.startswith("the quick")
    assert len(first) > len("the quick\n")
    assert "step" in err
    assert call("generate", "run", *arguments)[1] == first
    assert call("generate", "run", *arguments[:-1], "6")[1] != first
    assert_refused(call("generate", "run", *arguments, "--temperature", "-1"), "-1")
    assert_refused(call("generate", "run", *arguments, "--checkpoint", "77"), "77")
    not_utf8 = b"caf\xe9".decode(errors="surrogateescape")  # as Python hands it on
    assert_refused(call("generate", "run", "--prompt", not_utf8), "character 3")
    code, _, err = call("generate", "run", "--prompt", "long " * 20, "--tokens", "4", "--seed", "1")
    assert code == 0
    assert "16" in err  # the prompt was cut to the context, and it is said

    assert call("export", "run", "--to", "llama")[0] == 0
    assert_refused(call("export", "run", "--to", "llama"), "llama")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert model.config.model_type == "llama"
    assert tokenizer("the quick")["input_ids"] == list(b"the quick")

    assert call("import", "llama", "--run", "back", "--corpus", corpus)[0] == 0
    greedy = ["--prompt", "the quick", "--tokens", "12", "--temperature", "0"]
    assert call("generate", "back", *greedy)[1] == call("generate", "run", *greedy)[1]


def test_an_imported_model_can_be_tuned(call, corpus, tmp_path):
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=3")[0] == 0
    assert call("export", "run", "--to", "llama")[0] == 0
    assert_refused(call("import", "llama", "--run", "tuned", "--corpus", "nothing.txt"), "nothing.txt")
    relative = os.path.relpath(corpus, tmp_path)  # the run means the same file from wherever it goes on
    assert call("import", "llama", "--run", "tuned", "--corpus", relative)[0] == 0
    assert RunFolder.open(tmp_path / "tuned").config.data.corpus == str(corpus)
    code, out, _ = call(
        "train", "--run", "tuned", "--resume", "--training.steps=2", "--training.sample-tokens=0"
    )
    assert code == 0, out
    assert checkpoint.step_of(checkpoint.checkpoints(tmp_path / "tuned" / "checkpoints")[-1]) == 2


def test_the_doctor_says_what_there_is(call):
    code, out, _ = call("doctor")
    assert code == 0
    assert "TFLOP/s" in out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert any(row.startswith("cpu ✓ ") for row in rows)
    for kind, here in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        assert any(row.startswith(f"{kind} {'✓' if here else '–'} ") for row in rows), kind
    chosen = f"device auto the first of cuda, mps, cpu that is available: {choose_device('auto').type}"
    assert chosen in " ".join(rows)
    code, out, _ = call("--language", "zh", "doctor")
    assert code == 0
    assert "处理器" in out


# As a process


def test_help_answers_without_torch_in_both_languages(clinometer):
    script = (
        "import sys\nsys.argv = ['clinometer', *sys.argv[1:]]\nfrom clinometer.cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules), 'too much'"
    )
    for arguments, word in ((["--help"], "train"), (["train", "--help", "--language=zh"], "学习率")):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", "import clinometer, sys; assert 'torch' not in sys.modules"], check=False
    )
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(tmp_path, corpus, number, code):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "clinometer", "train", "--corpus", corpus, "--run", run, *SMALL]
    process = subprocess.Popen(
        [*map(str, command), "--training.steps=100000"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and len(list(RunFolder(run).metrics())) < 20:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == code, out
    step = int(re.search(r"Stopped at step ([\d,]+)", out)[1].replace(",", ""))
    assert checkpoint.step_of(checkpoint.checkpoints(run / "checkpoints")[-1]) == step
    assert "--resume" in out


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_page_opens_beside_the_training_and_stays_until_ctrl_c(tmp_path, corpus):
    train = ["train", "--view", "--corpus", corpus, "--run", "run", "--training.steps=4", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "clinometer", *map(str, train)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "BROWSER": "true"},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Ctrl-C") and "Done:" in "".join(said):
                break
        address = re.search(r"(http://127\.0\.0\.1:\d+)/\?run=(\w+)", "".join(said))
        assert address is not None, "".join(said)
        with urllib.request.urlopen(f"{address[1]}/api/runs/{address[2]}") as answer:
            run = json.load(answer)
        assert (run["state"], run["last_step"], run["tensor_count"]) == ("done", 4, 12)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to both
        process.communicate()
    assert process.returncode == 0
