"""What `cpt run` and `cpt serve` print for the user to type next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cpt_ray.config import JOB_ENV, RunConfig
from cpt_ray.console import say
from cpt_ray.rubrics.catalog import EXAMPLE_PROMPT, Catalog
from cpt_ray.rubrics.rubric import load_rubrics
from cpt_ray.serving.app import CONFIGURATIONS_PATH, PAGE_PATHS
from cpt_ray.serving.keys import KEY_VARIABLE


def print_next(run_file: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """After a run, how it is served and asked: in a job, by another job."""
    if JOB_ENV in os.environ:  # where `cpt` would be typed is no part of the cluster
        job = shlex.join(["python", "jobs/serve.py", str(run_file), *overrides])
        say(f"\nServe it:    ray job submit --no-wait --address http://HEAD:8265 --working-dir . -- {job}")
        say("             (the job's log says how to ask it and what it can be asked for)")
        return
    program = "cpt" if shutil.which("cpt") or not sys.argv[0].endswith("cpt") else os.path.relpath(sys.argv[0])
    command = shlex.join([program, "serve", str(run_file), *overrides])
    rubric = load_rubrics(config.rubric_paths)[0]
    say(f"\nServe it:    {command}")
    say(
        f"Talk to it:  curl http://{config.serve.host}:{config.serve.port}/{config.name}/v1/chat/completions "
        "-H 'Content-Type: application/json' \\\n"
        '               -H "Authorization: Bearer $CPT_API_KEY" -d '
        f'\'{{"model": "{config.name}", "configuration": {{"{rubric.id}": "{rubric.levels[-1].name}"}}, '
        f'"messages": [{{"role": "user", "content": "{EXAMPLE_PROMPT}"}}]}}\''
    )


def print_examples(config: RunConfig, catalogs: dict[str, Catalog], url: str, new_key: str | None, block: bool) -> None:
    """Once it is served, how to ask it.

    Args:
        catalogs: what can be asked of each model that is served, the tuned one first.
        new_key: a key that was made for this server. block: whether it is stopped by who reads this.
    """
    name, catalog = next(iter(catalogs.items()))
    example = json.dumps({rubric.id: rubric.levels[-1].name for rubric in catalog.rubrics[:1]})
    messages = json.dumps([{"role": "user", "content": EXAMPLE_PROMPT}])
    if new_key:
        say(f"API key (made for this server, shown only here): {new_key}\n  export {KEY_VARIABLE}={new_key}")
    how = "`ray job stop`" if JOB_ENV in os.environ else "Ctrl-C"
    say(f"""serving      {name} at {url}{f" ({how} stops it)" if block else ""}
playground   {url}{PAGE_PATHS[1]}

curl {url}/v1/chat/completions -H "Authorization: Bearer ${KEY_VARIABLE}" -H "Content-Type: application/json" \\
  -d '{{"model": "{name}", "configuration": {example}, "messages": {messages}}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="...")
client.chat.completions.create(model="{name}", messages={messages},
                               extra_body={{"configuration": {example}}})

What can be asked for:
curl {url}{CONFIGURATIONS_PATH} -H "Authorization: Bearer ${KEY_VARIABLE}\"""")
