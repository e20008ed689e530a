"Rewards behind HTTP: real servers on this machine, good ones, slow ones, dying ones and worse."
import json, socket, threading, time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
import pytest
import torch
from alignkit import remote
from alignkit.remote import PROTOCOL, make_server, pack, remote_reward
from alignkit.rewards import Reward, RewardError, get_reward, score
from conftest import bits, go, history

RGB = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CATS = ["a cat"] * 6


def mean(images, prompts): return images.mean((1, 2, 3))


@contextmanager
def running(reward=mean, port=0, **how):
    server = make_server(reward, port=port, **how)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield "http://{}:{}".format(*server.server_address)
    finally:
        server.shutdown()
        server.server_close()


def post(url, body, **headers):
    "Status and answer of a raw request."
    try:
        with urlopen(Request(f"{url}/score", body, headers), timeout=10) as answer: return answer.status, json.loads(answer.read())
    except HTTPError as e: return e.code, json.loads(e.read())


def test_a_run_with_a_remote_reward_is_the_run_with_the_local_one(pipe_folder, tmp_path):
    "JPEG rewards see 8 bits either way: the history is equal bit for bit, and the record says where the rewards came from."
    with running("jpeg_compressibility") as url:
        far = go(pipe_folder, tmp_path / "far", reward=remote_reward(url, batch_size=2))
    go(pipe_folder, tmp_path / "near", reward="jpeg_compressibility")
    assert bits(history(tmp_path / "far")) == bits(history(tmp_path / "near"))
    assert far.config["reward"] == "jpeg_compressibility (remote)"


def test_a_server_that_dies_and_comes_back(pipe_folder, tmp_path):
    "The run stops with a word; with the server again it goes on, and ends as the run that was never stopped."
    seen = []
    with running("jpeg_compressibility") as url:
        reward, port = remote_reward(url, retries=0), int(url.rpartition(":")[2])
        def mortal(images, prompts):
            seen.append(len(prompts))
            if len(seen) > 6: raise OSError("status 500, gone")
            return reward(images, prompts)
        mortal.name = reward.name
        with pytest.raises(RewardError, match="gone"): go(pipe_folder, tmp_path / "cut", reward=Reward(mortal, "far"), num_epochs=3)
    with pytest.raises(RewardError, match="none of 1 endpoints answered in 1 rounds"): score(reward, RGB, CATS)
    with running("jpeg_compressibility", port=port):
        go(pipe_folder, tmp_path / "cut", reward=Reward(reward.fn, "far"), num_epochs=3, resume=True)
    go(pipe_folder, tmp_path / "whole", reward=Reward(get_reward("jpeg_compressibility").fn, "far"), num_epochs=3)
    assert bits(history(tmp_path / "cut")) == bits(history(tmp_path / "whole"))


