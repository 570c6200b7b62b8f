"""The smallest models of transformers that have all their parts, from configs: nothing is downloaded."""

import torch
import transformers as hf


def _ids(model, labels=True, length=7, vocabulary=40):
    ids = torch.randint(5, vocabulary, (2, length))
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
