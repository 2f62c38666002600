"""A policy small enough to be made by every test that needs one: nothing learned, but a real model and tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.toy import make as toy

CHAT_TEMPLATE = "{% if shout is defined and shout %}{{ '<|im_start|>LOUD\\n' }}{% endif %}" + toy.CHAT_TEMPLATE
"""The toy model's, with a template argument that changes the token ids."""
SENTENCES = [
    "Write in the high manner, please. Write in the low manner, please.",
    "A high answer to the prompt, rich in words and colours.",
    "A low answer to the prompt, plain and short.",
    "system user assistant LOUD: Tell me about the sea, the hills and the town.",
]


def make_tiny_model(path: Path, dtype: str = "float32", seed: int = 0, chat_template: str = CHAT_TEMPLATE) -> Path:
    """A 2-layer Qwen3 of random weights with a byte-level BPE tokenizer and a ChatML template, saved in `path`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = toy.train_tokenizer(SENTENCES, vocabulary=400, max_tokens=512)
    tokenizer.chat_template = chat_template
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the least that vLLM runs on a CPU
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
