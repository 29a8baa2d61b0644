"""Text from models: one small protocol, and back ends behind it (transformers, vLLM, OpenAI-compatible servers)."""

from .factory import make_generator
from .protocol import BACKENDS, Completion, GenerationError, Generator, ModelSpec, Request, Sampling

__all__ = [
    "BACKENDS",
    "Completion",
    "GenerationError",
    "Generator",
    "ModelSpec",
    "Request",
    "Sampling",
    "make_generator",
]
