"""The export against transformers, and the way back against both."""

import json
import os
import shutil
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clinometer.lm import llama_files
from clinometer.lm.functional import transformer_lm
from clinometer.lm.generate import generate
from clinometer.lm.llama import rescale_residual
from clinometer.lm.llama_files import export_llama, import_llama
from clinometer.lm.model import TransformerLM, initial_weights
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError

transformers = pytest.importorskip("transformers")

CONFIG = TransformerConfig(
    vocab_size=61, context_length=32, d_model=32, num_layers=2, num_heads=4, d_ff=48, rope_theta=500.0
)
IDS = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(11))


def small_weights(config=CONFIG):
    return initial_weights(config, torch.Generator().manual_seed(2))


def opened(folder, dtype="auto"):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, unexpected or misshapen
    return model.eval()


def largest_difference(a, b):
    return float((a.double() - b.double()).detach().abs().max())


def edit_config(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "remove"}))


@pytest.fixture
def folder(tmp_path):
    return export_llama(small_weights(), CONFIG, tmp_path / "model")


def llama(folder, *, seed=4, shard="1GB", **changes):
    """A model made and saved by transformers, with norms that are not all one."""
    torch.manual_seed(seed)
    kind = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(kind | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def test_transformers_opens_the_export_with_the_same_logits(tmp_path):
    model = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(2))
    folder = export_llama(model, CONFIG, tmp_path / "model", end_of_text_id=60)
    theirs = opened(folder)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 60
    assert theirs.config.max_position_embeddings == 32
    assert largest_difference(theirs(IDS).logits, model(IDS)) <= 1e-5


def test_in_float64_the_logits_agree_to_1e_10(tmp_path):
    weights = {name: w.double() for name, w in small_weights().items()}
    theirs = opened(export_llama(weights, CONFIG, tmp_path / "model"))
    assert theirs.dtype == torch.float64
    for name, norm in list(theirs.named_modules()):
        if type(norm).__name__ == "LlamaRMSNorm":  # it computes in float32 whatever it is given
            plain = torch.nn.RMSNorm(32, eps=1e-5, dtype=torch.float64)
            plain.weight = norm.weight
            theirs.set_submodule(name, plain)
    assert largest_difference(theirs(IDS).logits, transformer_lm(weights, IDS, CONFIG)) <= 1e-10


