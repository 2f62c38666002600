"""`python -m cpt_ray` is the `cpt` command."""

from cpt_ray.cli import console

console()
