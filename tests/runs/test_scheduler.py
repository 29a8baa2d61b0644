"""Tasks, streaming services and rounds, with services that answer in a given order."""

import math
import queue
import random
import threading
import time
from contextlib import closing
from dataclasses import dataclass

import pytest

from stepdpo_trl.data.answers import Check
from stepdpo_trl.generation import Completion, Request, Sampling
from stepdpo_trl.runs import scheduler
from stepdpo_trl.runs.log import Log
from stepdpo_trl.runs.progress import ProgressLines
from stepdpo_trl.runs.run_directory import RunDirectory
from stepdpo_trl.runs.runner import TaskRunner
from stepdpo_trl.runs.scheduler import Scheduler
from stepdpo_trl.runs.tasks import Ask, CheckRequest, RecordedChecks, RecordedModel, run_tasks
from stepdpo_trl.runs.workers import StreamingService, Workers


@dataclass(frozen=True)
class Item:
    key: str


class Service(StreamingService):
    """Echoes keys, after `wait(key)`."""

    def __init__(self, wait=lambda key: None, threads=4):
        self.wait, self.threads = wait, threads
        self.kept, self.sent, self.lock = {}, [], threading.Lock()
        self.answered = 0

    def stored(self, request):
        return self.kept.get(request.key)

    def work(self, requests):
        with self.lock:
            self.sent += [request.key for request in requests]
        for request in requests:
            self.wait(request.key)
        return [request.key for request in requests]

    def keep(self, replies):
        self.answered += len(replies)
        self.kept.update((request.key, reply) for request, reply in replies)
        return {request.key: reply for request, reply in replies}


def chain(name, length, service="s"):
    """Task that sends one request after the other."""
    replies = []
    for number in range(length):
        key = f"{name}/{number}"
        replies.append((yield Ask(service, (Item(key),)))[key])
    return replies


def test_a_task_does_not_wait_for_others():
    """The first answer only arrives when the other task has ended, with all of its requests."""
    other_ended = threading.Event()
    service = Service(lambda key: other_ended.wait(10) if key == "slow/0" else None)

    def other():
        result = yield from chain("fast", 5)
        other_ended.set()
        return result

    results = list(run_tasks([chain("slow", 1), other()], {"s": service}))
    assert results == [["slow/0"], [f"fast/{number}" for number in range(5)]]
    assert other_ended.is_set()


def test_results_come_in_the_order_of_the_tasks():
    rng = random.Random(0)
    service = Service(lambda key: time.sleep(rng.uniform(0, 0.005)), threads=16)
    tasks = [chain(str(n), rng.randrange(4)) for n in range(60)]
    assert [len(result) for result in run_tasks(tasks, {"s": service})] == [
        length for rng in [random.Random(0)] for length in (rng.randrange(4) for _ in range(60))
    ]


def test_a_request_of_several_tasks_is_sent_once():
    service = Service(lambda key: time.sleep(0.01))

    def task():
        replies = yield Ask("s", (Item("a"), Item("b"), Item("a")))
        return replies["a"] + replies["b"]

    assert list(run_tasks([task() for _ in range(5)], {"s": service})) == ["ab"] * 5
    assert sorted(service.sent) == ["a", "b"]


def test_all_threads_are_used(monkeypatch):
    """The next task starts when one ends, so that as many requests as possible are in flight."""
    monkeypatch.setattr(scheduler, "WINDOW", 1)
    monkeypatch.setattr(scheduler, "TASKS_PER_THREAD", 1)
    barrier = threading.Barrier(6)
    service = Service(lambda key: barrier.wait(10), threads=6)
    assert len(list(run_tasks([chain(str(n), 2) for n in range(30)], {"s": service}))) == 30


def test_a_limited_number_of_tasks_is_active(monkeypatch):
    monkeypatch.setattr(scheduler, "WINDOW", 4)
    monkeypatch.setattr(scheduler, "TASKS_PER_THREAD", 4)
    active, most = 0, 0

    def task(number):
        nonlocal active, most
        active += 1
        most = max(most, active)
        yield from chain(str(number), 2)
        active -= 1

    list(run_tasks(map(task, range(50)), {"s": Service(threads=2)}))
    assert most == 8


