"""The smallest models of transformers that have all their parts, from configs: nothing is downloaded."""

import torch
import transformers as hf


def _ids(model, labels=True, length=7, vocabulary=40):
    ids = torch.randint(0, vocabulary, (2, length))  # 0 is the padding of some
    return model, {"input_ids": ids, **({"labels": ids} if labels else {})}


def gpt2():
    return _ids(
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    )


def llama():
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return _ids(hf.LlamaForCausalLM(config))


def bert():
    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return _ids(hf.BertForMaskedLM(config))


def t5():
    config = hf.T5Config(
        vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return _ids(hf.T5ForConditionalGeneration(config))


def vit():
    config = hf.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    pixels = torch.randn(2, 3, 8, 8)
    return hf.ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


def mixtral():
    config = hf.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    return _ids(hf.MixtralForCausalLM(config))


def mamba():
    config = hf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    return _ids(hf.MambaForCausalLM(config))


TINY = {f.__name__: f for f in (gpt2, llama, bert, t5, vit, mixtral, mamba)}


_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}
_SEQUENCE = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}


def _image(model, size):
    return model, {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])}


def deberta():
    config = hf.DebertaV2Config(
        **_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4
    )
    return _ids(hf.DebertaV2ForMaskedLM(config))


def albert():
    return _ids(hf.AlbertForMaskedLM(hf.AlbertConfig(**_SIZES, embedding_size=8)))


def mistral():
    return _ids(hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=4)))


def gemma2():
    return _ids(hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, head_dim=8)))


def qwen3_moe():
    config = hf.Qwen3MoeConfig(
        **_GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        head_dim=8,
        output_router_logits=True,
    )
    return _ids(hf.Qwen3MoeForCausalLM(config))


def bart():
    return _ids(hf.BartForConditionalGeneration(hf.BartConfig(**_SEQUENCE, max_position_embeddings=20)))


def mamba2():
    config = hf.Mamba2Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
    )
    return _ids(hf.Mamba2ForCausalLM(config))


def swin():
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return _image(hf.SwinForImageClassification(config), 16)


def resnet():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    return _image(hf.ResNetForImageClassification(config), 32)


def wav2vec2():
    config = hf.Wav2Vec2Config(
        **{**_SIZES, "vocab_size": 12},
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    inputs = {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 12, (2, 5))}
    return hf.Wav2Vec2ForCTC(config), inputs


MORE = {
    f.__name__: f for f in (deberta, albert, mistral, gemma2, qwen3_moe, bart, mamba2, swin, resnet, wav2vec2)
}
