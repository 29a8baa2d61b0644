"""Generation with transformers: seeds, batches, sampling distribution and ends of completions."""

import io
import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_trl.generation import GenerationError, ModelSpec, Request, Sampling, make_generator
from stepdpo_trl.generation.chat import render
from stepdpo_trl.generation.transformers import SeededSampling, TransformersGenerator
from stepdpo_trl.quickstart import MODEL_PATH, make_problems

from ..tiny import byte_level_tokenizer, save_tiny_model, sentencepiece_tokenizer, tiny_model


@pytest.fixture(scope="module")
def quickstart():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH), AutoTokenizer.from_pretrained(MODEL_PATH)


def requests_for(generator, count):
    texts = [problem.text for problem in make_problems(count, "pairs", (2, 6))]
    return [Request(f"{n}", generator.render(text, ""), n) for n, text in enumerate(texts)]


def answers(generator, requests, sampling, done=()):
    return {request.key: answer for part in generator.generate(requests, sampling, done) for request, answer in part}


def test_settings_stored_without_top_k_can_be_read():
    assert Sampling(**{"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 1024}).top_k == 0


def test_a_completion_depends_only_on_its_seed(quickstart):
    """The rest of the batch and the global random state have no influence."""
    one, many = TransformersGenerator(*quickstart, batch_size=1), TransformersGenerator(*quickstart, batch_size=16)
    requests = requests_for(one, 24)
    sampling = Sampling(1.0, 0.95, 96)
    torch.manual_seed(0)
    apart = answers(one, requests, sampling)
    torch.manual_seed(1)
    together = answers(many, requests[::-1], sampling)
    assert apart == together
    assert {answer.finish_reason for answer in apart.values()} == {"stop"}
    again = [Request("x", requests[0].prompt, seed) for seed in range(8)]
    assert len({answers(one, [request], sampling)["x"].text for request in again}) > 1


def test_greedy_decoding_matches_generate(quickstart):
    model, tokenizer = quickstart
    generator = TransformersGenerator(model, tokenizer, batch_size=4)
    requests = requests_for(generator, 6)
    found = answers(generator, requests, Sampling(0.0, 1.0, 64))
    for request in requests:
        ids = tokenizer(request.prompt, add_special_tokens=False, return_tensors="pt")
        row = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert found[request.key].text == tokenizer.decode(row, skip_special_tokens=True)
        assert found[request.key].tokens == len(row)
        assert found[request.key].prompt_tokens == ids["input_ids"].shape[1]


def test_completions_at_the_length_limit_are_marked(quickstart):
    generator = TransformersGenerator(*quickstart)
    requests = requests_for(generator, 2)
    for answer in answers(generator, requests, Sampling(1.0, 1.0, 5)).values():
        assert (answer.finish_reason, answer.tokens) == ("length", 5)


def test_a_resumed_run_forms_the_same_batches(quickstart):
    """Batches are generated as a whole, but only missing completions are returned."""
    generator = TransformersGenerator(*quickstart, batch_size=4)
    requests = requests_for(generator, 8)
    sampling = Sampling(1.0, 1.0, 48)
    runs = []
    run = generator._run
    generator._run = lambda prompts, *rest: runs.append(len(prompts)) or run(prompts, *rest)
    whole = answers(generator, requests, sampling)
    assert runs == [4, 4]
    order = list(whole)
    rest = answers(generator, requests, sampling, done=order[:5])
    assert runs == [4, 4, 4]
    assert rest == {key: whole[key] for key in order[5:]}


def test_a_chat_template_that_fails():
    tokenizer = byte_level_tokenizer("{{ raise_exception('no system turn') }}")
    with pytest.raises(
        GenerationError, match=r"cannot render .* the roles \['user'\] \(TemplateError: no system turn"
    ):
        render(tokenizer, [{"role": "user", "content": "a"}])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers(temperature):
    """As after a training that has diverged."""
    tokenizer = byte_level_tokenizer()
    model = tiny_model(len(tokenizer))
    generator = TransformersGenerator(model, tokenizer)
    generator.model.config.name_or_path = "stage-1/model"
    assert answers(generator, [Request("a", "1", 0)], Sampling(temperature, 1.0, 2))
    torch.nn.init.constant_(model.lm_head.weight[3:4], float("nan"))
    with pytest.raises(GenerationError, match=r"scores of the model 'stage-1/model' are not a number \(NaN"):
        answers(generator, [Request("a", "1", 0)], Sampling(temperature, 1.0, 2))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.6, 0), (1.0, 1.0, 3), (0.7, 0.7, 2), (1.0, 0.9, 9)],
)
def test_sampled_frequencies_match_the_distribution(temperature, top_p, top_k):
    """Frequencies of 20,000 seeds match the distribution, which is computed here in plain Python."""
    scores = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0])
    weights = [2.718281828459045 ** (s / temperature) for s in scores.tolist()]
    probabilities = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    ranked = sorted(probabilities, key=probabilities.get, reverse=True)[: top_k or None]
    total = sum(probabilities[token] for token in ranked)
    probabilities = {token: probabilities[token] / total for token in ranked}  # top-p applies to what top-k keeps
    nucleus, mass = {}, 0.0
    for token in ranked:
        if mass >= top_p:
            break
        nucleus[token] = probabilities[token]
        mass += probabilities[token]
    count = 20_000
    processor = SeededSampling(list(range(count)), Sampling(temperature, top_p, 1, top_k), prompt_length=1)
    chosen = processor(torch.zeros(count, 1, dtype=torch.long), scores.repeat(count, 1)).argmax(-1).tolist()
    found = Counter(chosen)
    assert set(found) == set(nucleus)
    for token, probability in nucleus.items():
        expected = probability / mass
        assert abs(found[token] / count - expected) <= 1e-6 + 4 * (expected * (1 - expected) / count) ** 0.5


