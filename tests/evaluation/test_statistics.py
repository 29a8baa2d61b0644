"""Intervals, tests and majority votes against independent computations."""

import numpy as np
import pytest

from stepdpo_trl.data.answers import AnswerChecker, Check
from stepdpo_trl.evaluation.majority import Vote, vote
from stepdpo_trl.evaluation.statistics import bootstrap, clustered, mcnemar, wilson
from stepdpo_trl.pipeline.policy import Continuation
from stepdpo_trl.runs.tasks import run_tasks


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [  # scipy.stats.binomtest(only_first, only_first + only_second).pvalue
        (0, 0, 1.0),
        (7, 7, 1.0),
        (1, 9, 0.021484375),
        (15, 5, 0.04138946533203125),
        (30, 12, 0.007915897334896727),
        (700, 800, 0.010559255466711506),
    ],
)
def test_mcnemar(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-12)
    assert mcnemar(only_second, only_first) == pytest.approx(p, rel=1e-12)


def test_wilson_and_clustered_intervals():
    # scipy.stats.binomtest(950, 1319).proportion_ci(method="wilson")
    expected = pytest.approx((0.6954052216266475, 0.74380084961182), abs=1e-8)
    assert wilson(950 / 1319, 1319) == expected
    assert clustered([1.0] * 950 + [0.0] * 369, 1) == expected
    # Ten equal answers count as one, ten independent answers as ten
    assert clustered([1.0] * 950 + [0.0] * 369, 10) == expected
    assert clustered([0.5] * 100, 10) == pytest.approx(wilson(0.5, 1000))
    assert clustered([1.0] * 20, 8) == wilson(1.0, 20)


def test_coverage_of_clustered_intervals():
    """With problems of different difficulty and eight samples each, the plain Wilson interval is far too narrow."""
    rng = np.random.default_rng(0)
    truth, covered, naive = 0.8, 0, 0
    for _ in range(1000):
        shares = rng.binomial(8, rng.beta(0.8, 0.2, size=60)) / 8
        low, high = clustered(list(shares), 8)
        covered += low <= truth <= high
        low, high = wilson(shares.mean(), 8 * 60)
        naive += low <= truth <= high
    assert 930 <= covered <= 970
    assert naive < 700


def test_bootstrap():
    differences = [1.0] * 300 + [-1.0] * 120 + [0.0] * 1580
    low, high = bootstrap(differences)
    error = np.std(differences) / len(differences) ** 0.5
    assert (low, high) == pytest.approx((0.09 - 1.96 * error, 0.09 + 1.96 * error), abs=0.002)
    assert bootstrap(differences) == (low, high) != bootstrap(differences, seed=1)
    assert bootstrap([0.5] * 9) is None
    # Against resampling one problem at a time
    rng = np.random.default_rng(0)
    shares = [0.25, -0.5, 0.75, 0.0, 1.0, 0.25]
    drawn = rng.choice(shares, size=(20_000, len(shares))).mean(1)
    assert bootstrap(shares, resamples=20_000) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.02)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["right 4", "wrong 5", "wrong 5"], ("wrong", "5", 2)),
        (["wrong 5", "right 4", "right 8/2"], ("right", "4", 2)),
        (["right 4", "wrong 5"], ("right", "4", 1)),  # a tie goes to the first
        (["wrong 5", "right 4"], ("wrong", "5", 1)),
        (["right 4", "right 4", "wrong 0.5", "wrong \\frac{1}{2}", "wrong 50\\%"], ("wrong", "0.5", 3)),
        (["right 4", "right 4", "wrong 1,200", "wrong 1200", "wrong 1200.0"], ("wrong", "1,200", 3)),
        (["right 4", "right 4", "wrong 1", "wrong 2", "wrong 3"], ("right", "4", 2)),
        (["wrong right", "right left", "wrong right"], ("wrong", "right", 2)),
        (["unreadable ?", "unreadable ?", "wrong 5"], ("wrong", "5", 1)),
        (["unreadable ?", "unreadable ?"], ("unreadable", None, 0)),
    ],
)
def test_majority(given, expected, checker):
    class Service:
        def answer(self, requests):
            return {r.key: checker.check([(r.problem, r.text)])[0] for r in requests}

    samples = [Continuation("", "", "stop", Check(*text.split(" ", 1))) for text in given]
    assert list(run_tasks([vote(samples)], {"check": Service()})) == [Vote(*expected)]
