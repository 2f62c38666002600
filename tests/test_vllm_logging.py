"""vLLM's logging set-up in a process with Serve's handlers, which is a process of its own here."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, sys
from logging.handlers import MemoryHandler
from vllm import AsyncEngineArgs
from vllm.logger import configure_logging_if_needed
from cpt_ray.serving.vllm_app import set_up_logging

logger, file = logging.getLogger("ray.serve"), logging.FileHandler(sys.argv[1])
handler = MemoryHandler(1, target=file)
logger.addHandler(handler)
arguments = AsyncEngineArgs(model=".")
if sys.argv[2] == "ours":
    set_up_logging(arguments)
configure_logging_if_needed(arguments.create_logging_config())  # as an engine does
print(handler.target is file)
logger.warning("after it")
"""


def test_serves_log_files_outlive_vllms_set_up_which_takes_them(tmp_path: Path) -> None:
    def printed(whose: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / whose), whose]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout

    assert printed("vllms").splitlines()[-1] == "False"  # once it is True, set_up_logging can go
    assert printed("ours").splitlines()[-1] == "True"
    assert (tmp_path / "ours").read_text() == "after it\n"
