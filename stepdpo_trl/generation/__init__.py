"""Text generation with transformers, vLLM or OpenAI-compatible servers, behind one protocol."""

from .factory import make_generator
from .protocol import (
    BACKENDS,
    Completion,
    GenerationError,
    Generator,
    ModelSpec,
    Request,
    Sampling,
    ServerGenerator,
    StartedServers,
)

__all__ = [
    "BACKENDS",
    "Completion",
    "GenerationError",
    "Generator",
    "ModelSpec",
    "Request",
    "Sampling",
    "ServerGenerator",
    "StartedServers",
    "make_generator",
]
