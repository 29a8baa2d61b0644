"""Creation of generators."""

from pathlib import Path

from .protocol import Generator, ModelSpec, ServerGenerator


def make_generator(spec: ModelSpec, log_dir: Path = Path()) -> Generator | ServerGenerator:
    """
    Create the generator for a model. With transformers, the model is loaded.

    Args:
        spec (`ModelSpec`):
            The model and its inference backend.
        log_dir (`Path`, *optional*, defaults to the current folder):
            Folder for the logs of vLLM.

    Returns:
        `Generator` or `ServerGenerator`: The generator.

    Raises:
        GenerationError: If the model cannot be loaded, or the package of the inference backend is missing.
    """
    if spec.backend == "openai":
        from .openai import OpenAIGenerator

        return OpenAIGenerator(spec)
    if spec.backend == "vllm":
        from .vllm import VLLMGenerator

        return VLLMGenerator(spec, log_dir)
    from .transformers import TransformersGenerator

    return TransformersGenerator.load(spec)
