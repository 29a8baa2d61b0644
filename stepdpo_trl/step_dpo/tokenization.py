"""One step pair in, token ids out.

The prefix (prompt and initial reasoning steps) is tokenized as at inference, where the model continues from it. Each
step is tokenized as a continuation of that text, on its own, so that no token belongs to both: the loss can count
every token of the step and no other, and the policy is scored on the token sequences that it would itself generate.
"""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import prepare_multimodal_messages

from ..data.prompts import PROMPT_SUFFIXES, PROMPT_TEMPLATES, resolve_text
from ..data.schema import PREFIX_COLUMN, StepPreference

OVERLONG_PREFIX_CHOICES = ("truncate", "drop", "error")

# Text that a template can neither strip nor split at; it stands for the solution while the end of turn is looked up.
_SOLUTION = "SOLUTION\u2063TEXT"


@dataclass(frozen=True)
class StepTokenizer:
    """
    Turns rows of step data into `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the policy.
        chat_template (`str`, *optional*):
            Chat template, defaults to the tokenizer's own. A processor may have one where its tokenizer has none.
        multimodal (`bool`, *optional*, defaults to `False`):
            Whether the chat template is a processor's, which takes messages as lists of parts.
        system_prompt (`str`, *optional*):
            System message put before string prompts.
        prompt_suffix (`str`, *optional*):
            Text put behind string prompts, or the name of one in [`~stepdpo_trl.data.prompts.PROMPT_SUFFIXES`].
        prompt_template (`str`, *optional*):
            Layout of string prompts in place of a chat template, with `{prompt}` in it and `{system_prompt}` where
            there is one, or the name of one in [`~stepdpo_trl.data.prompts.PROMPT_TEMPLATES`]. Defaults to the chat
            template, to `"plain"` where there is none.
        max_length (`int`, *optional*):
            Most tokens that prefix and step may have together. `None` for no limit.
        overlong_prefix (`str`, *optional*, defaults to `"truncate"`):
            What to do where they have more: cut the prefix from the left (`"truncate"`), mark the row as one to drop
            (`"drop"`) or raise (`"error"`). A step is never cut.

    Raises:
        ValueError: If an option has an unusable value.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    multimodal: bool = False
    system_prompt: str | None = None
    prompt_suffix: str | None = None
    prompt_template: str | None = None
    max_length: int | None = None
    overlong_prefix: str = "truncate"

    def __post_init__(self) -> None:
        check_token_options(self.prompt_suffix, self.prompt_template, self.overlong_prefix)
        if (
            self.system_prompt is not None
            and not self._uses_chat_template
            and "{system_prompt}" not in self._plain_template
        ):
            raise ValueError(
                f"`system_prompt={self.system_prompt!r}` has no place: there is no chat template, and the template "
                f"{self._plain_template!r} has no {{system_prompt}} in it. Add it to `prompt_template`, or leave "
                "`system_prompt` unset."
            )

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """
        Tokenize one row.

        Args:
            row (`Mapping[str, Any]`):
                Row with the columns of [`StepPreference`], and optionally `tools` and `chat_template_kwargs` as
                `DPOTrainer` knows them.
            where (`str`):
                What to call the row in an error.

        Returns:
            `dict`: `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of token ids) and `overlong`, the number of
            prefix tokens that did not fit into `max_length`. They have been cut if `overlong_prefix="truncate"`.

        Raises:
            ValueError: If the row is not a valid step pair, or does not fit and must.
        """
        pair = StepPreference.from_row(row, where)
        steps = {"chosen": (pair.chosen, pair.chosen_ends_solution)}
        steps["rejected"] = (pair.rejected, pair.rejected_ends_solution)
        prefix_ids, step_ids, overlong = self.encode_steps(pair.prompt, pair.initial_reason_steps, steps, where, row)
        if step_ids["chosen"] == step_ids["rejected"]:
            raise ValueError(
                f"`chosen` and `rejected` of {where} differ as text but have the same tokens, so there is nothing to "
                "prefer. Remove the row."
            )
        return {
            "prompt_ids": prefix_ids,
            "chosen_ids": step_ids["chosen"],
            "rejected_ids": step_ids["rejected"],
            "overlong": overlong,
        }

    def encode_steps(
        self,
        prompt: str | list[dict[str, Any]],
        prefix: str,
        steps: Mapping[str, tuple[str, bool]],
        where: str,
        row: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], dict[str, list[int]], int]:
        """
        Tokenize a prefix and any number of steps that may follow it.

        Args:
            prompt (`str` or `list[dict]`), prefix (`str`):
                The problem, and what the assistant has written so far.
            steps (`Mapping[str, tuple[str, bool]]`):
                Steps by name, each with whether the solution ends with it.
            where (`str`):
                What to call them in an error.
            row (`Mapping[str, Any]`, *optional*):
                Where `tools` and `chat_template_kwargs` are, if there are any.

        Returns:
            `list[int]`, `dict[str, list[int]]`, `int`: Tokens of the prefix, of each step, and `overlong` as above.

        Raises:
            ValueError: If they cannot be tokenized, or do not fit and must.
        """
        messages, prefix = self._messages_and_prefix(prompt, prefix, where)
        try:
            template_kwargs = self._template_kwargs(row or {})
            text = self._render(messages, template_kwargs) + prefix
        except Exception as error:  # whatever a template raises
            raise ValueError(f"The chat template cannot render {where}: {type(error).__name__}: {error}") from error
        asked = messages[-1].get("content")
        if isinstance(asked, str) and asked.strip() not in text:
            raise ValueError(
                f"The chat template does not write out the last message of {where}, {asked[-60:]!r}. Pass the "
                "processor that the template belongs to as `processing_class`, or set another `chat_template`."
            )
        text_ids = self._encode(text)
        prefix_ids = self._leading_special_ids(text, text_ids) + text_ids

        step_ids = {}
        for name, (step, ends) in steps.items():
            end_of_turn = self._end_of_turn(messages, template_kwargs, where) if ends else ""
            if not step.rstrip().endswith(end_of_turn):
                step += end_of_turn
            step_ids[name] = self._encode_step(text, text_ids, step, f"`{name}` of {where}")

        overlong = self._overlong(prefix_ids, step_ids, where)
        if overlong and self.overlong_prefix == "truncate":
            first, kept = prefix_ids[0], prefix_ids[overlong:]
            # Many models depend on BOS
            prefix_ids = [first, *kept[1:]] if first == self.tokenizer.bos_token_id and len(kept) > 1 else kept
        return prefix_ids, step_ids, overlong

    def _template_kwargs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        return {"chat_template": self.chat_template, **kwargs} if self.chat_template else kwargs

    @property
    def _uses_chat_template(self) -> bool:
        return self.prompt_template is None and bool(self.chat_template or self.tokenizer.chat_template)

    @property
    def _plain_template(self) -> str:
        return resolve_text(self.prompt_template or "plain", PROMPT_TEMPLATES, "prompt_template")

    def _messages_and_prefix(
        self, prompt: str | list[dict[str, Any]], prefix: str, where: str
    ) -> tuple[list[dict[str, Any]], str]:
        """Messages up to the assistant's turn, and what the assistant has said in it."""
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt + self._suffix}]
            if self.system_prompt is not None:
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            return messages, prefix
        if {self.system_prompt, self.prompt_suffix, self.prompt_template} != {None}:
            raise ValueError(
                "`system_prompt`, `prompt_suffix` and `prompt_template` are for string prompts, but `prompt` of "
                f"{where} is a list of messages. Leave them unset and write the messages as they should be."
            )
        if not self._uses_chat_template:
            raise ValueError(
                f"`prompt` of {where} is a list of messages, but the tokenizer has no chat template to render it. "
                "Set `tokenizer.chat_template`, or give the prompt as a string."
            )
        last = prompt[-1]
        if last["role"] != "assistant":
            return prompt, prefix
        extras = [name for name in ("tool_calls", "reasoning_content", "thinking") if last.get(name)]
        if len(prompt) == 1 or extras or not isinstance(last.get("content"), str):
            raise ValueError(
                f"The assistant's turn that ends `prompt` of {where} cannot be continued: it must follow another turn "
                f"and have plain text as its content{f', not {extras}' if extras else ''}. Put the text into "
                f"`{PREFIX_COLUMN}` and end the prompt with the user's turn."
            )
        return prompt[:-1], last["content"]

    @property
    def _suffix(self) -> str:
        return resolve_text(self.prompt_suffix, PROMPT_SUFFIXES, "prompt_suffix") if self.prompt_suffix else ""

    def _render(self, messages: list[dict[str, Any]], template_kwargs: dict[str, Any]) -> str:
        """Text up to and including the opening of the assistant's turn."""
        if self._uses_chat_template:
            return self._apply_chat_template(messages, add_generation_prompt=True, **template_kwargs)
        by_role = {message["role"]: message["content"] for message in messages}
        # Not `str.format`: templates and problems are full of LaTeX braces.
        before, _, after = self._plain_template.partition("{prompt}")
        system = by_role.get("system", "")
        before, after = (part.replace("{system_prompt}", system) for part in (before, after))
        return before + by_role["user"] + after

    def _end_of_turn(self, messages: list[dict[str, Any]], template_kwargs: dict[str, Any], where: str) -> str:
        """The token that the template writes after the assistant's last word; EOS where it writes none."""
        end = ""
        if self._uses_chat_template:
            whole = [*messages, {"role": "assistant", "content": _SOLUTION}]
            _, found, end = self._apply_chat_template(whole, **template_kwargs).rpartition(_SOLUTION)
            if not found:
                raise ValueError(
                    f"The end of the solution in {where} cannot be learnt: the chat template does not write out the "
                    "assistant's turn, so its end cannot be told. Set another `chat_template`."
                )
            # Generation stops at the first special token. What templates write behind it is never generated.
            special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
            first = min((token for token in special if token in end), key=end.index, default=None)
            end = first or end.strip()
        end = end or self.tokenizer.eos_token or ""
        if not end:
            raise ValueError(
                f"The end of the solution in {where} cannot be learnt: the tokenizer has neither a chat template nor "
                "an EOS token. Set `tokenizer.eos_token`."
            )
        return end

    def _apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        messages = prepare_multimodal_messages(messages) if self.multimodal else messages
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _leading_special_ids(self, text: str, text_ids: list[int]) -> list[int]:
        """What the tokenizer puts in front of a text (BOS). What it puts behind (EOS) does not belong to a prefix."""
        if self._uses_chat_template:  # templates write their own BOS
            return []
        with_special = self.tokenizer(text)["input_ids"]
        for start in range(len(with_special) - len(text_ids) + 1):
            if with_special[start : start + len(text_ids)] == text_ids:
                return with_special[:start]
        return []

    def _encode_step(self, prefix: str, prefix_ids: list[int], step: str, where: str) -> list[int]:
        wanted = None
        # Some tokenizers (SentencePiece with a dummy prefix) begin every text with a space. Behind an anchor, which is
        # taken off again, the step is not the beginning of a text.
        for anchor in ("", "\n", ":", "0"):
            anchor_ids = self._encode(anchor) if anchor else []
            ids = self._encode(anchor + step)
            if ids[: len(anchor_ids)] != anchor_ids:
                continue
            ids = ids[len(anchor_ids) :]
            decoded = self._decode(prefix_ids + ids)
            if decoded == prefix + step:
                return ids
            # Tokenizers may change a text (normalize, lower-case, drop what they do not know). What counts is that
            # the two parts come back as the whole would.
            wanted = wanted or _normalize(self._decode(self._encode(prefix + step)))
            if ids and _normalize(decoded) == wanted:
                return ids
        raise ValueError(
            f"{where} cannot be tokenized as a continuation: the tokens of the prefix and of the step do not decode "
            f"to {(prefix + step)[-60:]!r}. Move the boundary of the step to the beginning of a word."
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _overlong(self, prefix_ids: list[int], step_ids: dict[str, list[int]], where: str) -> int:
        if self.max_length is None:
            return 0
        longest = max(step_ids, key=lambda name: len(step_ids[name]))
        length = len(step_ids[longest])
        overlong = max(0, len(prefix_ids) + length - self.max_length)
        if length >= self.max_length and self.overlong_prefix != "drop":
            raise ValueError(
                f"`{longest}` of {where} has {length} tokens, which leaves no room for a prefix in "
                f"max_length={self.max_length}. A step is never cut: set `max_length` to more than {length}, or "
                "`overlong_prefix='drop'` to leave such rows out."
            )
        if overlong and self.overlong_prefix == "error":
            raise ValueError(
                f"{where} has {len(prefix_ids)} prefix and {length} step tokens, {overlong} more than "
                f"max_length={self.max_length}. Raise `max_length`, or set `overlong_prefix` to 'truncate' (cut the "
                "prefix from the left) or 'drop' (leave such rows out)."
            )
        return overlong


def _normalize(text: str) -> str:
    # Normalization does not commute with cutting: a combining accent at a boundary stays apart in the two parts.
    return unicodedata.normalize("NFKC", text)


def check_token_options(prompt_suffix: str | None, prompt_template: str | None, overlong_prefix: str) -> None:
    """
    Check the options that decide how step data is tokenized; see [`StepTokenizer`] for their meaning.

    Raises:
        ValueError: If one has an unusable value.
    """
    if prompt_suffix:
        resolve_text(prompt_suffix, PROMPT_SUFFIXES, "prompt_suffix")
    template = resolve_text(prompt_template or "plain", PROMPT_TEMPLATES, "prompt_template")
    if template.count("{prompt}") != 1:
        raise ValueError(f"`prompt_template={prompt_template!r}` must contain {{prompt}} exactly once.")
    if overlong_prefix not in OVERLONG_PREFIX_CHOICES:
        raise ValueError(f"`overlong_prefix={overlong_prefix!r}` must be one of {list(OVERLONG_PREFIX_CHOICES)}.")