def test_requests_are_answered_in_order():
    """By their order, and those of the same order as submitted."""
    blocked = threading.Event()
    service = Service(lambda key: blocked.wait(10), threads=1)
    workers = Workers(service, queue.SimpleQueue())
    for number, order in enumerate((0.0, 3.0, math.inf, 1.0, 3.0, 2.0, math.inf)):
        workers.submit(Item(str(number)), order)
        while not service.sent:  # the first one is taken at once
            time.sleep(0.001)
    blocked.set()
    workers.close()
    while len(workers.arrived) < 7:
        time.sleep(0.001)
    assert service.sent == ["0", "3", "5", "1", "4", "2", "6"]


def paced(tasks, threads):
    """Run tasks. No thread starts a request before all answers have been used. Return the service and the ends."""
    used, ended = 0, []

    def progress(number, stored):
        nonlocal used
        used = used if number else len(service.kept)
        ended.extend([len(service.kept)] * number)

    def wait(key):
        while used < len(service.sent) - threads:
            time.sleep(0)

    service = Service(wait, threads)
    list(run_tasks(tasks, {"s": service}, progress))
    return service, ended


def test_progress_is_steady():
    """After half of the answers, about half of the tasks have ended. If they took turns, all would end late."""
    rng = random.Random(0)
    service, ended = paced([chain(str(number), rng.randrange(6, 9)) for number in range(200)], 4)
    share = [sum(number <= part * len(service.kept) for number in ended) / 200 for part in (0.25, 0.5, 0.75)]
    assert share == pytest.approx([0.25, 0.5, 0.75], abs=0.1)


def test_the_last_tasks_take_turns():
    """The very last one starts before the others of them go on, so that all threads are used until the end."""
    service, _ = paced([chain(str(number), 3) for number in range(100)], 4)
    first = service.sent.index("99/0")
    assert all(service.sent.index(f"{number}/2") > first for number in range(76, 100))  # of the last 32
    assert all(service.sent.index(f"{number}/2") < first for number in range(60))


@pytest.mark.parametrize(("tasks", "turns"), [(6, 6), (10, 8), (40, 20), (200, 32)])
def test_number_of_tasks_that_take_turns(tasks, turns):
    """With 4 threads at most 32, but at most half of a stage, unless that is less than 8."""
    under_test = Scheduler((), {"s": Service(threads=4)})
    under_test._started, under_test._all_started = tasks, True
    found = []
    for active in range(1, tasks + 1):
        under_test._active = active
        found.append(under_test._order(5))
    assert found == [math.inf] * turns + [5] * (tasks - turns)


def test_few_results_wait_for_a_hung_task(monkeypatch):
    """Others start until four windows are ahead of it. Their results are in memory."""
    monkeypatch.setattr(scheduler, "WINDOW", 4)
    monkeypatch.setattr(scheduler, "TASKS_PER_THREAD", 1)
    most = 4 * scheduler.AHEAD
    release, ended, started = threading.Event(), [], []

    def progress(number, stored):
        ended.extend(range(number))
        if len(ended) == most - 1:  # all but the first one
            threading.Timer(0.1, release.set).start()

    def task(number):
        started.append(number)
        return (yield from chain(str(number), 1))

    service = Service(lambda key: release.wait(10) if key == "0/0" else None)
    results = run_tasks(map(task, range(60)), {"s": service}, progress)
    assert next(results) == ["0/0"]
    assert len(started) == most
    assert len(list(results)) == 59
    assert len(started) == 60


def test_answers_in_flight_are_kept_after_an_error():
    started = threading.Barrier(4)

    def wait(key):
        started.wait(10)
        if key == "1/0":
            raise ValueError("broken")
        time.sleep(0.05)

    service = Service(wait)
    with pytest.raises(ValueError, match="broken"):
        list(run_tasks([chain(str(n), 3) for n in range(20)], {"s": service}))
    assert set(service.kept) == {"0/0", "2/0", "3/0"}
    assert len(service.sent) == 4  # none of those that were waiting


def test_answers_in_flight_are_kept_if_the_caller_fails(tmp_path):
    service = Service(lambda key: time.sleep(0 if key == "0/0" else 0.2))
    with RunDirectory(tmp_path) as run:
        runner = TaskRunner(run, "stage", {"s": service})
        results = runner.results((chain(str(n), 1) for n in range(20)), 20, "items", {})
        with closing(results):
            next(results)  # and then fail
    assert set(service.kept) == set(service.sent)
    assert 2 <= len(service.kept) < 20