def test_retries_are_counted_and_pauses_double(monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    with running() as url: reward = remote_reward(url, retries=3, wait=0.5)
    with pytest.raises(RewardError, match="none of 1 endpoints answered in 4 rounds .*refused"): score(reward, RGB, CATS)
    assert pauses == [0.5, 1., 2.]


def test_a_failing_reward_is_asked_again_and_its_words_are_told():
    "Status 500 with the reward's own words, no traceback; it may do better the next time."
    calls = []
    def fails_twice(images, prompts):
        calls.append(1)
        if len(calls) < 3: raise RuntimeError("out of memory")
        return mean(images, prompts)
    with running(fails_twice) as url:
        assert score(remote_reward(url, retries=2, wait=0.01), RGB, CATS).shape == (6,) and len(calls) == 3
    def always(images, prompts): raise RuntimeError("no weights")
    with running(always) as url:
        with pytest.raises(RewardError, match="status 500, .*no weights"): score(remote_reward(url, retries=1, wait=0.01), RGB, CATS)
        assert "Traceback" not in post(url, pack(RGB, CATS))[1]["error"]


def test_a_slow_server_is_passed_over():
    "Slower than the time-out: the other endpoint answers for it, and it comes last from then on."
    def slow(images, prompts):
        time.sleep(1.5)
        return mean(images, prompts)
    slow.name = "mean"
    with running(slow) as one, running(mean) as other:
        reward = remote_reward(one, other, batch_size=3, timeout=0.3, retries=0)
        assert score(reward, RGB, CATS).allclose(mean(RGB, CATS), atol=0.5 / 255)
        assert reward.fn.asked == {one: 0, other: 2} and "timed out" in reward.fn.said[one]


def test_batches_are_shared_evenly():
    "Twelve requests to three endpoints, one at a time to each."
    busy, most = [0], [0]
    def counted(images, prompts):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        busy[0] -= 1
        return mean(images, prompts)
    with running(counted) as a, running(counted) as b, running(counted) as c:
        reward = remote_reward(a, b, c, batch_size=1)
        for _ in range(2): score(reward, RGB, CATS)
        assert reward.fn.asked == {a: 4, b: 4, c: 4} and 2 <= most[0] <= 3


@pytest.mark.parametrize("answer, words", [
    (b'{"rewards": [1, 2]}', "6 rewards for 6 pictures, got 2 of them"),
    (b'{"rewards": ["1", "1", "1", "1", "1", "1"]}', "a number, got '1'"),
    (b'[1, 1, 1, 1, 1, 1]', "in the place of an object"), (b"<html>", "something else than JSON"), (b"{}", "got None"),
    (b'{"rewards": [1, 1, 1, 1, 1, false]}', "a number, got False"), (b" " * (remote.MOST + 2), "more than"),
], ids=["too few", "texts", "a list", "a page", "nothing", "false", "endless"])
def test_a_lying_server_is_named_and_not_asked_again(answer, words, monkeypatch):
    "What it answered stands in the error, beside its address."
    asked = []
    with running() as url:
        reward = remote_reward(url, retries=3, wait=0.01)
        def lie(self):
            asked.append(1)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        monkeypatch.setattr(remote._Handler, "do_POST", lie)
        with pytest.raises(RewardError) as error: score(reward, RGB, CATS)
        assert words in str(error.value) and url in str(error.value) and len(asked) == 1


def test_what_the_server_refuses():
    "Too large before it is read, a wrong path, no length, no picture: each with a status and a word, and the server lives on."
    with running(max_bytes=2000, max_pictures=2, max_side=8) as url:
        host, port = url.removeprefix("http://").split(":")
        status, told = post(url, b"x" * 2001)
        assert status == 413 and "at most 2000 bytes" in told["error"]
        assert post(url, b"{}") == (400, {"error": f"protocol: {PROTOCOL!r} is spoken here"})
        assert "at most 8 pixels a side" in post(url, pack(RGB[:1], CATS[:1]))[1]["error"]
        assert "at most 2 at a time" in post(url, pack(RGB[:3, :, :4, :4], CATS[:3]))[1]["error"]
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(b"POST /score HTTP/1.0\r\n\r\n")
            assert b"411" in raw.recv(100)
        with socket.create_connection((host, int(port)), timeout=5) as raw: raw.sendall(b"nonsense\r\n\r\n")
        assert post(url, pack(RGB[:2, :, :8, :8], CATS[:2]))[0] == 200


def test_what_is_no_endpoint_is_refused():
    other = Reward(mean, "another")
    with running() as one, running(other) as two:
        with pytest.raises(ValueError, match="different rewards"): remote_reward(one, two)
    with pytest.raises(ConnectionError, match="no endpoint answers"): remote_reward(one)
    with pytest.raises(ValueError, match="urls: http://"): remote_reward("gpu2:8000")
    with pytest.raises(ValueError, match="urls: at least one"): remote_reward()
    with pytest.raises(ValueError, match="kind: 'PNG' or 'JPEG'"): remote_reward(one, kind="GIF")


def test_not_finite_rewards_arrive_as_such():
    "JSON has no NaN: null goes over the wire, and the kit's rule for pictures without a reward holds."
    def odd(images, prompts): return torch.tensor([1., float("nan"), float("inf"), 2., 3., 4.])
    with running(odd) as url:
        assert "NaN" not in json.dumps(post(url, pack(RGB, CATS))[1])
        found = score(remote_reward(url), RGB, CATS, finite=False)
        assert found.isnan().tolist() == [False, True, True, False, False, False]


def test_metadata_goes_along():
    from alignkit.prompts import Prompt
    def weighed(images, prompts, metadata): return torch.tensor([float(m["weight"]) for m in metadata])
    with running(weighed) as url:
        prompts = [Prompt("a cat", {"weight": k}) for k in range(6)]
        assert score(remote_reward(url, batch_size=4), RGB, prompts).tolist() == [0., 1., 2., 3., 4., 5.]


def test_nothing_is_unpickled():
    text = Path(remote.__file__).read_text(encoding="utf-8")
    assert "pickle" not in text and "torch.load" not in text and "eval(" not in text


def test_the_command(pipe_folder, tmp_path, monkeypatch):
    "The program serves a reward, and trains on one by its address; Ctrl-C ends the server with code 0."
    import os, re, signal, subprocess, sys
    from typer.testing import CliRunner
    from alignkit.cli import app
    from conftest import ROOT
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom alignkit.cli import main\nmain()"
    words = [sys.executable, "-c", call, "serve-reward", "jpeg_compressibility", "--port", "0"]
    server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    url = re.search(r"http://\S+?(?=;)", server.stdout.readline()).group()
    few = "--set samples_per_epoch=4 --set num_inference_steps=2 --set updates_per_epoch=1 --set num_epochs=1".split()
    done = CliRunner().invoke(app, ["train", "ddpo", "--pipe", str(pipe_folder), "--reward", url, *few, "--out", "run"])
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(app, ["resume", "run", "--set", "num_epochs=2"])
    assert again.exit_code == 0 and len(history("run")) == 2, again.output
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
