"""The command line: `cpt check PATH...`, `cpt status RUN`, `cpt synthesize|train|... RUN_FILE [key=value ...]`.

`cpt keys add|list|revoke RUN_FILE [NAME]` manages who may use the server;
`cpt push RUN_FILE TARGET` publishes the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt_ray import __version__
from cpt_ray.cluster import check_room, connected
from cpt_ray.config import ModelConfig, RunConfig, TrainConfig, load_any_config, load_config, local_path
from cpt_ray.console import say, status_lines
from cpt_ray.engines.roles import CPU_DTYPE, convert_models, roles_of, with_dtype
from cpt_ray.engines.vllm import engine_env
from cpt_ray.engines.worker import endpoint_key
from cpt_ray.errors import UserError
from cpt_ray.plan import Plan, Shards, make_plan, plan_units, run_info
from cpt_ray.rubrics.catalog import CATALOG_FILE, EXAMPLE_PROMPT, Catalog
from cpt_ray.rubrics.rubric import load_rubric, load_rubrics, rubric_files
from cpt_ray.serving.keys import KEYS_FILE, SPENT_FILE, Keyring, make_key
from cpt_ray.synthesis.stage import name_shards, resolved, synthesize
from cpt_ray.tables.records import Directive, content_id
from cpt_ray.tables.rundir import MARK, RunDir
from cpt_ray.training.publishing import HUB, push
from cpt_ray.yaml_file import read_yaml


def check(arguments: argparse.Namespace) -> None:
    """Lints rubric and run files, starting nothing; UserError with a line per problem."""
    files = rubric_files([Path(one) for one in arguments.paths])
    run_files = [path for path in files if _is_run_file(path)]
    files = [path for path in files if path not in run_files]
    load_rubrics(files)
    for path in run_files:
        _check_run_file(path)
    for path in files:
        rubric = load_rubric(path)
        measured = f", {len(rubric.measured)} measured" if rubric.measured else ""
        say(f"{path}: ok ({rubric.title}: {len(rubric.levels)} levels, {len(rubric.criteria)} criteria{measured})")


def _is_run_file(path: Path) -> bool:
    return not {"policy", "writer", "preferences"}.isdisjoint(read_yaml(path))


def _check_run_file(path: Path) -> None:
    config = load_any_config(path)
    if not isinstance(config, RunConfig):
        say(f"{path}: ok (a training on {config.preferences.source})")
        return
    plan = make_plan(config)
    answers = sum(len(list(units)) for units in plan_units(plan).values())
    train, held_out = (len(plan.prompts_of(split)) for split in ("train", "held_out"))
    say(
        f"{path}: ok ({len(plan.rubrics)} rubrics, {train} prompts and {held_out} held out, {answers} answers in the "
        f"first pass; run directory {config.run_dir})"
    )


def _finished(plan: Plan, run: RunDir) -> tuple[Plan, Shards]:
    """The plan with its levels, and the synthesis tables it names; UserError if they are not complete."""
    units = plan_units(plan)
    shards = name_shards(plan, units)
    plan = resolved(plan, run, units)
    if not all(run.has("pairs", name) for name in shards.pairs):
        raise UserError(f"{run.path}: synthesis is not complete for this run file; run `cpt synthesize` first")
    return plan, shards


def _train_key(plan: Plan, shards: Shards) -> str:
    """Hash of all that the tuned model depends on; where it is trained is not part of it."""
    return content_id(shards.pairs, _settings(plan.config.train), plan.config.policy.policy_key, plan.config.seed)


def _settings(train: TrainConfig) -> dict[str, object]:
    """Those that change what is learned: not where it is done, nor where it is kept."""
    places = {
        "num_workers",
        "use_gpu",
        "resources_per_worker",
        "sharding",
        "save_steps",
        "max_failures",
        "checkpoints",
        "report_to",
    }
    return {**train.model_dump(exclude=places), "format": TRAIN_FORMAT}


def do_train(plan: Plan, run: RunDir) -> None:
    """Pairs to a model."""
    from cpt_ray.training.stage import train

    plan, shards = _finished(plan, run)
    train(plan.config, run, shards.pairs, _train_key(plan, shards), rubrics=plan.rubrics)
    catalog = Catalog.build(plan.rubrics, run.read("directives", shards.directives, Directive))
    run.write_json(CATALOG_FILE, catalog.to_json())
    if run.adapter.exists():  # an adapter is served from its folder alone
        run.write_json(f"{run.adapter.name}/{CATALOG_FILE}", catalog.to_json())


def do_evaluate(plan: Plan, run: RunDir) -> None:
    """Base and tuned on what was held out."""
    from cpt_ray.evaluation.stage import evaluate

    plan, shards = _finished(plan, run)
    made = run.read_json(MARK)
    if not made or made["key"] != _train_key(plan, shards):
        found = "was trained with other settings or pairs" if made else "is not there"
        raise UserError(f"{run.model}: the tuned model {found}; run `cpt train` with this run file first")
    evaluate(plan, run, shards)


def do_run(plan: Plan, run: RunDir) -> None:
    """Everything."""
    start = time.monotonic()
    synthesize(plan, run)
    do_train(plan, run)
    do_evaluate(plan, run)
    say(f"total        {time.monotonic() - start:.0f} s")


TRAIN_FORMAT = 2
"""Goes up when the same settings and pairs train another model than before."""
STAGES: dict[str, tuple[Callable[[Plan, RunDir], object], str]] = {
    "run": (do_run, "synthesize, train and evaluate"),
    "synthesize": (synthesize, "write and judge answers, make twin pairs"),
    "train": (do_train, "tune the policy on the pairs (DPO)"),
    "evaluate": (do_evaluate, "measure base and tuned, write the report"),
}


LIMITS: dict[str, tuple[Callable[[str], float], float, str]] = {
    "requests_per_minute": (int, 1e12, "requests it may send each minute"),
    "tokens_per_minute": (int, 1e12, "prompt and answer tokens it may use each minute"),
    "budget": (int, 1e15, "prompt and answer tokens it may use in all"),
    "days": (float, 36525, "how long it is good for"),
}
"""Limits that `cpt keys add` can put on a key: kind, highest value, meaning."""


def _limit(kind: Callable[[str], float], most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}; give {what} above 0, at most {most:,.0f}")
        return value

    return number


def work(arguments: argparse.Namespace) -> None:
    """One stage (or all) of a run, on the cluster this process belongs to."""
    config = load_config(Path(arguments.run_file), arguments.overrides)
    run = RunDir(Path(config.run_dir).absolute())
    config, dtype = with_dtype(config, run)
    plan = make_plan(config)
    convert_models(roles_of(config))
    for role in _called(arguments.command, plan).values():
        endpoint_key(role)
    if arguments.command == "run":  # hours before it is trained
        from cpt_ray.training.checks import open_policy

        open_policy(config).tokeniser.check()
    if arguments.command in ("train", "evaluate") and not run.path.exists():
        raise UserError(f"{run.path}: nothing is there; run `cpt synthesize` with this run file first")
    with run.locked():
        run.check_format()
        kept = {CPU_DTYPE: dtype} if dtype else {}
        run.write_run({"config": config.model_dump(mode="json"), **kept, **run_info(plan)})
        with connected(arguments.verbose, run.path / "ray.log"):
            _check_room(arguments.command, plan)
            STAGES[arguments.command][0](plan, run)
            if arguments.command == "run":
                _say_next(arguments.run_file, config, arguments.overrides)


def _called(command: str, plan: Plan) -> dict[str, ModelConfig]:
    """The models that a command asks, by their names in the run file; no judge where everything is measured."""
    config, is_judged = plan.config, any(rubric.judged for rubric in plan.rubrics)
    roles: dict[str, ModelConfig] = {}
    if command in ("run", "synthesize"):
        roles = {"writer": config.writer, "director": config.director}
        roles |= {f"judges[{at}]": one for at, one in enumerate(config.judges)}
        roles |= {"policy": config.policy} if config.synthesis.control else {}
    if command in ("run", "evaluate"):
        roles |= {"policy": config.policy}
        is_judged = is_judged or config.evaluate.judge_check is not None
    return roles | ({"judge": config.judge} if is_judged and command != "train" else {})


def _check_room(command: str, plan: Plan) -> None:
    """UserError if a stage of the command can never start here; now, not when the stages before it are done."""
    from cpt_ray.training.checks import check_workers

    for name, role in _called(command, plan).items():
        if role.endpoint is None:
            each = {"CPU": role.num_cpus, "GPU": role.num_gpus}
            remedy = f"lower {name}.num_actors, {name}.num_cpus or {name}.num_gpus, or run on a cluster (RAY_ADDRESS)"
            check_room(name, each, role.num_actors.least, remedy)
    if command in ("run", "train"):
        check_workers(plan.config.train)


def status(arguments: argparse.Namespace) -> None:
    """What a run has done and what it cost, from its directory alone."""
    run = RunDir(Path(arguments.run))
    made, ledger = run.read_yaml("run.yaml"), run.read_json("ledger.json") or {}
    if not isinstance(made, dict) or "name" not in made:
        raise UserError(f"{run.path}: no run.yaml there that names a run; give the directory of a run (runs/NAME)")
    say(f"{made['name']}: {'a process is at work on it' if run.busy else 'no process is at work on it'}")
    say("\n".join(status_lines(ledger)) or "nothing is done yet")


def train_model(arguments: argparse.Namespace) -> None:
    """A model from the run's pairs or, if the run file names one, from any preference set."""
    from cpt_ray.training.stage import train

    given = load_any_config(Path(arguments.run_file), arguments.overrides)
    if isinstance(given, RunConfig):
        work(arguments)
        return
    source, run = given.preferences.source, RunDir(Path(given.run_dir).absolute())
    path = Path(source)
    config, dtype = with_dtype(given, run)
    convert_models(roles_of(config))
    data = _file_hash(path) if path.is_file() else source
    key = content_id(
        data, config.preferences.data_split, _settings(config.train), config.policy.policy_key, config.seed
    )
    with run.locked():
        kept = {CPU_DTYPE: dtype} if dtype else {}
        run.write_run({"config": config.model_dump(mode="json"), **kept, "name": config.name, "preferences": data})
        train(config, run, (), key, connected(arguments.verbose, run.path / "ray.log"))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def push_model(arguments: argparse.Namespace) -> None:
    """The run's model to a folder or to the Hugging Face Hub."""
    run = RunDir(Path(load_any_config(Path(arguments.run_file), arguments.overrides).run_dir))
    push(run, arguments.target if arguments.target.startswith(HUB) else str(_given_path("TARGET", arguments.target)))


