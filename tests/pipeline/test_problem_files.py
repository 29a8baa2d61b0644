"""Problems that are read from a file when they are used."""

import json
import pickle
import tracemalloc

import pytest

from stepdpo_trl.cli.main import main
from stepdpo_trl.pipeline.records import Problem, digest_of, read_problems, read_texts, shard_of, text_digest
from stepdpo_trl.runs.log import RunError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def rows():
    return [{"id": f"ü{n}", "problem": f"What is {n} + 1?\u2028", "answer": str(n + 1)} for n in range(11)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_problems_are_those_of_the_file(tmp_path, rows, suffix):
    path = tmp_path / f"problems{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes(("\ufeff" + lines[0] + "\r\n\n  \n" + "\n".join(lines[1:])).encode())
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    expected = [Problem(row["id"], row["problem"].strip(), row["answer"]) for row in rows]
    problems = read_problems(path)
    for found, part in (
        (problems, expected),
        (read_problems(path, 4), expected[:4]),
        (problems[2:9:3], expected[2:9:3]),
        (shard_of(problems, (1, 3)), expected[1::3]),
        (shard_of(problems, (1, 3))[1:], expected[1::3][1:]),
        (pickle.loads(pickle.dumps(shard_of(problems, (1, 3)))), expected[1::3]),
    ):
        assert len(found) == len(part)
        assert list(found) == list(found) == part
        assert [found[n] for n in range(-len(part), len(part))] == part + part


def test_digest_of_many_texts(rows):
    for parts in ([], ["a"], ["a", "", "\0"], rows):
        assert digest_of(iter(parts)) == text_digest(*parts)


def test_a_file_that_changes_while_it_is_used(tmp_path, rows):
    path = write(tmp_path / "problems.jsonl", rows)
    problems = read_problems(path)
    write(path, rows[1:])
    for read in (lambda: list(problems), lambda: problems[0]):
        with pytest.raises(RunError, match=r"problems.jsonl was changed while the command was running. Rerun"):
            read()
    path.unlink()
    with pytest.raises(RunError, match="was changed while"):
        list(problems)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nonsense}", r"Line 13 of .*problems.jsonl is not JSON .*'\{nonsense\}'"),
        (b'{"problem": "\xff"}', r"is not UTF-8 \(line 13: .*Save it as UTF-8"),
    ],
)
def test_the_line_of_an_error(tmp_path, rows, line, message):
    path = write(tmp_path / "problems.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")
    with pytest.raises(RunError, match=message):
        read_problems(path)
    with pytest.raises(RunError, match=message):
        list(read_texts(path))


@pytest.mark.parametrize("count", [2_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_problems_passed_twice(tmp_path, count, capsys):
    """They are refused with their number and five examples, in little memory."""
    path = tmp_path / "problems.jsonl"
    line = json.dumps({"problem": "%d " + "x" * 300, "answer": "1"}) + "\n"
    with path.open("w") as file:
        for _ in range(2):
            file.writelines(line % number for number in range(count))
    tracemalloc.start()
    with pytest.raises(RunError) as error:
        read_problems(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    first = "; ".join(f"row {count + n}: same text as row {n}" for n in range(1, 6))
    assert str(error.value) == f"{count:,} rows of {path} cannot be used: {first} .... Fix or remove such rows."
    assert peak < 300 * count + 100_000
    arguments = ["--model", "student", "--problems", str(path), "--output-dir", str(tmp_path / "run")]
    assert main(["collect", *arguments]) == 2
    assert f"{count:,} rows of" in capsys.readouterr().err


def test_memory_per_problem(tmp_path):
    """Problems are not kept in memory."""
    rows = ({"problem": f"{n} " + "x" * 1000, "answer": "1", "solution": "y" * 1000} for n in range(1000))
    path = write(tmp_path / "problems.jsonl", rows)
    tracemalloc.start()
    problems = read_problems(path)
    kept = tracemalloc.get_traced_memory()[0]
    assert sum(len(problem.solution) for problem in problems) == 1_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept < 100_000
    assert peak < 500_000
