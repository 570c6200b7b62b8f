"""Checkpoints as known families publish them, made small: the same logits, or the key in the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf

from clinometer.lm.functional import transformer_lm
from clinometer.lm.generate import generate
from clinometer.lm.llama_files import export_llama, import_llama
from clinometer.lm.model import TransformerLM
from clinometer.messages import InputError

IDS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(3))
SMALL = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 6, "max_position_embeddings": 64, "initializer_range": 0.15}

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 32, "rope_theta": 500_000.0}

FAMILIES = {
    "Llama 2": (hf.LlamaConfig, {"rms_norm_eps": 1e-5}),
    "Llama 3": (hf.LlamaConfig, {"num_key_value_heads": 2, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}),
    "Llama 3.1": (
        hf.LlamaConfig,
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA31},
    ),
    "TinyLlama": (hf.LlamaConfig, {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "SmolLM2": (hf.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e5}),
    "Mistral 0.3": (hf.MistralConfig, {"num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None}),
    "a window as wide as the context": (hf.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 64}),
}


def saved(folder: Path, config: hf.PretrainedConfig) -> None:
    torch.manual_seed(4)
    model = hf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_checkpoints_keeps_its_logits(tmp_path: Path, family: str) -> None:
    kind, settings = FAMILIES[family]
    saved(tmp_path, kind(**SMALL | settings))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    config, weights = import_llama(tmp_path)
    assert config.rope_theta == settings.get("rope_parameters", settings).get("rope_theta", 10_000.0)
    if settings.get("rms_norm_eps") == 1e-5:
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}  # as they were published
    with torch.no_grad():
        expected = theirs(IDS).logits
        ours = transformer_lm({name: weight.float() for name, weight in weights.items()}, IDS, config)
    assert float(expected.std()) > 0.3
    assert float((ours - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("named", "config"),
    [
        (
            "rope_type = 'linear'",
            hf.LlamaConfig(
                **SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            ),
        ),
        ("sliding_window = 16", hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16)),
        ("head_dim = 16", hf.MistralConfig(**SMALL, num_key_value_heads=2, head_dim=16, sliding_window=None)),
        ("attention_bias = True", hf.LlamaConfig(**SMALL, attention_bias=True)),
        ("model_type qwen2", hf.Qwen2Config(**SMALL, num_key_value_heads=2)),
        ("model_type qwen3", hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        ("model_type gemma", hf.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_another_function_is_refused_with_the_key_that_says_so(
    tmp_path: Path, named, config
) -> None:
    saved(tmp_path, config)
    with pytest.raises(InputError) as raised:
        import_llama(tmp_path)
    assert named in str(raised.value)
    assert str(tmp_path) in raised.value.render("zh")


@pytest.mark.parametrize("spelling", ["transformers 5", "transformers 4"])
def test_a_stretched_rotation_changes_the_logits_and_survives_the_way_back(tmp_path: Path, spelling) -> None:
    saved(tmp_path / "theirs", hf.LlamaConfig(**SMALL, rms_norm_eps=1e-5, rope_parameters=LLAMA31))
    file = tmp_path / "theirs" / "config.json"
    if spelling == "transformers 4":
        content = json.loads(file.read_text())
        content["rope_scaling"] = content.pop("rope_parameters")
        content["rope_theta"] = content["rope_scaling"].pop("rope_theta")
        file.write_text(json.dumps(content))
    config, weights = import_llama(tmp_path / "theirs")
    assert config.rope_scaling == (8.0, 1.0, 4.0, 32.0)
    weights = {name: weight.float() for name, weight in weights.items()}
    ours = transformer_lm(weights, IDS, config)
    plain = transformer_lm(weights, IDS, replace(config, rope_scaling=None))
    assert float((ours - plain).abs().max()) > 0.01 * float(ours.abs().max())
    model = TransformerLM(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), ours, rtol=1e-5, atol=1e-5)
        greedy = torch.cat(list(generate(model, IDS[:1, :8], 8, temperature=0))).tolist()
    export_llama(model, config, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["rope_parameters"]
    assert written == LLAMA31
    assert type(written["original_max_position_embeddings"]) is int  # transformers complains of 32.0
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert float((back(IDS).logits - ours).abs().max()) <= 2e-5 * float(ours.abs().max())
        theirs = back.generate(IDS[:1, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert theirs[0, 8:].tolist() == greedy


@pytest.mark.parametrize(
    "change",
    [
        {"factor": None},
        {"factor": 0.5},
        {"low_freq_factor": 4.0},
        {"original_max_position_embeddings": "8192"},
    ],
    ids=str,
)
def test_a_stretching_that_is_none_is_refused(tmp_path: Path, change) -> None:
    saved(tmp_path, hf.LlamaConfig(**SMALL, rope_parameters=LLAMA31))
    content = json.loads((tmp_path / "config.json").read_text())
    content["rope_parameters"] |= change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="rope_scaling"):
        import_llama(tmp_path)


def test_what_a_mistral_config_leaves_out_has_the_defaults_of_its_own_class(tmp_path: Path) -> None:
    saved(tmp_path, hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None))
    content = json.loads((tmp_path / "config.json").read_text())
    for left_out, named in (("sliding_window", "sliding_window = 4096"), ("num_key_value_heads", "= 8")):
        less = {name: value for name, value in content.items() if name != left_out}
        less["max_position_embeddings"] = 8192
        (tmp_path / "config.json").write_text(json.dumps(less))
        assert getattr(hf.AutoConfig.from_pretrained(tmp_path), left_out) in (4096, 8)
        with pytest.raises(InputError) as raised:
            import_llama(tmp_path)
        assert named in str(raised.value)
