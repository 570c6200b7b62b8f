"""The whole model against transformers' LlamaForCausalLM, built from a configuration."""

import pytest
import torch

from clinometer.lm.functional import cross_entropy, transformer_lm
from clinometer.lm.model import initial_weights
from clinometer.lm.transformer_config import TransformerConfig

transformers = pytest.importorskip("transformers")

CONFIG = TransformerConfig(
    vocab_size=96, context_length=40, d_model=48, num_layers=3, num_heads=4, d_ff=80, rope_theta=10_000.0
)
NAMES = {
    "token_embeddings.weight": "model.embed_tokens.weight",
    "ln_final.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
PARTS = {
    "ln1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}
for i in range(CONFIG.num_layers):
    NAMES |= {f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in PARTS.items()}


def halves_from_pairs(weight):
    """Llama turns (i, i + K/2) where we turn (2i, 2i+1): the same rotation of permuted rows."""
    heads = weight.view(CONFIG.num_heads, CONFIG.head_dim // 2, 2, CONFIG.d_model)
    return heads.transpose(1, 2).reshape(CONFIG.d_model, CONFIG.d_model)


def to_llama(name, tensor):
    return halves_from_pairs(tensor) if name.endswith(("q_proj.weight", "k_proj.weight")) else tensor


def llama(weights, dtype):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.d_model,
            intermediate_size=CONFIG.d_ff,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            max_position_embeddings=CONFIG.context_length,
            rms_norm_eps=1e-5,
            rope_theta=CONFIG.rope_theta,
            tie_word_embeddings=False,
        )
    ).to(dtype)
    state = {NAMES[name]: to_llama(name, w.detach()).clone() for name, w in weights.items()}
    if dtype == torch.float64:
        # LlamaRMSNorm computes in float32 whatever it is given, which alone costs 4e-7 here.
        for name, norm in list(model.named_modules()):
            if type(norm).__name__ == "LlamaRMSNorm":
                model.set_submodule(name, torch.nn.RMSNorm(CONFIG.d_model, eps=1e-5, dtype=dtype))
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logits_and_every_gradient_are_llamas(dtype, tolerance):
    drawn = initial_weights(CONFIG, torch.Generator().manual_seed(3))
    weights = {name: w.to(dtype).requires_grad_() for name, w in drawn.items()}
    ids = torch.randint(0, CONFIG.vocab_size, (3, 40))
    targets = torch.randint(0, CONFIG.vocab_size, (3, 40))
    theirs = llama(weights, dtype)

    ours_logits = transformer_lm(weights, ids, CONFIG)
    their_logits = theirs(ids).logits
    assert 0.1 < float(ours_logits.std()) < 10  # logits of ordinary size
    assert float((ours_logits - their_logits).detach().abs().max()) <= tolerance

    cross_entropy(ours_logits, targets).backward()
    torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, weight in weights.items():
        theirs_grad = their_grads[NAMES[name]]
        error = (to_llama(name, weight.grad) - theirs_grad).norm() / theirs_grad.norm()
        assert float(error) <= 1e-5, f"{name}: {float(error):.2e}"
