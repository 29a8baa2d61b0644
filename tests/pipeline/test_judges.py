"""Judges: binary search against a linear scan, readable replies, votes, scores, and combined judges."""

import math

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForTokenClassification, Qwen2Model

from stepdpo_trl.data.answers import RIGHT, WRONG, Check
from stepdpo_trl.data.prompts import STEP_PROMPTS
from stepdpo_trl.generation import Completion
from stepdpo_trl.pipeline.judges.arithmetic import arithmetic_judge
from stepdpo_trl.pipeline.judges.expressions import combine, parse_judges
from stepdpo_trl.pipeline.judges.llm import llm_judge, read_step
from stepdpo_trl.pipeline.judges.prm import prm_judge
from stepdpo_trl.pipeline.judges.prm_model import ProcessRewardModel, RecordedPRM
from stepdpo_trl.pipeline.judges.rollout import rollout_judge
from stepdpo_trl.pipeline.policy import Policy
from stepdpo_trl.pipeline.records import Problem, Solution, Verdict
from stepdpo_trl.runs.run_directory import Log, RunError
from stepdpo_trl.runs.tasks import run_tasks

from ..tiny import CHATML, byte_level_tokenizer

PROBLEM = Problem("p", "What is it?", "1", "It is 1.")


def solution(steps):
    text = "".join(f"Step {n}: s{n}\n" for n in range(1, steps + 1))
    return Solution(f"p/{steps}", PROBLEM, text, WRONG, "stop", "2")


class Rollouts:
    """Services whose rollouts from number `luck` on are right after fewer than `first_wrong` steps."""

    def __init__(self, first_wrong, luck=0):
        self.first_wrong, self.luck, self.asked = first_wrong, luck, []

    def answer(self, requests):
        if hasattr(requests[0], "prompt"):
            self.asked += [request.key for request in requests]
            return {r.key: Completion(f" go {r.prompt.count('s')} {r.key}", "stop", 1, 1) for r in requests}
        return {r.key: Check(RIGHT if self.right(r.text) else WRONG) for r in requests}

    def right(self, text):
        _, steps, key = text.rpartition(" go ")[2].split(" ")[0], *text.rpartition(" go ")[2].split(" ")
        return int(steps) < self.first_wrong and int(key.rpartition("/")[2]) >= self.luck


def judge_one(judge, item, services):
    def task():
        return (yield from judge(item))

    return next(run_tasks([task()], services))


@pytest.mark.parametrize("luck", [0, 1, 3, 7])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 13])
def test_rollouts_find_every_step(steps, luck):
    """Binary search finds the same step as a linear scan of all prefixes, with at most k log2(M) rollouts."""
    policy = Policy("policy", STEP_PROMPTS["plain"], lambda user, response_prefix: response_prefix, 0)
    for first_wrong in range(1, steps + 1):
        services = Rollouts(first_wrong, luck)
        verdict = judge_one(rollout_judge(policy, 8), solution(steps), {"policy": services, "check": services})
        assert verdict.step == first_wrong
        assert len(services.asked) == len(set(services.asked))
        assert len(services.asked) <= 8 * (math.ceil(math.log2(steps)) + 1)


def test_rollouts_stop_early():
    """A prefix that is not lost costs one rollout, a lost one all eight."""
    policy = Policy("policy", STEP_PROMPTS["plain"], lambda user, response_prefix: response_prefix, 0)
    services = Rollouts(first_wrong=8)
    verdict = judge_one(rollout_judge(policy, 8), solution(8), {"policy": services, "check": services})
    # Prefixes of 0, 4, 6 and 7 steps are not lost. The whole solution is known to be wrong.
    assert verdict.evidence["rollouts"] == {"0": [1, 1], "4": [1, 1], "6": [1, 1], "7": [1, 1]}
    services = Rollouts(first_wrong=1)
    verdict = judge_one(rollout_judge(policy, 8), solution(8), {"policy": services, "check": services})
    assert verdict.evidence["rollouts"] == {"0": [1, 1], "4": [8, 0], "2": [8, 0], "1": [8, 0]}


def test_rollouts_abstain_on_problems_that_are_never_solved():
    policy = Policy("policy", STEP_PROMPTS["plain"], lambda user, response_prefix: response_prefix, 0)
    services = Rollouts(first_wrong=0)
    verdict = judge_one(rollout_judge(policy, 8), solution(3), {"policy": services, "check": services})
    assert verdict.step is None
    assert verdict.evidence["reason"] == "no right solution from the beginning"


