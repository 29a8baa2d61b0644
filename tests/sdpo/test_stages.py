"""Tests for splitting data into stages, and for invalid options and arguments."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl import SDPOCallback, StepDPOTrainer, measure_gamma, split_stages
from stepdpo_trl.sdpo.diagnostics import gamma_metrics
from stepdpo_trl.sdpo.stages import find_stages, join_stages

from ..tiny import plain_rows, step_rows
from ..training import config, make_trainer
from .separate_runs import OPTIONS, staged_run, two_stages
from .test_training import gamma

NUMBERS = Dataset.from_dict({"number": list(range(10)), "source": ["a", "b"] * 5})


def numbers(stages):
    return {name: dataset["number"][:] for name, dataset in stages.items()}


def test_fractions():
    assert numbers(find_stages(NUMBERS, [0.25, 0.75])) == {"1": [0, 1], "2": [2, 3, 4, 5, 6, 7, 8, 9]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 1, 10, 1], {"1": [1, 3], "2": [0], "10": [2]}),  # numbers are sorted
        (["hard", "easy", "hard", "easy"], {"hard": [0, 2], "easy": [1, 3]}),  # names keep their order of appearance
    ],
)
def test_stage_column(values, expected):
    stages = find_stages(Dataset.from_dict({"number": [0, 1, 2, 3], "stage": values}))
    assert numbers(stages) == expected
    assert list(stages) == list(expected)


def test_stratified_split_has_the_same_fraction_of_each_source():
    stages = split_stages(NUMBERS, "stratified", [0.4, 0.6], source_column="source")
    assert [sorted(stage["source"]) for stage in stages.values()] == [list("aabb"), list("aaabbb")]
    assert sorted(number for part in numbers(stages).values() for number in part) == list(range(10))
    assert numbers(stages)["1"] == [1, 4, 7, 8]  # the split of a seed does not change between releases
    assert numbers(split_stages(NUMBERS, "stratified", [0.4, 0.6], seed=1)) != numbers(
        split_stages(NUMBERS, "stratified", [0.4, 0.6], seed=2)
    )


def test_easy_to_hard_by_source():
    # Source a: 2 of 5 rows above 0, mean 1.6. Source b: 3 of 5 rows above 0, mean -1
    gamma = [9, 1, 2, 1, -1, 1, -1, -4, -1, -4]
    by_accuracy = split_stages(NUMBERS, "easy_to_hard", source_column="source", gamma=gamma)
    assert numbers(by_accuracy) == {"b": [1, 3, 5, 7, 9], "a": [0, 2, 4, 6, 8]}
    by_gamma = split_stages(NUMBERS, "easy_to_hard", source_column="source", gamma=gamma, by="gamma")
    assert list(by_gamma) == ["a", "b"]


def test_easy_to_hard_by_row():
    stages = split_stages(NUMBERS, "easy_to_hard", [0.3, 0.7], gamma=[0, 5, 1, 9, 2, 3, -1, -2, -3, 8])
    assert numbers(stages) == {"1": [3, 9, 1], "2": [5, 4, 2, 0, 6, 7, 8]}


def test_measure_gamma(chat_model, tmp_path):
    dataset = Dataset.from_list(plain_rows())
    measured = measure_gamma(chat_model, dataset, config(tmp_path))
    trainer = make_trainer(chat_model, tmp_path, plain_rows())
    assert measured.shape == (8,)
    np.testing.assert_allclose(measured, [gamma(trainer.model, row) for row in trainer.train_dataset], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "hard_to_easy"}, "'easy_to_hard' or 'stratified'"),
        ({"how": "stratified"}, "requires `fractions`"),
        ({"how": "stratified", "fractions": [0.5, 0.6]}, "sum to 1"),
        ({"how": "stratified", "fractions": [0.99, 0.01]}, "Stage 2 is empty"),
        (
            {"how": "stratified", "fractions": [0.5, 0.5], "source_column": "origin"},
            "source_column='origin' is not a column of",
        ),
        ({"how": "easy_to_hard", "fractions": [0.5, 0.5]}, "requires `gamma`"),
        ({"how": "easy_to_hard", "gamma": [1.0]}, "1 values, but the dataset has 10 rows"),
        ({"how": "easy_to_hard", "gamma": [1.0] * 9 + [float("nan")], "fractions": [1.0]}, "row 9 is nan"),
        (
            {"how": "easy_to_hard", "gamma": [1.0] * 10, "source_column": "source", "by": "loss"},
            "'reward_accuracy' or",
        ),
        (
            {"how": "easy_to_hard", "gamma": [1.0] * 10, "source_column": "source", "fractions": [0.5, 0.5]},
            "`fractions` has no effect with `source_column`",
        ),
    ],
)
def test_invalid_splits(options, message):
    with pytest.raises(ValueError, match=message):
        split_stages(NUMBERS, **options)


ROWS = Dataset.from_list(plain_rows(4))


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([], ValueError, "no stages"),
        ([ROWS, ROWS.select([])], ValueError, "Stage '2' is empty"),
        ([ROWS, ROWS.remove_columns("prompt")], ValueError, r"\['prompt'\] are in one of them only"),
        ([ROWS, ROWS.map(lambda row: {"prompt": [{"role": "user", "content": "?"}]})], ValueError, "different types"),
        ({"a": ROWS, "b": ROWS.to_iterable_dataset()}, TypeError, "'b' is of type IterableDataset.*streaming=False"),
        ({1: ROWS, "1": ROWS}, ValueError, "same name"),
        ({"a": ROWS.add_column("stage", [1] * 4), "b": ROWS}, ValueError, "already has a column `stage`"),
        (DatasetDict({"train": ROWS, "test": ROWS}), ValueError, r"splits \['test', 'train'\]"),
    ],
    ids=["none", "empty", "columns", "types", "stream", "names", "stage-column", "splits"],
)
def test_invalid_stages(stages, error, message):
    with pytest.raises(error, match=message):
        join_stages(stages)


def test_missing_or_ambiguous_stages(chat_model, tmp_path):
    with pytest.raises(TypeError, match=r"list of datasets.*callbacks=\[SDPOCallback\(\)\]"):
        make_trainer(chat_model, tmp_path, two_stages())
    with pytest.raises(ValueError, match="found no stages: the data has no column `stage`"):
        staged_run(chat_model, tmp_path, stages=ROWS)
    with pytest.raises(ValueError, match="`fractions` is set, but the data has a column `stage` as well"):
        staged_run(chat_model, tmp_path, callback=SDPOCallback(fractions=[0.5, 0.5]))
    with pytest.raises(ValueError, match="Row 1 has no value"):
        staged_run(chat_model, tmp_path, stages=ROWS.add_column("stage", [1, None, 1, 2]))
    stream = IterableDataset.from_generator(lambda: iter(plain_rows(4)))
    with pytest.raises(TypeError, match=r"streaming=False"):
        staged_run(chat_model, tmp_path, stages=stream, max_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "'restart' or 'continuous'"),
        ({"fractions": [0.5, 0.6]}, "sum to 1"),
        ({"stage_options": {"beta": 0.1}}, "must map names of stages"),
        ({"stage_options": {"2": {"betta": 0.1}}}, "unknown option 'betta'. Did you mean 'beta'"),
        ({"stage_options": {"2": {"beta": 0}}}, "must be a positive number"),
        ({"stage_options": {"2": {"beta": "0.1"}}}, "must be a positive number"),
        ({"stage_options": {"2": {"learning_rate": 1e-4}}, "schedule": "continuous"}, "schedule='restart'"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        SDPOCallback(**options)


def test_stage_of_overlong_rows(chat_model, tmp_path):
    rows = Dataset.from_list(step_rows(8))
    long = rows.map(lambda row: {"chosen": row["chosen"] + " and so on" * 99})
    with pytest.raises(ValueError, match="Stage '2' is empty: all its rows are longer than max_length=300"):
        staged_run(chat_model, tmp_path, stages=[rows, long, rows], max_length=300, overlong_prefix="drop")


def test_fractions_as_an_array(chat_model, tmp_path):
    """Fractions of any type can be saved in checkpoints, which are JSON."""
    callback = SDPOCallback(fractions=np.array([0.5, 0.5]))
    staged = staged_run(chat_model, tmp_path, stages=plain_rows(), callback=callback, save_strategy="epoch")
    staged.train()
    assert [len(stage.dataset) for stage in staged.stages] == [4, 4]


def test_data_in_torch_format(chat_model, tmp_path):
    rows = Dataset.from_list([{**row, "stage": i % 2} for i, row in enumerate(plain_rows())]).with_format("torch")
    staged = staged_run(chat_model, tmp_path, stages=rows)
    assert [stage.name for stage in staged.stages] == ["0", "1"]


def test_streamed_evaluation_data(chat_model, tmp_path):
    stream = ROWS.to_iterable_dataset()
    staged_run(chat_model, tmp_path, eval_dataset=stream)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True with a streamed evaluation dataset"):
        staged_run(chat_model, tmp_path, "scores", eval_dataset={"a": stream})


def test_custom_optimizer(chat_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    optimizers = torch.optim.AdamW(model.parameters(), lr=1e-3), None
    options = {"processing_class": AutoTokenizer.from_pretrained(chat_model), "optimizers": optimizers}
    callback = SDPOCallback(stage_options={"2": {"learning_rate": 1e-4}})
    with pytest.raises(ValueError, match="learning_rate in stage_options together with a custom optimizer"):
        staged_run(model, tmp_path, callback=callback, **options)
    staged_run(model, tmp_path, **options).train()


def test_attaching_a_second_callback(chat_model, tmp_path):
    staged = staged_run(chat_model, tmp_path)
    with pytest.raises(ValueError, match="already has an SDPOCallback"):
        SDPOCallback(staged)


def test_unknown_stage(chat_model, tmp_path):
    with pytest.raises(ValueError, match=r"unknown stage '3'. The stages are \['1', '2'\]"):
        staged_run(chat_model, tmp_path, callback=SDPOCallback(stage_options={3: {"beta": 0.1}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
            "load_best_model_at_end",
        ),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]}, "state cannot be cleared"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_arguments(options, message, chat_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        staged_run(chat_model, tmp_path, **options)


def test_unsupported_models(chat_model, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(chat_model)
    with pytest.raises(ValueError, match="Remove `ref_model`"):
        staged_run(chat_model, tmp_path, "lora", ref_model=reference)
    narrower = type(reference)(type(reference.config)(**{**reference.config.to_dict(), "intermediate_size": 16}))
    with pytest.raises(ValueError, match="has a different architecture"):
        staged_run(chat_model, tmp_path, ref_model=narrower)


def test_schedule_that_cannot_restart(chat_model, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_dataset": ROWS}
    staged = staged_run(chat_model, tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **evaluated)
    with pytest.raises(ValueError, match="schedule='continuous'"):
        staged.train()


def test_two_callbacks(chat_model, tmp_path):
    with pytest.raises(ValueError, match="2 SDPOCallbacks"):
        make_trainer(chat_model, tmp_path, two_stages(), callbacks=[SDPOCallback(), SDPOCallback])


def test_callback_without_a_trainer(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, plain_rows(), **OPTIONS)
    trainer.add_callback(SDPOCallback())
    with pytest.raises(ValueError, match=r"SDPOCallback\(trainer\)"):
        trainer.train()


def test_callback_passed_as_a_class(chat_model, tmp_path):
    trainer = make_trainer(chat_model, tmp_path, two_stages(), callbacks=[SDPOCallback])
    assert len(trainer.stages) == 2
    assert isinstance(trainer, StepDPOTrainer)


def test_warnings_about_one_stage_and_shared_rows(chat_model, tmp_path, caplog):
    staged_run(chat_model, tmp_path, stages=[ROWS])
    assert "There is only one stage" in caplog.text
    staged_run(chat_model, tmp_path, stages=[ROWS, Dataset.from_list(plain_rows(7)[2:])])
    assert "2 rows of stage 2 ('2') are also in an earlier stage (the first of them in '1')" in caplog.text


def test_warning_about_a_reference_trained_on_the_data(chat_model, tmp_path, caplog):
    staged = staged_run(chat_model, tmp_path)
    gamma = np.linspace(-1, 200, 100)
    gamma_metrics(staged.stages[1], np.concatenate([gamma, [-1.0] * 10]))
    gamma_metrics(staged.stages[1], np.linspace(1, 10, 100))  # easy rows, which stage 1 may have
    assert "seems to have been trained on" not in caplog.text
    metrics = gamma_metrics(staged.stages[1], gamma)
    assert "prefers the chosen answer in 99.0% of 100 rows, with a mean gamma_ref of 99.5" in caplog.text
    assert metrics == pytest.approx({"sdpo/gamma_ref": 99.5, "sdpo/ref_accuracy": 0.99})
