"""Step-DPO (arXiv 2406.18629) and stepwise DPO (sDPO, arXiv 2403.19270) for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data.schema import StepPreference
    from .sdpo.callback import SDPOCallback
    from .sdpo.stages import split_stages
    from .step_dpo.config import StepDPOConfig
    from .step_dpo.gamma import measure_gamma
    from .step_dpo.trainer import StepDPOTrainer

__all__ = [
    "SDPOCallback",
    "StepDPOConfig",
    "StepDPOTrainer",
    "StepPreference",
    "__version__",
    "measure_gamma",
    "split_stages",
]

_MODULES = {
    "SDPOCallback": "sdpo.callback",
    "StepDPOConfig": "step_dpo.config",
    "StepDPOTrainer": "step_dpo.trainer",
    "StepPreference": "data.schema",
    "measure_gamma": "step_dpo.gamma",
    "split_stages": "sdpo.stages",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the trainer needs torch and TRL, the data format does not.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
