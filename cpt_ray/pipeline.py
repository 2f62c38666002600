"""What each command does, and what each product of a run depends on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt_ray.capacity import node_types
from cpt_ray.cluster import connected
from cpt_ray.config import (
    TRAIN_PLACES,
    ModelConfig,
    PreferenceRunConfig,
    TuneConfig,
    load_any_config,
    load_config,
    local_path,
    storage_path,
)
from cpt_ray.console import say, status_lines
from cpt_ray.engines.roles import CPU_DTYPE, convert_models, is_here, roles_of, with_dtype
from cpt_ray.engines.vllm import engine_env
from cpt_ray.engines.worker import endpoint_key
from cpt_ray.errors import UserError
from cpt_ray.plan import Plan, check_first_pass, make_plan, run_info
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.rubrics.rubric import load_rubric, load_rubrics, rubric_files
from cpt_ray.serving.examples import print_next
from cpt_ray.serving.keys import Keyring, make_key
from cpt_ray.synthesis.stage import finished_synthesis, synthesize
from cpt_ray.tables.files import file_hash
from cpt_ray.tables.records import Directive, content_id
from cpt_ray.tables.rundir import (
    CATALOG_FILE,
    KEYS_FILE,
    LEDGER_FILE,
    MODEL_INFO_FILE,
    RUN_INFO_FILE,
    SPENT_FILE,
    RunDir,
)
from cpt_ray.training.publishing import HUB, push
from cpt_ray.yaml_file import read_yaml

TRAIN_FORMAT = 2
"""Goes up when the same settings and pairs train another model than before."""


# ---------------------------------------------------------------- check, status


def check(paths: Sequence[Path], overrides: Sequence[str] = ()) -> None:
    """Checks rubric and run files without starting anything; UserError with a line per problem.

    Args:
        overrides: of each run file.
    """
    from cpt_ray.estimate.dry_run import describe_run_file

    files = rubric_files(list(paths))
    run_files = [path for path in files if not {"policy", "writer", "preferences"}.isdisjoint(read_yaml(path))]
    files = [path for path in files if path not in run_files]
    if overrides and not run_files:
        raise UserError(f"{overrides[0]}: changes an entry of a run file, and none is among the paths; give one")
    load_rubrics(files)
    for path in run_files:
        describe_run_file(path, overrides)
    for path in files:
        rubric = load_rubric(path)
        measured = f", {len(rubric.measured)} measured" if rubric.measured else ""
        criteria = f"{len(rubric.criteria)} criteri{'on' if len(rubric.criteria) == 1 else 'a'}"
        say(f"{path}: ok ({rubric.title}: {len(rubric.levels)} levels, {criteria}{measured})")


def status(run: str) -> None:
    """What a run has done and what it cost, read from its directory alone."""
    folder = RunDir.at(run)
    info, ledger = folder.read_yaml(RUN_INFO_FILE), folder.read_json(LEDGER_FILE) or {}
    if not isinstance(info, dict) or "name" not in info:
        raise UserError(f"{run}: no run.yaml there that names a run; give the directory of a run (runs/NAME)")
    say(f"{info['name']}: {'a process is at work on it' if folder.busy else 'no process is at work on it'}")
    say("\n".join(status_lines(ledger)) or "nothing is done yet")


# ---------------------------------------------------------------- the stages of a run


def train_key(config: TuneConfig, *data: object) -> str:
    """Hash of all that the tuned model depends on; where it is trained is not part of it.

    Args:
        data: the shards of pairs, or what identifies a preference set.
    """
    settings = {**config.train.model_dump(exclude=TRAIN_PLACES), "format": TRAIN_FORMAT}
    return content_id(*data, settings, config.policy.policy_key, config.seed)


def _train(plan: Plan, run: RunDir) -> None:
    from cpt_ray.training.stage import train

    plan, shards = finished_synthesis(plan, run)
    train(plan.config, run, shards.pairs, train_key(plan.config, shards.pairs), rubrics=plan.rubrics)
    catalog = Catalog.build(plan.rubrics, run.read("directives", shards.directives, Directive))
    run.write_json(CATALOG_FILE, catalog.to_json())
    if run.adapter.exists():  # an adapter is served from its folder alone
        run.write_json(f"{run.adapter.name}/{CATALOG_FILE}", catalog.to_json())


def _evaluate(plan: Plan, run: RunDir) -> None:
    from cpt_ray.evaluation.stage import evaluate

    plan, shards = finished_synthesis(plan, run)
    mark = run.read_json(MODEL_INFO_FILE)
    if not mark or mark["key"] != train_key(plan.config, shards.pairs):
        problem = "was trained with other settings or pairs" if mark else "is not there"
        raise UserError(f"{run.model}: the tuned model {problem}; run `cpt train` first, with the same overrides")
    evaluate(plan, run, shards)


def _run(plan: Plan, run: RunDir) -> None:
    start = time.monotonic()
    synthesize(plan, run)
    _train(plan, run)
    _evaluate(plan, run)
    say(f"total        {time.monotonic() - start:.0f} s")


RESUMABLE: dict[str, Callable[[Plan, RunDir], object]] = {
    "run": _run,
    "synthesize": synthesize,
    "train": _train,
    "evaluate": _evaluate,
}
"""Commands that resume where they were stopped."""


def run_stage(
    command: str,
    run_file: Path,
    overrides: Sequence[str],
    verbose: bool,
    dry_run: bool = False,
    rates: str | None = None,
) -> None:
    """One stage of a run (or, for "run", all of them), on the cluster this process belongs to.

    Args:
        dry_run: only say what it would ask for; `rates` is an earlier run's directory, for that.
    """
    if rates and not dry_run:
        raise UserError("--rates: is read by --dry-run alone; add that, or leave --rates out")
    if command == "train" and isinstance(alone := load_any_config(run_file, overrides), PreferenceRunConfig):
        if dry_run:
            raise UserError("train --dry-run: reads no preference set; leave --dry-run out")
        _train_alone(alone, verbose)
        return
    config = load_config(run_file, overrides)
    run = RunDir.at(config.run_dir)
    config, dtype = with_dtype(config, run)
    plan = make_plan(config)
    if command in ("run", "synthesize"):
        check_first_pass(plan)
    roles = roles_of(config)
    if dry_run:  # which writes nothing, so it converts and copies nothing
        roles = {name: role for name, role in roles.items() if is_here(role)}
    convert_models(roles)
    for role in _roles_called_by(command, plan).values():
        endpoint_key(role)  # only for its UserError: a missing key ends the command now
    if command == "run" and "policy" in roles:  # now: training comes hours later, and must not fail then
        from cpt_ray.training.checks import open_policy

        open_policy(config).tokeniser.check()
    if command in ("train", "evaluate") and not run.path.exists():
        raise UserError(f"{run.path}: nothing is there; run `cpt synthesize` with this run file first")
    if dry_run:
        from cpt_ray.estimate.dry_run import describe

        describe(command, plan, run, rates, lambda shards: train_key(plan.config, shards.pairs))
        return
    with run.locked():
        run.check_format()
        _write_run(run, config, dtype, **run_info(plan))
        with connected(verbose, run.ray_log, run.environment, config.no_progress_minutes):
            _check_room(command, plan)
            RESUMABLE[command](plan, run)
            if command == "run":
                print_next(run_file, config, overrides)


def _train_alone(config: PreferenceRunConfig, verbose: bool) -> None:
    """A model from a preference set, without a synthesis."""
    from cpt_ray.training.stage import train

    source, run = config.preferences.source, RunDir.at(config.run_dir)
    path = Path(source)
    config, dtype = with_dtype(config, run)
    convert_models(roles_of(config))
    data = file_hash(path) if path.is_file() else source
    with run.locked():
        _write_run(run, config, dtype, name=config.name, preferences=data)
        key = train_key(config, data, config.preferences.data_split)
        connecting = connected(verbose, run.ray_log, run.environment, config.no_progress_minutes)
        train(config, run, (), key, connecting)


def _write_run(run: RunDir, config: TuneConfig, dtype: str | None, **info: object) -> None:
    run.write_run({"config": config.model_dump(mode="json"), **({CPU_DTYPE: dtype} if dtype else {}), **info})


def _roles_called_by(command: str, plan: Plan) -> dict[str, ModelConfig]:
    """The roles that a command calls, by their names in the run file; no judge where everything is measured."""
    config, is_judged = plan.config, any(rubric.judged for rubric in plan.rubrics)
    roles: dict[str, ModelConfig] = {}
    if command in ("run", "synthesize"):
        roles = {"writer": config.writer, "director": config.director}
        roles |= {f"judges[{at}]": judge for at, judge in enumerate(config.judges) if is_judged}
        roles |= {"policy": config.policy} if config.synthesis.control else {}
    if command in ("run", "evaluate"):
        roles |= {"policy": config.policy}
        is_judged = is_judged or config.evaluate.judge_check is not None
    return roles | ({"judge": config.judge} if is_judged and command != "train" else {})


def _check_room(command: str, plan: Plan) -> None:
    """UserError if a stage of the command can never start here; now, not when the stages before it are done."""
    from cpt_ray.logprobs.reference import reference_role
    from cpt_ray.training.checks import check_workers

    types = node_types()
    if command == "steer":
        each = {"GPU" if plan.config.steer.use_gpu else "CPU": 1.0}
        types.check("the training of steer", each, plan.config.steer.num_workers, "lower steer.num_workers")
        return
    for name, role in _roles_called_by(command, plan).items():
        remedy = f"lower {name}.num_actors, num_cpus or num_gpus"
        types.check(f"the {name}", role.actor_resources, role.num_actors.least, remedy)
    if command in ("run", "train"):
        check_workers(plan.config.train)
    if command != "synthesize":  # the evaluation has the answers' perplexity
        role, remedy = reference_role(plan.config), "lower train.num_workers or train.resources_per_worker"
        types.check("the untuned policy", role.actor_resources, role.num_actors.least, remedy)


# ---------------------------------------------------------------- push, steer, serve


def push_model(run_file: Path, target: str, overrides: Sequence[str]) -> None:
    """The run's model to a folder or to the Hugging Face Hub."""
    run = RunDir.at(load_any_config(run_file, overrides).run_dir)
    push(run, target if target.startswith(HUB) else _given_path("TARGET", target, storage_path))


