"""
Solutions with known labels, of GSM8K's gold solutions: python -m tests.data.make_labelled_solutions gsm8k_test.jsonl

Each problem gives one right solution and one with the same reasoning and another final answer, written in the ways in
which models write theirs. Which of them is right is known from how they were made.
"""

import json
import re
import sys
from pathlib import Path

TARGET = Path(__file__).parent / "labelled_solutions.jsonl"

# Ways to end a solution with an answer, a number as GSM8K writes it
ENDINGS = (
    "#### {}",
    "The answer is $\\boxed{{{}}}$.",
    "Therefore, the final answer is {}.",
    "**Answer:** {}",
    "So the answer is \\boxed{{\\text{{{}}}}}.",
    "\\[\n\\boxed{{{} \\text{{ in total}}}}\n\\]",
    "Thus, there are {} in all, so the answer is: **{}**",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
)


def spellings(number: str) -> list[str]:
    """Ways to write the same number."""
    plain = number.replace(",", "")
    ways = [plain, f"{float(plain):,.2f}"]
    if abs(float(plain)) < 1e5:
        ways += [f"\\frac{{{2 * float(plain):g}}}{{2}}"]
    if float(plain).is_integer():
        ways += [f"{int(float(plain)):,}", f"{int(float(plain)):,}".replace(",", "{,}"), f"{plain}.0"]
    return ways


def falsified(number: str, reasoning: str) -> list[str]:
    """Other numbers than the right one: small slips, wrong signs and scales, results on the way."""
    right = float(number.replace(",", ""))
    others = [right + 1, right - 1, right * 10, -right, right + 0.5, right * 2, right / 2]
    others += [float(result) for result in re.findall(r"=(\d+(?:\.\d+)?)>>", reasoning)][:-1]
    if digits := re.match(r"(\d)(\d)(.*)", f"{right:.10g}"):
        others += [float(digits[2] + digits[1] + digits[3])]
    return [f"{other:.10g}" for other in others if other != right and "e" not in f"{other:.10g}"]


def make(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Labelled solutions, two for each row."""
    labelled: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        reasoning, _, gold = row["answer"].rpartition("####")
        gold = gold.strip()
        text = re.sub(r"<<.*?>>", "", reasoning)
        others = falsified(gold, reasoning)
        wrong = others[number // len(ENDINGS) % len(others)]
        for is_correct, answer in ((True, gold), (False, wrong)):
            ways = spellings(answer)
            spelt = ways[(number // 3) % len(ways)]
            ending = ENDINGS[number % len(ENDINGS)]
            if "text{{{}}}" in ending:
                spelt = answer  # no formula within \text
            solution = text + ending.format(*[spelt] * ending.count("{}"))
            name = f"{number}-{'right' if is_correct else 'wrong'}"
            labelled.append({"id": name, "answer": gold, "solution": solution, "is_correct": is_correct})
        if number % 10 == 0:  # cut before the answer: not right, and not wrong either
            labelled.append({"id": f"{number}-cut", "answer": gold, "solution": text, "is_correct": False})
    return labelled


def main(source: str) -> None:
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    rows = make([json.loads(line) for line in lines[:150]])
    TARGET.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
