"""Healthy models, tiny and with their own loss, in train mode: none of them may be accused."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Built = tuple[nn.Module, Callable[[], Any]]
LAYERS = 2
"""Of the models of transformers that stack equal layers; the soak over many seeds takes 1."""
_DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")


def _deep(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings with LAYERS layers, where no other setting lists the layers one by one."""
    if {"attention_types", "attention_hidden_size"} & settings.keys():  # RWKV divides by layers less one
        return settings
    return {key: LAYERS if key in _DEPTHS and value == 2 else value for key, value in settings.items()}


def ids(batch: int = 2, length: int = 8, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def causal(name: str, **config: Any) -> Callable[[], Built]:
    """A decoder with the next-token loss."""

    def build() -> Built:
        import transformers

        cls = getattr(transformers, f"{name}Config")
        settings = {
            "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip
        settings.update(config)
        head = getattr(transformers, f"{name}ForCausalLM", None) or getattr(
            transformers, f"{name}LMHeadModel"
        )
        model = head(cls(**_deep(settings))).train()
        tokens = ids()
        return model, lambda: model(input_ids=tokens, labels=tokens).loss

    return build


def masked(name: str, head: str = "ForMaskedLM", **config: Any) -> Callable[[], Built]:
    """An encoder that fills in masked tokens, with padding in the batch."""

    def build() -> Built:
        import transformers

        settings = {
            "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0,
        }  # fmt: skip
        settings.update(config)
        cls = getattr(transformers, f"{name}Config")
        model = getattr(transformers, f"{name}{head}")(cls(**_deep(settings))).train()
        tokens = ids()
        attention = torch.ones_like(tokens)
        attention[0, 6:] = 0
        labels = tokens.clone()
        labels[:, ::2] = -100
        return model, lambda: model(input_ids=tokens, attention_mask=attention, labels=labels).loss

    return build


def encoder_decoder(name: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        cls = getattr(transformers, f"{name}Config")
        head = getattr(transformers, f"{name}ForConditionalGeneration", None)
        model = (head or getattr(transformers, f"{name}MTModel"))(cls(**_deep(config))).train()
        tokens = ids()
        return model, lambda: model(input_ids=tokens, labels=tokens).loss

    return build


_SEQ2SEQ = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": 2, "decoder_vocab_size": 50,
}  # fmt: skip


def image(name: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        cls = getattr(transformers, f"{name}Config")
        model = getattr(transformers, f"{name}ForImageClassification")(
            cls(num_labels=3, **_deep(config))
        ).train()
        pixels = torch.randn(2, 3, 32, 32)
        return model, lambda: model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss

    return build


def backbone() -> Built:
    """Half of all users of BERT: its last hidden state and a head of their own; the pooler rests."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = nn.Module()
    model.bert, model.head = BertModel(BertConfig(vocab_size=50, **small)).train(), nn.Linear(16, 3)
    tokens = ids()

    def loss():
        first = model.bert(input_ids=tokens).last_hidden_state[:, 0]
        return F.cross_entropy(model.head(first), torch.tensor([0, 2]))

    return model, loss


def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**small, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).train()
    tokens, pixels = ids(), torch.randn(2, 3, 32, 32)
    tokens[:, -1] = 2
    return model, lambda: model(input_ids=tokens, pixel_values=pixels, return_loss=True).loss


def speech(name: str) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=20,
            conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2, mask_time_length=2, layerdrop=0.0, num_feat_extract_layers=2,
        )  # fmt: skip
        model = getattr(transformers, f"{name}ForCTC")(config).train()
        audio, labels = torch.randn(2, 800), torch.randint(1, 20, (2, 5))
        return model, lambda: model(input_values=audio, labels=labels).loss

    return build


def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    config.pop("max_position_embeddings")
    model = WhisperForConditionalGeneration(WhisperConfig(**config)).train()
    mel, labels = torch.randn(2, 8, 32), ids()
    return model, lambda: model(input_features=mel, labels=labels).loss


_MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4}

TRANSFORMERS: dict[str, Callable[[], Built]] = {
    "gpt2": causal("GPT2"),
    "llama": causal("Llama"),
    "mistral": causal("Mistral", num_key_value_heads=1),
    "qwen2": causal("Qwen2", num_key_value_heads=1),
    "qwen3": causal("Qwen3", num_key_value_heads=1, head_dim=8),
    "gemma": causal("Gemma", num_key_value_heads=1, head_dim=8),
    "phi": causal("Phi"),
    "opt": causal("OPT", ffn_dim=32, word_embed_proj_dim=16),
    "bloom": causal("Bloom"),
    "gpt_neox": causal("GPTNeoX"),
    "gpt_neo": causal("GPTNeo", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=2),
    "falcon": causal("Falcon"),
    "stablelm": causal("StableLm", num_key_value_heads=2),
    "bert": masked("Bert"),
    "bert_classification": masked("Bert", "ForTokenClassification", num_labels=50),
    "bert_backbone": backbone,
    "roberta": masked("Roberta"),
    "distilbert": masked("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "electra": masked("Electra", embedding_size=16),
    "deberta_v2": masked("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "albert": masked("Albert", embedding_size=16),
    "t5": encoder_decoder(
        "T5", vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    ),
    "bart": encoder_decoder("Bart", **_SEQ2SEQ),
    "marian": encoder_decoder("Marian", **_SEQ2SEQ),
    "pegasus": encoder_decoder("Pegasus", **_SEQ2SEQ),
    "vit": image("ViT", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 image_size=32, patch_size=16),
    "swin": image("Swin", image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                  window_size=4),
    "convnext": image("ConvNext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "resnet": image("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "clip": clip,
    "mixtral": causal("Mixtral", num_key_value_heads=1, num_local_experts=4),
    "qwen2_moe": causal("Qwen2Moe", num_key_value_heads=1, num_experts=4, moe_intermediate_size=16,
                        shared_expert_intermediate_size=16),
    "mamba": causal("Mamba", **_MAMBA),
    "mamba2": causal("Mamba2", **_MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=8),
    "rwkv": causal("Rwkv", attention_hidden_size=16, context_length=32),
    "wav2vec2": speech("Wav2Vec2"),
    "hubert": speech("Hubert"),
    "whisper": whisper,
}  # fmt: skip


def lm(width: int = 16) -> Built:
    from clinometer.lm.functional import cross_entropy
    from clinometer.lm.model import TransformerLM
    from clinometer.lm.transformer_config import TransformerConfig

    config = TransformerConfig(
        vocab_size=50, context_length=16, d_model=width, num_layers=2, num_heads=2, d_ff=32
    )
    model = TransformerLM(config)
    tokens = ids(2, 9)
    return model, lambda: cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def torch_transformer() -> Built:
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    return (
        model,
        lambda: (
            model(source, target, tgt_mask=mask).square().mean() * 0.5
            + model(source, target, tgt_mask=mask)[..., 0].mean()
        ),
    )


def lstm() -> Built:
    model = nn.Sequential()
    model.embed, model.rnn, model.head = nn.Embedding(50, 8), nn.LSTM(8, 8, 2, dropout=0.1), nn.Linear(8, 50)
    tokens = ids()
    return model, lambda: F.cross_entropy(
        model.head(model.rnn(model.embed(tokens))[0]).flatten(0, 1), tokens.flatten()
    )


def gru() -> Built:
    model = nn.GRU(4, 6, bidirectional=True, batch_first=True)
    inputs = torch.randn(2, 5, 4)
    return model, lambda: model(inputs)[0].square().mean()


def convolutional() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3),
        nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(16, 5),
    )  # fmt: skip
    images = torch.randn(4, 3, 16, 16)
    return model, lambda: F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]), label_smoothing=0.1)


def attention() -> Built:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    inputs = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 4] = True
    return model, lambda: model(inputs, inputs, inputs, key_padding_mask=padding)[0].square().mean()


def embedding_bag() -> Built:
    model = nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 3))
    tokens = ids(4, 6, 30)
    return model, lambda: F.cross_entropy(model(tokens), torch.tensor([0, 1, 2, 0]))


def relu_network() -> Built:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    inputs = torch.randn(4, 8)
    return model, lambda: F.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0]))


def straight_through() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    inputs = torch.randn(4, 8)

    def loss():
        h = model[0](inputs)
        h = h + (h.round() - h).detach()
        return F.cross_entropy(model[1](h), torch.tensor([0, 1, 2, 0]))

    return model, loss


def masked_attention_by_hand() -> Built:
    model = nn.Linear(8, 24)
    inputs = torch.randn(2, 6, 8)

    def loss():
        q, k, v = model(inputs).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.triu(torch.ones(6, 6, dtype=torch.bool), 1), float("-inf"))
        return (scores.softmax(-1) @ v).square().mean()

    return model, loss


def weight_and_spectral_norm() -> Built:
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 2)))
    inputs = torch.randn(4, 8)
    return model, lambda: model(inputs).square().mean()


def checkpointed(reentrant: bool) -> Callable[[], Built]:
    def build() -> Built:
        from torch.utils.checkpoint import checkpoint

        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
        inputs = torch.randn(4, 8)

        def loss():
            h = checkpoint(model[1], model[0](inputs), use_reentrant=reentrant)
            return model[2](h).square().mean()

        return model, loss

    return build


def tied() -> Built:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30, bias=False))
    model[1].weight = model[0].weight
    tokens = ids(2, 6, 30)
    return model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def reward_baseline() -> Built:
    """Policy gradient: the advantage is detached, and should be."""
    model = nn.Module()
    model.policy, model.value = nn.Linear(8, 3), nn.Linear(8, 1)
    states, actions, rewards = torch.randn(6, 8), torch.randint(3, (6,)), torch.randn(6)

    def loss():
        value = model.value(states).squeeze(-1)
        advantage = (rewards - value).detach()
        chosen = model.policy(states).log_softmax(-1).gather(1, actions[:, None]).squeeze(-1)
        return -(chosen * advantage).mean() + F.mse_loss(value, rewards)

    return model, loss


def gradient_penalty() -> Built:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
    inputs = torch.randn(5, 4)

    def loss():
        x = inputs.clone().requires_grad_()
        score = model(x).sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        return (slope.norm(dim=-1) - 1).square().mean() + score * 0.1

    return model, loss


def mixture_by_gates() -> Built:
    """Every expert computes; the gate of those not chosen is exactly zero."""
    model = nn.Module()
    model.gate = nn.Linear(8, 4)
    model.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    inputs = torch.randn(2, 8)

    def loss():
        scores = model.gate(inputs).softmax(-1)
        top = scores.topk(1).indices
        gates = scores * torch.zeros_like(scores).scatter(1, top, 1.0)
        outputs = torch.stack([expert(inputs) for expert in model.experts], 1)
        return (gates[..., None] * outputs).sum(1).square().mean()

    return model, loss


def mixture_by_index() -> Built:
    """Experts that get no token run on an empty batch."""
    model = nn.Module()
    model.gate = nn.Linear(8, 4)
    model.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
    inputs = torch.randn(2, 8)

    def loss():
        weights, chosen = model.gate(inputs).softmax(-1).topk(1)
        out = torch.zeros_like(inputs)
        for number, expert in enumerate(model.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, expert(inputs[rows]) * weights[rows])
        return out.square().mean()

    return model, loss


def complex_weights() -> Built:
    model = nn.Module()
    model.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    signal = torch.randn(3, 8)
    return model, lambda: torch.fft.irfft(torch.fft.rfft(signal) * model.filter).square().mean()


def metrics_on_the_way() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    inputs, targets = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    log: list[float] = []

    def loss():
        logits = model(inputs)
        log.append((logits.argmax(-1) == targets).float().mean().item())
        log.append(float(logits.detach().abs().max()))
        with torch.no_grad():
            log.extend(logits.softmax(-1).max(-1).values.tolist())
        return F.cross_entropy(logits, targets)

    return model, loss


def autocast() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    inputs = torch.randn(4, 8)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0]))

    return model, loss


def vector_quantised() -> Built:
    """VQ-VAE: the codebook learns by its own term, the encoder by the straight-through copy."""
    model = nn.Module()
    model.encoder, model.decoder, model.codes = nn.Linear(8, 4), nn.Linear(4, 8), nn.Embedding(6, 4)
    inputs = torch.randn(16, 8)

    def loss():
        z = model.encoder(inputs)
        nearest = torch.cdist(z, model.codes.weight).argmin(-1)
        code = model.codes(nearest)
        passed = z + (code - z).detach()
        commit = F.mse_loss(z, code.detach()) + F.mse_loss(code, z.detach())
        return F.mse_loss(model.decoder(passed), inputs) + commit

    return model, loss


TORCH: dict[str, Callable[[], Built]] = {
    "transformer_lm": lm,
    "nn_transformer": torch_transformer,
    "lstm": lstm,
    "gru": gru,
    "convolutional": convolutional,
    "attention": attention,
    "embedding_bag": embedding_bag,
    "relu_network": relu_network,
    "straight_through": straight_through,
    "masked_attention": masked_attention_by_hand,
    "parametrizations": weight_and_spectral_norm,
    "checkpoint_reentrant": checkpointed(True),
    "checkpoint": checkpointed(False),
    "tied": tied,
    "policy_gradient": reward_baseline,
    "gradient_penalty": gradient_penalty,
    "mixture_by_gates": mixture_by_gates,
    "mixture_by_index": mixture_by_index,
    "complex": complex_weights,
    "metrics": metrics_on_the_way,
    "autocast": autocast,
    "vector_quantised": vector_quantised,
}
