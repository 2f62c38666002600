"""What cannot be trained is refused before any worker starts, and the policy opened as the driver needs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_ray.capacity import node_types
from cpt_ray.chat.templates import stop_tokens
from cpt_ray.config import LoraConfig, TrainConfig, TuneConfig
from cpt_ray.errors import UserError, first_line
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.training.pairs import TokenPair

SERVED_RANK = 512
"""The highest rank of an adapter that vLLM serves."""


@dataclass(frozen=True)
class Policy:
    """What the driver needs to know of the policy; its weights are not loaded."""

    tokeniser: Tokeniser
    max_length: int
    """Tokens that a sequence may have."""
    vocabulary: int
    """Tokens that the model has embeddings for."""


def policy_path(config: TuneConfig) -> str:
    """Absolute if it is a folder, since Ray Train changes the working directory."""
    path = config.policy.path
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def open_policy(config: TuneConfig) -> Policy:
    """UserError if it cannot be trained, as far as its configuration, its tokenizer and its chat template tell."""
    from transformers import AutoConfig, AutoTokenizer

    path, settings = policy_path(config), config.train
    try:
        model_config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        name = config.policy.model
        if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():  # no name of a hub's
            raise UserError(f"policy.model: {name}: no such folder") from None
        raise UserError(f"policy.model: {name!r} cannot be loaded: {first_line(error)}") from None
    _check_sharding(settings)
    if settings.lora:
        _check_lora(settings.lora, model_config)
    _check_packages(settings)
    text_config = model_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or settings.max_length
    tokeniser = Tokeniser(tokenizer, config.policy.chat_template_kwargs, stop_tokens(path, tokenizer))
    return Policy(tokeniser, min(settings.max_length, limit), text_config.vocab_size)


def _check_packages(settings: TrainConfig) -> None:
    packages: dict[str, str] = dict.fromkeys(settings.report_to, "train.report_to")
    if settings.lora and settings.lora.quantize:
        packages["bitsandbytes"] = "train.lora.quantize"
    for name, key in packages.items():
        if not importlib.util.find_spec(name):
            raise UserError(f"{key}: {name} is not installed; pip install {name}, or leave {key} out")


def _check_sharding(settings: TrainConfig) -> None:
    if settings.sharding == "ddp":
        return
    if not settings.lora or settings.lora.quantize:
        other = "train.lora.quantize" if settings.lora else "train.lora: null"
        raise UserError(f"train.sharding: fsdp shards frozen weights in full precision, {other} has none; use ddp")


def peft_config(lora: LoraConfig) -> Any:
    """The adapter's settings in PEFT's words."""
    import peft

    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def _check_lora(lora: LoraConfig, model_config: Any) -> None:
    """UserError if the model has no such modules (tried on a model without weights) or vLLM could not serve them."""
    if lora.r > SERVED_RANK:
        raise UserError(f"train.lora.r: {lora.r}; vLLM serves adapters of rank {SERVED_RANK} at most")
    if lora.target_modules == "all-linear":
        return
    unserved = [name for name in ("lm_head", "embed_tokens") if name in str(lora.target_modules)]
    if unserved:
        raise UserError(f"train.lora.target_modules: vLLM serves no adapter on {unserved[0]}; leave it out")
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            get_peft_model(AutoModelForCausalLM.from_config(model_config), peft_config(lora))
    except ValueError as error:
        raise UserError(f"train.lora.target_modules: {first_line(error)}; 'all-linear' fits every model") from None


def check_vocabulary(pairs: Sequence[TokenPair], size: int) -> None:
    """UserError if the tokenizer gives a token for which the model has no embedding."""
    highest = max(max(*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids) for pair in pairs)
    if highest >= size:
        raise UserError(
            f"policy: its tokenizer gives token {highest}, but the model has embeddings for {size} tokens; "
            "use the tokenizer that belongs to the model"
        )


def check_rows(settings: TrainConfig, num_rows: int, num_steps: int) -> None:
    """UserError if a step has no row for each worker."""
    most = settings.num_workers.most
    if num_rows // num_steps < most:
        raise UserError(
            f"train.num_workers: {most} workers share {num_rows // num_steps} prompts per step of "
            f"{settings.batch_size} pairs; lower train.num_workers or raise train.batch_size"
        )


def check_workers(settings: TrainConfig) -> None:
    """UserError if the cluster neither has nor can have room for the workers."""
    remedy = "lower train.num_workers or train.resources_per_worker"
    node_types().check("the training", settings.worker_resources, settings.num_workers.least, remedy)
