"""
Create solutions with known labels from the gold solutions of GSM8K.

    python -m tests.data.make_labeled_solutions gsm8k_test.jsonl

Each problem yields a right solution and a solution with the same reasoning but a wrong final answer. The final answers
use formats that are typical of language models. The labels are known by construction.
"""

import json
import re
import sys
from pathlib import Path

TARGET = Path(__file__).parent / "labeled_solutions.jsonl"

# Endings of a solution, with a placeholder for the answer
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
    """Return different spellings of the same number."""
    plain = number.replace(",", "")
    found = [plain, f"{float(plain):,.2f}"]
    if abs(float(plain)) < 1e5:
        found += [f"\\frac{{{2 * float(plain):g}}}{{2}}"]
    if float(plain).is_integer():
        found += [f"{int(float(plain)):,}", f"{int(float(plain)):,}".replace(",", "{,}"), f"{plain}.0"]
    return found


def falsified(number: str, reasoning: str) -> list[str]:
    """Return wrong numbers: small slips, wrong signs, wrong scales and intermediate results."""
    right = float(number.replace(",", ""))
    others = [right + 1, right - 1, right * 10, -right, right + 0.5, right * 2, right / 2]
    others += [float(result) for result in re.findall(r"=(\d+(?:\.\d+)?)>>", reasoning)][:-1]
    if digits := re.match(r"(\d)(\d)(.*)", f"{right:.10g}"):
        others += [float(digits[2] + digits[1] + digits[3])]
    return [f"{other:.10g}" for other in others if other != right and "e" not in f"{other:.10g}"]


def make(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Create two labeled solutions for each row, and a truncated one for every tenth row."""
    labeled: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        reasoning, _, gold = row["answer"].rpartition("####")
        gold = gold.strip()
        text = re.sub(r"<<.*?>>", "", reasoning)
        others = falsified(gold, reasoning)
        wrong = others[number // len(ENDINGS) % len(others)]
        for is_correct, answer in ((True, gold), (False, wrong)):
            candidates = spellings(answer)
            spelling = candidates[(number // 3) % len(candidates)]
            ending = ENDINGS[number % len(ENDINGS)]
            if "text{{{}}}" in ending:
                spelling = answer  # \text cannot contain math
            solution = text + ending.format(*[spelling] * ending.count("{}"))
            name = f"{number}-{'right' if is_correct else 'wrong'}"
            labeled.append({"id": name, "answer": gold, "solution": solution, "is_correct": is_correct})
        if number % 10 == 0:  # truncated before the answer: unreadable rather than wrong
            labeled.append({"id": f"{number}-cut", "answer": gold, "solution": text, "is_correct": False})
    return labeled


def main(source: str) -> None:
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    rows = make([json.loads(line) for line in lines[:150]])
    TARGET.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
