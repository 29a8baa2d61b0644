"""Step-DPO (arXiv 2406.18629) for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .schema import StepPreference
    from .step_dpo_config import StepDPOConfig
    from .step_dpo_trainer import StepDPOTrainer

__all__ = ["StepDPOConfig", "StepDPOTrainer", "StepPreference", "__version__"]

_MODULES = {
    "StepDPOConfig": "step_dpo_config",
    "StepDPOTrainer": "step_dpo_trainer",
    "StepPreference": "schema",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the trainer needs torch and TRL, the data format does not.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
