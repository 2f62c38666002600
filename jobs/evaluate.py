"""Measures base and tuned and writes the report.

ray job submit --working-dir . -- python jobs/evaluate.py RUN_FILE run_dir=/shared/runs/NAME
"""

import sys

from cpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
