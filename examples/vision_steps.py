"""
Train a small vision-language model with Step-DPO on bar charts, and print its accuracy before and after.

    python examples/vision_steps.py

Each image is a bar chart of four colors, drawn on the fly. A question asks for the sum of two bars, and a solution has
three steps: read the first bar, read the second bar, add. The model has the architecture of LLaVA and random weights.

1. It is trained on solutions by simulated students. They read bars correctly, except that they usually report the
   height of the bar to the left if that bar is taller (`MISTAKE`). The model therefore learns to see, and to make this
   mistake.
2. It solves problems with new images at temperature 1. A step pair consists of a first wrong step and a right step
   from the same prefix, both sampled from the model.
3. Step-DPO trains on these pairs.

The accuracy is that of greedy decoding on images that no training step has used.

Measured with the default settings and the seeds 0, 1 and 2, on 500 held-out images each: 53.1 % before and 95.2 %
after Step-DPO (mean; standard deviations 2.6 and 2.3), from 282 step pairs, in 6 to 8 minutes on a core that other
processes used as well. The gain is large because all mistakes are of one simulated kind.
"""

import argparse
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)

from stepdpo_trl import StepDPOConfig, StepDPOTrainer
from stepdpo_trl.evaluation.statistics import mcnemar, wilson
from stepdpo_trl.quickstart import MODEL_PATH

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (235, 200, 40)}
SIDE, PATCH = 32, 8  # of images and patches, in pixels
UNIT = 6  # pixels per unit of height
TALLEST = 5
MISTAKE = 0.75  # how often a student reads the bar to the left if it is taller
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = re.compile(r"Step 1:( \S.*)\nStep 2:( \S.*)\nStep 3:( \S.*)")


@dataclass(frozen=True)
class Problem:
    """
    Question about a bar chart.

    Args:
        colors (`tuple[str, ...]`):
            Colors of the bars, from left to right.
        heights (`tuple[int, ...]`):
            Heights of the bars.
        asked (`tuple[str, str]`):
            Colors of the bars to add.
    """

    colors: tuple[str, ...]
    heights: tuple[int, ...]
    asked: tuple[str, str]

    @property
    def text(self) -> str:
        """The question."""
        return f"What is {self.asked[0]} + {self.asked[1]}?"

    def draw(self) -> Image.Image:
        """Draw the chart."""
        image = Image.new("RGB", (SIDE, SIDE), "white")
        pen, width = ImageDraw.Draw(image), SIDE // len(self.colors)
        for i, (color, height) in enumerate(zip(self.colors, self.heights, strict=True)):
            pen.rectangle((i * width + 1, SIDE - UNIT * height, (i + 1) * width - 2, SIDE - 1), COLORS[color])
        return image

    def steps(self, rng: random.Random | None = None) -> list[str]:
        """Return the three right steps, or with a random number generator those of a student."""
        read = []
        for color in self.asked:
            place = self.colors.index(color)
            height = self.heights[place]
            taller = place > 0 and self.heights[place - 1] > height
            if rng is not None and taller and rng.random() < MISTAKE:
                height = self.heights[place - 1]
            read.append(height)
        first, second = self.asked
        return [f" {first} {read[0]}", f" {second} {read[1]}", f" {read[0]} + {read[1]} = {sum(read)}"]


def draw_problems(seed: int, held_out: bool = False) -> Iterator[Problem]:
    """Draw problems endlessly. A tenth of all charts is held out."""
    rng = random.Random(seed)
    while True:
        colors = tuple(rng.sample(sorted(COLORS), len(COLORS)))
        heights = tuple(rng.randint(1, TALLEST) for _ in COLORS)
        first, second = rng.sample(colors, 2)
        number = sum(height * TALLEST**i for i, height in enumerate(heights))
        if (number % 10 == 0) == held_out:
            yield Problem(colors, heights, (first, second))


def take(problems: Iterator[Problem], number: int) -> list[Problem]:
    """Return the next problems."""
    return [next(problems) for _ in range(number)]


def write(steps: Sequence[str]) -> str:
    """Write steps as a text."""
    return "\n".join(f"Step {number}:{step}" for number, step in enumerate(steps, start=1))


def prefix_of(steps: Sequence[str]) -> str:
    """Write steps, and the label of the next one."""
    return write([*steps, ""])


