"""Tunes the policy on the pairs.

ray job submit --working-dir . -- python jobs/train.py RUN_FILE run_dir=/shared/runs/NAME
"""

import sys

from cpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
