"""The write stage under Ray Data against bare `vllm.LLM` and `ray.data.llm`: same requests, same engine arguments.

python jobs/benchmarks/engine.py [--rounds 3] [--width 512] [--actors 2] [--chat] [--ray-llm] [RUN_FILE [key=value ...]]

In every round a new engine answers all requests, its cache empty each time, by `LLM.generate`, which is given token
ids, as the stage's engine, and by `LLM.generate` again: two processes differ by more than what is to be shown, and the
machine's speed changes within a round, so the stage is held against the mean of the two turns around it (`--chat`:
`LLM.chat` has two turns as well).
Steady state is from the engine's first step to the last that finished an answer; of bare vLLM the whole call. Beside:
the fixed overhead (start of the stage to the first step, last answer to the end of the stage), and the steps: how
many, the share of the time spent within them, milliseconds each, tokens per CPU second of the engine's process. At the
end, over all rounds, the time from one step to the next while more requests wait than the engine takes, whose lower
percentiles other work on the machine leaves alone, and what the process's other threads took of the time.
`--width` takes a model of random weights, 8 layers of that width, in the place of the run file's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from transformers import AutoTokenizer

from cpt_ray.chat.conversations import token_ids
from cpt_ray.cluster import ENGINE_ENV, QUIET_ENV
from cpt_ray.config import ModelConfig, RunConfig, load_config
from cpt_ray.engines.engine import Completion, Request
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.roles import with_dtype
from cpt_ray.engines.step import Line
from cpt_ray.engines.vllm import VllmEngine, engine_arguments, engine_env
from cpt_ray.plan import Plan, make_plan, plan_units
from cpt_ray.synthesis.stage import Steps
from cpt_ray.tables.rundir import RunDir

LAYERS = 8
WARM_UP = 200
"""Requests that an engine answers before it is timed."""
REQUESTS = "requests.json"


class Watch:
    """In the place of a vLLM engine's `step`: when it ran, and for how long."""

    def __init__(self, engine: Any):
        self._step, engine.step = engine.step, self
        self.first, self.last, self.within, self.steps, self.tokens, self.cpu = 0.0, 0.0, 0.0, 0, 0, 0.0
        self.beside = 0.0
        """CPU seconds of other threads of this process."""
        self.periods: list[float] = []
        """Seconds from the start of a step to that of the next, while more requests wait than the engine takes."""
        self._scheduler, self._start = engine.engine_core.engine_core.scheduler, 0.0
        self._cpu_before, self._beside_before = time.process_time(), 0.0

    def __call__(self) -> Any:
        start = time.time()
        if self._start:
            self.periods.append(start - self._start)
        else:
            self._beside_before = self._beside_before or time.process_time() - time.thread_time()
        outputs = self._step()
        end = time.time()
        self._start = start if self._scheduler.waiting else 0.0
        self.first, self.within, self.steps = self.first or start, self.within + end - start, self.steps + 1
        done = [one for output in outputs if output.finished for one in output.outputs]
        if done:
            self.last, self.cpu = end, time.process_time() - self._cpu_before
            self.beside = time.process_time() - time.thread_time() - self._beside_before
            self.tokens += sum(len(one.token_ids) for one in done)
        return outputs

    def found(self) -> dict[str, Any]:
        """What it saw."""
        names = ("first", "last", "within", "steps", "tokens", "cpu", "beside", "periods")
        return {name: getattr(self, name) for name in names}


