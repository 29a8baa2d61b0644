"""Make a generator from its description."""

from .protocol import Generator, ModelSpec


def make_generator(spec: ModelSpec) -> Generator:
    """
    Make the back end that a description asks for; loads the model.

    Raises:
        GenerationError: If the model cannot be loaded, or a package is missing (named with its extra).
    """
    if spec.backend == "openai":
        from .openai import OpenAIGenerator

        return OpenAIGenerator(spec)
    if spec.backend == "vllm":
        from .vllm import VLLMGenerator

        return VLLMGenerator(spec)
    from .transformers import TransformersGenerator

    return TransformersGenerator.load(spec)
