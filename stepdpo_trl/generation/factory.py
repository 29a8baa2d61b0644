"""Creation of generators."""

from .protocol import Generator, ModelSpec, ServerGenerator


def make_generator(spec: ModelSpec) -> Generator | ServerGenerator:
    """
    Create the generator for a model. Unless a server has it, the model is loaded.

    Args:
        spec (`ModelSpec`):
            The model and its inference backend.

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

        return VLLMGenerator(spec)
    from .transformers import TransformersGenerator

    return TransformersGenerator.load(spec)
