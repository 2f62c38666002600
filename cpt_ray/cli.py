"""The command line: arguments only; `pipeline` has what the commands do.

With argparse: typer needed a third more lines for the same arguments and knows no shortened options.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpt_ray import __version__, pipeline
from cpt_ray.cluster import interrupted_by_sigterm, terminated
from cpt_ray.errors import UserError

STAGE_HELP = {
    "run": "synthesize, train and evaluate",
    "synthesize": "write and judge answers, make twin pairs",
    "train": "tune the policy on the pairs (DPO)",
    "evaluate": "measure base and tuned, write the report",
}
LIMITS: dict[str, tuple[Callable[[str], float], float, str]] = {
    "--requests-per-minute": (int, 1e12, "requests it may send each minute"),
    "--tokens-per-minute": (int, 1e12, "prompt and answer tokens it may use each minute"),
    "--budget": (int, 1e15, "prompt and answer tokens it may use in all"),
    "--days": (float, 36525, "days until it expires"),
}
"""Limits that `cpt keys add` can put on a key: kind, highest value, meaning."""

OVERRIDE = re.compile(r"\w[^=]*=")
"""How an override begins."""


def _limit(kind: Callable[[str], float], most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}; give {wanted} above 0, at most {most:,.0f}")
        return value

    return number


def _add_command(group: Any, name: str, text: str, do: Callable[..., None]) -> argparse.ArgumentParser:
    """A command of a group; its arguments are named like the parameters of `do`."""
    parser: argparse.ArgumentParser = group.add_parser(name, help=text)
    parser.set_defaults(do=do)
    return parser


def _add_run_file(parser: argparse.ArgumentParser, *between: tuple[str, str | None], verbose: str = "") -> None:
    """RUN_FILE, other arguments (name, help) and the overrides; --verbose if there is a help text for it."""
    parser.add_argument("run_file", metavar="RUN_FILE", type=Path)
    for name, help in between:
        parser.add_argument(name, metavar=name.upper(), help=help)
    help = "entries of the run file to change"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)
    if verbose:
        parser.add_argument("--verbose", action="store_true", help=verbose)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cpt", description="Rubrics in, a configurable language model out, on Ray.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = _add_command(commands, "check", "lint rubric files and run files; nothing is started", _check)
    check.add_argument("paths", nargs="+", metavar="PATH", help="a rubric file, a folder of them, or a run file")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="entries of the run files to change")
    status = _add_command(commands, "status", "what a run has done so far and what it cost", pipeline.status)
    status.add_argument("run", metavar="RUN", help="the directory of a run, or its address in an object store")
    output = "show what Ray and vLLM print, and tracebacks"
    for name, text in STAGE_HELP.items():
        stage = _add_command(commands, name, text, functools.partial(pipeline.run_stage, name))
        _add_run_file(stage, verbose=output)
        stage.add_argument(
            "--dry-run", action="store_true", help="say what it would ask for and take, and start nothing"
        )
        stage.add_argument("--rates", metavar="RUN", help="of --dry-run: an earlier run's directory, for its rates")
    serve = _add_command(commands, "serve", "serve the tuned model", pipeline.serve)
    _add_run_file(serve, verbose=output)
    serve.add_argument("--insecure", action="store_true", help="let everyone in, without a key")
    serve.add_argument("--replace", action="store_true", help="take the name over from another run that has it")
    text = "copy the tuned model to a folder or to the Hugging Face Hub"
    push = _add_command(commands, "push", text, lambda verbose, **given: pipeline.push_model(**given))
    _add_run_file(push, ("target", "an empty folder, or hf://OWNER/NAME"), verbose=output)
    _add_keys(commands)
    steer = _add_command(commands, "steer", "few-shot steering: a user's choices set the dial", pipeline.steer)
    steer.add_argument(
        "action",
        choices=("fit", "infer", "evaluate"),
        help="fit: learn from simulated users; infer: the configuration that a user's choices imply; "
        "evaluate: fit, then compare all methods",
    )
    _add_run_file(steer, verbose="show what Ray and vLLM print")
    steer.add_argument("--dry-run", action="store_true", help="check the data and say what would be learned, no more")
    steer.add_argument("--choices", metavar="FILE", help="infer: JSONL of prompt, chosen, rejected")
    return parser


def _check(paths: Sequence[str], overrides: Sequence[str]) -> None:
    """Of both, since argparse leaves everything to the paths."""
    given = [*paths, *overrides]
    changes = [text for text in given if OVERRIDE.match(text) and not os.path.exists(text)]
    pipeline.check([Path(text) for text in given if text not in changes], changes)


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="make, list and revoke API keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    add = _add_command(actions, "add", "make a key", pipeline.add_key)
    _add_run_file(add, ("name", None))
    for option, (kind, most, meaning) in LIMITS.items():
        add.add_argument(option, type=_limit(kind, most), metavar="N", help=meaning)
    _add_run_file(_add_command(actions, "list", "show all keys", pipeline.list_keys))
    _add_run_file(_add_command(actions, "revoke", "close a key", pipeline.revoke_key), ("name", None))


def _parsed(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    given = vars(arguments)
    if "overrides" not in given or not all(map(OVERRIDE.match, left)):
        parser.parse_args(argv)  # only for argparse's own error, which names the unknown argument
    elif left:  # overrides after an option: argparse collects none there
        given["overrides"] = [*given["overrides"], *left]
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for a user's error, 130 for Ctrl-C, 143 for SIGTERM."""
    given = _parsed(argv)
    do, command, verbose = given.pop("do"), given.pop("command"), given.get("verbose", False)
    if not verbose:  # it logs each retry; the error at the end is enough
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        terminated.clear()
        with interrupted_by_sigterm():
            do(**given)
        return 0
    except UserError as error:
        if verbose:
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where this one left off" if command in pipeline.RESUMABLE else ""
        print(f"stopped{goes_on}", file=sys.stderr, flush=True)
        return 128 + (signal.SIGTERM if terminated.is_set() else signal.SIGINT)


def console() -> None:
    """Entry point of the `cpt` command."""
    sys.exit(main())
