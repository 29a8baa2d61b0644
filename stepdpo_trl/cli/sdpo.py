"""Options of the training script for stages (sDPO, arXiv 2403.19270)."""

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
    Whether and how the training script trains in stages, with [`SDPOCallback`].

    The stages are the data sets listed under `datasets`, in their order, or parts of the one in `dataset_name`: by its
    column `stage`, or cut by `stage_fractions`.

    Args:
        sdpo (`bool`, *optional*, defaults to `False`):
            Train in stages, each with the model of the one before as its reference.
        stage_fractions (`list[float]`, *optional*):
            Share of the rows of `dataset_name` in each stage, in their order. They sum to 1.
        stage_schedule (`str`, *optional*, defaults to `"restart"`):
            `"restart"` begins optimizer, warm-up and decay anew in each stage, as in the paper; `"continuous"` keeps
            one course over all of them.
        stage_options (`dict[str, dict[str, float]]` or `str`, *optional*):
            `beta`, `learning_rate` and `num_train_epochs` of single stages, in place of those of the training
            arguments. Keys are the values of the column `stage`, otherwise "1", "2", ... A dict, or a JSON string.

    Raises:
        ValueError: If an option is unusable, or set without `sdpo`.
    """

    sdpo: bool = field(
        default=False,
        metadata={
            "help": "Train in stages (sDPO), each with the model of the one before as its reference. The stages are "
            "the data sets listed under `datasets`, or `dataset_name` by its column `stage` or `stage_fractions`."
        },
    )
    stage_fractions: list[float] | None = field(
        default=None,
        metadata={"help": "Share of the rows of `dataset_name` in each stage, in their order. They sum to 1."},
    )
    stage_schedule: str = field(
        default="restart",
        metadata={
            "help": "'restart' begins optimizer, warm-up and decay anew in each stage, 'continuous' keeps one course.",
            "choices": ["restart", "continuous"],
        },
    )
    stage_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "`beta`, `learning_rate` and `num_train_epochs` of single stages, as a JSON string or, in the "
            """file, a mapping: '{"2": {"beta": 0.05}}'."""
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
            self.make_callback()  # which refuses unusable options, here before anything is loaded
        elif any(given.values()):
            name = next(name for name, is_given in given.items() if is_given)
            raise ValueError(f"--{name} has no effect without stages. Set --sdpo true too, or leave it out.")

    def make_callback(self) -> "SDPOCallback":
        """The callback that trains in these stages."""
        from ..sdpo.callback import SDPOCallback

        options: Any = self.stage_options
        return SDPOCallback(fractions=self.stage_fractions, schedule=self.stage_schedule, stage_options=options)

    def check_sources(self, script_args: "ScriptArguments", dataset_args: "DatasetMixtureConfig") -> None:
        """
        Refuse options of the data that do not go together with stages.

        Raises:
            ValueError: Saying which, why, and what to do.
        """
        if not self.sdpo:
            return
        if script_args.dataset_streaming or dataset_args.streaming:
            name = "streaming" if dataset_args.streaming else "dataset_streaming"
            raise ValueError(f"--{name} does not go together with --sdpo: a stage ends after all its rows. Remove it.")
        if not dataset_args.datasets:
            return
        if self.stage_fractions is not None:
            raise ValueError(
                "--stage_fractions cuts the one data set of --dataset_name into stages, but each of `datasets` is a "
                "stage already. Leave one of them out."
            )
        if any(getattr(part, "fraction", None) is not None for part in dataset_args.datasets):
            raise ValueError(
                "`fraction` under `datasets` is a share of a mixture, but with --sdpo each of them is a stage. Take "
                "fewer rows with `split: train[:50%]`."
            )
        if dataset_args.test_split_size is not None:
            raise ValueError(
                "--test_split_size draws other rows in every process and run, so that stages differ between them. "
                "Leave it out; to evaluate, use --dataset_name with a column `stage` and a test split."
            )

    def check_stages(self, dataset: Any) -> None:
        """
        Check, before a model is loaded, that a single data set tells its stages.

        Raises:
            ValueError: If it does not, or if a stage is empty.
        """
        has_column = STAGE_COLUMN in dataset.column_names
        if has_column and self.stage_fractions is not None:
            raise ValueError(
                f"The data has a column `{STAGE_COLUMN}`, and --stage_fractions is given as well. Leave one out."
            )
        if not has_column and self.stage_fractions is None:
            raise ValueError(
                f"--sdpo cannot tell the stages: the data has no column `{STAGE_COLUMN}`, only "
                f"{dataset.column_names}. Add it, set --stage_fractions, or list a data set for each stage under "
                "`datasets` in the file."
            )
        find_stages(dataset, self.stage_fractions)
