"""A trained conditional policy on the disk."""

from __future__ import annotations

from dataclasses import dataclass

from cpt_ray.config import ModelConfig
from cpt_ray.errors import UserError
from cpt_ray.steering.policy import VERSION
from cpt_ray.tables.rundir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedForm:
    """A conditional policy on the disk, as `steering/<form>.json` has it."""

    weights: str
    """Relative to the run directory."""
    policy: str
    """Identity of the model that it conditions."""
    embedder: str
    """Identity of the model that embeds choices."""
    size: int
    mean: list[float]
    """Of the embeddings learned from, per dimension."""
    deviation: list[float]
    version: int = VERSION

    @staticmethod
    def file(form: str) -> str:
        """Where it is in the run directory."""
        return f"steering/{form}.json"

    @classmethod
    def read(cls, run: RunDir, form: str, policy: ModelConfig, embedder: ModelConfig) -> SavedForm:
        """UserError unless one was fitted for these models."""
        found = run.read_json(cls.file(form))
        if not found:
            raise UserError(
                f"serve.preferences: no {form} in {run.path}; run `cpt steer fit` with steer.forms=[{form}]"
            )
        saved = cls(**{"version": 1} | found)
        if saved.version != VERSION:
            raise UserError(f"serve.preferences: the {form} is an earlier version's; run `cpt steer fit` again")
        for what, mine, model in (("model", saved.policy, policy), ("steer.embedder", saved.embedder, embedder)):
            if mine != model.identity:
                raise UserError(f"serve.preferences: the {form} is for another {what}; run `cpt steer fit` again")
        return saved
