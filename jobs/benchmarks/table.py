"""The README's table of several training seeds: `python jobs/benchmarks/table.py runs/*/report/results.json`."""

import sys
from pathlib import Path

from cpt_ray.errors import UserError
from cpt_ray.evaluation.seeds import markdown, over_seeds, read_results

if __name__ == "__main__":
    try:
        print(markdown(over_seeds([read_results(Path(name)) for name in sys.argv[1:]])))
    except UserError as error:
        sys.exit(f"error: {error}")
