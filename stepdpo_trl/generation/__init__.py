"""Text generation with transformers, vLLM or OpenAI-compatible servers, behind one protocol."""

from .factory import make_generator
from .protocol import BACKENDS, Completion, GenerationError, Generator, ModelSpec, Request, Sampling, ServerGenerator

__all__ = [
    "BACKENDS",
    "Completion",
    "GenerationError",
    "Generator",
    "ModelSpec",
    "Request",
    "Sampling",
    "ServerGenerator",
    "make_generator",
]
