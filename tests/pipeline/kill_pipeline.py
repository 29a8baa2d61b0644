"""All stages with the made-up student, to be killed anywhere: python -m tests.pipeline.kill_pipeline FOLDER"""

import sys
from pathlib import Path

from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.generation import ModelSpec, Sampling
from stepdpo_trl.pipeline.judge_options import JudgeOptions
from stepdpo_trl.pipeline.session import Session

from ..simulated import Student, draw_records


def main(path: Path) -> None:
    model = ModelSpec("student")
    with Session({model: Student(delay=0.001)}) as session:
        problems, prompt = draw_records(36), STEP_PROMPTS["plain"]
        session.collect(path, problems, "drawn", model, prompt, Sampling(1.0, 1.0, 256), 3)
        session.localize(path, "rollout", JudgeOptions())
        session.rectify(path, num_corrections=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
