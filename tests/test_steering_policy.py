"""NP-DPO: what the loss sees, that choices are used, and that what is served is what was trained."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_ray.config import Form, ModelConfig
from cpt_ray.engines.vllm import engine_arguments, engine_env
from cpt_ray.rubrics.measures import measures
from cpt_ray.rubrics.rubric import Rubric, load_rubrics
from cpt_ray.steering.fitting import answers_by_prompt, draw_answers
from cpt_ray.steering.policy import ConditionalPolicy
from cpt_ray.steering.reward import train_loop
from cpt_ray.steering.scoring import answer_tokens
from tests import toy
from tests.tiny_model import make_tiny_model
from tests.toy.world import level_text

FORMS: tuple[Form, ...] = ("film", "gated_lora")
ANSWERS = ["A high answer, rich in colours.", "A low answer, plain and short."]
PROMPTS = [f"Tell me about the {one}." for one in ("sea", "hills", "town")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy"))


def make_policy(path: Path, form: Form, seed: int = 0) -> ConditionalPolicy:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    return ConditionalPolicy(model, form, embedding=2, size=32, beta=0.1)


def disturbed(policy: ConditionalPolicy) -> ConditionalPolicy:
    """With every learned weight off its start, so that z and the adapters matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for one in policy.parameters():
            if one.requires_grad:
                one.add_(0.1 * torch.randn_like(one))
    return policy


def texts(path: Path) -> list[tuple[list[int], int]]:
    """(ids, start) of each prompt's high and low answer in turn."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [answer_tokens(tokenizer, None, prompt, one, {}) for prompt in PROMPTS for one in ANSWERS]


def plain_logp(model: Any, ids: list[int], start: int) -> float:
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits.log_softmax(dim=-1)[0]
    return float(sum(found[at - 1, ids[at]] for at in range(start, len(ids))))


@pytest.mark.parametrize("form", FORMS)
def test_only_answer_tokens_are_scored_and_the_reference_is_the_policy_itself(tiny: Path, form: Form) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    wanted = torch.tensor([plain_logp(plain, *one) for one in texts(tiny)])
    policy = disturbed(make_policy(tiny, form))
    z = torch.randn(len(wanted), 32)
    with torch.no_grad():
        before, conditioned, after = policy.logps(texts(tiny)), policy.logps(texts(tiny), z), policy.logps(texts(tiny))
    torch.testing.assert_close(before, wanted, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(after, before)
    assert (conditioned - before).abs().min() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_before_training_every_user_has_the_reference(tiny: Path, form: Form) -> None:
    policy = make_policy(tiny, form)
    with torch.no_grad():
        torch.testing.assert_close(policy.logps(texts(tiny), torch.randn(6, 32)), policy.logps(texts(tiny)))


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_policy_is_loaded_strictly(tiny: Path, form: Form) -> None:
    policy, other = disturbed(make_policy(tiny, form)), make_policy(tiny, form, seed=7)
    z, state = torch.randn(6, 32), policy.own_state()
    other.load_own_state(state)
    with torch.no_grad():
        torch.testing.assert_close(other.logps(texts(tiny), z), policy.logps(texts(tiny), z))
    assert not any("embed_tokens" in name or name.endswith("base.weight") for name in state)
    name = next(iter(state))
    for wrong in ({k: v for k, v in state.items() if k != name}, state | {"x": z}, state | {name: z}):
        with pytest.raises(ValueError, match="not the weights"):
            other.load_own_state(wrong)


def batch(path: Path, seed: int, count: int, reference: torch.Tensor) -> tuple[Any, ...]:
    """Users who like the high answer or the low one, each kind on the same prompts; embeddings tell the two apart."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.arange(8) % 2
    high, low = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    context = torch.stack([torch.stack([high, low] if kind == 0 else [low, high]) for kind in kinds])[:, None]
    context = context.repeat(1, count, 1, 1)
    context += 0.3 * torch.randn(context.shape, generator=random)
    prompts = torch.randint(len(PROMPTS), (4,), generator=random).repeat_interleave(2).tolist()
    pairs = [
        (2 * at, 2 * at + 1) if kind == 0 else (2 * at + 1, 2 * at) for at, kind in zip(prompts, kinds, strict=True)
    ]
    preferred = torch.full((len(pairs), 2, 2), torch.nan)
    preferred[:, 0, 1] = 1
    return context, pairs, texts(path), reference, preferred


