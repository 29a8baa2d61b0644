"""Logs: a mapping in a file that survives a killed process, compared with a dictionary."""

import json
import resource
import subprocess
import sys
import tracemalloc
from array import array

import numpy  # noqa: F401  # imported before memory is measured
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stepdpo_trl.runs import log as log_module
from stepdpo_trl.runs import log_index
from stepdpo_trl.runs.log import Log, RunError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(['"', "\\", "a\nb", "\u2028"])
RECORDS = st.dictionaries(TEXTS.filter(lambda name: name != "key"), TEXTS | st.integers() | st.none(), max_size=3)
BATCHES = st.lists(st.tuples(st.sampled_from(["a", "b", "c", 'q"', "\\", "ü/é", ""]) | TEXTS, RECORDS), max_size=5)
STEPS = st.lists(st.sampled_from(["reopen", "reopen without index"]) | BATCHES, max_size=8)


def check(log, model):
    assert len(log) == len(model)
    assert list(log) == list(model)
    assert list(log.items()) == list(model.items())
    assert list(log.values()) == list(model.values())
    for key, record in model.items():
        assert key in log
        assert log[key] == record
    for key in ("missing", "a/", *(key + "x" for key in model)):
        assert (key in log, log.get(key)) == (key in model, model.get(key))


@pytest.mark.parametrize("bits", [64, 2], ids=["", "colliding digests"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, cut=st.integers(0, 200))
@example(steps=[[("a", {}), ("b", {}), ("a", {"x": "\u2028"})], "reopen", [("b", {}), ("b", {"y": 1})]], cut=3)
def test_log_equals_a_dictionary(tmp_path_factory, monkeypatch, bits, steps, cut):
    """Also after the last line was cut at any byte."""
    monkeypatch.setattr(log_module, "RECENT", 3)
    monkeypatch.setattr(log_module, "BATCH", 2)
    monkeypatch.setattr(log_module, "SAVED_BYTES", 1)
    if bits < 64:
        for module in (log_module, log_index):
            monkeypatch.setattr(module, "digest", lambda key: bytes(7) + bytes([len(key) % 2**bits]))
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    log, model, before, lines = Log(path), {}, {}, [b""]
    for step in steps:
        if isinstance(step, list):
            log.extend(step)
            for key, record in step:
                before = dict(model)
                model[key] = record
                lines.append(json.dumps({"key": key, **record}, ensure_ascii=False).encode() + b"\n")
        else:
            if step == "reopen without index":
                path.with_name("log.jsonl.index").unlink(missing_ok=True)
            log = Log(path)
        check(log, model)
    if path.exists():
        assert path.read_bytes() == b"".join(lines)
        if 0 < cut < len(lines[-1]):
            path.write_bytes(path.read_bytes()[:-cut])
            model = before
        log = Log(path)
        check(log, model)
        log.append("last", {"n": 1})
        check(Log(path), {**model, "last": {"n": 1}})


def test_records_are_read_back(tmp_path):
    log = Log(tmp_path / "a.jsonl")
    log.extend([("x", {"text": "a\u2028b\nc\r"}), ("y", {"n": 1})])
    log.append("x", {"text": "later"})
    again = Log(tmp_path / "a.jsonl")
    assert dict(again) == dict(log) == {"x": {"text": "later"}, "y": {"n": 1}}


@pytest.mark.parametrize("cut", range(1, 20))
def test_an_incomplete_last_line_is_removed_with_a_warning(tmp_path, caplog, cut):
    path = tmp_path / "a.jsonl"
    Log(path).extend([("x", {"n": 1}), ("y", {"n": 2})])
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    log = Log(path)
    assert dict(log) == {"x": {"n": 1}}
    assert "ends in the middle of a record, probably because a process was killed" in caplog.text
    assert f"The last {21 - cut} bytes are removed" in caplog.text
    log.append("y", {"n": 2})
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", '{"n": 1}', '{"key": ["x"]}', '{"key": 1}', '{"key": "x', '{"key": "x}', '{"key": "x"', ""],
)
def test_a_line_that_is_not_a_record(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"key": "w"}}\n{line}\n{{"key": "x"}}\n')
    with pytest.raises(RunError, match=r"Line 2 of .*a.jsonl is not a record"):
        Log(path)


@pytest.mark.parametrize("line", [b'{"key": "x", "n": }', b'{"key": "x", 1}', b'{"key": "x", "t": "\xff"}'])
def test_a_damaged_record_is_found_when_it_is_read(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"key": "w"}\n' + line + b'\n{"key": "y"}\n')
    log = Log(path)
    assert list(log) == ["w", "x", "y"]
    for read in (lambda: log["x"], lambda: list(log.values()), lambda: dict(log)):
        with pytest.raises(
            RunError, match=r"Line 2 of .*a.jsonl is not a record .*Restore the file, or remove the line"
        ):
            read()