class Replies:
    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def answer(self, requests):
        self.asked += requests
        return {request.key: Completion(self.texts.pop(0), "stop", 1, 1) for request in requests}


@pytest.mark.parametrize(
    ("votes", "replies", "step", "unreadable"),
    [
        (1, [r"Step 2 is wrong. \boxed{2}"], 2, 0),
        (1, [r"All is well. \boxed{-1}"], None, 0),
        (1, ["I think it is step 2.", r"\boxed{3}"], 3, 1),
        (1, [r"\boxed{0}", r"\boxed{4}"], None, 2),
        (3, [r"\boxed{1}", r"\boxed{2}", r"\boxed{1}"], 1, 0),
        (2, [r"\boxed{1}", r"\boxed{2}"], None, 0),
        (3, [r"\boxed{1}", "no", r"\boxed{2}", r"\boxed{2}"], 2, 1),
        (3, ["no"] * 6, None, 6),
    ],
)
def test_votes_of_a_language_model(votes, replies, step, unreadable):
    services = Replies(*replies)
    verdict = judge_one(llm_judge("judge", 0, votes), solution(3), {"judge": services})
    assert verdict.step == step
    assert verdict.evidence["unreadable"] == unreadable
    assert not services.texts  # no fewer requests than expected
    assert len({request.key for request in services.asked}) == len({r.seed for r in services.asked}) == len(replies)


def test_the_prompt_contains_the_gold_solution_only_if_it_should():
    for gold in (True, False):
        services = Replies(r"\boxed{1}")
        judge_one(llm_judge("judge", 0, gold=gold), solution(2), {"judge": services})
        (message,) = services.asked[0].prompt
        for part, expected in (
            ("What is it?", True),
            ("<step_2>\ns2\n</step_2>", True),
            ("It is 1.", gold),
            ("[Correct answer]\n1\n", gold),
        ):
            assert (part in message["content"]) == expected
        assert message["content"].endswith(r"with \boxed{-1} if no step is wrong.")


def test_a_template_without_gold_gets_empty_variables():
    services = Replies(r"\boxed{1}")
    template = "{{ problem }}{{ steps[0] }}[{{ answer }}{{ solution }}]"
    judge_one(llm_judge("judge", 0, gold=False, prompt=template), solution(2), {"judge": services})
    assert services.asked[0].prompt[0]["content"] == "What is it?s1[]"


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        (r"\boxed{2}", 2),
        (r"first \boxed{1}, no: \boxed{ 3 }.", 3),
        (r"\boxed{-1}", -1),
        (r"\boxed{4}", None),
        (r"\boxed{0}", None),
        (r"\boxed{-2}", None),
        (r"\boxed{Step 2}", None),
        (r"The student's answer is \boxed{2}, but let me check", None),
        (r"the student wrote \boxed{3}. So: **\boxed{2}**.", 2),
        ("2", None),
    ],
)
def test_replies_are_read_strictly(reply, number):
    assert read_step(reply, 3) == number


def test_judge_expressions():
    assert parse_judges("arithmetic , rollout+llm") == [["arithmetic"], ["rollout", "llm"]]
    for wrong in ("", "arithmetic,", "rollout+", "gpt"):
        with pytest.raises(RunError, match="is not known"):
            parse_judges(wrong)


def test_combined_judges():
    def fixed(step):
        def judge(item):
            return Verdict(step, "stand-in", {})
            yield

        return judge

    def verdict(expression, **steps):
        judge = combine(parse_judges(expression), {name: fixed(step) for name, step in steps.items()})
        return judge_one(judge, solution(3), {})

    assert verdict("arithmetic,rollout", arithmetic=2, rollout=3).step == 2
    assert verdict("arithmetic,rollout", arithmetic=None, rollout=3).step == 3
    assert verdict("arithmetic+rollout", arithmetic=2, rollout=3).step is None
    assert verdict("arithmetic+rollout", arithmetic=2, rollout=2).step == 2
    combined = verdict("arithmetic+rollout,llm", arithmetic=2, rollout=3, llm=1)
    assert (combined.step, combined.judge) == (1, "llm")
    assert {name: evidence["step"] for name, evidence in combined.evidence.items()} == {
        "arithmetic": 2,
        "rollout": 3,
        "llm": 1,
    }


