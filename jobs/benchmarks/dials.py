"""Dial positions through a running server beside the evaluation's: does what is served turn as what was measured does?

make serve                                                        # in another terminal; prints a key
CPT_API_KEY=... python jobs/benchmarks/dials.py jobs/quickstart.yaml

Two columns come from the server. `same requests`: the evaluation's prompts and directives once more, each directive as
a system message; it must agree with the evaluation but for sampling. `by configuration`: the same prompts at each
level, as a client asks for it; then one directive stands for a level, not the many that the evaluation takes in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from cpt_ray.config import load_config
from cpt_ray.errors import UserError
from cpt_ray.evaluation.dials import Dial
from cpt_ray.judging.spread import Survey, with_points
from cpt_ray.plan import make_plan
from cpt_ray.rubrics.measures import whole_sentences
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial
from cpt_ray.tables.rundir import SPREAD_FILE, RunDir

CLIENTS = 16
"""Requests in flight."""
EVALUATION, SAME, CONFIGURED = "evaluation", "same requests", "by configuration"


@dataclass
class Position:
    """A level of a dial: the dial's values in the answers, by where they come from."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def cell(self, source: str) -> str:
        """Mean and the half-width of its 95% interval, as if answers were independent."""
        known = self.values[source]
        half = 1.96 * statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else float("nan")
        return f"{statistics.fmean(known):.2f} ± {half:.2f}"


def read_run(run_file: Path, overrides: Sequence[str]) -> tuple[tuple[Rubric, ...], list[Trial], Survey]:
    """The rubrics with their levels, the tuned model's answers under held-out directives, and the pool's spread."""
    config = load_config(run_file, overrides)
    run, rubrics = RunDir(Path(config.run_dir)), make_plan(config).rubrics
    known = (run.read_json(SPREAD_FILE) or {}).get("rubrics", {})
    trials = run.read("evaluation", sorted(run.names("evaluation")), Trial)
    tuned = [trial for trial in trials if trial.model == "tuned" and trial.directive and not trial.is_trained]
    if not tuned:
        raise UserError(f"{run.path}: no evaluation of a tuned model; run `cpt run` with this run file first")
    return tuple(with_points(rubric, known.get(rubric.id, {})) for rubric in rubrics), tuned, known


async def ask(session: aiohttp.ClientSession, model: str, trial: Trial, slots: asyncio.Semaphore, by: str) -> Trial:
    """The trial with the server's answer to it."""
    messages = [{"role": "user", "content": trial.prompt}]
    body: dict[str, Any] = {"model": model, "messages": messages}
    if by == CONFIGURED:
        body["configuration"] = {trial.rubric_id: trial.level}
    else:
        messages.insert(0, {"role": "system", "content": str(trial.directive)})
    async with slots, session.post("v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise UserError(f"the server answered {answer.status}: {(await answer.text())[:300]}")
        (choice,) = (await answer.json())["choices"]
    text = choice["message"]["content"]
    return replace(trial, text=whole_sentences(text) if choice["finish_reason"] == "length" else text)


async def ask_all(url: str, key: str, trials: Sequence[Trial], by: str) -> list[Trial]:
    """All of them, answered."""
    slots = asyncio.Semaphore(CLIENTS)
    async with aiohttp.ClientSession(f"{url}/", headers={"Authorization": f"Bearer {key}"}) as session:
        async with session.get("v1/models") as answer:
            if answer.status != 200:
                raise UserError(f"{url}/v1/models answered {answer.status}; CPT_API_KEY is the key of `make serve`")
            model = (await answer.json())["data"][0]["id"]
        return await asyncio.gather(*(ask(session, model, trial, slots, by) for trial in trials))


def one_per_level(trials: Sequence[Trial]) -> list[Trial]:
    """The first trial of each prompt and level: by configuration all of them would be the same request."""
    return list({(trial.prompt_id, trial.rubric_id, trial.level): trial for trial in reversed(trials)}.values())


def print_table(rubrics: Sequence[Rubric], spread: Survey, answers: dict[str, list[Trial]]) -> None:
    """Means by dial and level, then each dial's slope, in each column."""
    print(f"| dial, measure | asked | {' | '.join(answers)} |\n|{'---|' * (2 + len(answers))}")
    for rubric in rubrics:
        dial = Dial(rubric, spread.get(rubric.id, {}))
        positions = {level.name: Position() for level in rubric.levels}
        for source, trials in answers.items():
            for trial in trials:
                value = dial.value(trial)
                if trial.rubric_id == rubric.id and np.isfinite(value):
                    positions[trial.level].values[source].append(value)
        for name, position in positions.items():
            asked = f"{name} ({dial.anchors[name]:.2f})"
            print(f"| {rubric.id}, {dial.measure} | {asked} | {' | '.join(map(position.cell, answers))} |")
        low, *_, high = positions.values()
        moved = (statistics.fmean(high.values[one]) - statistics.fmean(low.values[one]) for one in answers)
        print(f"| {rubric.id} | slope | {' | '.join(f'{gain / dial.span:.2f}' for gain in moved)} |")


def main() -> None:
    """Reads the run, asks the server twice, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--url", help="of the run's server; by default where the run file has it")
    options = parser.parse_args()
    try:
        config = load_config(options.run_file, options.overrides)
        options.url = options.url or f"http://{config.serve.host}:{config.serve.port}/{config.name}"
        rubrics, trials, spread = read_run(options.run_file, options.overrides)
        key = os.environ.get("CPT_API_KEY", "")
        answers = {EVALUATION: trials, SAME: asyncio.run(ask_all(options.url, key, trials, SAME))}
        answers[CONFIGURED] = asyncio.run(ask_all(options.url, key, one_per_level(trials), CONFIGURED))
        print_table(rubrics, spread, answers)
    except UserError as error:
        sys.exit(f"error: {error}")
    except aiohttp.ClientError as error:
        sys.exit(f"error: {options.url}: {error}; start the server with `make serve`")


if __name__ == "__main__":
    main()
