"""Serves the tuned model until stopped.

ray job submit --working-dir . -- python jobs/serve.py RUN_FILE run_dir=/shared/runs/NAME
"""

import sys

from cpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