def test_a_checker_that_is_slow_does_not_delay_the_model(tmp_path):
    """While answers are checked, other tasks send their requests."""
    model_done = threading.Event()

    class Checker:
        def check(self, solutions, checker, stop):
            assert model_done.wait(10)
            return [Check("right") for _ in solutions]

    model = Service(lambda key: model_done.set() if key == "39" else None, threads=1)

    def task(number):
        yield Ask("s", (Item(str(number)),))
        checks = yield Ask("check", (CheckRequest(f"c{number}", {"answer": ""}, ""),))
        return checks[f"c{number}"].outcome

    services = {"s": model, "check": RecordedChecks(Checker(), Log(tmp_path / "checks.jsonl"))}
    assert list(run_tasks(map(task, range(40)), services)) == ["right"] * 40
    assert list(Log(tmp_path / "checks.jsonl")) == [f"c{n}" for n in range(40)]  # in the order of the requests


@pytest.mark.parametrize("failed", [False, True])
def test_an_interrupted_run_stores_no_failed_check(tmp_path, failed):
    """A signal to all processes ends those of the checker too, which is no result of checking."""
    checked = threading.Event()

    class Checker:
        def check(self, solutions, checker, stop):
            checked.set()
            assert stop.wait(10)
            return [Check("unreadable", reason="the checking process died", failed=failed) for _ in solutions]

    def task():
        yield Ask("check", (CheckRequest("0", {"answer": ""}, ""),))

    def tasks():
        yield task()
        assert checked.wait(10)
        raise KeyboardInterrupt

    services = {"check": RecordedChecks(Checker(), Log(tmp_path / "checks.jsonl"))}
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(tasks(), services))
    assert list(Log(tmp_path / "checks.jsonl")) == ([] if failed else ["0"])


class LocalModel:
    """Generator in this process, in batches of four. Raises KeyboardInterrupt after `limit` batches."""

    def __init__(self, limit=None):
        self.rounds, self.limit = [], limit

    def generate(self, requests, sampling, done):
        self.rounds.append([request.key for request in requests])
        for start in range(0, len(requests), 4):
            if self.limit == 0:
                raise KeyboardInterrupt
            self.limit = self.limit and self.limit - 1
            batch = [request for request in requests[start : start + 4] if request.key not in done]
            if batch:
                yield [(request, Completion(request.key, "stop", 1, 1)) for request in batch]


def sample_and_check(number):
    """Task whose number of requests depends on the answers. Some requests are those of other tasks."""
    length = random.Random(number).randrange(4)
    for step in range(length):
        key = f"{number // (step + 1)}/{step}"
        yield Ask("model", (Request(key, "", 0),))
        yield Ask("s", (Item(f"check {number} {step}"),))
    return length


def run_local(path, delays, model):
    rng = random.Random(delays)
    services = {
        "s": Service(lambda key: time.sleep(rng.choice((0, 0, 0.002))), threads=3),
        "model": RecordedModel(model, Sampling(), Log(path / "log.jsonl"), "stage"),
    }
    return list(run_tasks(map(sample_and_check, range(60)), services))


