import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlavaForConditionalGeneration

from stepdpo_trl.step_dpo.vision import PROMPT_TEXT

from ..reference_dpo import step_dpo_loss
from ..tiny import step_rows
from ..training import BETA, logged, make_trainer, weights
from ..vision import llava_model, llava_processor, vision_step_rows

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra quantization")

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules=["lm_head"],
)


@pytest.fixture(autouse=True)
def _no_repacking(monkeypatch):
    # On CPUs with AVX512-BF16, a forward in evaluation mode repacks the weights and breaks later gradients
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


def test_qlora_trains_the_adapter_on_a_quantized_base(chat_model, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(
        chat_model, tmp_path, step_rows(), peft_config=lora, quantization_config=NF4, learning_rate=0.3
    )
    layer = trainer.model.get_base_model().model.layers[0]
    assert isinstance(layer.mlp.up_proj, bitsandbytes.nn.Linear4bit)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)

    # The oracle computes the same loss for the trained policy, with the quantized base model as reference
    batch = trainer.data_collator(list(trainer.train_dataset))
    triples = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    reference = AutoModelForCausalLM.from_pretrained(chat_model, quantization_config=NF4, dtype=torch.float32)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    expected = step_dpo_loss(trainer.model, reference, triples, BETA)
    assert loss.item() != pytest.approx(0.6931, abs=1e-3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_qlora_with_images(tmp_path):
    processor = llava_processor()
    llava_model(processor, 1).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    lora = LoraConfig(r=4, target_modules=r".*(q_proj|v_proj)")
    options = {"peft_config": lora, "quantization_config": NF4, "learning_rate": 0.3, "max_length": None}
    trainer = make_trainer(model, tmp_path, vision_step_rows(), shared_prefix="on", **options)
    layer = trainer.model.get_base_model().model.vision_tower.encoder.layers[0]
    assert isinstance(layer.mlp.fc1, bitsandbytes.nn.Linear4bit)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert any("vision_tower" in name for name in changed)

    cases = []
    for encoded, row in zip(trainer.train_dataset, vision_step_rows(), strict=True):
        images = {"images": row["images"]} if row["images"] else {}
        inputs = dict(processor(text=[encoded[PROMPT_TEXT]], return_tensors="pt", **images))
        ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask")
        assert ids == encoded["prompt_ids"]
        cases.append((ids, encoded["chosen_ids"], encoded["rejected_ids"], inputs))
    reference = LlavaForConditionalGeneration.from_pretrained(model, quantization_config=NF4, dtype=torch.float32)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    expected = step_dpo_loss(trainer.model, reference, cases, BETA)
    assert loss.item() != pytest.approx(0.6931, abs=1e-3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_warning_if_bitsandbytes_repacks_weights(chat_model, tmp_path, monkeypatch, caplog):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    make_trainer(chat_model, tmp_path, step_rows(), peft_config=lora, quantization_config=NF4)
    assert "AVX512" not in caplog.text
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    make_trainer(chat_model, tmp_path, step_rows(), peft_config=lora, quantization_config=NF4)
    assert "all later gradients are wrong. Do not evaluate, generate or set" in caplog.text
