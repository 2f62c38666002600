"""Few-shot steering: learns from simulated users, infers a configuration, compares the methods.

ray job submit --working-dir . -- python jobs/steer.py fit|infer|evaluate RUN_FILE run_dir=/shared/runs/NAME
"""

import sys

from cpt_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["steer", *sys.argv[1:]]))