def test_rounds_do_not_depend_on_the_clock(tmp_path, monkeypatch):
    """The batches of a local model are always the same, also after interruptions."""
    monkeypatch.setattr(scheduler, "WINDOW", 16)
    monkeypatch.setattr(scheduler, "TASKS_PER_THREAD", 1)
    tmp_path.joinpath("whole").mkdir()
    whole = LocalModel()
    results = run_local(tmp_path / "whole", 0, whole)
    assert len(whole.rounds) > 5
    for delays in range(1, 5):
        (tmp_path / str(delays)).mkdir()
        model = LocalModel()
        assert run_local(tmp_path / str(delays), delays, model) == results
        assert model.rounds == whole.rounds
        interrupted = tmp_path / f"interrupted {delays}"
        interrupted.mkdir()
        with pytest.raises(KeyboardInterrupt):
            run_local(interrupted, delays, LocalModel(3 + delays))
        model = LocalModel()
        assert run_local(interrupted, delays + 10, model) == results
        assert model.rounds == whole.rounds[-len(model.rounds) :]
        for path in (tmp_path / str(delays), interrupted):
            assert (path / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_tasks_end_while_a_round_is_generated(tmp_path):
    """Progress does not wait for the end of the round."""
    ended = []

    class Model(LocalModel):
        def generate(self, requests, sampling, done):
            for part in super().generate(requests, sampling, done):
                yield part
                ended.append(sum(number for number, _ in counts))

    def task(number):
        yield Ask("model", (Request(str(number), "", 0),))

    counts = []
    services = {"model": RecordedModel(Model(), Sampling(), Log(tmp_path / "log.jsonl"), "stage")}
    list(run_tasks(map(task, range(12)), services, lambda *ended: counts.append(ended)))
    assert ended == [4, 8, 12]


def test_progress(tmp_path, monkeypatch):
    """The bar shows the tasks that have ended, the counts of the caller and the speed."""
    shown = []

    class Bar:
        def __init__(self, **options):
            shown.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, number):
            shown.append(number)

        def set_postfix(self, postfix):
            shown.append(postfix)

    monkeypatch.setattr("stepdpo_trl.runs.runner.progress_bar", Bar)
    monkeypatch.setattr("stepdpo_trl.runs.runner._SECONDS_BETWEEN_REDRAWS", 0.0)
    service = Service()
    service.tokens = 1000
    with RunDirectory(tmp_path) as run:
        counts = {}
        for number, _ in enumerate(
            TaskRunner(run, "stage", {"s": service}).results((chain(str(n), 1) for n in range(9)), 9, "items", counts)
        ):
            counts["right"] = number + 1
    assert shown[0] == {"total": 9, "desc": "stage", "unit": " items", "position": 0}
    assert sum(entry for entry in shown if isinstance(entry, int)) == 9
    assert all(postfix["tokens/s"] > 0 for postfix in shown[2:-1] if isinstance(postfix, dict))
    assert shown[-1] == {"right": 9}


def flags(tasks, services):
    """Run tasks, and return for each, in the order of their ends, whether it needed stored replies only."""
    found = []
    list(run_tasks(tasks, services, lambda number, stored: found.extend([stored] * number)))
    return found


def test_stored_tasks_are_told_from_new_ones(tmp_path):
    """Only those before the first answer of this process: later ones are spread over the rest of the stage."""
    service = Service(threads=1)
    assert flags((chain(str(number), 2) for number in range(3)), {"s": service}) == [False] * 3
    service = Service(threads=1)
    service.kept = {f"{number}/{step}": "" for number in (0, 1, 2, 5) for step in range(2)}
    assert flags((chain(str(number), 2) for number in range(6)), {"s": service}) == [True] * 4 + [False] * 2
    assert flags([chain("none", 0)], {"s": Service()}) == [False]  # needs no answer, and is worked on here

    def task(number):
        yield Ask("model", (Request(str(number), "", 0),))

    def model():
        return {"model": RecordedModel(LocalModel(), Sampling(), Log(tmp_path / "log.jsonl"), "stage")}

    assert flags(map(task, range(5)), model()) == [False] * 5
    assert flags(map(task, range(8)), model()) == [True] * 5 + [False] * 3


def test_a_resumed_run_shows_its_own_rate(tmp_path, monkeypatch):
    """The bar starts with the tasks of the earlier process, whose time does not count either."""
    now, shown = [100.0], []
    monkeypatch.setattr("stepdpo_trl.runs.runner.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("stepdpo_trl.runs.runner._SECONDS_BETWEEN_REDRAWS", 0.0)

    class Bar(ProgressLines):
        def set_postfix(self, values):
            shown.append((self._line(), values.get("tokens/s")))

    monkeypatch.setattr("stepdpo_trl.runs.runner.progress_bar", lambda **given: Bar(**given, disable=False))

    class Slow(Service):
        tokens = 0

        def keep(self, replies):
            now[0] += 5 * len(replies)
            self.tokens += 1000 * len(replies)
            return super().keep(replies)

    def tasks():
        for number in range(100):
            now[0] += 1 if number < 60 else 0  # reading is slow
            yield chain(str(number), 1)

    service = Slow(threads=1)
    service.kept = {f"{number}/0": "" for number in range(60)}
    with RunDirectory(tmp_path) as run:
        assert len(list(TaskRunner(run, "stage", {"s": service}).results(tasks(), 100, "items", {}))) == 100
    assert shown[59] == ("stage: 60/100 items, 0 s", None)
    assert shown[-2] == ("stage: 100/100 items, 3 min, 12/min, 0 s left", 200)