class WatchedEngine(VllmEngine):
    """Answers all requests by bare `LLM.chat` and `LLM.generate` as well; keeps what the watches saw in a file."""

    def __init__(self, model: ModelConfig, folder: Path, chats: bool):
        super().__init__(model)
        begun, self._file, self._kwargs = time.time(), folder / f"{os.getpid()}.json", model.chat_template_kwargs
        self._requests = json.loads((folder / REQUESTS).read_text())
        self._left = len(self._requests)
        self._bare(WARM_UP)
        self._chats = chats
        self._found: dict[str, Any] = {"chatting": self._chat(), "bare": [self._bare()]}
        self._found["spent"] = time.time() - begun
        self._lock, self._step = threading.Lock(), self._engine.step
        self._watch = Watch(self._engine)

    def _asked(self) -> tuple[list[Any], list[Any]]:
        from vllm import SamplingParams

        return [one for one, _ in self._requests], [SamplingParams(**one) for _, one in self._requests]

    def _chat(self) -> list[float]:
        """Seconds of `LLM.chat`, if they are wanted."""
        if not self._chats:
            return []
        conversations, params = self._asked()
        start = time.time()
        self._llm.chat(conversations, params, use_tqdm=False, chat_template_kwargs=self._kwargs)
        seconds = time.time() - start
        self._llm.reset_prefix_cache()
        return [seconds]

    def _bare(self, count: int | None = None) -> dict[str, float]:
        """The first `count` requests by `LLM.generate`, which is given token ids."""
        (conversations, params), step = self._asked(), self._engine.step
        prompts = [{"prompt_token_ids": token_ids(self._tokenizer, one, self._kwargs)} for one in conversations]
        watch, start = Watch(self._engine), time.time()
        self._llm.generate(prompts[:count], params[:count], use_tqdm=False)
        found = watch.found() | {"first": start, "last": time.time()}
        self._llm.reset_prefix_cache()
        self._engine.step = step
        return found

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """As ever; then the file is written, and behind the last request bare vLLM has its second turn."""
        done = super().run(requests)
        with self._lock:
            self._left -= len(requests)
            self._found["stage"] = self._watch.found()
            if self._left == 0:
                begun = time.time()
                time.sleep(1)  # the other shard in flight is written
                self._engine.step = self._step
                self._llm.reset_prefix_cache()
                self._found["bare"].append(self._bare())
                self._found["chatting"] += self._chat()
                self._found["spent_after"] = time.time() - begun
            self._file.write_text(json.dumps(self._found))
        return done


