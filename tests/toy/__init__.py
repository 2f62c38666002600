"""The toy model: a tiny chat model and its made-up world, both made by this project (see `make.py`), for tests alone.

`run.yaml` is its run file; the paths in it are those from the top of the repository, where tests run.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
RUBRICS = FOLDER / "rubrics"
"""Two rubrics and prompts.jsonl."""
RUN_FILE = FOLDER / "run.yaml"