def margins(policy: ConditionalPolicy, batch: tuple[Any, ...]) -> torch.Tensor:
    rewards = policy.rewards(*batch[:4])
    return rewards[:, 0] - rewards[:, 1]


def test_the_loss_is_that_of_every_pair_by_itself_weighed_by_its_probability(tiny: Path) -> None:
    """Against DPO's loss written out pair by pair; answers of other prompts, and both orders, count for nothing."""
    policy, reference = disturbed(make_policy(tiny, "gated_lora")), torch.randn(6)
    context, answers = torch.randn(2, 3, 2, 2), [[0, 1, 2], [5, 3, 4]]
    preferred = torch.rand(2, 3, 3)
    preferred[0, 0, 2] = preferred[0, 1, 2] = preferred[1, 0, 1] = torch.nan
    with torch.no_grad():
        z = policy.encoder(context)
        wanted = []
        for user, i, j in ((0, 0, 1), (1, 0, 2), (1, 1, 2)):
            two = [answers[user][i], answers[user][j]]
            found = policy.logps([texts(tiny)[at] for at in two], z[user].repeat(2, 1)) - reference[two]
            margin, likely = policy.beta * (found[0] - found[1]), preferred[user, i, j]
            wanted.append(-likely * margin.sigmoid().log() - (1 - likely) * (-margin).sigmoid().log())
        loss = policy((context, answers, texts(tiny), reference, preferred))
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_choices_steer_both_kinds_of_users_and_a_policy_without_them_is_at_chance(tiny: Path, form: Form) -> None:
    policy = make_policy(tiny, form)
    with torch.no_grad():
        reference = policy.logps(texts(tiny))
    train_loop(policy, lambda step: batch(tiny, step, step % 4, reference), 60, 1e-2)
    with torch.no_grad():
        sums = {}
        for count in (0, 3):
            right = torch.stack([margins(policy, batch(tiny, 1000 + at, count, reference)) > 0 for at in range(4)])
            sums[count] = float(right[:, 0::2].float().mean() + right[:, 1::2].float().mean())
        context, *rest = batch(tiny, 2000, 3, reference)
        other = (margins(policy, (context.flip(2), *rest)) > 0).float().mean()
    assert sums[0] == pytest.approx(1, abs=0.01)
    assert sums[3] > 1.8
    assert float(other) < 0.1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), count=st.integers(2, 9), seed=st.integers(0, 99))
def test_answers_are_drawn_with_their_prompts_and_none_without_another_to_compare(
    sizes: list[int], count: int, seed: int
) -> None:
    made = [str(prompt) for prompt, size in enumerate(sizes) for _ in range(size)]
    groups = answers_by_prompt(made)
    assert sorted(at for one in groups for at in one) == [
        at for at, prompt in enumerate(made) if sizes[int(prompt)] > 1
    ]
    if not groups:
        return
    drawn = draw_answers(groups, count, torch.Generator().manual_seed(seed))
    assert len(drawn) == count
    assert all(at in groups[group] for at, group in drawn)
    runs = [len(list(run)) for _, run in groupby(group for _, group in drawn)]
    assert min(runs[:-1], default=2) >= 2
    assert runs[-1] >= 2 or len(groups[drawn[-2][1]]) == 2  # a pair cannot give up one


