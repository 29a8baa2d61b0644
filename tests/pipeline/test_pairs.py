"""Selection of pairs by digests, compared with a selection of texts."""

from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdpo_trl.pipeline.pairs import SelectedPairs, normalize_problem, select_pairs
from stepdpo_trl.pipeline.records import Problem
from stepdpo_trl.pipeline.rectify import normalize_step
from stepdpo_trl.pipeline.stage_directory import ResultWriter
from stepdpo_trl.runs.log import Log

PROBLEMS = {name: Problem(name, f"What is {name}?", "1") for name in "abc"}
ROWS = st.lists(
    st.builds(
        lambda problem, prefix, chosen, rejected: {
            "prompt": f"{problem}?",
            "initial_reason_steps": prefix,
            "chosen": chosen,
            "rejected": rejected,
            "problem_id": problem,
        },
        st.sampled_from("abc"),
        st.sampled_from(["", "Step 1:", "step 1:"]),
        st.sampled_from([" x", " X.", " y"]),
        st.sampled_from([" u", " v", " V"]),
    ),
    max_size=12,
)


def select_texts(rows, excluded, most):
    """The selection, with all texts in memory."""
    counts, ranked = Counter(), []
    for number, row in enumerate(rows):
        error = (row["prompt"], row["initial_reason_steps"], row["rejected"])
        ranked.append((counts[error], number))
        counts[error] += 1
    kept, left_out, seen, of_problem = [], Counter(), set(), Counter()
    for _, number in sorted(ranked):
        row = rows[number]
        name = row["problem_id"]
        identity = (row["prompt"], *(normalize_step(row[c]) for c in ("initial_reason_steps", "chosen", "rejected")))
        if normalize_problem(PROBLEMS[name].problem) in map(normalize_problem, excluded):
            left_out["in a test set"] += 1
        elif identity in seen:
            left_out["duplicate"] += 1
        elif most is not None and of_problem[name] >= most:
            left_out["above the limit per problem"] += 1
        else:
            seen.add(identity)
            of_problem[name] += 1
            kept.append(number)
    return kept, left_out


@settings(max_examples=50, deadline=None)
@given(ROWS, st.sampled_from([[], ["what is  B ?"]]), st.sampled_from([None, 1, 3]))
def test_selection(rows, excluded, most):
    kept, left_out = select_pairs(iter(rows), PROBLEMS, excluded, most)
    assert (list(kept), left_out) == select_texts(rows, excluded, most)


def test_selected_pairs_of_several_runs():
    def row(number):
        return {"prompt": "p", "initial_reason_steps": "", "chosen": f" {number}", "rejected": " x"}

    runs = [[row(0), row(1)], [], [row(2)], [row(3), row(4), row(5)]]
    pairs = SelectedPairs(runs, [5, 0, 2, 3])
    assert list(pairs) == [row(5), row(0), row(2), row(3)]
    assert [pairs[-1], *pairs[1:3]] == [row(3), row(0), row(2)]
    assert pairs == list(pairs) == SelectedPairs([list(map(row, range(6)))], [5, 0, 2, 3])
    assert pairs != pairs[:3] != [row(0)]
    with pytest.raises(IndexError):
        pairs[4]
    with pytest.raises(ValueError, match="`chosen` and `rejected` of pair 1 are the same"):
        list(SelectedPairs([[row(0), row("x")]], [0, 1]))


def test_results_are_written_once_per_second(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("stepdpo_trl.pipeline.stage_directory.time", SimpleNamespace(monotonic=lambda: clock.now))
    log = Log(tmp_path / "log.jsonl")
    log.append("old", {"n": (1, 2)})
    with suppress(KeyboardInterrupt), ResultWriter(log) as writer:
        writer.add("a", {})
        assert set(log) == {"old", "a"}
        writer.add("b", {})
        clock.now += 0.9
        writer.add("old", {"n": (1, 2)})  # unchanged
        writer.add("c", {})
        assert set(log) == {"old", "a"}
        clock.now += 0.1
        writer.add("d", {})
        assert set(log) == {"old", "a", "b", "c", "d"}
        writer.add("old", {"n": (1, 3)})
        raise KeyboardInterrupt
    assert log["old"] == {"n": [1, 3]}
    assert len(log.path.read_text().splitlines()) == 6
