"""Options of the training script for sDPO (arXiv 2403.19270)."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..sdpo.stages import STAGE_COLUMN, find_stages

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ScriptArguments

    from ..sdpo.callback import SDPOCallback


@dataclass
class SDPOArguments:
    """
    Arguments for training in stages with [`SDPOCallback`].

    The stages are the datasets listed under `datasets`, in that order, or parts of the dataset `dataset_name`, given
    by its column `stage` or by `stage_fractions`.

    Args:
        sdpo (`bool`, *optional*, defaults to `False`):
            Whether to train in stages, each with the model of the previous stage as its reference model.
        stage_fractions (`list[float]`, *optional*):
            Fraction of the rows of `dataset_name` in each stage, in order. Must sum to 1.
        stage_schedule (`str`, *optional*, defaults to `"restart"`):
            `"restart"` resets the optimizer and restarts the learning rate schedule in each stage, as in the paper.
            `"continuous"` uses one schedule for all stages.
        stage_options (`dict[str, dict[str, float]]` or `str`, *optional*):
            Values of `beta`, `learning_rate` and `num_train_epochs` for single stages, which override the training
            arguments. Keys are the values of the column `stage`, or "1", "2", ... if there is none. A dict or a JSON
            string.

    Raises:
        ValueError: If an option is invalid, or set without `sdpo`.
    """

    sdpo: bool = field(
        default=False,
        metadata={
            "help": "Train in stages (sDPO), each with the model of the previous stage as its reference model. The "
            "stages are the datasets listed under `datasets`, or parts of `dataset_name`, given by its column "
            "`stage` or by `stage_fractions`."
        },
    )
    stage_fractions: list[float] | None = field(
        default=None,
        metadata={"help": "Fraction of the rows of `dataset_name` in each stage, in order. Must sum to 1."},
    )
    stage_schedule: str = field(
        default="restart",
        metadata={
            "help": "'restart' resets the optimizer and restarts the learning rate schedule in each stage, "
            "'continuous' uses one schedule for all stages.",
            "choices": ["restart", "continuous"],
        },
    )
    stage_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Values of `beta`, `learning_rate` and `num_train_epochs` for single stages, as a JSON string "
            """such as '{"2": {"beta": 0.05}}', or as a mapping in the file."""
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.stage_options, str):
            try:
                self.stage_options = json.loads(self.stage_options)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"--stage_options {self.stage_options!r} is not JSON ({error}). Write it like "
                    """'{"2": {"beta": 0.05}}'."""
                ) from error
        given = {
            "stage_fractions": self.stage_fractions is not None,
            "stage_schedule": self.stage_schedule != "restart",
            "stage_options": bool(self.stage_options),
        }
        if self.sdpo:
            self.make_callback()  # raises for invalid options before anything is loaded
        elif any(given.values()):
            name = next(name for name, is_given in given.items() if is_given)
            raise ValueError(f"--{name} has no effect without stages. Set --sdpo true, or remove it.")

    def make_callback(self) -> "SDPOCallback":
        """Create the callback that trains in these stages."""
        from ..sdpo.callback import SDPOCallback

        options: Any = self.stage_options
        return SDPOCallback(fractions=self.stage_fractions, schedule=self.stage_schedule, stage_options=options)

    def check_sources(self, script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> None:
        """
        Check that the options of the data are compatible with stages.

        Args:
            script_args (`ScriptArguments`), dataset_args (`DatasetMixtureConfig`):
                Arguments that select the data.

        Raises:
            ValueError: If they are not.
        """
        if not self.sdpo:
            return
        if script_args.dataset_streaming or dataset_args.streaming:
            name = "streaming" if dataset_args.streaming else "dataset_streaming"
            raise ValueError(f"--{name} cannot be used with --sdpo: the length of a stage must be known. Remove it.")
        if not dataset_args.datasets:
            return
        if self.stage_fractions is not None:
            raise ValueError(
                "--stage_fractions splits the dataset of --dataset_name into stages, but each of `datasets` is "
                "already a stage. Remove one of them."
            )
        if any(getattr(part, "fraction", None) is not None for part in dataset_args.datasets):
            raise ValueError(
                "`fraction` under `datasets` is a share of a mixture, but with --sdpo each of them is a stage. To use "
                "fewer rows, set `split: train[:50%]`."
            )
        if dataset_args.test_split_size is not None:
            raise ValueError(
                "--test_split_size draws different rows in every process and run, so their stages would differ. "
                "Remove it; to evaluate, use --dataset_name with a column `stage` and a test split."
            )

    def check_stages(self, dataset: Any) -> None:
        """
        Check, before a model is loaded, that the stages of a single dataset are defined.

        Args:
            dataset (`Dataset`):
                The training data.

        Raises:
            ValueError: If they are not, or if a stage is empty.
        """
        has_column = STAGE_COLUMN in dataset.column_names
        if has_column and self.stage_fractions is not None:
            raise ValueError(
                f"The data has a column `{STAGE_COLUMN}`, and --stage_fractions is set as well. Remove one of them."
            )
        if not has_column and self.stage_fractions is None:
            raise ValueError(
                f"--sdpo needs stages: the data has no column `{STAGE_COLUMN}`, only {dataset.column_names}. Add it, "
                "set --stage_fractions, or list one dataset per stage under `datasets` in the file."
            )
        find_stages(dataset, self.stage_fractions)
