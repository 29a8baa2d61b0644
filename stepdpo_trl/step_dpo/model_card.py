"""Model cards of models that were trained on step pairs with images."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from ..shared_prefix.forward import text_decoder
from ..shared_prefix.support import decoder

PIPELINE = "image-text-to-text"
# Parts of TRL's template that are replaced or extended
QUICK_START = re.compile(r"(?<=^## Quick start\n\n)```python\n.*?^```$", re.MULTILINE | re.DOTALL)
METHOD = re.compile(r"^This model was trained with .*$", re.MULTILINE)
SNIPPET = """\
```python
from transformers import pipeline

image = "chart.png"  # a path or a URL
question = "How much more was sold in May than in April?"
content = [{{"type": "image", "url": image}}, {{"type": "text", "text": question}}]
generator = pipeline("image-text-to-text", model="{model}", device_map="auto")
output = generator(text=[{{"role": "user", "content": content}}], max_new_tokens=128, return_full_text=False)[0]
print(output["generated_text"])
```"""


def describe_images(path: Path, trainer: Any) -> None:
    """
    Add what concerns images to a model card of TRL: the pipeline, an example, and what was trained.

    Args:
        path (`Path`):
            File with the model card.
        trainer ([`StepDPOTrainer`]):
            Trainer of step pairs with images.
    """
    card = ModelCard.load(path)
    card.data.pipeline_tag = PIPELINE
    snippet = SNIPPET.format(model=trainer.hub_model_id or path.parent.name)
    text = QUICK_START.sub(lambda _: snippet, card.text, count=1)
    card.text = METHOD.sub(lambda match: f"{match[0]} {describe_training(trainer)}", text, count=1)
    card.save(path)


def describe_training(trainer: Any) -> str:
    """Return a sentence that says which weights were trained, and whether prefixes were shared."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    base = decoder(model)
    modules = (text_decoder(base.base_model), base.get_output_embeddings())
    language = {id(parameter) for module in modules for parameter in module.parameters()}
    trained = {"language model": False, "vision tower": False}
    for parameter in model.parameters():
        trained["language model" if id(parameter) in language else "vision tower"] |= parameter.requires_grad
    whole = all(parameter.requires_grad for parameter in model.parameters())
    what = "adapters" if isinstance(model, PeftModel) else "all weights" if whole else "weights"
    parts = " and ".join(f"the {part}" for part, value in trained.items() if value)
    frozen = "".join(f" (the {part} was frozen)" for part, value in trained.items() if not value)
    shared = "used" if trainer.shares_prefixes else "did not use"
    return f"The training on step pairs with images updated {what} of {parts}{frozen} and {shared} shared prefixes."
