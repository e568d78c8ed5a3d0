"""The commands that must work, as the design's section 1 writes them, one after the other on one workspace. Only paths
and ports are replaced."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import pagoda

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
LINES = """\
lmdeploy convert internlm-chat-7b /path/to/internlm-chat-7b            # offline conversion -> ./workspace
    [--dst_path DIR] [--tp N] [--model-format hf|awq|gptq] [--group-size 128]
lmdeploy chat turbomind /path/to/hf_model/ --model-name internlm-chat-7b   # online conversion, chat in the terminal
lmdeploy chat turbomind ./workspace
lmdeploy chat torch /path/to/hf_model/                                 # the same chat on transformers, for comparison
lmdeploy serve api_server ./workspace --server_name 0.0.0.0 --server_port 23333 --instance_num 64 --tp 1
lmdeploy serve api_client http://localhost:23333
lmdeploy serve gradio http://0.0.0.0:23333 --server_name 0.0.0.0 --server_port 6006 --restful_api True
lmdeploy serve gradio ./workspace
lmdeploy lite calibrate   --model DIR --calib_dataset FILE --calib_samples 128 --calib_seqlen 2048 --work_dir ./quant_output
lmdeploy lite kv_qparams  --work_dir ./quant_output --turbomind_dir ./workspace --kv_sym False --num_tp 1
lmdeploy lite auto_awq    --model DIR --w_bits 4 --w_group_size 128 --work_dir ./quant_output
lmdeploy list | lmdeploy check_env
"""  # noqa: E501
FEW = ["--calib_samples", "8", "--calib_seqlen", "256"]
TYPED = "Who are you?\n\nexit\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


PLACES = {
    "/path/to/internlm-chat-7b": "models/internlm-chat-7b", "/path/to/hf_model/": "models/internlm-chat-7b/",
    "--model DIR": "--model models/internlm-chat-7b", "FILE": "calibration.txt",
    "23333": str(free_port()), "6006": str(free_port()),
}  # fmt: skip


def command(start: str) -> list[str]:
    """The one line that begins so, with this test's paths and ports, for the shell-less start of a process."""
    [line] = [line.split("  #")[0] for line in LINES.splitlines() if re.sub(" +", " ", line).startswith(start)]
    for old, new in PLACES.items():
        line = line.replace(old, new)
    return [sys.executable, "-m", "pagoda.cli.main", *line.split()[1:]]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a text, and the workspace that the first line makes."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(Path(pagoda.__file__).parent / "mini", folder / "models" / "internlm-chat-7b")
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (folder / "calibration.txt").write_text(text * 60, encoding="utf-8")
    assert "workspace is ready" in run(folder, command("lmdeploy convert"))
    return folder


def environment() -> dict[str, str]:
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, more)])}


def run(folder: Path, words: list[str], typed: str = "") -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment(), input=typed, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def running(folder: Path, words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
    assert code in (0, 130)


def wait_for(url: str, process: "subprocess.Popen[str]") -> httpx.Response:
    pause = threading.Event()
    for _ in range(900):
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(url)
            if answer.status_code == 200:
                return answer
        assert process.poll() is None, "it ended"
        pause.wait(0.1)
    raise AssertionError(f"{url} does not answer")


def test_the_lines_are_the_design_s() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.search(r"^## 1\. .*?^```\n(.*?)^```", page, re.M | re.S)[1] == LINES


def test_chats(house: Path) -> None:
    for start in ("lmdeploy chat turbomind /path", "lmdeploy chat turbomind ./workspace", "lmdeploy chat torch"):
        assert re.search(r"[1-9]\d* tokens in 1 reply", run(house, command(start), TYPED)), start


def test_a_server_its_client_and_its_pages(house: Path) -> None:
    words = command("lmdeploy serve api_server")
    url = f"http://127.0.0.1:{PLACES['23333']}"
    with running(house, words) as server:
        wait_for(f"{url}/ready", server)
        hello = {"model": "workspace", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8}
        made = httpx.post(f"{url}/v1/chat/completions", json=hello, timeout=60)
        assert made.status_code == 200 and made.json()["usage"]["completion_tokens"] > 0, made.text
        said = run(house, command("lmdeploy serve api_client"), TYPED)
        assert "workspace at http://localhost" in said and len(said.splitlines()) > 1
        with running(house, command("lmdeploy serve gradio http")) as page:
            assert "gradio" in wait_for(f"http://127.0.0.1:{PLACES['6006']}/", page).text
    with running(house, [*command("lmdeploy serve gradio ./workspace"), "--server_port", PLACES["6006"]]) as page:
        assert "gradio" in wait_for(f"http://127.0.0.1:{PLACES['6006']}/", page).text


def test_an_int8_cache_by_the_older_spellings(house: Path) -> None:
    assert "key_stats" in run(house, command("lmdeploy lite calibrate"))
    assert "engine.toml" in run(house, command("lmdeploy lite kv_qparams"))
    settings = house / "workspace" / "engine.toml"
    text = settings.read_text()
    for policy in ('"int8"', "8"):  # a name, or the number that stood for it
        settings.write_text(re.sub(r"quant_policy = .*", f"quant_policy = {policy}", text))
        assert "tokens in 1 reply" in run(house, command("lmdeploy chat turbomind ./workspace"), TYPED)
        with pagoda.pipeline(str(house / "workspace"), pagoda.EngineConfig(device="cpu")) as pipe:
            assert "ranges of an int8 cache" in pipe.engine.info.report[0]
    settings.write_text(text)


def test_4_bit_weights_by_the_older_spellings(house: Path) -> None:
    assert "quant_output is ready" in run(house, [*command("lmdeploy lite auto_awq"), *FEW])
    convert = [*command("lmdeploy convert")[:5], "quant_output", "--model-format", "awq", "--group-size", "128"]
    assert "small is ready" in run(house, [*convert, "--dst_path", "small", "--tp", "2"])
    weights = sorted(p.name for p in (house / "small" / "weights").iterdir())
    assert weights == ["rank-0-of-2.safetensors", "rank-1-of-2.safetensors"]
    run(house, [*convert, "--dst_path", "small"])
    chat = [w.replace("./workspace", "./small") for w in command("lmdeploy chat turbomind ./workspace")]
    assert re.search(r"[1-9]\d* tokens in 1 reply", run(house, chat, TYPED))


def test_lists(house: Path) -> None:
    first, second = command("lmdeploy list"), [sys.executable, "-m", "pagoda.cli.main", "check_env"]
    assert first[3:] == ["list", "|", "lmdeploy", "check_env"]
    assert "internlm-chat-7b" in run(house, first[:4]) and "torch" in run(house, second)
