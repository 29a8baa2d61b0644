"""Data cards: Markdown with the metadata of the Hugging Face Hub."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from .build_record import BuildRecord
from .summary import Summary, rows_of

# Upper bounds of the size categories of the Hub
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def write_card(summary: Summary, build: BuildRecord, license: str | None = None) -> str:
    """
    Write the data card of step pairs.

    Args:
        summary ([`Summary`]):
            Counts and settings of the run.
        build ([`BuildRecord`]):
            The build.
        license (`str`, *optional*):
            License of the dataset, as an identifier of the Hub such as `"apache-2.0"`. Left out if not known.

    Returns:
        `str`: Markdown with YAML metadata.
    """
    collect = summary.settings.get("collect", {})
    model = str(collect.get("model", {}).get("model", "unknown"))
    rectifiers = sorted({s["rectifier"] for s in summary.settings.values() if s.get("rectifier")})
    table = "\n".join(
        f"| {stage} | {what.replace('|', ' ')} | {count:,} |" for stage, what, count in rows_of(summary, build)
    )
    subject = [] if collect.get("checker") else ["math"]
    return f"""{_metadata(build.pairs, license, [model, *rectifiers], subject)}
# Step pairs

{build.pairs:,} step pairs in the columns of `xinlai/Math-Step-DPO-10K`, made with `stepdpo_trl` as described in
Step-DPO ([arXiv:2406.18629](https://arxiv.org/abs/2406.18629)). Solutions were sampled from the model, the first wrong
step of each wrong solution was located, and a right step was sampled in its place from the same prefix, by the model
itself or by the `rectifier` in the settings. `StepDPOTrainer` trains on the dataset without further processing.

Besides the columns of Math-Step-DPO-10K there are:

- `step_index`: number of the step, counted from 1
- `chosen_ends_solution`, `rejected_ends_solution`: whether the solution ends with the step
- `source`: set of corrections and key of the sample
- `problem_id`: id of the problem

## Origin

| | |
|---|---|
| model | {model} |
{_source_rows(summary)}| license | {license or "not stated: check the licenses of the problems and of the model"} |
{_version_rows()}

## Counts

| stage | what | count |
|---|---|---:|
{table}

## Settings

```json
{json.dumps(summary.settings, indent=2, ensure_ascii=False)}
```
"""


def write_import_card(name: str, counts: Mapping[str, int], rows: int) -> str:
    """
    Write the data card of imported data.

    Args:
        name (`str`):
            Name of the published data.
        counts (`Mapping[str, int]`):
            Counts of the import.
        rows (`int`):
            Number of rows.

    Returns:
        `str`: Markdown with YAML metadata.
    """
    table = "\n".join(f"| {what} | {count:,} |" for what, count in counts.items())
    return (
        f"{_metadata(rows, None, [], ['math'])}\n# From {name}\n\n{rows:,} rows, converted with `stepdpo_trl` "
        f"{__version__}.\n\n| what | count |\n|---|---:|\n{table}\n"
    )


def _metadata(rows: int, license: str | None, models: list[str], subject: list[str]) -> str:
    from huggingface_hub import DatasetCardData

    # Only ids of the Hub are valid here: neither folders nor names on a server
    ids = [model for model in models if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()]
    data = DatasetCardData(
        language=["en"],
        license=license,
        task_categories=["text-generation"],
        size_categories=[next((name for bound, name in _SIZES.items() if rows < bound), "10M<n<100M")],
        tags=["step-dpo", "dpo", "preference", *subject, "trl", "stepdpo_trl"],
        base_model=ids or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _source_rows(summary: Summary) -> str:
    source = summary.settings.get("source", {})
    names = {"path": "problems", "sha256": "SHA-256 of the problems"}
    return "".join(f"| {title} | `{source[key]}` |\n" for key, title in names.items() if key in source)


def _version_rows() -> str:
    versions = {"stepdpo_trl": __version__}
    for package in ("transformers", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return "\n".join(f"| {package} | {number} |" for package, number in versions.items())
