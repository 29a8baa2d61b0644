"""Tests for training in stages: equality with separate runs, schedules, adapters, evaluation and the report."""

import inspect
import itertools
import json
import math
import multiprocessing

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from stepdpo_trl import SDPOCallback, StepDPOConfig, StepDPOTrainer

from ..tiny import plain_rows, step_rows
from ..training import assert_same_weights, logged, make_trainer
from .separate_runs import (
    MODES,
    OPTIONS,
    check_rows,
    lora,
    nf4,
    record_rows,
    separate_runs,
    staged_run,
    trained_weights,
    two_stages,
)


@pytest.fixture(autouse=True)
def _no_repacking(monkeypatch):
    # On CPUs with AVX512-BF16, a forward pass in evaluation mode repacks 4-bit weights and breaks later gradients
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


@pytest.mark.parametrize("mode", MODES)
def test_equals_separate_runs(mode, chat_model, tmp_path):
    first, second = separate_runs(chat_model, tmp_path / "separate", mode)
    staged = staged_run(chat_model, tmp_path / "staged", mode)
    staged.train()
    assert_same_weights(trained_weights(staged), trained_weights(second), rtol=0, atol=0)
    for name in ("loss", "learning_rate", "rewards/margins"):
        assert logged(staged, name) == logged(first, name) + logged(second, name)
    assert logged(staged, "loss")[0] == logged(staged, "sdpo/first_batch_loss")[0] == pytest.approx(math.log(2))
    assert logged(staged, "sdpo/first_batch_margin") == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_equals_separate_runs_with_shared_prefixes(mode, chat_model, tmp_path):
    """The weights are equal up to rounding, which Adam amplifies where a gradient is near zero."""
    *_, last = separate_runs(chat_model, tmp_path / "separate", mode)
    staged = staged_run(chat_model, tmp_path / "staged", mode, shared_prefix="on", max_tokens_per_forward=1024)
    staged.train()
    atol = 2e-3 if mode == "qlora" else 1e-4  # bfloat16 adapter with weights up to 0.1
    assert_same_weights(trained_weights(staged), trained_weights(last), rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [two_stages(), two_stages(rows=step_rows)], ids=["plain", "steps"])
def test_stock_trainer_with_a_stage_column(rows, chat_model, tmp_path):
    """The callback works with `trl.DPOTrainer`, and the rows need not be sorted by stage."""
    if "initial_reason_steps" in rows[0].column_names:
        cls, config_cls = StepDPOTrainer, StepDPOConfig
    else:
        cls, config_cls = DPOTrainer, DPOConfig
    *_, oracle = separate_runs(chat_model, tmp_path / "separate", stages=rows, cls=cls, config_cls=config_cls)
    mixed = [{**row, "stage": 7} for row in rows[1]] + [{**row, "stage": 3} for row in rows[0]]
    trainer = make_trainer(chat_model, tmp_path, mixed, cls, config_cls, **OPTIONS)
    trainer.add_callback(SDPOCallback(trainer))
    trainer.train()
    assert [stage.name for stage in trainer.stages] == ["3", "7"]
    assert isinstance(trainer, cls)
    assert_same_weights(trained_weights(trainer), trained_weights(oracle), rtol=0, atol=0)


def test_options_of_a_stage(chat_model, tmp_path):
    own = {"beta": 0.1, "learning_rate": 3e-4, "num_train_epochs": 1.5}
    first = make_trainer(chat_model, tmp_path / "1", two_stages()[0], DPOTrainer, DPOConfig, **OPTIONS)
    first.train()
    first.save_model()
    second = make_trainer(str(tmp_path / "1"), tmp_path / "2", two_stages()[1], DPOTrainer, **{**OPTIONS, **own})
    second.train()

    stages = dict(zip(("easy", "hard"), two_stages(), strict=True))
    staged = staged_run(chat_model, tmp_path, stages=stages, callback=SDPOCallback(stage_options={"hard": own}))
    staged.train()
    assert logged(staged, "loss") == pytest.approx(logged(first, "loss") + logged(second, "loss"), abs=1e-6)
    assert staged.state.global_step == first.state.global_step + second.state.global_step == 6 + 5
    assert_same_weights(trained_weights(staged), trained_weights(second), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("polynomial", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("linear", {}),
        ("constant_with_warmup", {}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
    ],
)
def test_learning_rate_schedules(kind, options, chat_model, tmp_path):
    schedule = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options, "learning_rate": 2e-4}
    separate = separate_runs(chat_model, tmp_path / "separate", **schedule)
    staged = staged_run(chat_model, tmp_path / "staged", **schedule)
    staged.train()
    rates = [rate for trainer in separate for rate in logged(trainer, "learning_rate")]
    assert logged(staged, "learning_rate") == pytest.approx(rates, rel=1e-12)