def test_lines_written_by_other_programs(tmp_path):
    """Order of the fields, spaces, escapes and Windows line ends do not matter."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n":1,"key":"x"}\n{"key":"y"}\r\n{"key": "\\u00fc", "n": 2}\n')
    log = Log(path)
    assert dict(log) == {"x": {"n": 1}, "y": {}, "ü": {"n": 2}}
    log.append("ü", {"n": 3})
    assert dict(Log(path)) == {"x": {"n": 1}, "y": {}, "ü": {"n": 3}}


def test_a_full_disk(tmp_path):
    """Writes to /dev/full always fail."""
    log = Log(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        RunError, match=r"The disk is full: 1 records .* Free disk space and rerun the same command to resume"
    ):
        log.append("x", {"n": 1})
    assert dict(log) == {}


def test_a_failed_write_leaves_the_file_unchanged(tmp_path):
    """A limit on the file size interrupts a write in the middle of a record."""
    path = tmp_path / "a.jsonl"
    code = f"""
import resource, signal
from stepdpo_trl.runs.log import Log, RunError
log = Log(__import__("pathlib").Path({str(path)!r}))
log.append("x", {{"text": "a" * 100}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))
try:
    log.append("y", {{"text": "b" * 300}})
except RunError as error:
    print(error, list(log))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "All earlier records are safe" in output
    assert "['x']" in output
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["x"]


@pytest.fixture
def indexed(tmp_path, monkeypatch):
    """A log with a stored index of its first 300 records, and two more records."""
    monkeypatch.setattr(log_module, "SAVED_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    Log(path).extend((f"k{n:03}", {"n": n}) for n in range(300))
    Log(path)
    assert path.with_name("a.jsonl.index").exists()
    Log(path).extend([("new", {}), ("k000", {"n": -1})])
    return path


def scanned(path, monkeypatch):
    """Open a log, and return it with the number of lines that were scanned for their keys."""
    keys = []
    monkeypatch.setattr(log_module, "digest", lambda key: keys.append(key) or log_index.digest(key))
    log = Log(path)
    monkeypatch.setattr(log_module, "digest", log_index.digest)
    return log, len(keys)


def test_the_index_of_a_large_log_is_stored(indexed, monkeypatch):
    """Only the records after it are scanned."""
    log, lines = scanned(indexed, monkeypatch)
    assert lines == 2
    assert dict(log) == {f"k{n:03}": {"n": n or -1} for n in range(300)} | {"new": {}}


def replace_index(path, content):
    path.with_name("a.jsonl.index").write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: replace_index(path, b""),
        lambda path: replace_index(path, b"PK nonsense"),
        lambda path: replace_index(path, path.with_name("a.jsonl.index").read_bytes()[:-200]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'{"key": "k007", "n": 7}\n', b"")),
        lambda path: path.write_bytes(b'{"key": "k999"}\n' + path.read_bytes()),
        lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:20])),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"k0', b'"l0')),
    ],
    ids=["empty", "nonsense", "cut", "line removed", "line added", "shorter log", "other keys"],
)
def test_an_index_that_does_not_fit_is_made_again(indexed, monkeypatch, change):
    change(indexed)
    expected = {}
    for line in indexed.read_text().splitlines():
        record = json.loads(line)
        expected[record.pop("key")] = record
    log, lines = scanned(indexed, monkeypatch)
    assert dict(log) == expected
    assert lines == len(indexed.read_text().splitlines())
    if len(expected) > 100:
        log, lines = scanned(indexed, monkeypatch)
        assert dict(log) == expected
        assert lines == 0


def test_no_space_for_the_index(indexed, monkeypatch):
    index = indexed.with_name("a.jsonl.index")
    index.unlink()
    index.with_name("a.jsonl.index.partial").mkdir()  # so that it cannot be written
    assert len(Log(indexed)) == 301
    assert not index.exists()


def test_memory_per_record(tmp_path):
    """The index has 20 bytes per record, whatever its length."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"key": "problem-{n}/0123456789abcdef/0", "text": "{"x" * 500}"}}\n' for n in range(5_000))
    tracemalloc.start()
    log = Log(path)
    kept, peak = tracemalloc.get_traced_memory()
    assert sum(len(record["text"]) for record in log.values()) == 500 * 5_000
    after = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(log._index.offsets, array)
    assert kept < 25 * 5_000 + 50_000
    assert max(peak, after) < 80 * 5_000 + 3_000_000  # buffers of 1 MB