def test_arithmetic_evidence():
    item = Solution("p/0", PROBLEM, "Step 1: 1 + 1 = 2\nStep 2: 2 + 2 = 5\nStep 3: 5 + 5 = 11", WRONG, "stop")
    verdict = judge_one(arithmetic_judge, item, {})
    assert (verdict.step, verdict.evidence) == (2, {"equation": "2 + 2 = 5"})


class QwenPRM(nn.Module):
    """A tiny model like Qwen2.5-Math-PRM: a backbone, and a head of two layers with two classes."""

    def __init__(self, config):
        super().__init__()
        self.model = Qwen2Model(config)
        size = config.hidden_size
        self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 2))

    @property
    def device(self):
        return self.score[0].weight.device

    def forward(self, use_cache=None, **inputs):
        return (self.score(self.model(**inputs).last_hidden_state),)


def tiny_config(tokenizer, **kwargs):
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **kwargs,
    )


STEPS = [("first step", "second, and last"), ("a",), ("one", "two", "three")]


def test_qwen_prm():
    """Scores in a batch match those of each solution alone, read at `<extra_0>`."""
    tokenizer = byte_level_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    torch.manual_seed(0)
    model = QwenPRM(tiny_config(tokenizer))
    prm = ProcessRewardModel(model, tokenizer)
    scores = prm.score([("How many?", steps) for steps in STEPS])
    for steps, found in zip(STEPS, scores, strict=True):
        system = "Please reason step by step, and put your final answer within \\boxed{}."
        text = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        )
        text += "<extra_0>".join(steps) + "<extra_0><|im_end|>\n"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        positions = (ids[0] == tokenizer.convert_tokens_to_ids("<extra_0>")).nonzero().flatten()
        expected = model(input_ids=ids)[0][0, positions].softmax(-1)[:, 1]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-6)
        assert len(found) == len(steps)


def test_prm_abstains_on_solutions_that_it_cannot_score(tmp_path):
    """`<extra_0>` in a problem or step, or probabilities that are not numbers, concern one solution only."""
    tokenizer = byte_level_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    torch.manual_seed(0)
    prm = ProcessRewardModel(QwenPRM(tiny_config(tokenizer)), tokenizer)
    service = RecordedPRM(prm, Log(tmp_path / "scores.jsonl"))
    texts = ["Step 1: a\nStep 2: b", "Step 1: a<extra_0>\nStep 2: b", "<extra_0>"]
    solutions = [Solution(f"p/{n}", PROBLEM, text, WRONG, "stop") for n, text in enumerate(texts)]
    verdicts = [judge_one(prm_judge(), item, {"prm": service}) for item in solutions]
    assert len(verdicts[0].evidence["scores"]) == 2
    assert [v.evidence.get("reason") for v in verdicts[1:]] == ["the model cannot score these steps"] * 2
    assert prm.score([("p<extra_0>", ("a",)), ("p", ("a",))])[0] is None
    assert [len(scores or []) for scores in prm.score([("p", ("a<extra_0>",)), ("p", ("a", "b"))])] == [0, 2]

    torch.nn.init.constant_(prm.model.score[2].bias, float("nan"))
    assert prm.score([("p", ("a",))]) == [None]


def test_prm_with_a_token_classification_head():
    tokenizer = byte_level_tokenizer(CHATML)
    torch.manual_seed(0)
    model = Qwen2ForTokenClassification(tiny_config(tokenizer, num_labels=2))
    scores = ProcessRewardModel(model, tokenizer).score([("How many?", steps) for steps in STEPS])
    for steps, found in zip(STEPS, scores, strict=True):
        ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        expected = []
        for text in ("How many?", *steps):
            ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
            expected.append(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[1].item())
        assert found == pytest.approx(expected[1:], rel=1e-4)


def test_prm_picks_the_first_low_score():
    class Scores:
        def answer(self, requests):
            return {request.key: {"scores": [0.9, 0.4, 0.1]} for request in requests}

    verdict = judge_one(prm_judge(), solution(3), {"prm": Scores()})
    assert (verdict.step, verdict.evidence) == (2, {"scores": [0.9, 0.4, 0.1]})
    assert judge_one(prm_judge(0.05), solution(3), {"prm": Scores()}).step is None
