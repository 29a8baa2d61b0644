"""Shards on a local Ray give what one process gives."""

import json

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.build import build, run_directories
from stepdpo_trl.pipeline.ray import run_on_ray
from stepdpo_trl.pipeline.session import JudgeOptions, Session
from stepdpo_trl.prompts import STEP_PROMPTS

from .simulated import Student, draw_records

MODEL = ModelSpec("student")


def work(session, folder, shard):
    session.generators[MODEL] = Student()
    session.collect(
        folder, draw_records(20), "drawn", MODEL, STEP_PROMPTS["plain"], Sampling(1.0, 1.0, 256), 2, shard=shard
    )
    session.localize(folder, "rollout", JudgeOptions())
    return session.rectify(folder)


@pytest.mark.slow
def test_shards_on_ray(tmp_path):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        folders = [(tmp_path / "parts" / f"shard-{index}-of-2", (index, 2)) for index in range(2)]
        done = run_on_ray(work, folders)
    finally:
        ray.shutdown()
    with Session() as session:
        counts = work(session, tmp_path / "whole", (0, 1))
    assert sum(row["counts"]["pairs"] for row in done) == counts["pairs"] > 0
    parts, whole = build(run_directories(tmp_path / "parts"))[0], build([tmp_path / "whole"])[0]
    assert sorted(map(json.dumps, parts)) == sorted(map(json.dumps, whole))
