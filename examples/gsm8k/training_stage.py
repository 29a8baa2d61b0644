"""The later stages of the comparison: tuning, training, evaluation, and one more iteration of the loop."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_stage import DataStage
from plan import (
    BASE,
    LOOP,
    METHODS,
    STEP,
    Settings,
    backend_options,
    data_options,
    eval_options,
    preference_options,
    training_options,
)
from scores import DECODING, accuracy_of
from units import Command, CommandError, Units

from stepdpo_trl.data.files import partial_path
from stepdpo_trl.pipeline.loop import MODEL, PAIRS
from stepdpo_trl.runs.run_directory import RunError
from stepdpo_trl.sdpo.files import find_checkpoint

DIVERGED = "Training diverged"  # in the error of `stepdpo train`

Trial = tuple[float, float, float]  # learning rate, beta, accuracy on the tuning problems


def best_trial(trials: list[Trial]) -> tuple[float, float]:
    """Return the learning rate and beta with the highest accuracy, or the lowest of them if tied."""
    rate, beta, _ = max(sorted(trials), key=lambda trial: trial[2])
    return rate, beta


@dataclass
class TrainingStage:
    """
    Tuning, training and evaluation.

    Args:
        data (`DataStage`):
            The training data.
        on_cpu (`bool`):
            Whether to train on the CPU.
    """

    data: DataStage
    on_cpu: bool

    @property
    def units(self) -> Units:
        """Runner of the units of work."""
        return self.data.units

    @property
    def settings(self) -> Settings:
        """Settings that must stay the same."""
        return self.data.settings

    @property
    def out(self) -> Path:
        """Folder of the comparison."""
        return self.units.path

    def train(self, unit: str, name: str, rate: float, beta: float, seed: int) -> Path:
        """
        Train a model.

        Args:
            unit (`str`):
                Name of the unit of work.
            name (`str`):
                Name of the method.
            rate (`float`):
                Learning rate.
            beta (`float`):
                Beta of the DPO loss.
            seed (`int`):
                Seed of the training.

        Returns:
            `Path`: Folder of the model. It is missing if the training diverged.
        """
        folder = self.out / unit / "model"

        def work() -> None:
            try:
                self.units.call(f"{unit}/train", self.training_command(name, folder, rate, beta, seed))
            except CommandError as error:
                if DIVERGED not in error.output:
                    raise
                shutil.rmtree(folder, ignore_errors=True)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

        self.units.do(f"{unit}/train", work)
        return folder

    def training_command(self, name: str, folder: Path, rate: float, beta: float, seed: int) -> Command:
        """Return the command that trains a model, from its last checkpoint if there is one."""
        method, file = METHODS[name], self.data.data_file(name)
        # `trl sft` takes the folder of a file
        program, source = (["trl-sft"], file.parent) if method.is_sft else (["stepdpo", "train"], file)
        words = [
            "--model_name_or_path",
            self.settings.model,
            "--dataset_name",
            str(source),
            "--output_dir",
            str(folder),
        ]
        words += training_options(self.settings, rate, seed, self.on_cpu)
        words += [] if method.is_sft else preference_options(method, beta)
        with suppress(ValueError):  # no checkpoint yet
            words += ["--resume_from_checkpoint", str(find_checkpoint(folder, True)[0])]
        return [*program, *words]

    def tune(self, name: str) -> None:
        """Train a method with each setting, and measure the accuracy on the tuning problems."""
        for rate, beta in self.settings.trials(METHODS[name]):
            unit = trial_name(name, rate, beta)
            if not self.units.is_done(f"{unit}/eval"):
                model = self.train(unit, name, rate, beta, seed=0)
                self.measure(f"{unit}/eval", model, self.data.files.tuning, 0.0)
            shutil.rmtree(self.out / unit / "model", ignore_errors=True)

    def trials_of(self, name: str) -> list[Trial]:
        """Return all tuning trials of a method. A diverged training solves nothing."""
        found = []
        for rate, beta in self.settings.trials(METHODS[name]):
            folder = self.out / trial_name(name, rate, beta) / "eval"
            found.append((rate, beta, accuracy_of(folder) if folder.exists() else 0.0))
        return found

    def train_best(self, name: str, seed: int) -> None:
        """Train a method with its best setting, and evaluate it on the test problems."""
        rate, beta = best_trial(self.trials_of(name))
        unit = f"final/{name}/seed-{seed}"
        model = self.train(unit, name, rate, beta, seed)
        if not model.exists():
            raise RunError(
                f"The training of {name} with seed {seed} diverged at its best setting, learning rate {rate:g}. Try "
                "smaller --rates in another --output-dir."
            )
        self.evaluate(unit, model)

    def evaluate_base(self) -> None:
        """Evaluate the initial model on the test problems."""
        self.evaluate(f"final/{BASE}", self.settings.model)

    def evaluate(self, unit: str, model: str | Path) -> None:
        """Evaluate a model on the test problems, greedy and sampled."""
        for decoding, temperature in zip(DECODING, (0.0, self.settings.eval_temperature), strict=True):
            self.measure(f"{unit}/{decoding}", model, self.data.files.test, temperature)

    def measure(self, unit: str, model: str | Path, problems: Path, temperature: float) -> None:
        """Evaluate a model. The folder of a model whose training diverged is missing: there is nothing to do."""
        if isinstance(model, Path) and not model.exists():
            self.units.do(unit, lambda: None)
            return
        command = ["stepdpo", "eval", "--problems", str(problems), "--model", str(model)]
        command += ["--output-dir", str(self.out / unit), *eval_options(self.settings, temperature)]
        self.units.command(unit, [*command, *backend_options(self.settings, self.data.connection)])

    # ------------------------------------------------------------------------------------------------ loop

    def loop(self) -> None:
        """
        Sample new pairs from the model of Step-DPO and train it on them, as the second stage of `stepdpo loop`.

        It samples as many problems as the pairs of Step-DPO took, and uses the learning rate and beta of Step-DPO.
        """
        self.units.do("loop/first", self._start_loop)
        rate, beta = best_trial(self.trials_of(STEP))
        command = ["stepdpo", "loop", "--model", self.settings.model, "--problems", str(self.data.files.train)]
        limit = max(1, self.data.facts_of(STEP)["problems"])
        command += ["--output-dir", str(self.out / LOOP), "--stages", "2", "--limit", str(limit)]
        command += backend_options(self.settings, self.data.connection)
        command += [*data_options(self.settings, self.data.files.excluded), "--"]
        command += [*training_options(self.settings, rate, 0, self.on_cpu), *preference_options(METHODS[STEP], beta)]
        self.units.command("loop/second", command)
        self.evaluate(f"final/{LOOP}/seed-0", self.out / LOOP / "stage-2" / MODEL)

    def _start_loop(self) -> None:
        """Make the model of Step-DPO and its pairs the first stage of a loop."""
        trained, stage = self.out / "final" / STEP / "seed-0" / "model", self.out / LOOP / "stage-1"
        model = stage / MODEL
        stage.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.data.data_file(STEP), stage / PAIRS)
        if self.settings.full and not model.exists():
            shutil.copytree(trained, partial_path(model), dirs_exist_ok=True)
            partial_path(model).rename(model)
        elif not model.exists():
            self.units.call("loop/first", ["stepdpo", "merge", str(trained), "--output-dir", str(model)])


def trial_name(name: str, rate: float, beta: float) -> str:
    """Return the name of a tuning trial."""
    return f"tuning/{name}/{rate:g}-{beta:g}"
