"""CS336's adapters, each against plain torch: the assignment's own tests need files that are not ours."""

import io
import itertools
import math
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clinometer.messages import InputError

ADAPTERS = Path(__file__).parents[2] / "examples" / "cs336_adapters.py"
adapters = SimpleNamespace(**runpy.run_path(str(ADAPTERS)))

V, S, D, L, H, FF, THETA = 50, 7, 16, 2, 4, 24, 10_000.0


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_weights(seed=0):
    shapes = {f"attn.{name}_proj.weight": (D, D) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn.w1.weight": (FF, D), "ffn.w2.weight": (D, FF), "ffn.w3.weight": (FF, D)}
    weights = {name: rand(*shape, seed=seed + i, scale=0.3) for i, (name, shape) in enumerate(shapes.items())}
    return weights | {f"ln{i}.weight": 1 + rand(D, seed=seed + 20 + i, scale=0.2) for i in (1, 2)}


def close(actual, expected, tolerance=1e-12):
    difference = (actual - expected).abs().max().item()
    assert actual.shape == expected.shape
    assert difference <= tolerance, difference


# What the parts should be, written another way than clinometer.lm.functional writes them.


def plain_norm(x, weight, eps=1e-5):
    return x * weight / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def plain_rope(x, positions, theta=THETA):
    """Each pair is a complex number, turned by multiplication."""
    K = x.shape[-1]
    angles = positions[..., None].double() * theta ** (-torch.arange(0, K, 2).double() / K)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def plain_attention(q, k, v, mask):
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.exp() / scores.exp().sum(-1, keepdim=True) @ v


def plain_heads(x, wq, wk, wv, wo, positions=None):
    """One head after another, as the assignment calls it: naive."""
    mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
    found = []
    for q, k, v in zip(wq.chunk(H), wk.chunk(H), wv.chunk(H), strict=True):
        q, k, v = x @ q.T, x @ k.T, x @ v.T
        if positions is not None:
            q, k = plain_rope(q, positions), plain_rope(k, positions)
        found.append(plain_attention(q, k, v, mask))
    return torch.cat(found, -1) @ wo.T


def plain_swiglu(x, w1, w2, w3):
    gate = x @ w1.T
    return (gate / (1 + (-gate).exp()) * (x @ w3.T)) @ w2.T


def plain_block(w, x):
    heads = (w[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output"))
    x = x + plain_heads(plain_norm(x, w["ln1.weight"]), *heads, torch.arange(x.shape[-2]))
    return x + plain_swiglu(plain_norm(x, w["ln2.weight"]), *(w[f"ffn.w{i}.weight"] for i in (1, 2, 3)))


def plain_lm(weights, ids, layers):
    x = weights["token_embeddings.weight"][ids]
    for i in range(layers):
        prefix = f"layers.{i}."
        x = plain_block({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}, x)
    return plain_norm(x, weights["ln_final.weight"]) @ weights["lm_head.weight"].T


def test_linear_embedding_norm_silu_swiglu_and_softmax():
    x, w = rand(2, S, D), block_weights()
    ids = torch.randint(V, (2, S), generator=torch.Generator().manual_seed(1))
    table = rand(V, D, seed=2)
    w1, w2, w3 = (w[f"ffn.w{i}.weight"] for i in (1, 2, 3))
    close(adapters.run_linear(D, FF, w1, x), x @ w1.T)
    close(adapters.run_embedding(V, D, table, ids), table[ids])
    close(adapters.run_rmsnorm(D, 1e-3, w["ln1.weight"], x), plain_norm(x, w["ln1.weight"], 1e-3))
    close(adapters.run_silu(x), x / (1 + (-x).exp()))
    close(adapters.run_swiglu(D, FF, w1, w2, w3, x), plain_swiglu(x, w1, w2, w3))
    close(adapters.run_softmax(x + 1000, 1), x.exp() / x.exp().sum(1, keepdim=True))


@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_attention_over_the_keys_that_the_mask_shows(leading):
    q, k, v = rand(*leading, 5, 4), rand(*leading, 6, 4, seed=1), rand(*leading, 6, 4, seed=2)
    mask = rand(*leading, 5, 6, seed=3) > -0.5
    mask[..., 0] = True
    close(adapters.run_scaled_dot_product_attention(q, k, v, mask), plain_attention(q, k, v, mask))
    everything = torch.ones(5, 6, dtype=torch.bool)
    close(adapters.run_scaled_dot_product_attention(q, k, v), plain_attention(q, k, v, everything))


def test_heads_with_and_without_rope_at_positions_of_their_own():
    x, w = rand(2, S, D), block_weights()
    weights = [w[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output")]
    rope = adapters.run_multihead_self_attention_with_rope
    close(adapters.run_multihead_self_attention(D, H, *weights, x), plain_heads(x, *weights))
    # The angles are float32 whatever the weights are.
    close(rope(D, H, S, THETA, *weights, x), plain_heads(x, *weights, torch.arange(S)), 1e-6)
    shared = torch.arange(S)[None] + 3
    close(rope(D, H, S, THETA, *weights, x, shared), plain_heads(x, *weights, torch.arange(S)), 1e-6)
    each = torch.stack([torch.arange(S), torch.arange(S).flip(0)])
    expected = torch.stack([plain_heads(x[i], *weights, each[i]) for i in (0, 1)])
    close(rope(D, H, S, THETA, *weights, x, each), expected, 1e-6)
    close(adapters.run_rope(D, THETA, S, x, each), plain_rope(x, each), 2e-6)


def test_a_block_and_the_whole_model():
    x = rand(2, S, D)
    w = block_weights()
    close(adapters.run_transformer_block(D, H, FF, S, THETA, w, x), plain_block(w, x), 2e-6)
    weights = {f"layers.{i}.{n}": t for i in range(L) for n, t in block_weights(seed=100 * i).items()}
    weights |= {"token_embeddings.weight": rand(V, D, seed=5), "lm_head.weight": rand(V, D, seed=6)}
    weights["ln_final.weight"] = 1 + rand(D, seed=7, scale=0.2)
    ids = torch.randint(V, (3, S), generator=torch.Generator().manual_seed(8))
    for length in (S, S // 2):
        actual = adapters.run_transformer_lm(V, S, D, L, H, FF, THETA, weights, ids[:, :length])
        close(actual, plain_lm(weights, ids[:, :length], L), 1e-5)


def test_the_loss_does_not_overflow():
    logits, targets = 1000 * rand(6, V), torch.arange(6)
    close(adapters.run_cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_clipping_takes_all_gradients_together():
    parameters = [torch.nn.Parameter(rand(3, 2, seed=i)) for i in range(3)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for set_ in (parameters, others):
        sum(p.square().sum() for p in set_[:2]).backward()  # the third has no gradient
    adapters.run_gradient_clipping(iter(parameters), 0.1)
    torch.nn.utils.clip_grad_norm_(others, 0.1)
    for p, other in zip(parameters[:2], others[:2], strict=True):
        close(p.grad, other.grad)
    assert parameters[2].grad is None


def test_adamw_takes_the_assignments_arguments_and_its_formula():
    weight = torch.nn.Parameter(rand(4, 3))
    optimizer = adapters.get_adamw_cls()([weight], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for t in range(1, 11):
        weight.grad = rand(4, 3, seed=t)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * weight.grad, 0.99 * v + 0.01 * weight.grad**2
        expected -= 1e-2 * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-8)
        expected -= 1e-2 * 0.1 * expected
    close(weight.detach(), expected)


def test_the_schedule_warms_up_falls_and_stays():
    rates = [adapters.run_get_lr_cosine_schedule(it, 1.0, 0.1, 4, 8) for it in (0, 2, 4, 6, 8, 20)]
    assert rates == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1], abs=1e-12)


def test_a_batch_starts_anywhere_and_its_targets_are_the_next_tokens():
    torch.manual_seed(0)
    data, starts = np.arange(20, dtype=np.uint16), Counter()
    for _ in range(200):
        x, y = adapters.run_get_batch(data, 8, 5, "cpu")
        assert x.shape == y.shape == (8, 5)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x + 1, y)
        starts.update(x[:, 0].tolist())
    assert set(starts) == set(range(15))
    mean, deviation = 1600 / 15, math.sqrt(1600 / 15)
    assert max(abs(count - mean) for count in starts.values()) < 5 * deviation
    with pytest.raises((RuntimeError, AssertionError)):
        adapters.run_get_batch(data, 8, 5, "cuda:99")


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_checkpoint_is_one_file_and_brings_everything_back(tmp_path, in_memory):
    def made(seed, steps):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
        optimizer = adapters.get_adamw_cls()(groups, lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = made(0, 5)
    file = io.BytesIO() if in_memory else tmp_path / "checkpoint.pt"
    adapters.run_save_checkpoint(model, optimizer, 5, file)
    other, another = made(1, 2)
    assert adapters.run_load_checkpoint(file, other, another) == 5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    before, after = optimizer.state_dict(), another.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entry.items())
    stranger = torch.nn.Linear(4, 5)
    with pytest.raises(InputError):
        adapters.run_load_checkpoint(file, stranger, torch.optim.AdamW(stranger.parameters()))


def plain_bpe(word, merges):
    parts = [bytes([byte]) for byte in word]
    for pair in merges:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            i += 1
    return parts


def test_a_tokenizer_from_its_tables():
    merges = [
        (b"h", b"e"),
        (b"l", b"l"),
        (b"he", b"ll"),
        (b" ", b"hell"),
        (b" hell", b"o"),
        (b"\xe6", b"\xa2"),
    ]
    specials = ["<|end|>", "<|end|><|end|>"]
    tokens = [*(bytes([b]) for b in range(256)), *(left + right for left, right in merges)]
    tokens.insert(7, specials[0].encode())  # the ids need not be in the order of the merges
    vocab = dict(enumerate(tokens))
    tokenizer = adapters.get_tokenizer(vocab, merges, specials)
    ids = {token: i for i, token in vocab.items()}
    text = "hello hello 梯度<|end|>\n<|end|><|end|>"
    expected = [
        *(plain_bpe(b"hello", merges) + plain_bpe(b" hello", merges)),
        *(plain_bpe(" 梯度".encode(), merges)),
    ]
    found = tokenizer.encode(text)
    assert found == [*(ids[t] for t in expected), 7, ids[b"\n"], len(vocab)]
    assert tokenizer.decode(found) == text
    assert list(tokenizer.encode_iterable(["hello hel", "lo 梯度<|end|>\n<|end|>", "<|end|>"])) == found
    assert tokenizer.decode([7]) == "<|end|>"
    plain = adapters.get_tokenizer(vocab, merges)
    assert 7 not in plain.encode("<|end|>")
    with pytest.raises(InputError, match="7, 300"):
        adapters.get_tokenizer(vocab | {300: b"<|end|>"}, merges, specials)
    with pytest.raises(InputError, match="merges"):
        adapters.get_tokenizer(vocab, [*merges, (b"q", b"q")])


def test_training_merges_what_is_most_frequent(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("low low low low lower lower widest widest widest<|end|>newest newest", encoding="utf-8")
    vocab, merges = adapters.run_train_bpe(file, 256 + 1 + 6, ["<|end|>"])
    assert vocab[0] == b"<|end|>"
    assert set(vocab.values()) == {b"<|end|>", *(bytes([b]) for b in range(256)), *(a + b for a, b in merges)}
    # Every merge is one of the most frequent pairs of what the merges before it left.
    words = Counter(["low", " low", " low", " low", " lower", " lower", " widest", " widest", " widest"])
    words += Counter(["newest", " newest"])
    for number, merge in enumerate(merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(plain_bpe(word.encode(), merges[:number])):
                pairs[pair] += count
        assert pairs[merge] == max(pairs.values()), (merge, pairs.most_common(3))
    tokenizer = adapters.get_tokenizer(vocab, merges, ["<|end|>"])
    assert tokenizer.decode(tokenizer.encode("widest of all<|end|>")) == "widest of all<|end|>"
