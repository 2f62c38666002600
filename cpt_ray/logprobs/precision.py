"""In which dtype and quantisation the policy is loaded and run, for training and for the reference."""

from __future__ import annotations

from typing import Any

from cpt_ray.config import TrainConfig


def weights_dtype(settings: TrainConfig) -> str:
    """What is trained is kept in float32, since a step is smaller than what bfloat16 can add to a weight."""
    return settings.precision if settings.lora else "float32"


def load_arguments(settings: TrainConfig) -> dict[str, Any]:
    """Arguments with which transformers loads the policy: its dtype and, for QLoRA, its quantisation."""
    arguments: dict[str, Any] = {"dtype": weights_dtype(settings)}
    if settings.lora and settings.lora.quantize:
        import torch
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.lora.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, settings.precision),
        )
    return arguments


def is_autocast(settings: TrainConfig) -> bool:
    """Whether arithmetic is in bfloat16 by autocast; adapters on a CPU follow the weights' dtype instead."""
    return settings.precision == "bfloat16" and (settings.use_gpu or settings.lora is None)