def stage(plan: Plan, folder: Path, chats: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run of the write stage alone: what its first engine saw of bare vLLM, and all of them of the stage."""
    run, units = RunDir(folder / "run"), plan_units(plan)
    for name, rows in units.items():
        run.write("units", name, rows)
    (folder / REQUESTS).write_text(json.dumps(requests_of(plan)))
    start = time.time()
    run_lines(
        run,
        [Line(list(units), [Steps.of(plan, ()).write])],
        functools.partial(WatchedEngine, folder=folder, chats=chats),
    )
    whole = time.time() - start
    seen = [json.loads(path.read_text()) for path in folder.glob("[0-9]*.json")]
    shutil.rmtree(folder)
    watched = [one["stage"] for one in seen]
    found = {name: sum(one[name] for one in watched) for name in ("within", "steps", "tokens", "cpu", "beside")}
    found |= {"periods": [value for one in watched for value in one["periods"]]}
    found |= {"first": min(one["first"] for one in watched), "last": max(one["last"] for one in watched)}
    spent, spent_after = seen[0]["spent"], seen[0].get("spent_after", 0.0)
    before, after = found["first"] - start - spent, start + whole - found["last"] - spent_after
    return seen[0], found | {"before": before, "after": after, "whole": whole - spent - spent_after}


def speed(found: dict[str, float]) -> float:
    """Generated tokens per second in steady state."""
    return found["tokens"] / (found["last"] - found["first"])


def text(found: dict[str, float]) -> str:
    """A line about a run."""
    seconds = found["last"] - found["first"]
    line = f"{speed(found):6.0f} tokens/s over {seconds:.1f} s, {found['within'] / seconds:.1%} of it in "
    line += f"{found['steps']:.0f} steps of {1000 * found['within'] / found['steps']:.1f} ms; "
    line += f"{found['tokens'] / found['cpu']:.0f} tokens per CPU second"
    if "before" in found:
        line += f"; {found['before']:.1f} s before, {found['after']:.1f} s after"
    return line


def full_steps(periods: Sequence[float]) -> str:
    """A line about the seconds from step to step of a full engine."""
    low, middle = (1000 * statistics.quantiles(periods, n=20)[at] for at in (3, 9))
    line = f"{len(periods)} full steps, {low:.2f} ms at the 20th percentile, {middle:.2f} in the median, "
    return line + f"{1000 * statistics.mean(periods):.2f} in the mean"


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
    write, units = Steps.of(plan, ()).write, plan_units(plan)
    asked = [write.request(unit) for rows in units.values() for unit in rows]
    keys = ("max_tokens", "temperature", "top_p", "seed")
    return [
        (one.messages, {key: getattr(one, key) for key in keys} | {"stop": list(one.active_stops)}) for one in asked
    ]


def make_model(folder: Path, source: str, width: int) -> str:
    """Random weights, of the architecture and behind the tokenizer of the model in `source`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": LAYERS})
    config.update({"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64})
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * LAYERS
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--actors", type=int, default=1, help="also measure the stage with this many engines")
    parser.add_argument("--chat", action="store_true", help="also measure LLM.chat")
    parser.add_argument("--ray-llm", action="store_true", help="also measure ray.data.llm")
    parser.add_argument("run_file", nargs="?", default="jobs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    env = {**ENGINE_ENV, **QUIET_ENV}
    os.environ |= env
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray makes a token and keeps it in the home folder
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        overrides = ["writer.num_actors=1", "synthesis.shard_rows=512", *options.overrides]
        if options.width:
            source = load_config(Path(options.run_file), overrides).writer.path
            overrides.append(f"writer.model={make_model(Path(folder) / 'model', source, options.width)}")

        def load(*more: str) -> RunConfig:
            return with_dtype(load_config(Path(options.run_file), [*overrides, *more]), RunDir(Path(folder)))[0]

        config = load()
        plan, more = make_plan(config), make_plan(load(f"writer.num_actors={options.actors}"))
        ray.init(
            "local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={"env_vars": env},
        )
        requests, tokenizer = requests_of(plan), AutoTokenizer.from_pretrained(config.writer.path)
        ids = [token_ids(tokenizer, one, config.writer.chat_template_kwargs) for one, _ in requests]
        print(f"{len(ids)} requests, {statistics.mean(map(len, ids)):.0f} prompt tokens each", flush=True)
        ratios: dict[str, list[float]] = {}
        periods: dict[str, list[float]] = {"bare": [], "stage": []}
        beside: dict[str, list[float]] = {"bare": [], "stage": []}

        def note(what: str, ratio: float, line: str) -> None:
            ratios.setdefault(what, []).append(ratio)
            print(f"{what:<16} {line} (ratio {ratio:.3f})", flush=True)

        for at in range(options.rounds):
            bare, found = stage(plan, Path(folder) / f"round-{at}", options.chat)
            for turn in bare["bare"]:
                print(f"{'bare vLLM':<16} {text(turn)}", flush=True)
            for kind, one in (("bare", bare["bare"][0]), ("bare", bare["bare"][1]), ("stage", found)):
                periods[kind] += one["periods"]
                beside[kind].append(one["beside"] / (one["last"] - one["first"]))
            before, after = map(speed, bare["bare"])
            note("stage", 2 * speed(found) / (before + after), text(found))
            if options.chat:
                chatting = statistics.mean(bare["chatting"]) / found["tokens"]
                ratios.setdefault("stage to LLM.chat", []).append(speed(found) * chatting)
            ratios.setdefault("bare vLLM, second turn to first", []).append(after / before)
            if options.actors > 1:
                _, several = stage(more, Path(folder) / f"more-{at}")
                note(f"{options.actors} engines", speed(several) / speed(found), text(several))
            if options.ray_llm:
                seconds = ray_llm(config.writer, ids, [params for _, params in requests])
                note("ray.data.llm", seconds / found["whole"], f"{seconds:.1f} s in all")
        for kind, values in periods.items():
            print(f"{kind:<16} {full_steps(values)}; {statistics.median(beside[kind]):.1%} of it in other threads' CPU")
        for what, values in ratios.items():
            print(f"median ratio, {what}: {statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        ray.shutdown()


if __name__ == "__main__":
    main()