def test_large_vocabularies_are_not_sorted_completely():
    """The shortcut by the most likely tokens samples the same tokens as sorting all of them."""
    torch.manual_seed(0)
    for spread in (8.0, 0.1):  # most likely tokens that cover top-p, and that do not
        scores = torch.randn(16, 5000) * spread
        sampling = Sampling(1.0, 0.9, 1)
        processor = SeededSampling(list(range(16)), sampling, prompt_length=1)
        chosen = processor(torch.zeros(16, 1, dtype=torch.long), scores).argmax(-1)
        sorted_, order = scores.softmax(-1).sort(descending=True)
        for row in range(16):
            cumulative = sorted_[row].cumsum(0)
            kept = int((cumulative - sorted_[row] < 0.9).sum())
            drawn = processor.uniform[row, 0] * cumulative[kept - 1]
            assert order[row, min(int((cumulative <= drawn).sum()), kept - 1)] == chosen[row]


@pytest.mark.parametrize("make", [sentencepiece_tokenizer, byte_level_tokenizer])
def test_a_leading_space_is_kept(make):
    """Some tokenizers drop the space at the beginning of a text."""
    tokenizer = make()
    generator = TransformersGenerator(tiny_model(len(tokenizer)), tokenizer)
    for before, after in (("Step 1:", " 12 = 42"), ("Step 1: ", "12"), ("1", "2"), ("Step", " + t")):
        whole = tokenizer(before, add_special_tokens=False)["input_ids"]
        joint = tokenizer(before + after, add_special_tokens=False)["input_ids"]
        if joint[: len(whole)] == whole:
            assert generator._completion(whole, joint[len(whole) :]).text == after


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(GenerationError, match="cannot be loaded"):
        make_generator(ModelSpec(str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(GenerationError, match="no chat template"):
        make_generator(ModelSpec(str(tmp_path)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"backend": "transfomers"}, "Did you mean 'transformers'"),
        ({"backend": "openai"}, "use the backend 'openai' with an address"),
        ({"base_url": "http://localhost:8000/v1"}, "does not match base_url='http://localhost:8000/v1'"),
        ({"backend": "openai", "base_url": "localhost:8000"}, "is not a URL. Use the form http://localhost:8000/v1"),
        ({"backend": "openai", "base_url": "https://user:secret@host/v1"}, "would be written to the files of the run"),
        ({"backend": "openai", "base_url": "https://host/v1?key=secret"}, "would be written to the files of the run"),
        ({"batch_size": 0}, "at least 1"),
        ({"backend": "openai", "base_url": "http://h/v1", "max_concurrent_requests": 0}, "at least 1"),
        ({"backend": "openai", "base_url": "http://h/v1", "batch_size": 4}, "Use max_concurrent_requests"),
        ({"backend": "openai", "base_url": "http://h/v1", "revision": "main"}, "revision='main' has no effect"),
        ({"max_concurrent_requests": 4}, "max_concurrent_requests=4 has no effect"),
        ({"backend": "vllm", "batch_size": 4}, "batch_size=4 has no effect on vLLM"),
        ({"vllm_args": "-tp 2"}, "vllm_args='-tp 2' has no effect on the inference backend 'transformers'"),
        ({"backend": "openai", "base_url": "http://h/v1", "adapter": "a"}, "does not load the adapter 'a'"),
    ],
)
def test_invalid_specs(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelSpec("m", **spec)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("values", [(-1, 0.9, 1), (1, 0, 1), (1, 1.1, 1), (1, 0.9, 0), (1, 1, 1, -1), (1, 1, 1, 0.5)])
def test_invalid_sampling_parameters(values):
    with pytest.raises(ValueError, match="must"):
        Sampling(*values)


def test_revision_of_model_and_tokenizer(monkeypatch):
    loaded = []

    def load(name, *args, revision=None, **kwargs):
        loaded.append((name, revision))
        raise OSError("not loaded in this test")

    monkeypatch.setattr("stepdpo_trl.generation.transformers.load_tokenizer", load)
    with pytest.raises(OSError, match="not loaded"):
        make_generator(ModelSpec("org/model", revision="v1"))
    with pytest.raises(OSError, match="not loaded"):
        make_generator(ModelSpec("org/model", tokenizer="org/tokenizer", revision="v1"))
    monkeypatch.setattr("stepdpo_trl.generation.transformers.load_tokenizer", lambda *args, **kwargs: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(GenerationError, match="cannot be loaded"):
        make_generator(ModelSpec("org/model", revision="v1"))
    assert loaded == [("org/model", "v1"), ("org/tokenizer", None), ("org/model", "v1")]


def test_a_warning_is_logged_once_if_the_context_is_too_short(quickstart, caplog):
    generator = TransformersGenerator(*quickstart)
    prompt = generator.render("What is 2 + 3?", "")
    for _ in range(2):
        list(generator.generate([Request("a", prompt, 0)], Sampling(0.0, 1.0, 600), {"a"}))
    assert caplog.text.count("max_new_tokens=600 exceed the model's context of 512 tokens") == 1


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(folder, owned):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch(owned)}, folder / "pytorch_model.bin")


def custom(folder, owned):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(owned)!r}, 'w')")


def truncated(folder, owned):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("change", [pickled, custom, truncated])
def test_code_in_models_is_not_run(change, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())  # transformers asks before it runs code
    save_tiny_model(tmp_path / "model", byte_level_tokenizer("{{ messages }}"))
    change(tmp_path / "model", tmp_path / "owned")
    with pytest.raises(GenerationError, match=r"The model '.*' cannot be loaded"):
        make_generator(ModelSpec(str(tmp_path / "model"), "transformers"))
    assert not (tmp_path / "owned").exists()
