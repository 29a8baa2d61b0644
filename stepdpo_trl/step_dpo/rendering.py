"""Rendering of prompts as text, with a chat template or a plain one, and the text that ends a turn."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import prepare_multimodal_messages

from ..data.prompts import PROMPT_SUFFIXES, PROMPT_TEMPLATES, resolve_text
from ..data.schema import PREFIX_COLUMN

# Placeholder for the solution. Its invisible separator keeps templates from stripping or splitting it
_SOLUTION = "SOLUTION\u2063TEXT"


@dataclass(frozen=True)
class PromptRenderer:
    """
    Renderer of the text that the model continues with the next step.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the policy.
        chat_template (`str`, *optional*):
            Chat template. Defaults to the tokenizer's. A processor can have one when its tokenizer has none.
        multimodal (`bool`, *optional*, defaults to `False`):
            Whether the chat template belongs to a processor and expects message contents as lists of parts.
        system_prompt (`str`, *optional*):
            System message prepended to string prompts.
        prompt_suffix (`str`, *optional*):
            Text appended to string prompts, or a name in [`~stepdpo_trl.data.prompts.PROMPT_SUFFIXES`].
        prompt_template (`str`, *optional*):
            Layout of string prompts that replaces the chat template and contains `{prompt}` and, if there is a system
            prompt, `{system_prompt}`; or a name in [`~stepdpo_trl.data.prompts.PROMPT_TEMPLATES`]. If `None`, the
            chat template is used, or `"plain"` if there is none.

    Raises:
        ValueError: If an option has an invalid value, or if the layout has no place for the system prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    multimodal: bool = False
    system_prompt: str | None = None
    prompt_suffix: str | None = None
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        if self.system_prompt is None or self.uses_chat_template or "{system_prompt}" in self._plain_template:
            return
        raise ValueError(
            f"`system_prompt={self.system_prompt!r}` cannot be rendered: there is no chat template, and the template "
            f"{self._plain_template!r} does not contain {{system_prompt}}. Add it to `prompt_template`, or remove "
            "`system_prompt`."
        )

    @property
    def uses_chat_template(self) -> bool:
        """`True` if prompts are rendered with a chat template."""
        return self.prompt_template is None and bool(self.chat_template or self.tokenizer.chat_template)

    @property
    def _plain_template(self) -> str:
        return resolve_text(self.prompt_template or "plain", PROMPT_TEMPLATES, "prompt_template")

    @property
    def _suffix(self) -> str:
        return resolve_text(self.prompt_suffix, PROMPT_SUFFIXES, "prompt_suffix") if self.prompt_suffix else ""

    def split_prompt(
        self, prompt: str | list[dict[str, Any]], prefix: str, where: str
    ) -> tuple[list[dict[str, Any]], str]:
        """
        Split a prompt into the messages before the assistant's turn and the beginning of that turn.

        Args:
            prompt (`str` or `list[dict]`):
                Problem, or messages. Messages may end with an open assistant turn.
            prefix (`str`):
                Initial reasoning steps. Not used if the prompt ends with an assistant turn.
            where (`str`):
                Name of the row in error messages.

        Returns:
            `tuple[list[dict], str]`: Messages and the beginning of the assistant's turn.

        Raises:
            ValueError: If the messages cannot be rendered or their last turn cannot be continued.
        """
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt + self._suffix}]
            if self.system_prompt is not None:
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            return messages, prefix
        if {self.system_prompt, self.prompt_suffix, self.prompt_template} != {None}:
            raise ValueError(
                "`system_prompt`, `prompt_suffix` and `prompt_template` are for string prompts, but `prompt` of "
                f"{where} is a list of messages. Remove these options and add their text to the messages."
            )
        if not self.uses_chat_template:
            raise ValueError(
                f"`prompt` of {where} is a list of messages, but the tokenizer has no chat template to render it. "
                "Set `tokenizer.chat_template`, or pass the prompt as a string."
            )
        last = prompt[-1]
        if last["role"] != "assistant":
            return prompt, prefix
        extras = [name for name in ("tool_calls", "reasoning_content", "thinking") if last.get(name)]
        if len(prompt) == 1 or extras or not isinstance(last.get("content"), str):
            raise ValueError(
                f"The assistant turn that ends `prompt` of {where} cannot be continued: it must follow another turn "
                f"and its content must be plain text{f', without {extras}' if extras else ''}. Move the text to "
                f"`{PREFIX_COLUMN}` and end the prompt with the user turn."
            )
        return prompt[:-1], last["content"]

    def render(self, messages: list[dict[str, Any]], prefix: str, where: str, row: Mapping[str, Any]) -> str:
        """
        Render messages, the opening of the assistant's turn and the prefix.

        Args:
            messages (`list[dict]`):
                Messages before the assistant's turn.
            prefix (`str`):
                Beginning of the assistant's turn.
            where (`str`):
                Name of the row in error messages.
            row (`Mapping[str, Any]`):
                Row whose `tools` and `chat_template_kwargs`, if present, are passed to the chat template.

        Returns:
            `str`: The text that the model continues.

        Raises:
            ValueError: If the chat template fails or does not render the last message.
        """
        try:
            text = self._render_prompt(messages, row) + prefix
        except Exception as error:  # templates can raise anything
            raise ValueError(f"The chat template cannot render {where}: {type(error).__name__}: {error}") from error
        question = messages[-1].get("content")
        parts = [part.get("text") for part in question] if isinstance(question, list) else [question]
        for part in parts:
            if isinstance(part, str) and part.strip() not in text:
                raise ValueError(
                    f"The chat template does not render the last message of {where}, {part[-60:]!r}. Pass the "
                    "processor that the template belongs to as `processing_class`, or set another `chat_template`."
                )
        return text

    def end_of_turn(self, messages: list[dict[str, Any]], where: str, row: Mapping[str, Any]) -> str:
        """
        Return the token that ends the assistant's turn in the chat template, or EOS if the template has none.

        Args:
            messages (`list[dict]`), where (`str`), row (`Mapping[str, Any]`):
                As for `render`.

        Returns:
            `str`: Text of the token.

        Raises:
            ValueError: If there is neither an end-of-turn nor an EOS token.
        """
        end = ""
        if self.uses_chat_template:
            conversation = [*messages, {"role": "assistant", "content": _SOLUTION}]
            try:
                text = self._apply_chat_template(conversation, **self._template_kwargs(row))
            except Exception as error:  # templates can raise anything
                raise ValueError(
                    f"The chat template cannot render the solution of {where}: {type(error).__name__}: {error}"
                ) from error
            _, found, end = text.rpartition(_SOLUTION)
            if not found:
                raise ValueError(
                    f"The end of the solution in {where} cannot be learned: the chat template does not render the "
                    "assistant turn, so its end-of-turn token is unknown. Set another `chat_template`."
                )
            # Generation stops at the first special token, so any text after it is never generated
            special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
            first = min((token for token in special if token in end), key=end.index, default=None)
            end = first or end.strip()
        end = end or self.tokenizer.eos_token or ""
        if not end:
            raise ValueError(
                f"The end of the solution in {where} cannot be learned: the tokenizer has neither a chat template nor "
                "an EOS token. Set `tokenizer.eos_token`."
            )
        return end

    def _render_prompt(self, messages: list[dict[str, Any]], row: Mapping[str, Any]) -> str:
        kwargs = self._template_kwargs(row)
        if self.uses_chat_template:
            return self._apply_chat_template(messages, add_generation_prompt=True, **kwargs)
        by_role = {message["role"]: message["content"] for message in messages}
        # `str.format` would fail on the LaTeX braces of templates and problems
        before, _, after = self._plain_template.partition("{prompt}")
        system = by_role.get("system", "")
        before, after = (part.replace("{system_prompt}", system) for part in (before, after))
        return before + by_role["user"] + after

    def _template_kwargs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        kwargs = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        return {"chat_template": self.chat_template, **kwargs} if self.chat_template else kwargs

    def _apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        messages = prepare_multimodal_messages(messages) if self.multimodal else messages
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
