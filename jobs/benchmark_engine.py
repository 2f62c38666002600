"""The write stage under Ray Data against bare `vllm.LLM` and `ray.data.llm`: same requests, same engine arguments.

python jobs/benchmark_engine.py [--rounds 3] [--without-ray-llm] [RUN_FILE [key=value ...]]

Alternated in one run. Steady state leaves out what comes before the first shard is in its table; the fixed overhead
(start to first shard, last shard to the end of the stage) is printed beside it. Bare vLLM gets its prompts as token ids
and writes no table. Times of `ray.data.llm` and of the stage are whole, engine start included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from cpt_ray.cluster import ENGINE_ENV, QUIET_ENV
from cpt_ray.config import ModelConfig, RunConfig, load_config
from cpt_ray.engine import engine_arguments, engine_env
from cpt_ray.pool import Line, run_lines
from cpt_ray.prompting import token_ids
from cpt_ray.rundir import RunDir
from cpt_ray.synthesis import Plan, make_plan, plan_units, steps_of


class Bare:
    """`vllm.LLM` in an actor of its own, so that it has the same kind of process and environment."""

    def __init__(self, model: ModelConfig, requests: Sequence[tuple[list[dict[str, str]], dict[str, Any]]]):
        from vllm import LLM, SamplingParams

        self._llm = LLM(**{"disable_log_stats": True, **engine_arguments(model)})
        tokenizer = self._llm.get_tokenizer()
        self._ids = [token_ids(tokenizer, one, model.chat_template_kwargs) for one, _ in requests]
        self._params = [SamplingParams(**params) for _, params in requests]

    def ids(self) -> list[list[int]]:
        """The prompts."""
        return self._ids

    def generate(self) -> tuple[int, float]:
        """(generated tokens, seconds); the cache is empty at the start, as in a new engine."""
        self._llm.reset_prefix_cache()
        start = time.monotonic()
        prompts = [{"prompt_token_ids": one} for one in self._ids]
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in outputs), time.monotonic() - start


def stage(plan: Plan, folder: Path) -> dict[str, float]:
    """One run of the write stage alone."""
    run, units = RunDir(folder), plan_units(plan)
    for name, rows in units.items():
        run.write("units", name, rows)
    write = steps_of(plan)[0]
    start = time.time()
    run_lines(run, [Line(list(units), [write])])
    end = time.time()
    done = sorted((run.shard("generations", name).stat().st_mtime, run.counts("generations", name)) for name in units)
    tokens = sum(counts["generated_tokens"] for _, counts in done[1:])
    return {
        "steady": tokens / (done[-1][0] - done[0][0]),
        "first": done[0][0] - start,
        "last": end - done[-1][0],
        "whole": end - start,
    }


def ray_llm(model: ModelConfig, ids: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> float:
    """Seconds that ray.data.llm takes for the same requests."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=model.path,
        engine_kwargs={key: value for key, value in engine_arguments(model).items() if key != "model"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": engine_env(model)},
        concurrency=(1, 1),
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    rows = [{"ids": one, "params": kept} for one, kept in zip(ids, params, strict=True)]
    processor = build_processor(
        config,
        preprocess=lambda row: {"tokenized_prompt": row["ids"], "prompt": "", "sampling_params": row["params"]},
        postprocess=lambda row: {"tokens": row["num_generated_tokens"]},
    )
    start = time.monotonic()
    count = processor(ray.data.from_items(rows)).count()
    assert count == len(rows), (count, len(rows))
    return time.monotonic() - start


def requests_of(plan: Plan) -> list[tuple[list[dict[str, str]], dict[str, Any]]]:
    """The stage's conversations and vLLM sampling parameters."""
    write, units = steps_of(plan)[0], plan_units(plan)
    asked = [write.request(unit) for rows in units.values() for unit in rows]
    keys = ("max_tokens", "temperature", "top_p", "seed")
    return [(one.messages, {key: getattr(one, key) for key in keys}) for one in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-ray-llm", action="store_true")
    parser.add_argument("run_file", nargs="?", default="jobs/embedded.yaml")
    parser.add_argument("overrides", nargs="*", default=["writer.num_actors=1", "synthesis.shard_rows=128"])
    options = parser.parse_args()
    config: RunConfig = load_config(Path(options.run_file), options.overrides)
    plan, env = make_plan(config), {**ENGINE_ENV, **QUIET_ENV}
    os.environ |= env
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray makes a token and keeps it in the home folder
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    requests = requests_of(plan)
    bare = (
        ray.remote(Bare)
        .options(num_cpus=1, runtime_env={"env_vars": {**env, **engine_env(config.writer)}})
        .remote(config.writer, requests)
    )
    ids = ray.get(bare.ids.remote())
    print(f"{len(ids)} requests, {statistics.mean(map(len, ids)):.0f} prompt tokens each", flush=True)
    ratios, others = [], []
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        for at in range(options.rounds):
            tokens, seconds = ray.get(bare.generate.remote())
            found = stage(plan, Path(folder) / str(at))
            ratios.append(found["steady"] / (tokens / seconds))
            text = (
                f"bare {tokens / seconds:.0f} tokens/s; stage {found['steady']:.0f} tokens/s in steady state "
                f"(ratio {ratios[-1]:.3f}), {found['first']:.1f} s to the first shard, {found['last']:.1f} s after the "
                f"last, {found['whole']:.1f} s in all"
            )
            if not options.without_ray_llm:
                other = ray_llm(config.writer, ids, [params for _, params in requests])
                others.append(other / found["whole"])
                text += f"; ray.data.llm {other:.1f} s in all"
            print(text, flush=True)
    print(f"median ratio of the stage to bare vLLM: {statistics.median(ratios):.3f}")
    if others:
        print(f"median ratio of ray.data.llm's time to the stage's: {statistics.median(others):.2f}")


if __name__ == "__main__":
    main()
