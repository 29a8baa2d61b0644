"""sDPO runs that are killed and resumed, and checkpoints that cannot be resumed from."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stepdpo_trl import SDPOCallback

from ..distributed.launcher import run_script
from ..training import assert_same_weights, make_trainer
from .kill_and_resume import POINTS
from .separate_runs import staged_run, trained_weights, two_stages

SAVING = {"save_strategy": "steps", "save_steps": 4}


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(chat_model, tmp_path):
    """SIGKILL before, during and after the swap, in checkpoints, and at random times."""
    script = Path(__file__).parent / "kill_and_resume.py"
    done = run_script(script, chat_model, tmp_path, "full", "scores", "lora", "--random", "1", timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    assert {kill["point"] for kill in kills} >= {*POINTS}
    assert sum(kill["killed"] for kill in kills) >= 20
    assert [kill for kill in kills if kill["difference"] > 0] == []


@pytest.fixture(scope="module")
def saved(chat_model, tmp_path_factory):
    """Folder of a run in two stages with all its checkpoints; number 8 is within stage 2."""
    folder = tmp_path_factory.mktemp("saved")
    staged_run(chat_model, folder, **SAVING).train()
    return folder


def resumed(model, folder, copy, **options):
    shutil.copytree(folder, copy)
    return staged_run(model, copy, **{**SAVING, **options})


def test_each_stage_ends_with_a_checkpoint(saved):
    numbers = sorted(int(path.name.split("-")[1]) for path in saved.glob("checkpoint-*"))
    assert numbers == [4, 6, 8, 12]


@pytest.mark.parametrize("checkpoint", [4, 6, 8])  # in stage 1, at its end, in stage 2
@pytest.mark.parametrize("restored", [False, True], ids=["callback", "restored-callback"])
def test_resumed_run_ends_as_uninterrupted_one(restored, checkpoint, saved, chat_model, tmp_path):
    """Also when the Trainer recreates the callback from the checkpoint."""
    trainer = resumed(chat_model, saved, tmp_path / "copy", restore_callback_states_from_checkpoint=restored)
    trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / f"checkpoint-{checkpoint}"))
    expected = load_file(saved / "stage-2" / "model.safetensors")
    assert_same_weights(trained_weights(trainer), expected, rtol=0, atol=0)


def test_stage_models_come_from_the_latest_training(saved, chat_model, tmp_path):
    """A run resumed before the swap with other settings overwrites the models of both stages."""
    trainer = resumed(chat_model, saved, tmp_path / "copy", max_grad_norm=0.01)
    trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-4"))
    written = load_file(tmp_path / "copy" / "stage-2" / "model.safetensors")
    assert_same_weights(trained_weights(trainer), written, rtol=0, atol=0)
    first = load_file(tmp_path / "copy" / "stage-1" / "model.safetensors")
    before = load_file(saved / "stage-1" / "model.safetensors")
    assert any((first[name] - before[name]).abs().max() > 1e-5 for name in first)
    # The old checkpoint needs the old model of stage 1 as its reference
    shutil.rmtree(tmp_path / "copy" / "checkpoint-8")
    shutil.copytree(saved / "checkpoint-8", tmp_path / "copy" / "checkpoint-8")
    with pytest.raises(ValueError, match="missing, incomplete, or from another stage or run"):
        staged_run(chat_model, tmp_path / "copy").train(str(tmp_path / "copy" / "checkpoint-8"))


def test_scores_of_other_evaluation_data_raise(chat_model, tmp_path):
    def make(rows):
        return staged_run(chat_model, tmp_path, "scores", eval_dataset=rows, eval_strategy="epoch", **SAVING)

    make(two_stages()[0]).train()
    with pytest.raises(ValueError, match=r"stage-2-eval.npz.*for other data than the 9 eval rows"):
        make(two_stages()[1].select(range(9))).train(str(tmp_path / "checkpoint-8"))


def test_finished_run_only_saves_its_last_stage(saved, chat_model, tmp_path):
    trainer = resumed(chat_model, saved, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "stage-2")  # as if killed before saving it
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert (tmp_path / "copy" / "stage-2" / "model.safetensors").is_file()


def test_incomplete_checkpoint_is_skipped(saved, chat_model, tmp_path, caplog):
    trainer = resumed(chat_model, saved, tmp_path / "copy")
    state = tmp_path / "copy" / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-12, which is not a complete checkpoint" in caplog.text
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-5"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stages": [two_stages()[0], two_stages()[1].select(range(8))]},
            "rows of stage 2: 11 in the checkpoint, 8 now",
        ),
        ({"stages": two_stages()[::-1]}, "digest of stage 1: '[0-9a-f]+' in the checkpoint, '[0-9a-f]+' now"),
        ({"stages": [*two_stages(), two_stages()[0]]}, "stages: 2 in the checkpoint, 3 now"),
        ({"num_train_epochs": 3}, "updates of stage 1: 6 in the checkpoint, 9 now"),
        ({"precompute_ref_log_probs": True}, "reference: 'model' in the checkpoint, 'scores' now"),
        ({"callback": SDPOCallback(schedule="continuous")}, "schedule: 'restart' in the checkpoint, 'continuous' now"),
        (
            {"callback": SDPOCallback(stage_options={2: {"beta": 0.3}})},
            "beta of stage 2: 0.4 in the checkpoint, 0.3 now",
        ),
    ],
    ids=["rows", "order", "number", "epochs", "reference", "schedule", "beta"],
)
def test_checkpoints_of_other_stages_raise(options, message, saved, chat_model, tmp_path):
    trainer = resumed(chat_model, saved, tmp_path / "copy", **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-8"))


def test_missing_reference_raises(saved, chat_model, tmp_path):
    """Only the model of stage 1 of the same run may become the reference of stage 2."""
    trainer = resumed(chat_model, saved, tmp_path / "copy")
    marker = tmp_path / "copy" / "stage-1" / "sdpo_stage.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "id": "another"}))
    with pytest.raises(ValueError, match=r"stage 2: its reference is the model in .*stage-1, which is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-8"))


def swap_stages(folder):
    (folder / "stage-1").rename(folder / "swap")
    (folder / "stage-2").rename(folder / "stage-1")
    (folder / "swap").rename(folder / "stage-2")


def swap_weights(folder):
    shutil.copy(folder / "stage-2" / "model.safetensors", folder / "stage-1" / "model.safetensors")


def cut(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def forget(*keys):
    def change(folder):
        file = folder / "checkpoint-8" / "trainer_state.json"
        state = json.loads(file.read_text())
        place = state
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        file.write_text(json.dumps(state))

    return change


RECORD = ("stateful_callbacks", "SDPOCallback", "attributes", "record")
OTHER_STAGE = "Cannot resume in stage 2: .*stage-1, which is missing, incomplete, or from another stage or run"
DAMAGED = "Cannot resume from .*checkpoint-8: .* is missing, truncated or damaged"
CHANGES = {
    "swapped": (swap_stages, OTHER_STAGE),
    "weights": (cut("checkpoint-8/model.safetensors"), DAMAGED),
}
MORE_CHANGES = {
    "swapped-weights": (swap_weights, OTHER_STAGE),
    "stage": (cut("stage-1/sdpo_stage.json"), OTHER_STAGE),
    "stage-weights": (cut("stage-1/model.safetensors"), OTHER_STAGE),
    "optimizer": (cut("checkpoint-8/optimizer.pt"), DAMAGED),
    "scheduler": (cut("checkpoint-8/scheduler.pt"), DAMAGED),
    "random-state": (cut("checkpoint-8/rng_state.pth"), DAMAGED),
    "state": (cut("checkpoint-8/trainer_state.json"), "Cannot resume from .*checkpoint-8, which is not a complete"),
    "step": (forget("global_step"), "Cannot resume from .*checkpoint-8, which is not a complete"),
    "record": (forget(*RECORD), "Cannot resume from .*checkpoint-8: the record of its stages is incomplete"),
    "ids": (forget(*RECORD, "ids"), "Cannot resume from .*checkpoint-8: the record of its stages is incomplete"),
    "digest": (forget(*RECORD, "stages", 0, "digest"), "digest of stage 1: None in the checkpoint, '[0-9a-f]+' now"),
}


@pytest.mark.parametrize("name", [*CHANGES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_CHANGES)])
def test_swapped_and_truncated_files_raise(name, saved, chat_model, tmp_path):
    change, message = {**CHANGES, **MORE_CHANGES}[name]
    trainer = resumed(chat_model, saved, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-8"))


@pytest.mark.long
def test_truncated_scores_raise(chat_model, tmp_path):
    staged_run(chat_model, tmp_path, "scores", **SAVING).train()
    cut("sdpo/stage-2-train.npz")(tmp_path)
    with pytest.raises(ValueError, match=r"Cannot resume in stage 2: .*stage-2-train.npz, which holds the scores"):
        staged_run(chat_model, tmp_path, "scores", **SAVING).train(str(tmp_path / "checkpoint-8"))


def test_checkpoint_without_stages_raises(chat_model, tmp_path):
    make_trainer(chat_model, tmp_path, two_stages()[0], **SAVING).train()
    with pytest.raises(ValueError, match="run without SDPOCallback"):
        staged_run(chat_model, tmp_path).train(resume_from_checkpoint=True)


def test_trainer_past_stage_1_cannot_restart(saved, chat_model, tmp_path):
    """Its reference has been replaced, so it cannot train on stage 1 again."""
    trainer = resumed(chat_model, saved, tmp_path / "copy")
    trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-8"))
    weights = trained_weights(trainer)
    with pytest.raises(RuntimeError, match="has already trained"):
        trainer.train()
    with pytest.raises(RuntimeError, match="a checkpoint from the first stage"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-8"))
    assert_same_weights(trained_weights(trainer), weights, rtol=0, atol=0)
