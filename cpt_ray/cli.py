"""The command line: `cpt check PATH...`, `cpt synthesize|train|evaluate|serve|run RUN_FILE [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt_ray.cluster import connected
from cpt_ray.config import RunConfig, load_config
from cpt_ray.configuration import CATALOG_FILE, Catalog
from cpt_ray.console import say
from cpt_ray.engine import engine_env
from cpt_ray.errors import UserError
from cpt_ray.records import Directive, content_id
from cpt_ray.rubric import load_rubric, load_rubrics, rubric_files
from cpt_ray.rundir import RunDir
from cpt_ray.synthesis import Plan, Shards, make_plan, name_shards, plan_units, run_info, synthesize


def check(paths: Sequence[str]) -> None:
    """Lints rubric files; UserError with a line per problem."""
    files = rubric_files([Path(one) for one in paths])
    load_rubrics(files)
    for path in files:
        rubric = load_rubric(path)
        measured = f", {len(rubric.measured)} measured" if rubric.measured else ""
        say(f"{path}: ok ({rubric.title}: {len(rubric.levels)} levels, {len(rubric.criteria)} criteria{measured})")


def _finished_shards(plan: Plan, run: RunDir) -> Shards:
    """The synthesis tables this run file names; UserError if they are not complete."""
    shards = name_shards(plan, list(plan_units(plan)))
    if not all(run.has("pairs", name) for name in shards.pairs):
        raise UserError(f"{run.path}: synthesis is not complete for this run file; run `cpt synthesize` first")
    return shards


def _train_key(plan: Plan, shards: Shards) -> str:
    """Hash of all that the tuned model depends on; where it is trained is not part of it."""
    settings = plan.config.train.model_dump(exclude={"use_gpu", "resources_per_worker", "save_steps", "max_failures"})
    return content_id(shards.pairs, settings, plan.config.policy.answer_key, plan.config.seed)


def do_synthesize(plan: Plan, run: RunDir) -> None:
    """Rubrics and prompts to pairs."""
    synthesize(plan, run)


def do_train(plan: Plan, run: RunDir) -> None:
    """Pairs to a model."""
    from cpt_ray.training import train

    shards = _finished_shards(plan, run)
    train(plan.config, run, shards.pairs, _train_key(plan, shards))
    catalog = Catalog.build(plan.rubrics, run.read("directives", shards.directives, Directive))
    run.write_json(CATALOG_FILE, catalog.to_json())


def do_evaluate(plan: Plan, run: RunDir) -> None:
    """Base and tuned on what was held out."""
    from cpt_ray.evaluation import evaluate
    from cpt_ray.training import MARK

    shards = _finished_shards(plan, run)
    made = run.read_json(MARK)
    if not made or made["key"] != _train_key(plan, shards):
        found = "was trained with other settings or pairs" if made else "is not there"
        raise UserError(f"{run.model}: the tuned model {found}; run `cpt train` with this run file first")
    evaluate(plan, run, shards)


def do_run(plan: Plan, run: RunDir) -> None:
    """Everything, then what to do next."""
    start = time.monotonic()
    for stage in (do_synthesize, do_train, do_evaluate):
        stage(plan, run)
    say(f"total        {time.monotonic() - start:.0f} s")


STAGES: dict[str, tuple[Callable[[Plan, RunDir], None], str]] = {
    "run": (do_run, "synthesize, train and evaluate"),
    "synthesize": (do_synthesize, "write and judge answers, make twin pairs"),
    "train": (do_train, "tune the policy on the pairs (DPO)"),
    "evaluate": (do_evaluate, "measure base and tuned, write the report"),
}


def work(command: str, config: RunConfig, verbose: bool = False) -> None:
    """One stage (or all) of a run, on the cluster this process belongs to."""
    plan, run = make_plan(config), RunDir(Path(config.run_dir).absolute())
    with run.locked():
        run.write_run({"config": config.model_dump(mode="json"), **run_info(plan)})
        with connected(verbose, run.path / "ray.log"):
            STAGES[command][0](plan, run)


def steer(config: RunConfig, arguments: argparse.Namespace) -> None:
    """One action of few-shot steering, on the cluster this process belongs to."""
    os.environ.update(engine_env(config.policy))  # `infer` holds the engine in this process
    from cpt_ray.steering import comparison, stage

    plan, run = make_plan(config), RunDir(Path(config.run_dir).absolute())
    needs_tables = arguments.action != "infer" and not config.steer.answers
    steering = stage.Steering(plan, run, _finished_shards(plan, run) if needs_tables else None)
    if arguments.action == "infer" and not arguments.choices:
        raise UserError("steer infer: give the user's choices: --choices FILE.jsonl")
    if arguments.action != "fit" and config.steer.answers:
        raise UserError(f"steer {arguments.action}: needs a tuned policy; with steer.answers there is only `steer fit`")
    if arguments.dry_run:
        stage.describe(steering)
        return
    choices = stage.read_choices(Path(arguments.choices)) if arguments.action == "infer" else []
    with run.locked(), connected(arguments.verbose, run.path / "ray.log"):
        if choices:
            say(json.dumps(stage.infer(steering, choices), indent=2, ensure_ascii=False))
        elif arguments.action == "fit":
            comparison.compare_rewards(steering)
        else:
            comparison.evaluate(steering)


def serve(config: RunConfig, verbose: bool = False) -> None:
    """The tuned model behind an OpenAI-compatible endpoint, until stopped."""
    from cpt_ray.serving import serve_model

    with connected(verbose):
        serve_model(config, RunDir(Path(config.run_dir).absolute()), api_key=None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cpt", description="Rubrics in, a configurable language model out, on Ray.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("check", help="lint rubric files")
    one.add_argument("paths", nargs="+", metavar="PATH", help="a rubric file or a folder of them")
    helps = {name: text for name, (_, text) in STAGES.items()} | {"serve": "serve the tuned model"}
    for name, text in helps.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("run_file", metavar="RUN_FILE")
        one.add_argument("overrides", nargs="*", metavar="key=value", help="override entries of the run file")
        one.add_argument("--verbose", action="store_true", help="show what Ray and vLLM print")
    one = commands.add_parser("steer", help="few-shot steering: a user's choices set the dial")
    one.add_argument("action", choices=("fit", "infer", "evaluate"))
    one.add_argument("run_file", metavar="RUN_FILE")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="override entries of the run file")
    one.add_argument("--dry-run", action="store_true", help="check the data and say what would be learned, no more")
    one.add_argument("--choices", metavar="FILE", help="infer: JSONL of prompt, chosen, rejected")
    one.add_argument("--verbose", action="store_true", help="show what Ray and vLLM print")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for a user's error, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "check":
            check(arguments.paths)
            return 0
        config = load_config(Path(arguments.run_file), arguments.overrides)
        if arguments.command == "serve":
            serve(config, arguments.verbose)
        elif arguments.command == "steer":
            steer(config, arguments)
        else:
            work(arguments.command, config, arguments.verbose)
            if arguments.command == "run":
                _say_next(arguments.run_file, config, arguments.overrides)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where this one left off" if arguments.command in STAGES else ""
        print(f"stopped{goes_on}", file=sys.stderr, flush=True)
        return 130


def _say_next(run_file: str, config: RunConfig, overrides: Sequence[str]) -> None:
    command = " ".join(["cpt serve", run_file, *overrides])
    rubric = load_rubrics(config.rubric_paths)[0]
    say(f"\nServe it:    {command}")
    say(
        f"Talk to it:  curl http://{config.serve.host}:{config.serve.port}/v1/chat/completions "
        "-H 'Content-Type: application/json' \\\n"
        '               -H "Authorization: Bearer $CPT_API_KEY" -d '
        f'\'{{"model": "{config.name}", "configuration": {{"{rubric.id}": "{rubric.levels[-1].name}"}}, '
        '"messages": [{"role": "user", "content": "..."}]}\''
    )


def console() -> None:
    """Entry point of the `cpt` command."""
    sys.exit(main())
