"""A GGUF of a very small Llama with random weights, and what can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, LAYERS = 32, 2


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    template: str | None = TEMPLATE,
    eot_token: int | None = None,
    parts: int = 1,
    without: str = "",
    seed: int = 0,
) -> Path:
    """Writes the file.

    Args:
        without: name of a tensor that is left out.
    """
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 324)]]  # GPT-2's, one per byte
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab"]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if eot_token is not None:
        writer.add_eot_token_id(eot_token)
    if template is not None:
        writer.add_chat_template(template)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    random = np.random.default_rng(seed)
    for name, shape in _shapes(len(tokens)).items():
        if name != without:
            writer.add_tensor(name, (random.standard_normal(shape) * 0.1).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(num_tokens: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (num_tokens, WIDTH), "output_norm.weight": (WIDTH,)}
    for at in range(LAYERS):
        shapes |= {
            f"blk.{at}.attn_norm.weight": (WIDTH,),
            f"blk.{at}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{at}.attn_k.weight": (WIDTH // 2, WIDTH),
            f"blk.{at}.attn_v.weight": (WIDTH // 2, WIDTH),
            f"blk.{at}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{at}.ffn_norm.weight": (WIDTH,),
            f"blk.{at}.ffn_gate.weight": (2 * WIDTH, WIDTH),
            f"blk.{at}.ffn_up.weight": (2 * WIDTH, WIDTH),
            f"blk.{at}.ffn_down.weight": (WIDTH, 2 * WIDTH),
        }
    return shapes