def test_skipped_steps_do_not_delay_the_next_stage(chat_model, tmp_path):
    """The schedule lags if fp16 skips optimizer steps, but it must restart with the next stage."""
    staged = staged_run(chat_model, tmp_path)
    skipped = iter([True, True])
    replaced = property(lambda self: next(skipped, False))
    accelerator = type("Skipping", (type(staged.accelerator),), {"optimizer_step_was_skipped": replaced})
    staged.accelerator.__class__ = accelerator
    staged.train()
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert logged(staged, "learning_rate")[6:] == pytest.approx([0, *expected])


def test_ending_an_epoch_early_raises(chat_model, tmp_path):
    class StopEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 2

    staged = staged_run(chat_model, tmp_path)
    staged.add_callback(StopEpoch())
    with pytest.raises(RuntimeError, match="should_epoch_stop"):
        staged.train()


def test_early_stopping_counts_within_a_stage(chat_model, tmp_path, caplog):
    """The loss returns to ln 2 at the start of a stage, which must not count against the patience."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": two_stages()[1]}
    staged = staged_run(chat_model, tmp_path, metric_for_best_model="eval_loss", num_train_epochs=3, **evaluated)
    patience = EarlyStoppingCallback(early_stopping_patience=3)
    staged.add_callback(patience)
    staged.train()
    losses = logged(staged, "eval_loss")
    first_worse = next(i for i in range(9, len(losses)) if losses[i] > min(losses[:9]))
    assert first_worse == 9
    assert staged.state.global_step > 9 + 3
    stopped = staged.state.global_step < staged.stages[-1].last_update
    assert ("Training ended early" in caplog.text) == stopped


def test_compiled_model(chat_model, tmp_path):
    staged_run(chat_model, tmp_path, torch_compile=True, torch_compile_backend="eager")


def test_max_steps_is_counted_per_stage(chat_model, tmp_path):
    staged = staged_run(chat_model, tmp_path, max_steps=2)
    staged.train()
    assert logged(staged, "sdpo/stage") == [1, 1, 2, 2, 2]  # the last is the summary of the run
    assert staged.state.global_step == 4


def test_continuous_schedule(chat_model, tmp_path):
    """One schedule spans both stages, and the optimizer state is kept."""
    staged = staged_run(chat_model, tmp_path, callback=SDPOCallback(schedule="continuous"), optim="adamw_torch")
    staged.train()
    rates = logged(staged, "learning_rate")
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 11)) for step in range(11)]
    assert rates == pytest.approx([0.0, *expected])
    assert {state["step"].item() for state in staged.optimizer.state.values()} == {12}
    restarted = staged_run(chat_model, tmp_path / "restart")
    restarted.train()
    assert {state["step"].item() for state in restarted.optimizer.state.values()} == {6}


def test_optimizer_steps_do_not_mix_stages(chat_model, tmp_path):
    staged = staged_run(chat_model, tmp_path, dataloader_num_workers=2, gradient_accumulation_steps=3)
    seen = record_rows(staged)
    staged.train()
    check_rows(staged, seen)


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 7},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=lambda adapter: "-".join(map(str, [*adapter, *adapter.values()][:2])),
)
def test_adapters(adapter, chat_model, tmp_path):
    """All weights of the adapter are copied to the reference, which does not change while the policy trains."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **adapter})
    staged = staged_run(chat_model, tmp_path, "lora", peft_config=config)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(chat_model)(tokens).logits
        torch.testing.assert_close(staged.model(tokens).logits, base, rtol=1e-4, atol=1e-4)
    start = trained_weights(staged)
    after_first = {}
    become_policy = staged.reference.become_policy

    def record_weights():
        become_policy()
        after_first.update(trained_weights(staged))

    staged.reference.become_policy = record_weights
    staged.train()

    names = dict(staged.model.named_parameters())
    trained = [name for name in start if "default" in name.split(".")]
    assert trained
    changed = 0
    for name in trained:
        reference = names[".".join("ref" if part == "default" else part for part in name.split("."))]
        assert torch.equal(reference, after_first[name]), name
        assert not reference.requires_grad
        in_both = [(start[name], after_first[name]), (after_first[name], names[name])]
        changed += not any(torch.equal(old, new) for old, new in in_both)
    assert changed >= len(trained) / 2
    assert logged(staged, "sdpo/first_batch_margin") == pytest.approx([0, 0], abs=1e-5)

    loaded = AutoModelForCausalLM.from_pretrained(chat_model)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "stage-1")
    for name in trained:
        torch.testing.assert_close(dict(loaded.named_parameters())[name].detach(), after_first[name])
    loaded = AutoModelForCausalLM.from_pretrained(chat_model)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "stage-2")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, staged.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_existing_adapter(chat_model, tmp_path):
    """The reference of the first stage is a copy of the adapter, not the base model."""
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    torch.manual_seed(1)
    model = get_peft_model(base, lora(init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    staged = staged_run(model, tmp_path, processing_class=tokenizer)
    staged.train()
    assert logged(staged, "sdpo/first_batch_margin") == pytest.approx([0, 0], abs=1e-5)
    assert len(staged.state.log_history) > 12


def test_existing_adapter_on_a_quantized_model(chat_model, tmp_path):
    """The reference has the dtype of the policy, whereas DPOTrainer keeps it in float32."""
    base = AutoModelForCausalLM.from_pretrained(chat_model, quantization_config=nf4(), dtype=torch.float32)
    model = get_peft_model(base, lora(init_lora_weights=False))
    staged = staged_run(model, tmp_path, processing_class=AutoTokenizer.from_pretrained(chat_model))
    staged.train()
    assert logged(staged, "sdpo/first_batch_loss") == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_existing_adapter_that_changes_the_base_model_raises(chat_model, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' changes the base model"):
        staged_run(model, tmp_path, processing_class=AutoTokenizer.from_pretrained(chat_model))


@pytest.mark.parametrize(
    "adapter", [lora(bias="lora_only"), PromptTuningConfig(num_virtual_tokens=2)], ids=["bias", "prompt"]
)
def test_precomputed_scores_need_no_reference_adapter(adapter, chat_model, tmp_path):
    if adapter.peft_type != "LORA" and "virtual tokens" not in inspect.getsource(DPOTrainer._compute_loss):
        pytest.skip("this version of TRL does not support prompt tuning")
    if adapter.peft_type == "LORA":
        with pytest.raises(ValueError, match=r"trains biases.*precompute_ref_log_probs=True"):
            staged_run(chat_model, tmp_path, peft_config=adapter)
    adapter.task_type = "CAUSAL_LM"
    staged = staged_run(chat_model, tmp_path, "scores", peft_config=adapter)
    staged.train()
    assert logged(staged, "sdpo/first_batch_margin") == pytest.approx([0, 0], abs=1e-5)
    assert set(staged.model.peft_config) == {"default"}
    # DPOTrainer would score new data with the base model as the reference
    with pytest.raises(ValueError, match=r"after the first stage.*eval_dataset"):
        staged.evaluate(two_stages()[0])


def test_ref_model_in_the_first_stage(chat_model, tmp_path, caplog):
    """A reference other than the model is supported, as in the paper, with a warning because it may be a mistake."""
    torch.manual_seed(1)
    reference = AutoModelForCausalLM.from_pretrained(chat_model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    staged = staged_run(chat_model, tmp_path, ref_model=reference)
    staged.train()
    first, second = logged(staged, "sdpo/first_batch_margin")
    assert abs(first) > 0.2
    assert second == pytest.approx(0, abs=1e-6)
    warnings = [r.message for r in caplog.records if "does not start from its reference" in r.message]
    assert len(warnings) == 1
    assert "Stage 1 " in warnings[0]


def test_evaluation_uses_the_reference_of_the_stage(chat_model, tmp_path):
    """At the start of a stage the evaluation margin is 0, with a reference model and with precomputed scores."""
    rows = Dataset.from_list(step_rows(6))
    histories, workers = [], []

    class CountWorkers(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            workers.append(len(multiprocessing.active_children()))

    for mode in ("full", "scores"):
        stages = two_stages(rows=step_rows)
        options = {"eval_dataset": {"a": rows}, "eval_strategy": "steps", "eval_steps": 1}
        options |= {"eval_on_start": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        staged = staged_run(chat_model, tmp_path / mode, mode, stages, **options)
        staged.add_callback(CountWorkers)
        staged.evaluate()
        assert logged(staged, "eval_rewards/margins") == pytest.approx([0], abs=1e-5)
        staged.train()
        histories.append(logged(staged, "eval_rewards/margins"))
        assert not multiprocessing.active_children()  # torch would wait five seconds for each when it deletes them
    assert max(workers) == 2  # one for training and one for evaluation, none of the stage before
    assert histories[0] == pytest.approx(histories[1], abs=1e-4)
    # The learning rate is 0 in the first step of each stage
    margins = histories[1][-12:]
    assert (margins[0], margins[6]) == pytest.approx((0, 0), abs=1e-5)
    assert abs(margins[5]) > 1e-3


def test_report(chat_model, tmp_path):
    staged = staged_run(chat_model, tmp_path, "scores", stages={"easy": two_stages()[0], "hard": two_stages()[1]})
    staged.train()
    report = json.loads((tmp_path / "sdpo_report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["easy", "hard"]
    assert [stage["gamma_ref"]["rows"] for stage in report["stages"]] == [9, 11]
    gammas = [stage["gamma_ref"]["mean"] for stage in report["stages"]]
    assert gammas == pytest.approx(logged(staged, "sdpo/gamma_ref"))
    assert [stage["first_batch"]["loss"] for stage in report["stages"]] == pytest.approx([math.log(2)] * 2, rel=1e-5)
    assert [point[1] for point in report["curves"]["loss"]] == [1] * 6 + [2] * 6
    assert (tmp_path / "sdpo_report.png").stat().st_size > 10_000

    # The reference of stage 2 is the model of stage 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage-1")
    expected = [gamma(model, row) for row in staged.stages[1].dataset]
    assert gammas[1] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def gamma(model, row):
    """Compute log p(chosen) - log p(rejected) in plain torch."""
    logps = []
    for ids in (row["chosen_ids"], row["rejected_ids"]):
        tokens = torch.tensor([row["prompt_ids"] + ids])
        with torch.no_grad():
            logits = model(tokens).logits.log_softmax(-1)[0, :-1]
        logps.append(logits.gather(1, tokens[0, 1:, None])[-len(ids) :].sum().item())
    return logps[0] - logps[1]


def test_group_by_prompt_within_stages(chat_model, tmp_path):
    rows = [{**row, "prompt": row["prompt"] if i % 2 else "What?"} for i, row in enumerate(plain_rows(16))]
    stages = [Dataset.from_list(rows[:7]), Dataset.from_list(rows[7:])]
    trainer = staged_run(chat_model, tmp_path, stages=stages, shared_prefix="on", group_by_prompt=True)
    seen = record_rows(trainer)
    trainer.train()
    check_rows(trainer, seen)
    shared = tuple(trainer.stages[1].dataset[1]["prompt_ids"])  # of "What?"
    for stage in trainer.stages:
        is_shared = [row[: len(shared)] == shared for update, row in seen if update >= stage.first_update]
        runs = [value for value, _ in itertools.groupby(is_shared[: len(stage.dataset)])]
        assert runs.count(True) == 1
