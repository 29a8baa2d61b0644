"""Step-DPO (arXiv 2406.18629): `trl.DPOTrainer` on single reasoning steps."""

import dataclasses
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..data.schema import PREFIX_COLUMN, check_columns, check_plain_columns, is_step_data
from ..sdpo.callback import SDPOCallback
from ..sdpo.stages import STAGE_COLUMN, join_stages
from ..sdpo.training import StagedTraining
from ..shared_prefix.mixin import PrefixSharing
from .config import STEP_OPTIONS, StepDPOConfig
from .sampler import PromptGroupSampler
from .tokenization import StepTokenizer

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = get_logger(__name__)


class StepDPOTrainer(StagedTraining, PrefixSharing, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that learns from single reasoning steps (Step-DPO, arXiv 2406.18629).

    Rows with a column `initial_reason_steps` are step pairs. Prompt and initial steps are context, and the loss of
    eq. 2 of the paper falls on every token of `chosen` (s_win) and `rejected` (s_lose) and on no other; no end of turn
    follows a step, unless the row says in `chosen_ends_solution` or `rejected_ends_solution` that the solution ends
    with it. Rows without the column are ordinary preference pairs, treated as by [`~trl.DPOTrainer`]. Loss and
    training loop are inherited, so every option of [`~trl.DPOConfig`] works on steps. What the sequences of a batch
    begin with alike is computed once (`shared_prefix` of [`StepDPOConfig`]).

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, ...:
            As for [`~trl.DPOTrainer`]. `args` is a [`StepDPOConfig`] or a [`~trl.DPOConfig`], and defaults to
            `StepDPOConfig(f"{model_name}-Step-DPO")`.

    Raises:
        ValueError: If a row of step data cannot be trained on; the message names the row and the mend. Raised before
            training starts, for streams when the row is drawn.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from stepdpo_trl import StepDPOConfig, StepDPOTrainer

    >>> trainer = StepDPOTrainer(
    ...     model="Qwen/Qwen2-7B-Instruct",
    ...     args=StepDPOConfig("Qwen2-7B-Step-DPO", prompt_suffix="step-dpo", beta=0.5, learning_rate=5e-7),
    ...     train_dataset=load_dataset("xinlai/Math-Step-DPO-10K", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "step-dpo"]  # noqa: RUF012  (a plain attribute upstream)
    _name = "Step-DPO"
    _paper = {  # noqa: RUF012
        "title": "Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs",
        "id": "2406.18629",
        "citation": textwrap.dedent("""\
            @article{lai2024stepdpo,
                title         = {{Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs}},
                author        = {Xin Lai and Zhuotao Tian and Yukang Chen and Senqiao Yang and Xiangru Peng and Jiaya Jia},
                year          = 2024,
                journal       = {arXiv preprint},
                eprint        = {2406.18629},
                archivePrefix = {arXiv}
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | list[Dataset] | dict[str, Dataset] | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,
    ) -> None:
        callbacks, sdpo = _find_sdpo(callbacks)
        if isinstance(train_dataset, (list, dict)):
            if sdpo is None:
                raise TypeError(
                    f"The training data is a {type(train_dataset).__name__} of data sets. To spend them in stages "
                    "(sDPO), pass `callbacks=[SDPOCallback()]`; otherwise choose one, or join them with "
                    "`datasets.concatenate_datasets`."
                )
            train_dataset = join_stages(train_dataset)
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            first_row = _first_row(train_dataset, "train dataset")
            _check_first_row(first_row, "train dataset")
            if not is_step_data(first_row):  # then it is DPO, and model card and tags say so
                self._name, self._paper, self._tag_names = DPOTrainer._name, DPOTrainer._paper, DPOTrainer._tag_names
            if _has_images(first_row):  # then DPOTrainer prepares no data set, so no prefix would be seen
                _check_no_step_data(eval_dataset)
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = StepDPOConfig(f"{model_name.split('/')[-1]}-{self._name}")
        # A stock DPOConfig on plain pairs is DPOTrainer to the bit
        step_data = isinstance(train_dataset, (Dataset, IterableDataset)) and is_step_data(first_row)
        self.shared_prefix = getattr(args, "shared_prefix", "auto" if step_data else "off")
        _check_order(args, train_dataset)
        _check_special_tokens(processing_class)
        if getattr(quantization_config, "load_in_4bit", False) or getattr(model, "is_loaded_in_4bit", False):
            _warn_of_repacking()
        self.sdpo = sdpo
        stage_names: list[Any] = []  # before rows are dropped as overlong
        if sdpo is not None and isinstance(train_dataset, Dataset) and STAGE_COLUMN in train_dataset.column_names:
            stage_names = train_dataset.unique(STAGE_COLUMN)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._start_sharing()
        if sdpo is not None:
            sdpo.attach(self, stage_names)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """With `group_by_prompt`, the pairs of a prompt one after the other."""
        if not getattr(self.args, "group_by_prompt", False):
            return super()._get_train_sampler(train_dataset)
        whole: Any = self.train_dataset  # the Trainer passes it without its text
        return PromptGroupSampler(whole["prompt"], self.args.data_seed or self.args.seed)

    def create_accelerator_and_postprocess(self) -> None:
        """Keep log-probabilities in float32 under FSDP2, whose default in bf16 rounds one of -40 to the next 0.25."""
        super().create_accelerator_and_postprocess()
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        policy = plugin.mixed_precision_policy if plugin is not None and plugin.fsdp_version == 2 else None
        if policy is not None and policy.output_dtype not in (None, torch.float32):
            plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
            logger.info(f"FSDP2 would round log-probabilities to {policy.output_dtype}. They are left in float32.")

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Tokenize step data; leave plain preference data to `DPOTrainer`. Serves train, eval and `evaluate()`."""
        where = f"{dataset_name} dataset"
        first_row = _first_row(dataset, where)
        _check_first_row(first_row, where)
        if not is_step_data(first_row):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        encode = make_step_tokenizer(processing_class, args)
        if isinstance(dataset, IterableDataset):
            stream = _StreamEncoder(encode, where)
            dataset = dataset.map(stream).filter(stream.keeps).remove_columns("overlong")
            _first_row(dataset, f"{where}, after rows longer than max_length={args.max_length} have been dropped,")
            return dataset

        with PartialState().main_process_first():  # the others read its cache
            dataset = dataset.map(
                _encode_row,
                with_indices=True,
                # The version is part of the cache's fingerprint, the code behind `encode` is not
                fn_kwargs={"encode": encode, "where": where, "version": __version__},
                num_proc=args.dataset_num_proc,
                desc=f"Tokenizing {where}",
            )
            overlong = sum(tokens > 0 for tokens in dataset["overlong"])
            if overlong and encode.overlong_prefix == "drop":
                dataset = dataset.filter(_fits, input_columns="overlong", desc=f"Dropping overlong rows from {where}")
        if overlong:
            logger.warning(_overlong_message(encode, f"{overlong} rows", where))
        if len(dataset) == 0:
            raise ValueError(
                f"No row of the {where} is left: all {overlong} are longer than max_length={args.max_length}. Raise "
                "`max_length`, or cut the prefixes with `overlong_prefix='truncate'`."
            )
        return dataset.remove_columns("overlong")


def make_step_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin, args: DPOConfig) -> StepTokenizer:
    """
    Make what turns rows of step data into tokens in training.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer or processor of the policy.
        args ([`StepDPOConfig`] or [`~trl.DPOConfig`]):
            The configuration.

    Returns:
        [`StepTokenizer`]: The tokenizer of rows.
    """
    multimodal = isinstance(processing_class, ProcessorMixin)
    tokenizer: Any = processing_class.tokenizer if multimodal else processing_class
    # A processor may have the chat template that its tokenizer lacks
    chat_template: Any = processing_class.chat_template if multimodal else None
    return StepTokenizer(
        tokenizer=tokenizer,
        chat_template=chat_template,
        multimodal=multimodal,
        max_length=args.max_length,
        **{name: getattr(args, name) for name in STEP_OPTIONS if isinstance(args, StepDPOConfig)},
    )


def _find_sdpo(callbacks: list[Any] | None) -> tuple[list[Any] | None, SDPOCallback | None]:
    """The callbacks, and the one for stages among them, made where the class is given as the Trainer allows."""
    made = [callback() if callback is SDPOCallback else callback for callback in callbacks or []]
    found = [callback for callback in made if isinstance(callback, SDPOCallback)]
    if len(found) > 1:
        raise ValueError(f"There are {len(found)} SDPOCallbacks. One runs all stages.")
    return (made if found else callbacks), (found[0] if found else None)


class _StreamEncoder:
    """
    Tokenizes the rows of a stream. A stream has no end to report at: overlong rows are logged at the 1st, 2nd, 4th,
    8th ... of them, by each worker for what it has drawn.
    """

    def __init__(self, encode: StepTokenizer, where: str) -> None:
        self.encode = encode
        self.where = where
        self.drawn = 0
        self.overlong = 0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.drawn += 1
        # Shards and shuffling leave a row of a stream without a number
        row = self.encode(row, f"the row of the {self.where} with the prompt {str(row.get('prompt'))[:80]!r}")
        if row["overlong"]:
            self.overlong += 1
            if self.overlong.bit_count() == 1:
                rows = f"{self.overlong} of the {self.drawn} rows drawn so far"
                logger.warning(_overlong_message(self.encode, rows, self.where))
        return row

    def keeps(self, row: dict[str, Any]) -> bool:
        return _fits(row["overlong"]) or self.encode.overlong_prefix != "drop"


def _encode_row(row: dict[str, Any], index: int, encode: StepTokenizer, where: str, version: str) -> dict[str, Any]:
    return encode(row, f"row {index} of the {where}")


def _fits(overlong: int) -> bool:
    return overlong == 0


def _overlong_message(encode: StepTokenizer, rows: str, where: str) -> str:
    done = "dropped" if encode.overlong_prefix == "drop" else "cut from the left to fit, their steps kept whole"
    return (
        f"{rows} of the {where} were longer than max_length={encode.max_length} and have been {done} "
        f"(overlong_prefix={encode.overlong_prefix!r})."
    )


def _first_row(dataset: Dataset | IterableDataset, where: str) -> dict[str, Any]:
    for row in dataset:
        return row
    raise ValueError(f"The {where} is empty. Check how it was loaded and filtered.")


def _check_first_row(row: dict[str, Any], where: str) -> None:
    if not is_step_data(row):
        check_plain_columns(row, f"the {where}")
        if "prefix" in row:  # what the released scripts of Step-DPO write
            logger.warning(
                f"The {where} has no `{PREFIX_COLUMN}` and is treated as ordinary preference pairs, without its "
                f"column `prefix`. Rename that to `{PREFIX_COLUMN}` if it holds reasoning steps."
            )
        return
    check_columns(row, f"the {where}")
    if _has_images(row):
        raise ValueError(
            f"The {where} has both `{PREFIX_COLUMN}` and images. Step pairs with images are not supported: remove the "
            f"images to train on the text, or remove `{PREFIX_COLUMN}` to train on ordinary preference pairs."
        )


def _check_order(args: Any, train_dataset: Any) -> None:
    if not getattr(args, "group_by_prompt", False):
        return
    if isinstance(train_dataset, IterableDataset):
        raise ValueError("`group_by_prompt=True` needs all rows at once, and the training data is a stream.")
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`group_by_prompt=True` and train_sampling_strategy={args.train_sampling_strategy!r} are two orders. "
            "Leave one of them out."
        )


def _has_images(row: dict[str, Any]) -> bool:
    return "image" in row or "images" in row


def _check_no_step_data(eval_dataset: Any) -> None:
    datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in datasets.items():
        if dataset is not None and is_step_data(_first_row(dataset, f"{name} dataset")):
            raise ValueError(
                f"The {name} dataset has `{PREFIX_COLUMN}` and the train dataset has images. Evaluate on step pairs "
                "with a trainer of their own."
            )


def _check_special_tokens(processing_class: PreTrainedTokenizerBase | ProcessorMixin | None) -> None:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has neither a pad token nor an EOS token, so batches cannot be padded. Set one before you "
            "pass it as `processing_class`: `tokenizer.pad_token = ...` with a token of its vocabulary."
        )


def _warn_of_repacking() -> None:
    if torch.cuda.is_available():
        return
    from bitsandbytes.nn import modules

    if getattr(modules, "has_avx512bf16", lambda: False)():
        logger.warning(
            "On this CPU (AVX512-BF16) bitsandbytes repacks 4-bit weights in the first forward in evaluation mode, "
            "and gradients are wrong from then on. Do not evaluate, generate or set `precompute_ref_log_probs` before "
            "training ends, or train on a GPU."
        )
