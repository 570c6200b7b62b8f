"""Configurations: what is refused, what a file may say, and that nothing is lost on the way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinometer.messages import InputError, sentences
from clinometer.training.settings.config import (
    SECTIONS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    config_from,
    differences,
)
from clinometer.training.settings.settings_file import read_toml


def written(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ModelConfig(d_model=100, num_heads=3), "model.heads"),
        (lambda: ModelConfig(d_model=20, num_heads=4), "model.odd_head"),
        (lambda: ModelConfig(d_model=0), "model.positive"),
        (lambda: ModelConfig(d_ff=-1), "model.positive"),
        (lambda: DataConfig(vocab_size=0), "config.at_least"),
        (lambda: DataConfig(validation_fraction=0.9), "config.between"),
        (lambda: DataConfig(validation_fraction=0.0), "config.between"),
        (lambda: OptimConfig(name="adam"), "config.one_of_near"),
        (lambda: OptimConfig(name="zzz"), "config.one_of"),
        (lambda: OptimConfig(lr=-1.0), "config.between"),
        (lambda: OptimConfig(lr=math.nan), "config.between"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "config.between_open"),
        (lambda: OptimConfig(betas=(0.9,)), "config.pair"),
        (lambda: OptimConfig(embedding_lr=-0.1), "config.between"),
        (lambda: OptimConfig(embedding_lr=math.inf), "config.between"),
        (lambda: OptimConfig(lr=0.0, embedding_lr=0.1), "optim.embedding_lr"),
        (lambda: OptimConfig(max_norm=0.0), "config.above_zero"),
        (lambda: OptimConfig(max_norm=math.nan), "config.above_zero"),
        (lambda: ScheduleConfig(name="cos"), "config.one_of_near"),
        (lambda: ScheduleConfig(warmup_steps=-1), "config.at_least"),
        (lambda: TrainingConfig(steps=0), "config.at_least"),
        (lambda: TrainingConfig(steps=2.5), "config.at_least"),
        (lambda: TrainingConfig(batch_size=16, micro_batch_size=5), "config.micro_batch"),
        (lambda: TrainingConfig(precision="fp8"), "config.one_of"),
        (
            lambda: RunConfig(schedule=ScheduleConfig(warmup_steps=50), training=TrainingConfig(steps=20)),
            "config.warmup",
        ),
        (
            lambda: RunConfig(optim=OptimConfig(lr=1e-4), schedule=ScheduleConfig(min_lr=1e-3)),
            "config.min_lr",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_reason(make, key):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.key == key
    for language in ("en", "zh"):
        assert "{" not in error.value.render(language)


def test_no_limit_on_the_norm_is_written_inf():
    assert OptimConfig(max_norm=math.inf).max_norm == math.inf


@given(
    lr=st.floats(1e-9, 10, allow_nan=False),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    steps=st.integers(1, 10**9),
    prompt=st.text(max_size=20).filter(lambda s: "\r" not in s),
    layers=st.integers(1, 100),
    min_lr=st.none() | st.just(0.0),
)
def test_a_configuration_survives_its_file(tmp_path_factory, lr, betas, steps, prompt, layers, min_lr):
    config = RunConfig(
        model=ModelConfig(num_layers=layers),
        optim=OptimConfig(lr=lr, betas=betas),
        schedule=ScheduleConfig(min_lr=min_lr),
        training=TrainingConfig(steps=steps, sample_prompt=prompt),
    )
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert config_from(read_toml(path)) == config


@pytest.mark.parametrize(
    ("text", "key", "line", "near"),
    [
        ("[model]\nd_model = 8\nnum_layer = 2\n", "config.unknown_near", 3, "num_layers"),
        ("# note\n\n[optimizer]\nlr = 1\n", "config.unknown_near", 3, "optim"),
        ("lr = 0.1\n", "config.unknown_near", 1, "[optim] lr"),
        ("[optim]\nlr = 1.0\nqqqq = 2\n", "config.unknown", 3, ""),
        ("[training]\nsteps = 'many'\n", "config.type", 2, None),
        ("[training]\n\nsteps = 1.5\n", "config.type", 3, None),
        ("[optim]\nbetas = [0.9]\n", "config.type", 2, None),
        ("model = 3\n", "config.section", 1, None),
        ("training.stepps = 3\n", "config.unknown_near", 1, "steps"),
    ],
)
def test_a_wrong_key_or_type_names_the_file_and_the_line(tmp_path, text, key, line, near):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_toml(path)
    assert error.value.key == key
    assert error.value.values["line"] == line
    assert error.value.values["path"] == path
    if near is not None:
        assert error.value.values["near"] == near


@pytest.mark.parametrize(
    ("content", "key"),
    [(b"[model\n", "config.not_toml"), (b"\xff\xfe\x00", "config.not_utf8"), (None, "config.unreadable")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, key):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_toml(path)
    assert error.value.key == key


def test_a_folder_is_not_a_configuration(tmp_path):
    with pytest.raises(InputError) as error:
        read_toml(tmp_path)
    assert error.value.key == "config.folder"


def test_an_empty_file_is_the_defaults(tmp_path):
    assert config_from(read_toml(written(tmp_path, ""))) == RunConfig()


def test_differences_name_the_fields():
    a = RunConfig()
    b = RunConfig(optim=OptimConfig(lr=5e-4), training=TrainingConfig(seed=3))
    assert differences(a, b) == {"optim.lr": (1e-3, 5e-4), "training.seed": (0, 3)}
    assert differences(a, a) == {}


def test_every_setting_is_explained_in_both_languages():
    for section, cls in SECTIONS.items():
        for field in cls.__dataclass_fields__:
            for language in ("en", "zh"):
                assert sentences(language)[f"config.{section}.{field}"]