def _given_path(name: str, text: str) -> Path:
    """A path among the arguments, with its ~ put in; UserError for an address."""
    try:
        return Path(local_path(text))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def steer(arguments: argparse.Namespace) -> None:
    """One action of few-shot steering, on the cluster this process belongs to."""
    config = load_config(Path(arguments.run_file), arguments.overrides)
    run = RunDir(Path(config.run_dir).absolute())
    config, _ = with_dtype(config, run, tell=lambda _: None)  # a result is all that is printed
    plan = make_plan(config)
    convert_models(roles_of(config))
    os.environ.update(engine_env(config.policy))  # `infer` holds the engine in this process
    from cpt_ray.evaluation.stage import update_report
    from cpt_ray.steering import comparison, stage

    needs_tables = arguments.action != "infer" and not config.steer.answers
    shards = None
    if needs_tables:
        plan, shards = _finished(plan, run)
    steering = stage.Steering(plan, run, shards)
    if arguments.action == "infer" and arguments.dry_run:
        raise UserError("steer infer: nothing is learned there, so --dry-run says nothing; leave it out")
    if arguments.action == "infer" and not arguments.choices:
        raise UserError("steer infer: give the user's choices: --choices FILE.jsonl")
    if arguments.action != "fit" and config.steer.answers:
        raise UserError(f"steer {arguments.action}: needs a tuned policy; with steer.answers there is only `steer fit`")
    if arguments.dry_run:
        stage.describe(steering)
        return
    choices = stage.read_choices(_given_path("--choices", arguments.choices)) if arguments.action == "infer" else []
    with run.locked(), connected(arguments.verbose, run.path / "ray.log"):
        if choices:
            say(json.dumps(stage.infer(steering, choices), indent=2, ensure_ascii=False))
        elif arguments.action == "fit":
            comparison.compare_rewards(steering)
        else:
            comparison.evaluate(steering)
            if shards:
                update_report(plan, run, shards)