def _given_path(name: str, text: str, read: Callable[[str], str] = local_path) -> str:
    """A path among the arguments, with its ~ replaced; UserError for an address that is not read or written."""
    try:
        return read(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def steer(
    action: str, run_file: Path, overrides: Sequence[str], choices: str | None, dry_run: bool, verbose: bool
) -> None:
    """One action of few-shot steering ("fit", "infer" or "evaluate"), on the cluster this process belongs to."""
    config = load_config(run_file, overrides)
    run = RunDir.at(config.run_dir)
    config, _ = with_dtype(config, run, report=lambda _: None)  # `steer infer` prints its JSON alone
    plan = make_plan(config)
    convert_models(roles_of(config))
    os.environ.update(engine_env(config.policy))  # `infer` holds the engine in this process
    from cpt_ray.evaluation.stage import update_report
    from cpt_ray.steering import comparison, stage

    shards = None
    if action != "infer" and not config.steer.answers:
        plan, shards = finished_synthesis(plan, run)
    steering = stage.Steering(plan, run, shards)
    if action == "infer" and dry_run:
        raise UserError("steer infer: trains nothing, so there is nothing to estimate; leave --dry-run out")
    if action == "infer" and not choices:
        raise UserError("steer infer: give the user's choices: --choices FILE.jsonl")
    if action != "fit" and config.steer.answers:
        raise UserError(f"steer {action}: needs a tuned policy; with steer.answers there is only `steer fit`")
    if dry_run:
        stage.describe(steering)
        return
    choices_made = stage.read_choices(Path(_given_path("--choices", choices))) if action == "infer" and choices else []
    with run.locked(), connected(verbose, run.ray_log, run.environment, config.no_progress_minutes):
        if action != "infer":
            _check_room("steer", plan)
        if choices_made:
            say(json.dumps(stage.infer(steering, choices_made), indent=2, ensure_ascii=False))
        elif action == "fit":
            comparison.compare_rewards(steering)
        else:
            comparison.evaluate(steering)
            if shards:
                update_report(plan, run, shards)


def serve(run_file: Path, overrides: Sequence[str], insecure: bool, replace: bool, verbose: bool) -> None:
    """The tuned model behind an OpenAI-compatible endpoint, until stopped."""
    from cpt_ray.serving.deploy import serve_model
    from cpt_ray.serving.haproxy import serve_env

    config = load_config(run_file, overrides)
    run = RunDir.at(config.run_dir)
    more_env = {**serve_env(), **run.environment}
    connecting = connected(verbose, more_env=more_env, patience=config.no_progress_minutes)
    config, _ = with_dtype(config, run)
    needed = {"steer.embedder", *(("policy",) if config.serve.base or config.serve.adapters else ())}
    convert_models({name: role for name, role in roles_of(config).items() if name in needed})
    serve_model(config, run, api_key=None, insecure=insecure, replace_other=replace, connecting=connecting)


# ---------------------------------------------------------------- keys


def _keyring(run_file: Path, overrides: Sequence[str]) -> tuple[RunDir, Keyring]:
    run = RunDir.at(load_config(run_file, overrides).run_dir)
    return run, Keyring(run.path / KEYS_FILE)


def add_key(run_file: Path, name: str, overrides: Sequence[str], **limits: float | None) -> None:
    """Makes an API key of a run and prints it, once."""
    run, keyring = _keyring(run_file, overrides)
    key, secret = make_key(name, **limits)
    keyring.add(key)
    say(f"{secret}\n(the key of {key.name}, shown only here; kept as a hash in {run.path / KEYS_FILE})")


def list_keys(run_file: Path, overrides: Sequence[str]) -> None:
    """Prints the keys of a run, their limits and what was used of them."""
    run, keyring = _keyring(run_file, overrides)
    spent = run.read_json(SPENT_FILE) or {}
    for key in keyring.keys:
        name = (
            key.name if key.name.isprintable() else ascii(key.name)
        )  # earlier versions allowed control characters in names
        say(f"{name:<20} {key.describe(spent.get(key.name, 0))}")


def revoke_key(run_file: Path, name: str, overrides: Sequence[str]) -> None:
    """Closes a key for good."""
    _, keyring = _keyring(run_file, overrides)
    keyring.revoke(name)
    say(f"{name} is revoked; a running server refuses it within a second")
