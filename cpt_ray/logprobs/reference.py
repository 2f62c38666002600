"""Log-probabilities of answers under the untuned policy, computed once by Ray Data actors.

DPO compares with the policy as it was. Its log-probabilities never change, so they are a table that every restart and
every sweep over training settings reads. They are computed by the code that trains (`cpt_ray/logprobs/model.py`), in
the same precision. The evaluation uses the same table for the perplexity of its answers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cpt_ray.config import ModelConfig, Range, TrainConfig, TuneConfig
from cpt_ray.engines.ledger import Tally, ledger_entry
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.step import Line, Runner, Step
from cpt_ray.errors import UserError
from cpt_ray.logprobs.precision import is_autocast, load_arguments, weights_dtype
from cpt_ray.logprobs.rows import SHARD_ROWS, Row, sequence_ids, write_rows
from cpt_ray.tables.records import ReferenceLogProb, content_id
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import DIGITS, ShardName
from cpt_ray.tables.store_path import path_of, readable

TABLE = "reference"


class ReferenceModel:
    """The untuned policy, in this process."""

    def __init__(self, model: ModelConfig, settings: TrainConfig):
        import torch

        from cpt_ray.logprobs.model import load_policy, prepare_model

        self._settings = settings
        if model.num_gpus == 0:
            torch.set_num_threads(max(1, int(model.num_cpus)))
        where = "auto" if model.num_gpus else "cpu"
        self._model = load_policy(model.path, **load_arguments(settings), device_map=where)
        self._model.eval().requires_grad_(False)
        prepare_model(self._model)

    def run(self, rows: Sequence[Row]) -> list[list[float]]:
        """For each row, the log-probability (nats) of each of its answers."""
        import torch

        from cpt_ray.logprobs.model import answer_logps

        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=is_autocast(self._settings)):
            return answer_logps(self._model, rows, 2 * self._settings.micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class ReferenceStep(Step):
    """Rows -> their answers' log-probabilities."""

    rows: str
    """A parquet file of rows; a shard is one of its row groups."""
    groups: dict[str, int]
    """The row group of each shard."""
    stage: str = "reference"
    table: str = TABLE

    def __call__(self, engine: ReferenceModel, run: RunDir, shard: str) -> None:
        """Computes one shard."""
        rows = pq.ParquetFile(readable(path_of(self.rows))).read_row_group(self.groups[shard]).to_pylist()
        tally = Tally(len(rows))
        tally.counts["prompt_tokens"] = sum(len(row["prompt"]) + sum(map(len, row["answers"])) for row in rows)
        logps_of_rows = engine.run(rows)
        if not all(math.isfinite(logp) for logps in logps_of_rows for logp in logps):
            raise UserError("the policy gives an answer no finite probability; its weights or train.dtype are broken")
        table = {
            name: ReferenceLogProb(sequence_id=name, log_prob=logp)
            for row, logps in zip(rows, logps_of_rows, strict=True)
            for name, logp in zip(sequence_ids(row), logps, strict=True)
        }
        run.write(self.table, shard, table.values(), tally.close(len(table)))


def add_reference(
    config: TuneConfig, run: RunDir, rows: Sequence[Row], stage: str = "reference", runner: Runner = run_lines
) -> list[Row]:
    """The rows with `ref_logps`, read from the reference table; what is missing there is computed first.

    Args:
        stage: its name in the ledger.
    """
    settings = config.train
    # model files (template included) and precision; prompt and answer are in the sequences' ids
    bits = settings.lora and settings.lora.quantize
    key = content_id(config.policy.identity, weights_dtype(settings), is_autocast(settings), bits)[:DIGITS]
    ids = [sequence_ids(row) for row in rows]
    known = _read(run, key)
    missing = [at for at, names in enumerate(ids) if not known.keys() >= set(names)]
    if missing:
        # two shards an actor at least, so that none waits for another's last one
        size = min(SHARD_ROWS, math.ceil(len(missing) / (2 * settings.num_workers.most)))
        shards = [missing[at : at + size] for at in range(0, len(missing), size)]
        names = [ShardName(key).keyed(content_id(*(ids[at] for at in shard))) for shard in shards]
        path = write_rows(run, stage, [rows[at] for at in missing], size)
        groups = {name: at for at, name in enumerate(names)}
        step = ReferenceStep(model=reference_role(config), rows=path, groups=groups, stage=stage)
        runner(run, [Line(names, [step])], functools.partial(ReferenceModel, settings=settings))
        run.add_to_ledger(stage, ledger_entry(run, TABLE, names, config.policy.price))
        known = _read(run, key)
    return [row | {"ref_logps": [known[name] for name in names]} for row, names in zip(rows, ids, strict=True)]


def _read(run: RunDir, key: str) -> dict[str, float]:
    table = run.read(TABLE, sorted(run.names(TABLE, key)), ReferenceLogProb)
    return {record.sequence_id: record.log_prob for record in table}


def reference_role(config: TuneConfig) -> ModelConfig:
    """The policy on the training's resources: as many actors as workers, or one with all that shards need."""
    settings = config.train
    resources = settings.worker_resources
    changes: dict[str, Any] = {"num_actors": settings.num_workers, "num_cpus": resources.get("CPU", 1), "engine": {}}
    changes["num_gpus"] = resources.get("GPU", 0)
    if settings.sharding == "fsdp":
        changes |= {"num_actors": Range(1, 1), "num_gpus": changes["num_gpus"] * settings.num_workers.least}
    return config.policy.model_copy(update=changes)