def make_model(hidden_size: int = 64) -> tuple[Any, Any]:
    """Create a model with random weights, and its processor."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.add_tokens([f" {color}" for color in COLORS])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    shape: Any = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(
            **shape,
            vocab_size=len(tokenizer),
            num_hidden_layers=3,
            max_position_embeddings=256,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=[1.0, 1.0, 1.0],  # the background becomes 0
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLIP's class token
    )
    return LlavaForConditionalGeneration(config), processor


def make_inputs(processor: Any, problems: Sequence[Problem], endings: Sequence[str]) -> Any:
    """Return the inputs of a model for problems and the beginnings of their solutions."""
    texts = []
    for problem, ending in zip(problems, endings, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": problem.text}]
        messages = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + ending)
    images = [[problem.draw()] for problem in problems]
    return processor(
        images=images, text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )


def pretrain(model: Any, processor: Any, updates: int, seed: int) -> None:
    """Train a model on solutions by students."""
    problems, rng = draw_problems(seed), random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates + 1, pct_start=0.1)
    opening = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    model.train()
    for update in range(1, updates + 1):
        batch = take(problems, 64)
        inputs = make_inputs(processor, batch, [f"{write(problem.steps(rng))}<|im_end|>" for problem in batch])
        answer = (inputs["input_ids"] == opening).cumsum(-1) == 2  # the assistant's turn
        labels = inputs["input_ids"].masked_fill(~answer, -100)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % max(1, updates // 10) == 0:
            print(f"update {update}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def solve(
    model: Any,
    processor: Any,
    problems: Sequence[Problem],
    sampled: bool = False,
) -> list[list[str]]:
    """Return the steps of the model's solutions. Solutions in another format have no steps."""
    model.eval()
    solutions = []
    for start in range(0, len(problems), 250):
        part = problems[start : start + 250]
        # With the label of the first step, because a token spans the line break before it
        inputs = make_inputs(processor, part, [prefix_of([])] * len(part))
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
        ids = model.generate(**inputs, max_new_tokens=32, **sampling)[:, inputs["input_ids"].shape[1] :]
        for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True):
            found = STEPS.fullmatch(prefix_of([]) + text)
            solutions.append(list(found.groups()) if found else [])
    return solutions


def make_pairs(problems: Sequence[Problem], solutions: Sequence[Sequence[list[str]]]) -> list[dict]:
    """Return a step pair for each first wrong step to which another solution of the problem has the right step."""
    rows = []
    for problem, own in zip(problems, solutions, strict=True):
        right, done = problem.steps(), set()
        for steps in own:
            wrong = next((i for i in range(len(steps)) if steps[i] != right[i]), None)
            if wrong is None or wrong in done or all(other[: wrong + 1] != right[: wrong + 1] for other in own):
                continue
            done.add(wrong)
            rows.append(
                {
                    "images": [problem.draw()],
                    "prompt": problem.text,
                    "initial_reason_steps": prefix_of(right[:wrong]),
                    "chosen": right[wrong],
                    "rejected": steps[wrong],
                    "chosen_ends_solution": wrong == 2,
                    "rejected_ends_solution": wrong == 2,
                }
            )
    return rows


def check(model: Any, processor: Any, problems: Sequence[Problem]) -> list[bool]:
    """Return for each problem whether the answer of greedy decoding is right."""
    answers = [steps[-1].rpartition("= ")[2] if steps else "" for steps in solve(model, processor, problems)]
    return [
        answer == problem.steps()[-1].rpartition("= ")[2] for answer, problem in zip(answers, problems, strict=True)
    ]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600, help="updates before Step-DPO (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=300, help="problems for step pairs (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="solutions of each problem (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=500, help="held-out problems (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="of Step-DPO (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.4, help="of Step-DPO (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of Step-DPO (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--output_dir", default="outputs/vision-steps", help="folder (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train the model on solutions, then on its own step pairs, and print its accuracy before and after."""
    args = parse_args()
    torch.set_num_threads(1)  # fastest for such small matrices
    set_seed(args.seed)
    started = time.perf_counter()
    model, processor = make_model()
    pretrain(model, processor, args.updates, args.seed)
    held_out = take(draw_problems(args.seed, held_out=True), args.held_out)
    before = check(model, processor, held_out)
    report("before", before, started)

    problems = take(draw_problems(args.seed + 1), args.problems)
    samples = solve(model, processor, [problem for problem in problems for _ in range(args.samples)], sampled=True)
    solutions = [samples[i : i + args.samples] for i in range(0, len(samples), args.samples)]
    rows = make_pairs(problems, solutions)
    if not rows:
        raise SystemExit("There is no step pair: the model is always right, or never. Change --updates.")
    print(f"{len(rows)} step pairs from {len(problems)} problems")
    trainer = StepDPOTrainer(
        model,
        args=StepDPOConfig(
            args.output_dir,
            beta=args.beta,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            precompute_ref_log_probs=True,  # no second model in memory
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=args.seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    after = check(model, processor, held_out)
    report("after", after, started)
    only = [sum(a and not b for a, b in zip(*both, strict=True)) for both in ((after, before), (before, after))]
    print(f"only right after: {only[0]}, only right before: {only[1]}, McNemar's p = {mcnemar(*only):.2g}")


def report(name: str, right: list[bool], started: float) -> None:
    """Print an accuracy with its 95 % interval, and the time since the start."""
    share = sum(right) / len(right)
    low, high = (100 * bound for bound in wilson(share, len(right)))
    print(
        f"accuracy {name}: {100 * share:.1f} % ({low:.1f} to {high:.1f}) on {len(right)} held-out images, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