def test_transformers_generates_the_same_text_from_the_export(tmp_path):
    model = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(2))
    free = torch.stack(list(generate(model, IDS[:, :6], 26, temperature=0)), dim=1)
    stop = int(free[0, 5])
    theirs = opened(export_llama(model, CONFIG, tmp_path / "model", end_of_text_id=stop))
    made = theirs.generate(IDS[:, :6], max_new_tokens=26, do_sample=False)[:, 6:]
    ours = torch.stack(list(generate(model, IDS[:, :6], 26, temperature=0, stop_id=stop)), dim=1)
    assert stop in ours[0, :6].tolist()
    assert torch.equal(ours, made)


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 4))
    return TransformerConfig(
        vocab_size=draw(st.integers(1, 30)),
        context_length=draw(st.integers(1, 100)),
        d_model=heads * 2 * draw(st.integers(1, 5)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        d_ff=draw(st.integers(1, 20)),
        rope_theta=draw(st.floats(1e-3, 1e9)),
    )


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_import_undoes_export_bit_for_bit(tmp_path_factory, config, dtype):
    weights = {name: torch.randn(shape).to(dtype) for name, shape in config.weight_shapes().items()}
    folder = export_llama(weights, config, tmp_path_factory.mktemp("export") / "model")
    again, back = import_llama(folder)
    assert again == config
    assert list(back) == list(weights)
    for name, weight in weights.items():
        assert back[name].dtype == dtype
        assert back[name].is_contiguous()
        assert torch.equal(back[name], weight), name


@settings(max_examples=10)
@given(configs())
def test_any_export_has_our_logits_in_transformers(tmp_path_factory, config):
    weights = initial_weights(config)
    folder = export_llama(weights, config, tmp_path_factory.mktemp("export") / "model")
    ids = torch.randint(0, config.vocab_size, (2, config.context_length))
    # Angles in float32: where theta makes them large, both round them the same way.
    assert largest_difference(opened(folder)(ids).logits, transformer_lm(weights, ids, config)) <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "rope_theta": 77.0},
        {"tie_word_embeddings": True},
        {"shard": "10KB"},
        {"shard": "10KB", "tie_word_embeddings": True, "num_key_value_heads": 2},
        {"rms_norm_eps": 1e-6},
        {"rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_a_model_of_transformers_keeps_its_logits_when_imported(tmp_path, changes):
    theirs = llama(tmp_path / "model", **changes)
    if "shard" in changes:
        assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    config, weights = import_llama(tmp_path / "model")
    expected = theirs(IDS).logits
    assert float(expected.detach().std()) > 0.5
    assert largest_difference(transformer_lm(weights, IDS, config), expected) <= 2e-5
    TransformerLM(config).load_state_dict(weights)
    again = opened(export_llama(weights, config, tmp_path / "again"))
    assert largest_difference(again(IDS).logits, expected) <= 2e-5


def test_another_epsilon_matters_here():
    """Otherwise the test above would pass on an import that ignores it."""
    weights = {name: w * 0.1 if name.startswith("token") else w for name, w in small_weights().items()}
    changed = transformer_lm(rescale_residual(weights, 1e-2), IDS, CONFIG)
    assert largest_difference(changed, transformer_lm(weights, IDS, CONFIG)) > 1e-2


def test_theta_is_read_in_the_old_and_the_new_spelling(folder):
    for changes in (
        {"rope_theta": 77, "rope_parameters": "remove"},
        {"rope_theta": "remove", "rope_parameters": {"rope_theta": 77.0}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 77.0, "rope_parameters": "remove", "rope_scaling": {"type": "default"}},
    ):
        edit_config(folder, **changes)
        assert import_llama(folder)[0].rope_theta == 77.0
        assert opened(folder).config.rope_parameters["rope_theta"] == 77.0
    edit_config(folder, rope_theta="remove", rope_parameters="remove", rope_scaling="remove")
    assert import_llama(folder)[0].rope_theta == opened(folder).config.rope_parameters["rope_theta"] == 10_000


def test_half_precision_of_another_epsilon_becomes_float32_and_keeps_its_logits(tmp_path):
    theirs = llama(tmp_path / "model", rms_norm_eps=1e-6)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config, weights = import_llama(tmp_path / "model")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    expected = opened(tmp_path / "model", torch.float32)(IDS).logits
    assert largest_difference(transformer_lm(weights, IDS, config), expected) <= 2e-5


def test_mixed_precisions_become_the_widest(folder):
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["lm_head.weight"].to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors")
    _, weights = import_llama(folder)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert torch.equal(weights["lm_head.weight"], small_weights()["lm_head.weight"].bfloat16().float())


def test_tied_weights_come_back_as_two(tmp_path):
    llama(tmp_path / "model", tie_word_embeddings=True)
    _, weights = import_llama(tmp_path / "model")
    embedding, head = weights["token_embeddings.weight"], weights["lm_head.weight"]
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()


def test_shared_and_transposed_weights_can_be_exported(tmp_path):
    weights = small_weights()
    weights["lm_head.weight"] = weights["token_embeddings.weight"]
    weights["layers.0.ffn.w1.weight"] = weights["layers.0.ffn.w1.weight"].t().contiguous().t()
    _, back = import_llama(export_llama(weights, CONFIG, tmp_path / "model"))
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_dtype_can_be_chosen(tmp_path):
    folder = export_llama(small_weights(), CONFIG, tmp_path / "model", dtype=torch.bfloat16)
    assert opened(folder).dtype == torch.bfloat16
    back = import_llama(folder)[1]
    assert all(torch.equal(back[name], w.bfloat16()) for name, w in small_weights().items())


def test_imported_weights_outlive_their_file(folder):
    _, weights = import_llama(folder)
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"\0" * size)
    assert all(torch.equal(weights[name], w) for name, w in small_weights().items())


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    export_llama(small_weights(), CONFIG, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for name in ("save_file", "_write_json", "commit_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(llama_files, name, full_disk)
            for target in ("new", "model"):
                with pytest.raises(InputError) as error:
                    export_llama(small_weights(), CONFIG, tmp_path / target, overwrite=True)
                assert error.value.key == "export.cannot_write"
                assert "No space left" in str(error.value)
        assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(KeyboardInterrupt):
        export_llama(small_weights(), CONFIG, tmp_path / "new", also=_interrupt)
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def _interrupt(_):
    raise KeyboardInterrupt


def test_more_files_come_in_before_the_folder_has_its_name(tmp_path):
    def tokenizer(unfinished):
        assert not (tmp_path / "model").exists()
        (unfinished / "tokenizer.json").write_text("{}")

    export_llama(small_weights(), CONFIG, tmp_path / "deep" / ".." / "model", also=tokenizer)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    export_llama(small_weights(), CONFIG, tmp_path / "model", overwrite=True)
    assert sorted(os.listdir(tmp_path / "model")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    modes = {
        stat.S_IMODE(os.stat(tmp_path / "model" / name).st_mode) for name in os.listdir(tmp_path / "model")
    }
    assert len(modes) == 1  # whoever may read one may read all


def test_nothing_but_an_earlier_export_is_replaced(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty folder is no obstacle
    export_llama(small_weights(), CONFIG, target)
    with pytest.raises(InputError) as error:
        export_llama(small_weights(), CONFIG, target)
    assert error.value.key == "export.exists"

    (target / "notes.txt").write_text("mine")
    llama(tmp_path / "theirs")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for folder in ("model", "theirs", "other"):
        before = sorted((p.name, p.read_bytes()) for p in (tmp_path / folder).iterdir())
        with pytest.raises(InputError) as error:
            export_llama(small_weights(), CONFIG, tmp_path / folder, overwrite=True)
        assert error.value.key == "export.foreign_folder"
        assert sorted((p.name, p.read_bytes()) for p in (tmp_path / folder).iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        export_llama(small_weights(), CONFIG, tmp_path / "file", overwrite=True)
    assert error.value.key == "export.not_a_folder_here"


def test_weights_that_do_not_fit_are_not_exported(tmp_path):
    weights = small_weights()
    for key, changed, more in [
        ("model.weights_missing", {k: w for k, w in weights.items() if "w2" not in k}, {}),
        ("model.weight_shape", weights | {"lm_head.weight": torch.zeros(3, 3)}, {}),
        ("export.unknown_weight", weights | {"layers.0.attn.q_proj.bias": torch.zeros(32)}, {}),
        ("export.end_of_text", weights, {"end_of_text_id": 61}),
        ("export.dtype", weights, {"dtype": torch.int8}),
    ]:
        with pytest.raises(InputError) as error:
            export_llama(changed, CONFIG, tmp_path / "model", **more)
        assert error.value.key == key
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("key", "field", "changes"),
    [
        ("export.architecture", None, {"model_type": "gpt2"}),
        ("export.architecture", None, {"model_type": "remove"}),
        ("export.architecture", None, {"architectures": ["LlamaForSequenceClassification"]}),
        ("export.unsupported", "rope_type", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ("model.scaling", None, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("export.unsupported", "rope_type", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}),
        ("export.unsupported", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("export.unsupported", "attention_bias", {"attention_bias": True}),
        ("export.unsupported", "mlp_bias", {"mlp_bias": True}),
        ("export.unsupported", "hidden_act", {"hidden_act": "gelu"}),
        ("export.unsupported", "head_dim", {"head_dim": 16}),
        ("export.unsupported", "num_key_value_heads", {"num_key_value_heads": 3}),
        ("export.unsupported", "rms_norm_eps", {"rms_norm_eps": 0}),
        ("export.unsupported", "quantization_config", {"quantization_config": {"bits": 4}}),
        ("export.config_field", "hidden_size", {"hidden_size": "remove"}),
        ("model.positive", "vocab_size", {"vocab_size": "61"}),
        ("model.theta", None, {"rope_parameters": {"rope_theta": "big"}}),
        ("export.tensor_shape", None, {"intermediate_size": 50}),
        ("export.tensor_shape", None, {"num_key_value_heads": 2}),
        ("export.tensor_missing", None, {"num_hidden_layers": 3}),
        ("export.tensor_unknown", None, {"num_hidden_layers": 1}),
    ],
)
def test_a_config_we_cannot_be_is_refused(folder, key, field, changes):
    edit_config(folder, **changes)
    with pytest.raises(InputError) as error:
        import_llama(folder)
    assert error.value.key == key
    if field is not None:
        assert error.value.values["field"] == field
    assert str(error.value)
    assert error.value.render("zh")


def rewrite(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def cut(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


BROKEN = {
    "truncated": ("export.file_broken", lambda f: cut(f, -7)),
    "empty": ("export.file_broken", lambda f: cut(f, 0)),
    "header only": ("export.file_broken", lambda f: cut(f, 100)),
    "config cut short": ("export.file_broken", lambda f: (f / "config.json").write_text('{"model_')),
    "config a list": ("export.file_broken", lambda f: (f / "config.json").write_text("[]")),
    "config not text": ("export.file_broken", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00")),
    "no config": ("export.no_config", lambda f: (f / "config.json").unlink()),
    "no weights": ("export.no_weights", lambda f: (f / "model.safetensors").unlink()),
    "a pickle": ("export.pickle", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
    "no head": ("export.tensor_missing", lambda f: rewrite(f, lambda t: t.pop("lm_head.weight"))),
    "a bias": ("export.tensor_unknown", lambda f: rewrite(f, lambda t: t.update(bias=torch.zeros(2)))),
    "integers": (
        "export.tensor_dtype",
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)})),
    ),
    "no folder": ("export.not_folder", shutil.rmtree),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(folder, what):
    key, damage = BROKEN[what]
    damage(folder)
    with pytest.raises(InputError) as error:
        import_llama(folder)
    assert error.value.key == key
    assert str(folder) in str(error.value)
    assert str(folder) in error.value.render("zh")


def test_old_checkpoints_may_hold_rotary_frequencies(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    import_llama(folder)


@pytest.mark.parametrize(
    ("key", "index"),
    [
        ("export.shard_path", {"weight_map": {"lm_head.weight": "../model.safetensors"}}),
        ("export.shard_missing", {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}),
        ("export.config_field", {"weight_map": {"lm_head.weight": 3}}),
        ("export.config_field", {}),
    ],
)
def test_an_index_that_leads_astray_is_refused(folder, key, index):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as error:
        import_llama(folder)
    assert error.value.key == key