def vllm_engine(path: Path, monkeypatch: pytest.MonkeyPatch, **engine: Any) -> Any:
    config = ModelConfig(
        model=str(path),
        engine={"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8, **engine},
    )
    for name, value in {**engine_env(config), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM

    return LLM(disable_log_stats=True, **engine_arguments(config) | {"kv_cache_memory_bytes": 50_000_000})


def test_served_adapters_are_what_was_trained(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers with gates, and vLLM with the folded adapter: the same log-probabilities, user by user."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    policy = disturbed(make_policy(tiny, "gated_lora"))
    llm = vllm_engine(tiny, monkeypatch, enable_lora=True, max_lora_rank=8)
    ids, start = texts(tiny)[0]
    prompt, z = ids[:start], torch.randn(2, 32)
    answers = []
    for number in range(2):
        folder = policy.fold(z[number], tmp_path / f"user-{number}", str(tiny))
        request = LoRARequest(f"user-{number}-v1", number + 1, str(folder))
        params = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
        out = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False, lora_request=request)[0].outputs[0]
        served = sum(one[token].logprob for one, token in zip(out.logprobs, out.token_ids, strict=True))
        whole = (prompt + list(out.token_ids), len(prompt))
        with torch.no_grad():
            assert float(policy.logps([whole], z[number : number + 1])) == pytest.approx(served, abs=1e-2)
            assert abs(float(policy.logps([whole])) - served) > 0.1
        answers.append(served)
    assert answers[0] != pytest.approx(answers[1], abs=1e-2)


# ---------------------------------------------------------------- what is written

WORLD_PROMPTS = [f"Write about the {what} at {when}." for what in ("harbor", "market") for when in ("dawn", "noon")]


def share(rubric: Rubric, text: str) -> float:
    """The measured share of high words; one half if there is none of either."""
    spec = rubric.measured[0].measure
    assert spec is not None
    found = measures(text, spec.words, spec.against)[spec.name]
    return 0.5 if found is None else found


def test_choices_steer_what_is_written_and_flipped_choices_the_other_way() -> None:
    """Of a user who likes high words, three choices; scored by counting words, which shares nothing with the policy."""
    rubrics = load_rubrics([toy.RUBRICS])
    rubric = next(one for one in rubrics if one.id == "ornament")
    random, rng = torch.Generator().manual_seed(0), Random(0)
    tokenizer = AutoTokenizer.from_pretrained(toy.MODEL)
    policy = make_policy(toy.MODEL, "gated_lora")
    pairs = [
        [
            answer_tokens(tokenizer, None, one, level_text(rng, rubrics, one, {"ornament": level}), {})
            for level in (5, 1)
        ]
        for one in WORLD_PROMPTS * 4
    ]
    answers = [one for pair in pairs for one in pair]
    with torch.no_grad():
        reference = policy.logps(answers)

    def choices(kinds: torch.Tensor) -> torch.Tensor:
        """Embeddings of (chosen, rejected) of three choices; kind 0 likes high words, 1 low ones."""
        ends = torch.eye(2)[torch.stack([kinds, 1 - kinds], dim=1)]
        return ends[:, None] + 0.3 * torch.randn(len(kinds), 3, 2, 2, generator=random)

    def draw(step: int) -> tuple[Any, ...]:
        kinds, at = torch.arange(8) % 2, torch.randint(len(pairs), (8,), generator=random)
        shown = torch.stack([2 * at + kinds, 2 * at + 1 - kinds], dim=1)
        preferred = torch.full((8, 2, 2), torch.nan)
        preferred[:, 0, 1] = 1
        return choices(kinds), shown.tolist(), answers, reference, preferred

    train_loop(policy, draw, 80, 3e-3)
    torch.manual_seed(0)
    found = []
    for kind in (0, 1):
        shown = []
        for prompt in WORLD_PROMPTS:
            ids, start = answer_tokens(tokenizer, None, prompt, "", {})
            with torch.no_grad(), policy.conditioned(policy.encoder(choices(torch.full((8,), kind)))):
                made = policy.model.generate(
                    torch.tensor([ids[:start]] * 8), max_new_tokens=48, do_sample=True, pad_token_id=0
                )
            shown += [share(rubric, one) for one in tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)]
        found.append(torch.tensor(shown))
    gap, error = found[0].mean() - found[1].mean(), (found[0].var() / 32 + found[1].var() / 32).sqrt()
    assert gap - 1.96 * error > 0.2, (gap, error)
