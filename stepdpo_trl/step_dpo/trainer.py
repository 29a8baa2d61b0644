"""Trainer for Step-DPO (arXiv 2406.18629): `trl.DPOTrainer` on single reasoning steps."""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
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
from transformers.trainer_utils import has_length
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..data.schema import IMAGE_COLUMNS, has_images, is_step_data
from ..sdpo.callback import SDPOCallback
from ..sdpo.reference import copy_weights
from ..sdpo.stages import STAGE_COLUMN, join_stages
from ..sdpo.training import StagedTraining
from ..shared_prefix.columns import hashes
from ..shared_prefix.mixin import PrefixSharing
from ..shared_prefix.support import decoder
from .checks import (
    check_first_row,
    check_images,
    check_no_step_data,
    check_order,
    check_special_tokens,
    check_vision_model,
    find_step_images,
    warn_about_repacking,
)
from .config import StepDPOConfig
from .dataset import get_first_row, make_step_tokenizer, prepare_step_dataset
from .images import without_decoding
from .model_card import describe_images
from .sampler import PromptGroupSampler
from .vision import IMAGES_DIGEST, PROMPT_TEXT, VisionStepCollator

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = get_logger(__name__)


class StepDPOTrainer(StagedTraining, PrefixSharing, DPOTrainer):
    """
    Trainer for Step-DPO (arXiv 2406.18629), which applies [`~trl.DPOTrainer`] to single reasoning steps.

    Rows with a column `initial_reason_steps` are step pairs. The prompt and the initial steps are context, and the
    loss covers all tokens of `chosen` (s_win) and `rejected` (s_lose) and no others. No end-of-turn token follows a
    step, unless `chosen_ends_solution` or `rejected_ends_solution` says that the step ends the solution. Rows without
    the column are ordinary preference pairs, which are handled as in [`~trl.DPOTrainer`].

    The loss is equation 2 of the paper, averaged over the pairs of a batch:

        -log sigmoid(beta * (log-ratio of s_win - log-ratio of s_lose))
        log-ratio of a step = log pi(step | prompt, initial steps) - log pi_ref(step | prompt, initial steps)

    It is computed by TRL, in `DPOTrainer._compute_loss` with `loss_type="sigmoid"`. `_prepare_dataset` feeds it: it
    writes prompt and initial steps to `prompt_ids` and the two steps to `chosen_ids` and `rejected_ids`, and TRL's
    collator masks everything but the steps. `tests/reference_dpo.py` is the oracle, equation 2 in plain PyTorch;
    `tests/step_dpo/test_loss.py` compares loss and gradients with it. The training loop is inherited as well, so all
    options of [`~trl.DPOConfig`] work on steps.

    Step pairs can have images, in a column `image` or `images`. [`VisionStepCollator`] creates their batches.

    Tokens that the sequences of a batch have in common are computed only once, see `shared_prefix` in
    [`StepDPOConfig`]. With an [`SDPOCallback`], training runs in stages (sDPO).

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, ...:
            As for [`~trl.DPOTrainer`]. `args` is a [`StepDPOConfig`] or a [`~trl.DPOConfig`] and defaults to
            `StepDPOConfig(f"{model_name}-Step-DPO")`. With an [`SDPOCallback`] in `callbacks`, `train_dataset` can be
            a list or dict of datasets, one per stage.

    Raises:
        ValueError: If a row of step data is invalid; the message says which row and how to fix it. Rows of a streaming
            dataset are checked when they are drawn, all others before training starts.

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

    has_step_data = False
    has_step_images = False
    _has_images = False

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
                    f"`train_dataset` is a {type(train_dataset).__name__} of datasets. Pass "
                    "`callbacks=[SDPOCallback()]` to train on them in stages (sDPO), or pass a single dataset, for "
                    "example joined with `datasets.concatenate_datasets`."
                )
            train_dataset = join_stages(train_dataset)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = without_decoding(train_dataset)
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            first_row = get_first_row(train_dataset, "train dataset")
            check_first_row(first_row, "train dataset")
            self.has_step_data = is_step_data(first_row)
            if not self.has_step_data:  # model card and tags are those of DPO
                self._name, self._paper, self._tag_names = DPOTrainer._name, DPOTrainer._paper, DPOTrainer._tag_names
            if self.has_step_data:
                self.has_step_images = find_step_images(first_row, eval_dataset)
            elif has_images(first_row):  # DPOTrainer skips `_prepare_dataset`, which would tokenize step data
                check_no_step_data(eval_dataset)
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = StepDPOConfig(f"{model_name.split('/')[-1]}-{self._name}")
        # With a plain DPOConfig, ordinary pairs train bit for bit as in DPOTrainer
        self.shared_prefix = getattr(args, "shared_prefix", "auto" if self.has_step_data else "off")
        check_order(args, train_dataset)
        check_special_tokens(processing_class)
        if getattr(quantization_config, "load_in_4bit", False) or getattr(model, "is_loaded_in_4bit", False):
            warn_about_repacking()
        self.sdpo = sdpo
        stage_names: list[Any] = []  # all stages, including those whose rows are all dropped as overlong
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

    @property
    def _is_vision_dataset(self) -> bool:
        """
        Whether `DPOTrainer` treats the data as images that are processed only in batches.

        It does so for ordinary preference pairs. Step pairs with images are prepared like text, so that all rows are
        checked before training and that `precompute_ref_log_probs` works.
        """
        return self._has_images and not self.has_step_images

    @_is_vision_dataset.setter
    def _is_vision_dataset(self, value: bool) -> None:
        self._has_images = value

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that batches are made of."""
        super()._set_signature_columns_if_needed()
        if self.has_step_images:
            columns: Any = self._signature_columns
            self._signature_columns: Any = list(dict.fromkeys([*columns, PROMPT_TEXT, *IMAGE_COLUMNS]))

    def _start_sharing(self) -> None:
        """Use the collator of step pairs with images if there are any, then share prefixes if possible."""
        if self.has_step_images and type(self.data_collator) is DataCollatorForPreference:
            check_vision_model(decoder(self.model), self.args.pad_to_multiple_of)
            processor: Any = self.processing_class
            several = self.accelerator.num_processes > 1
            self.data_collator = VisionStepCollator(processor, self.data_collator, always_images=several)
        super()._start_sharing()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load the weights of a checkpoint. The `Trainer` does not find those that `save_pretrained` has renamed."""
        if self._loads_whole_vision_model:
            self._load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, like `_load_from_checkpoint`."""
        if self._loads_whole_vision_model:
            self._load_weights(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _loads_whole_vision_model(self) -> bool:
        # Adapters, DeepSpeed and FSDP save weights under the model's own names
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return self.has_step_images and not sharded and not is_peft_model(self.model)

    def _load_weights(self, folder: str) -> None:
        logger.info(f"Loading the weights in {folder}.")
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options: dict[str, Any] = {"dtype": model.dtype, "device_map": None}
        copy_weights(create_model_from_path(folder, trust_remote_code=self.args.trust_remote_code, **options), model)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Compute the number of steps, and check that there is at least one batch."""
        if has_length(dataloader) and len(dataloader) == 0:
            rows: Any = self.train_dataset
            raise ValueError(
                f"The train dataset has {len(rows)} rows, which is less than one batch, and "
                "`dataloader_drop_last=True` drops them all. Set it to False, or decrease the batch size."
            )
        return super().set_initial_training_values(args, dataloader)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Return the sampler of training rows, which keeps pairs of a prompt together with `group_by_prompt`."""
        if not getattr(self.args, "group_by_prompt", False):
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset  # the argument lacks the text columns
        # "What is shown?" is another problem for each image
        columns = [name for name in ("prompt", IMAGES_DIGEST) if name in dataset.column_names]
        return PromptGroupSampler(hashes(dataset, columns), self.args.data_seed or self.args.seed)

    def create_accelerator_and_postprocess(self) -> None:
        """
        Create the accelerator, and keep model outputs in float32 under FSDP2.

        FSDP2 casts them to bfloat16 by default, which rounds a log-probability of -40 to a multiple of 0.25.
        """
        super().create_accelerator_and_postprocess()
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        policy = plugin.mixed_precision_policy if plugin is not None and plugin.fsdp_version == 2 else None
        if policy is not None and policy.output_dtype not in (None, torch.float32):
            plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)
            logger.info(f"FSDP2 would round log-probabilities to {policy.output_dtype}. They are kept in float32.")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """
        Compute the loss, with the weight of the output head gathered under FSDP2.

        `DPOTrainer` reads this weight without calling the head. Where the head is sharded on its own, as Accelerate
        does for vision-language models, its gradient would not be averaged over the processes.
        """
        if self.is_fsdp_enabled:
            from torch.distributed.fsdp import FSDPModule

            head = decoder(model).get_output_embeddings()
            if isinstance(head, FSDPModule):
                head.unshard()
        return super()._compute_loss(model, inputs, return_outputs)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Tokenize step data. Ordinary preference data is passed to `DPOTrainer`."""
        where = f"{dataset_name} dataset"
        if isinstance(dataset, IterableDataset):
            dataset = without_decoding(dataset)
        first_row = get_first_row(dataset, where)
        check_first_row(first_row, where)
        check_images(where, first_row, processing_class, self.has_step_data, self.has_step_images)
        if not is_step_data(first_row):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        encode = make_step_tokenizer(processing_class, args, images=has_images(first_row))
        return prepare_step_dataset(dataset, encode, where, args.dataset_num_proc)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return predictions and metrics. Step pairs are tokenized first, as in `evaluate`."""
        first_row = get_first_row(test_dataset, "test dataset")
        if is_step_data(first_row):
            if self.args.precompute_ref_log_probs and "ref_chosen_logps" not in first_row:
                raise ValueError(
                    "`predict` does not compute reference scores, and with `precompute_ref_log_probs=True` there are "
                    "none for the test dataset. Pass it to `evaluate`, or set `precompute_ref_log_probs=False`."
                )
            processor: Any = self.processing_class
            test_dataset = self._prepare_dataset(test_dataset, processor, self.args, "test")
        return super().predict(test_dataset, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create the model card of TRL. For step pairs with images, it says so and has an example with an image."""
        super().create_model_card(*args, **kwargs)
        if self.has_step_images and self.is_world_process_zero():
            describe_images(Path(self.args.output_dir, "README.md"), self)


def _find_sdpo(callbacks: list[Any] | None) -> tuple[list[Any] | None, SDPOCallback | None]:
    """Return the callbacks and the `SDPOCallback` among them, which the Trainer also accepts as a class."""
    instances = [callback() if callback is SDPOCallback else callback for callback in callbacks or []]
    found = [callback for callback in instances if isinstance(callback, SDPOCallback)]
    if len(found) > 1:
        raise ValueError(f"`callbacks` contains {len(found)} SDPOCallbacks. Pass one, which runs all stages.")
    return (instances if found else callbacks), (found[0] if found else None)
