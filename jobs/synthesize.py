"""Writes and judges answers and makes twin pairs.

ray job submit --working-dir . -- python jobs/synthesize.py RUN_FILE run_dir=/shared/runs/NAME
"""

import sys

from cpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
