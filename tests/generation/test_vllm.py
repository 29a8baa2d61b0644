"""Generation by servers that the fake `vllm` starts: arguments, GPUs, requests, and the end of all processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("openai", reason="needs the extra openai")

from stepdpo_trl.generation import GenerationError, ModelSpec, Request, Sampling, make_generator, vllm_server
from stepdpo_trl.generation.vllm_arguments import answer_arguments, gpu_groups, parse_arguments
from stepdpo_trl.generation.vllm_command import describe_servers, one_server, serve_command
from stepdpo_trl.generation.vllm_server import VLLMServer, stop_orphans
from stepdpo_trl.quickstart import MODEL_PATH

from ..fake_vllm import leave_server, records, session_of

MODEL = str(MODEL_PATH)


def send(generator, count, prompt="What is 6 * 7?"):
    """Send requests at the same time, and return the completions and errors."""
    generator.prepare()
    results = [None] * count

    def work(number):
        try:
            results[number] = generator.complete(Request(str(number), prompt, number), Sampling(top_k=5))
        except GenerationError as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("arguments", "gpus", "expected"),
    [
        ("", "0 1", [["0"], ["1"]]),
        ("--tensor-parallel-size 4", "0 1 2 3 4 5 6 7", [["0", "1", "2", "3"], ["4", "5", "6", "7"]]),
        ("-tp 2 --pipeline_parallel_size=2", "a b c d", [["a", "b", "c", "d"]]),
        ("--tensor-parallel-size=2 -dp 2", "0 1 2 3", [["0", "1", "2", "3"]]),
        ("-tp 16 --distributed-executor-backend ray", "0 1", [["0", "1"]]),
        ("--tensor-parallel-size 2", "0 1 2", [["0", "1"]]),
        ("--tensor-parallel-size 2", "", [[]]),
    ],
)
def test_groups_of_gpus(arguments, gpus, expected):
    assert gpu_groups(parse_arguments(arguments), gpus.split()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--port 8000", "--vllm-args contains --port. Remove it: this command sets it."),
        ("--dtype=half", "Use --dtype of this command instead."),
        ("--served_model_name x", "contains --served-model-name"),
        ("--tensor-parallel-size four", "'four' is not a whole number of at least 1"),
        ("-tp 0", "'0' is not a whole number"),
        ("--tensor-parallel-size", "expected one argument"),
        ("--kv-cache-dtype 'fp8", "No closing quotation"),
        ("--config=serve.yaml", "contains --config. The arguments in that file would not be checked, nor stored"),
        ("--hf_token hf_x", "contains --hf-token. It would be written to the files of the run. Set the environment"),
        ("--por 8000", "contains --por, an abbreviation. Write --port."),
        ("--tensor-par 2", "contains --tensor-par, an abbreviation. Write --tensor-parallel-size."),
        ("--data-parallel-size-l=2", "Write --data-parallel-size-local."),
        ("--max-num 2", "Write --max-num-batched-tokens or --max-num-partial-prefills or --max-num-seqs."),
    ],
)
def test_arguments_that_cannot_be_passed(arguments, message):
    with pytest.raises(ValueError, match="--vllm-args") as error:
        ModelSpec("m", "vllm", vllm_args=arguments)
    assert message in str(error.value)


def test_too_few_gpus():
    with pytest.raises(ValueError, match=r"asks for 8 GPUs .*but 2 are visible \(0, 1\)"):
        gpu_groups(parse_arguments("-tp 4 -pp 2"), ["0", "1"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, None),
        ("-tp 4 --gpu_memory_utilization 0.8 --max-model-len=8192 --enforce-eager", None),
        ("--quantization fp8 -tp 4", "--quantization fp8"),
        ("--kv_cache_dtype=fp8 --max-num-seqs 64 --seed -1", "--kv-cache-dtype fp8 --seed -1"),
        ("--compilation-config.level 3 --hf-overrides '{\"a\": 1}'", "--hf-overrides '{\"a\": 1}'"),
        ("-O3 --api-server-count 4 --data-parallel-size-local 2 -dpl 2 -cc.mode 3 -asc=2", None),
        ("-O 3 -O=2 -O.level=3 -O '{\"level\": 3}' --optimization-level 1", None),
        ("--no-enable-prefix-caching --no-async-scheduling --enable-prompt-embeds", "--enable-prompt-embeds"),
        ("-q fp8 -dcp 2 --nnodes 2 -r 1", "-q fp8"),
    ],
)
def test_arguments_that_answers_depend_on(arguments, expected):
    assert answer_arguments(arguments) == expected


def test_one_server_per_group_of_gpus(fake_vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-this-server")
    monkeypatch.setenv("VLLM_API_KEY", "sk-other")
    spec = ModelSpec(MODEL, "vllm", vllm_args="--tensor-parallel-size 2 --max-num-seqs 3")
    generator = make_generator(spec, tmp_path / "run")
    assert generator.concurrent == 6
    assert not records(fake_vllm, "started")  # only the first request starts them
    answers = send(generator, 12)
    assert [answer.text.rpartition("{")[2] for answer in answers] == ["42}.", "41}."] * 6
    started, asked = records(fake_vllm, "started"), records(fake_vllm, "asked")
    assert sorted(record["gpus"] for record in started) == ["4,5", "6,7"]
    assert [record["key"] for record in started] == [None, None]
    words = started[0]["words"]
    assert words[:4] == ["serve", MODEL, "--host", "127.0.0.1"]
    assert words[-4:] == ["--tensor-parallel-size", "2", "--max-num-seqs", "3"]
    assert words[words.index("--generation-config") + 1] == "vllm"
    assert len({tuple(record["words"]) for record in started}) == 2  # the ports differ
    # All 12 requests came at the same time: each server got half of them
    assert sorted(sum(request["pid"] == record["pid"] for request in asked) for record in started) == [6, 6]
    assert {(request["model"], request["top_k"], request["authorization"]) for request in asked} == {
        (MODEL, 5, "Bearer none")
    }
    assert len(session_of(started[0]["pid"])) == 2
    generator.close()
    assert not [pid for record in started for pid in session_of(record["pid"])]
    logs = sorted((tmp_path / "run").iterdir())
    assert [log.name for log in logs] == ["vllm-0.log", "vllm-1.log"]
    assert "CUDA_VISIBLE_DEVICES=4,5 vllm serve" in logs[0].read_text()


def test_prompts_are_token_ids_without_another_bos(fake_vllm, tmp_path):
    """The ids are those that the chat template gives, here with a tokenizer that prepends a BOS token to texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "<s>{{ messages[0].content }}>"
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = ModelSpec(MODEL, "vllm", tokenizer=str(tmp_path / "tokenizer"))
    generator = make_generator(spec, tmp_path)
    assert tokenizer("6")["input_ids"][0] == bos
    try:
        send(generator, 1, generator.render("6", "Step 1:"))
        send(generator, 1, ({"role": "user", "content": "6"},))
    finally:
        generator.close()
    expected = [[bos, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in ("6>Step 1:", "6>")]
    assert [request["prompt"] for request in records(fake_vllm, "asked")] == expected
    words = records(fake_vllm, "started")[0]["words"]
    assert words[words.index("--tokenizer") + 1] == str(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("failure", "arguments", "message"),
    [
        (
            "",
            "--no-such-argument 3",
            "status 2. Its last message: vllm: error: unrecognized arguments: --no-such-argument 3. The log is ",
        ),
        pytest.param(
            "out of memory",
            None,
            "Its last message: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB. The log is ",
            marks=pytest.mark.long,
        ),
        ("killed", None, "was killed by SIGKILL, possibly by the out-of-memory killer (see `dmesg`)."),
        pytest.param("dead engine", None, "The engine of vLLM died without a message", marks=pytest.mark.long),
    ],
)
def test_servers_that_end(fake_vllm, tmp_path, monkeypatch, failure, arguments, message):
    """The error has vLLM's own message, and no process is left."""
    monkeypatch.setenv("FAKE_VLLM", failure)
    generator = make_generator(ModelSpec(MODEL, "vllm", vllm_args=arguments), tmp_path / "run")
    try:
        results = send(generator, 6)
    except GenerationError as error:
        results = [error]
    finally:
        generator.close()
    error = next(result for result in results if isinstance(result, GenerationError))
    assert message in str(error)
    assert f"The log is {tmp_path / 'run' / 'vllm-0.log'}." in str(error)


def test_ctrl_c_during_the_start(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "never ready")
    generator = make_generator(ModelSpec(MODEL, "vllm"), tmp_path)

    def interrupt():
        while not (tmp_path / "vllm-0.log").exists() or "Loading" not in (tmp_path / "vllm-0.log").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        generator.prepare()


@pytest.mark.parametrize("kill_leader", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_orphan_is_stopped(fake_vllm, tmp_path, caplog, kill_leader):
    """Also if only a worker is left, as after a kill of the server's first process."""
    server = leave_server(MODEL, tmp_path, kill_leader)
    assert len(session_of(server.process.pid)) == 2 - kill_leader
    stop_orphans(tmp_path)
    assert not session_of(server.process.pid)
    assert "Stopping a vLLM server" in caplog.text


def test_other_processes_are_not_stopped(fake_vllm, tmp_path, caplog):
    """Neither one that has got the id of a server, nor a server that a running command uses."""
    generator = make_generator(ModelSpec(MODEL, "vllm"), tmp_path)
    generator.prepare()
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    record = json.loads((tmp_path / "vllm-0.pid").read_text())
    reused = {**record, "server": other.pid, "started": record["started"] - 1000, "owner": 2**22 + 1}
    (tmp_path / "vllm-5.pid").write_text(json.dumps(reused))
    (tmp_path / "vllm-6.pid").write_text(json.dumps({**reused, "host": "elsewhere"}))
    try:
        stop_orphans(tmp_path)
        assert other.poll() is None
        assert send(generator, 1)[0].finish_reason == "stop"
        assert "running on elsewhere" in caplog.text
        assert [file.name for file in tmp_path.glob("*.pid")] == ["vllm-0.pid"]
    finally:
        other.kill()
        other.wait()
        generator.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "JSONDecodeError"),
        ('{"server": 1', "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('{"server": 7, "started": 1.5}', "KeyError: 'owner'"),
        ('{"server": -7, "started": 1, "owner": 5, "owner_started": 1, "host": "h"}', "ValueError: the id"),
        ('{"server": 7, "started": "soon", "owner": 5, "owner_started": 1, "host": "h"}', "ValueError: could not"),
    ],
)
def test_a_damaged_file_of_a_process_is_removed(tmp_path, caplog, content, reason):
    file = tmp_path / "vllm-3.pid"
    file.write_text(content)
    stop_orphans(tmp_path)
    assert f"Removing {file}, which is damaged ({reason}" in caplog.text
    assert not file.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_before_the_file_of_the_process_is_written(fake_vllm, tmp_path, monkeypatch):
    """Nobody would find the server, so it must not have started."""
    monkeypatch.setattr(vllm_server, "write_atomically", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    starter = os.fork()
    if not starter:
        VLLMServer(["vllm", "serve", MODEL, "--port", "1", "--mark", str(tmp_path)], [], 1, tmp_path)
        os._exit(0)
    assert os.waitpid(starter, 0)[1] == signal.SIGKILL
    left = [process for process in psutil.process_iter() if str(tmp_path) in words_of(process)]
    psutil.wait_procs(left, timeout=10)
    assert not any(process.is_running() for process in left)
    assert not records(fake_vllm, "started")


def words_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_full_disk_before_the_file_of_the_process_is_written(fake_vllm, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vllm_server, "write_atomically", fail)
    with pytest.raises(OSError, match="No space left"):
        VLLMServer(["vllm", "serve", MODEL, "--port", "1"], [], 1, tmp_path)
    assert not records(fake_vllm, "started")
    assert not list(tmp_path.glob("*.pid"))


def write_adapter(folder, **config):
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": MODEL, "r": 16, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_adapters(fake_vllm, tmp_path):
    """The folder of an adapter is served on its base model, with the smallest rank that vLLM accepts."""
    adapter = write_adapter(tmp_path / "lora", r=20, rank_pattern={"q_proj": 40})
    passed_alone, on_base = ModelSpec(adapter, "vllm"), ModelSpec(MODEL, "vllm", adapter=adapter)
    for spec in (passed_alone, on_base):
        words = serve_command(spec, 1)
        assert words[:3] == ["vllm", "serve", MODEL]
        assert words[words.index("--enable-lora") + 1 :][:2] == ["--max-lora-rank", "64"]
        assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": adapter, "path": adapter}
    generator = make_generator(passed_alone, tmp_path)
    try:
        assert send(generator, 1)[0].finish_reason == "stop"
    finally:
        generator.close()
    assert records(fake_vllm, "asked")[0]["model"] == adapter


@pytest.mark.parametrize(("rank", "accepted"), [(1, "8"), (64, "64"), (65, "128"), (600, "600")])
def test_ranks_of_adapters(tmp_path, rank, accepted):
    words = serve_command(ModelSpec(write_adapter(tmp_path / "lora", r=rank), "vllm"), 1)
    assert words[words.index("--max-lora-rank") + 1] == accepted


def test_adapters_that_vllm_does_not_load(tmp_path):
    adapter = write_adapter(tmp_path / "ia3", peft_type="IA3")
    with pytest.raises(GenerationError, match=r"of type IA3, but .* `stepdpo merge`"):
        serve_command(ModelSpec(adapter, "vllm"), 1)


def test_command_lines(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    spec = ModelSpec("org/m", "vllm", tokenizer="org/t", revision="v1", dtype="bfloat16", vllm_args="-tp 2")
    lines = describe_servers(spec).splitlines()
    assert lines[0] == "vLLM servers of org/m: 2"
    assert lines[2] == (
        "CUDA_VISIBLE_DEVICES=2,3 vllm serve org/m --host 127.0.0.1 --port PORT --dtype bfloat16 --generation-config "
        "vllm --disable-uvicorn-access-log --tokenizer org/t --revision v1 -tp 2"
    )
    assert one_server(spec).vllm_args == "-tp 2 --data-parallel-size 2"
    revision = serve_command(ModelSpec("org/m", "vllm", revision="v1"), 1)
    assert revision[-4:] == ["--revision", "v1", "--tokenizer-revision", "v1"]


def test_missing_command(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(GenerationError, match=r"needs the command vllm.*pip install 'stepdpo_trl\[vllm\]'"):
        make_generator(ModelSpec(MODEL, "vllm"), tmp_path)