def serve(arguments: argparse.Namespace) -> None:
    """The tuned model behind an OpenAI-compatible endpoint, until stopped."""
    from cpt_ray.serving.deploy import serve_model
    from cpt_ray.serving.haproxy import serve_env

    config = load_config(Path(arguments.run_file), arguments.overrides)
    run, connecting = RunDir(Path(config.run_dir).absolute()), connected(arguments.verbose, more_env=serve_env())
    config, _ = with_dtype(config, run)
    needed = {"steer.embedder", *(("policy",) if config.serve.base or config.serve.adapters else ())}
    convert_models({name: role for name, role in roles_of(config).items() if name in needed})
    serve_model(config, run, api_key=None, insecure=arguments.insecure, connecting=connecting)


def manage_keys(arguments: argparse.Namespace) -> None:
    """Makes, lists or revokes API keys of a run."""
    run = RunDir(Path(load_config(Path(arguments.run_file), arguments.overrides).run_dir).absolute())
    keyring = Keyring(run.path / KEYS_FILE)
    if arguments.action == "list":
        spent = run.read_json(SPENT_FILE) or {}
        for key in keyring.keys:
            name = key.name if key.name.isprintable() else ascii(key.name)  # of an earlier version
            say(f"{name:<20} {key.describe(spent.get(key.name, 0))}")
    elif arguments.action == "revoke":
        keyring.revoke(arguments.name)
        say(f"{arguments.name} is revoked; a running server refuses it within a second")
    else:
        limits = {name: getattr(arguments, name) for name in LIMITS}
        key, secret = make_key(arguments.name, **limits)
        keyring.add(key)
        say(f"{secret}\n(the key of {key.name}, shown only here; kept as a hash in {run.path / KEYS_FILE})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cpt", description="Rubrics in, a configurable language model out, on Ray.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("check", help="lint rubric files and run files; nothing is started")
    one.add_argument("paths", nargs="+", metavar="PATH", help="a rubric file, a folder of them, or a run file")
    one = commands.add_parser("status", help="what a run has done so far and what it cost")
    one.add_argument("run", metavar="RUN", help="the directory of a run")
    helps = {name: text for name, (_, text) in STAGES.items()} | {
        "serve": "serve the tuned model",
        "push": "take the tuned model to a folder or to the Hugging Face Hub",
    }
    for name, text in helps.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("run_file", metavar="RUN_FILE")
        if name == "push":
            one.add_argument("target", metavar="TARGET", help="an empty folder, or hf://OWNER/NAME")
        one.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="entries of the run file to change"
        )
        one.add_argument("--verbose", action="store_true", help="show what Ray and vLLM print, and tracebacks")
        if name == "serve":
            one.add_argument("--insecure", action="store_true", help="let everyone in, without a key")
    keys = commands.add_parser("keys", help="make, list and revoke API keys")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in {"add": "make a key", "list": "show all keys", "revoke": "close a key"}.items():
        one = actions.add_parser(name, help=text)
        one.add_argument("run_file", metavar="RUN_FILE")
        if name != "list":
            one.add_argument("name", metavar="NAME")
        one.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="entries of the run file to change"
        )
        for limit, (kind, most, about) in LIMITS.items() if name == "add" else ():
            one.add_argument(f"--{limit.replace('_', '-')}", type=_limit(kind, most), metavar="N", help=about)
    one = commands.add_parser("steer", help="few-shot steering: a user's choices set the dial")
    one.add_argument(
        "action",
        choices=("fit", "infer", "evaluate"),
        help="learn from simulated users; say what a user's choices come to; fit, then compare all methods",
    )
    one.add_argument("run_file", metavar="RUN_FILE")
    one.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="entries of the run file to change")
    one.add_argument("--dry-run", action="store_true", help="check the data and say what would be learned, no more")
    one.add_argument("--choices", metavar="FILE", help="infer: JSONL of prompt, chosen, rejected")
    one.add_argument("--verbose", action="store_true", help="show what Ray and vLLM print")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for a user's error, 130 for Ctrl-C."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    if not hasattr(arguments, "overrides") or not all(re.match(r"\w[^=]*=", one) for one in left):
        parser.parse_args(argv)  # says what it does not know
    elif left:  # behind an option, where argparse does not look for more of them
        arguments.overrides = [*arguments.overrides, *left]
    commands = {"check": check, "status": status, "train": train_model, "push": push_model, "serve": serve}
    commands |= {"steer": steer, "keys": manage_keys}
    if not getattr(arguments, "verbose", False):  # a line for each retry; what failed in the end is said once
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        commands.get(arguments.command, work)(arguments)
        return 0
    except UserError as error:
        if getattr(arguments, "verbose", False):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where this one left off" if arguments.command in STAGES else ""
        print(f"stopped{goes_on}", file=sys.stderr, flush=True)
        return 130


def _say_next(run_file: str, config: RunConfig, overrides: Sequence[str]) -> None:
    program = "cpt" if shutil.which("cpt") or not sys.argv[0].endswith("cpt") else os.path.relpath(sys.argv[0])
    command = shlex.join([program, "serve", run_file, *overrides])
    rubric = load_rubrics(config.rubric_paths)[0]
    say(f"\nServe it:    {command}")
    say(
        f"Talk to it:  curl http://{config.serve.host}:{config.serve.port}/v1/chat/completions "
        "-H 'Content-Type: application/json' \\\n"
        '               -H "Authorization: Bearer $CPT_API_KEY" -d '
        f'\'{{"model": "{config.name}", "configuration": {{"{rubric.id}": "{rubric.levels[-1].name}"}}, '
        f'"messages": [{{"role": "user", "content": "{EXAMPLE_PROMPT}"}}]}}\''
    )


def console() -> None:
    """Entry point of the `cpt` command."""
    sys.exit(main())
