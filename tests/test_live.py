"Runs that are looked at while they go on: by files of another process, from a busy kernel, through half-written files, without a notebook."
import json, os, queue, re, shutil, signal, subprocess, sys, threading, time, weakref
from contextlib import contextmanager
import numpy as np
import pytest
import torch
from PIL import Image
from alignkit import live
from alignkit.folder import Pictures
from alignkit.runs import Latest, Run, read_run
from conftest import ROOT, assert_same_run, forked, go

RECORDED = ROOT / "data" / "runs" / "jpeg_compressibility" / "ddpo_is_seed3"


def until(so, seconds=60):
    "Wait for something that another thread or process does."
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def board_of(folder, refresh=0.05):
    "A board at work, as in a notebook."
    board = live.watch(folder, refresh)
    if board.thread is None: board.start()
    return board


def parts_of(board): return board.shows.parts


@contextmanager
def another_process(pipe_folder, out, **changes):
    "A run that somebody else does."
    child = forked(_run_there, pipe_folder, out, changes)
    try: yield child
    finally:
        if child.is_alive(): child.kill()
        child.join()


def _run_there(pipe_folder, out, changes):
    torch.set_num_threads(1)
    go(pipe_folder, out, **changes)


def is_png(widget): return bytes(widget.value[:4]) == b"\x89PNG" and widget.layout.display is None


# ---- a run of another process

def test_a_run_of_another_process_is_watched_and_stopped(pipe_folder, tmp_path):
    "From before its folder is there until it is over; the button leaves the file that stops it."
    out = tmp_path / "run"
    board = board_of(out)
    p = parts_of(board)
    assert "waiting" in p["head"].value and p["stop"].disabled and p["at"].disabled
    assert not any(is_png(p[name]) for name in ("curve", "spread", "panels", "pictures"))
    with another_process(pipe_folder, out, num_epochs=200, eval_every=1) as child:
        until(lambda: f"running, process {child.pid} on" in p["head"].value)
        until(lambda: len(p["at"].options) > 2 and all(is_png(p[name]) for name in ("curve", "spread", "panels", "pictures")))
        assert p["at"].value == p["at"].options[-1][1] and "left" in p["head"].value  # the newest epoch, which it follows
        p["at"].value, followed = 0, p["at"].options[-1][1]
        until(lambda: p["at"].options[-1][1] > followed)
        assert p["at"].value == 0  # who looks at an old one goes on to look at it
        p["stop"].click()
        assert p["stop"].disabled
        child.join(60)
        assert child.exitcode == 0
    until(lambda: not board.thread.is_alive())
    run = read_run(out)
    assert 3 <= len(run.rows) < 200 and "stopped" in p["head"].value and f"{len(run.rows)} of 200 epochs" in p["head"].value
    assert p["stop"].disabled and not (out / "stop").exists()
    assert [e for _, e in p["at"].options] == [int(r["epoch"]) for r in run.rows]


def test_a_run_that_was_killed_is_told(pipe_folder, tmp_path):
    board = board_of(tmp_path)
    with another_process(pipe_folder, tmp_path, num_epochs=200) as child:
        until(lambda: (tmp_path / "history.csv").exists())
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    until(lambda: not board.thread.is_alive())
    assert "dead" in parts_of(board)["head"].value and parts_of(board)["stop"].disabled
    assert "resume=True" in str(board)


def test_a_newer_board_of_a_folder_takes_the_place_of_the_older(tmp_path):
    "Running a cell twice leaves one thread."
    boards = [board_of(tmp_path / "run") for _ in range(3)]
    assert [b.thread.is_alive() for b in boards] == [False, False, True]
    boards[-1].close()
    assert not boards[-1].thread.is_alive()
    boards[-1].refresh()  # by hand it still looks


def test_nothing_is_drawn_twice(tmp_path, monkeypatch):
    "Looks that find nothing new send nothing."
    shutil.copytree(RECORDED, tmp_path / "run")
    board, sent = live.watch(tmp_path / "run"), []
    for widget in parts_of(board).values(): widget.observe(sent.append)
    for name in ("draw_curve", "draw_panels", "draw_spread", "side_by_side"): monkeypatch.setattr(live, name, None)
    for _ in range(3): board.refresh()
    assert sent == []


# ---- files that are being written

def rewritten(folder, done):
    "Every file of a run is torn, removed and put back, over and over."
    files = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    rng = np.random.default_rng(0)
    while not done.is_set():
        for file, content in files.items():
            file.write_bytes(content[:rng.integers(len(content))])
            if rng.random() < 0.2: file.unlink()
            time.sleep(0.001)
            file.write_bytes(content)


def test_half_written_files_do_no_harm(tmp_path):
    "A board goes on through anything, and is right again when the files are."
    shutil.copytree(RECORDED, tmp_path / "run")
    board, done, seen = live.watch(tmp_path / "run"), threading.Event(), set()
    whole = {name: parts_of(board)[name].value for name in ("head", "curve", "panels", "pictures")}
    writer = threading.Thread(target=rewritten, args=(tmp_path / "run", done))
    writer.start()
    try:
        for _ in range(20):
            board.refresh()
            seen.add(parts_of(board)["note"].value)
    finally:
        done.set()
        writer.join()
    assert seen == {""}
    time.sleep(0.05)
    board.refresh()
    assert {name: parts_of(board)[name].value for name in whole} == whole


STRANGE = [b"", b"epoch", b"epoch,reward_mean\n", b"epoch,reward_mean\n0,", b"\x00" * 100, b"a,b\n1,2,3,4\n", b"epoch\nx\n", b"epoch\n0\n"]


@pytest.mark.parametrize("written", STRANGE, ids=range(len(STRANGE)))
def test_a_strange_history_is_no_end(tmp_path, written):
    "What cannot be drawn says so, beside what can."
    shutil.copytree(RECORDED, tmp_path / "run")
    (tmp_path / "run" / "history.csv").write_bytes(written)
    board = live.watch(tmp_path / "run")
    board.refresh()
    assert is_png(parts_of(board)["pictures"]) and "ddpo_is" in parts_of(board)["head"].value


def test_a_sheet_comes_back_as_it_was_saved(tmp_path):
    "Of any number and shape of pictures; of a version without captions and numbers too."
    rng = np.random.default_rng(0)
    for n, h, w in [(1, 8, 8), (8, 16, 24), (9, 24, 16), (16, 64, 64)]:
        made = Pictures(rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8), ["a prompt"] * n, [float(i) for i in range(n)], [1.] * 30)
        made.save(tmp_path / "epoch_0001.png")
        back = live.read_sheet(tmp_path / "epoch_0001.png")
        assert (back.pixels == made.pixels).all() and (back.prompts, back.rewards) == (made.prompts, made.rewards)
    old = Image.new("RGB", (8 * 16, 2 * 16), "white")
    for i in range(11): old.paste((i * 20, 0, 0), (i % 8 * 16, i // 8 * 16, i % 8 * 16 + 16, i // 8 * 16 + 16))
    old.save(tmp_path / "base.png")
    back = live.read_sheet(tmp_path / "base.png")
    assert back.pixels[:, 3, 5, 0].tolist() == [20 * i for i in range(11)] and back.prompts == [""] * 11


# ---- a run of this process

def test_live_changes_no_number(pipe_folder, unbroken, tmp_path, capsys):
    "Without a notebook the words come at the end; the run is the same bit for bit."
    from alignkit.ddpo import train
    from conftest import PROMPTS, brightness, small
    run = train(pipe_folder, brightness, PROMPTS, small(), out=tmp_path / "run", live=True)
    assert_same_run(tmp_path / "run", unbroken)
    told = capsys.readouterr().out
    assert f"{tmp_path / 'run'}: finished" in told and "4 of 4 epochs" in told and run.stopped == ""


@pytest.mark.parametrize("method", ["ddpo", "rwr", "alignprop"])
def test_every_method_has_it(method, pipe_folder, capsys):
    "Last of its arguments, and at work without a folder."
    import importlib, inspect
    from alignkit.rewards import Reward
    module = importlib.import_module(f"alignkit.{method}")
    assert list(inspect.signature(module.train).parameters)[-1] == "live"
    kind = {"ddpo": "DDPOConfig", "rwr": "RWRConfig", "alignprop": "AlignPropConfig"}[method]
    cfg = getattr(module, kind)(num_epochs=1, samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=2, fast="onednn")
    light = Reward(lambda images, prompts: images.mean((1, 2, 3)), "light", differentiable=True)
    module.train(pipe_folder, light, ["a cat"], cfg, live=True)
    assert "this run: finished" in capsys.readouterr().out


def made_up(epochs):
    "A run in memory, and its epochs."
    rows = read_run(RECORDED).rows[:epochs]
    return Run(torch.nn.Linear(1, 1), dict(read_run(RECORDED).config, num_epochs=epochs)), rows


def test_a_run_without_a_folder_shows_its_own_pictures():
    run, rows = made_up(5)
    with live.dashboard(run, refresh=0.02) as callback:
        p = parts_of(callback.board)
        for row in rows:
            run.rows.append(row)
            run.latest = Latest(torch.full((3, 3, 16, 16), row["epoch"] / 8), ["a", "b", "c"], torch.arange(3.), torch.randn(20))
            assert callback(run, row) is False
        callback.board.refresh()
        assert "running, in this process" in p["head"].value
        sheet = callback.board.shows.see().sheet(3)
        assert sheet.pixels[0, 0, 0, 0] == round(255 * 3 / 8) and sheet.prompts == ["a", "b", "c"] and len(sheet.all_rewards) == 20
        p["stop"].click()
        assert callback(run, rows[-1]) is True
    assert "finished" in p["head"].value and [e for _, e in p["at"].options] == [0, 1, 2, 3, 4]
    before = p["pictures"].value
    p["at"].value = 1  # browsed when all is over
    assert is_png(p["pictures"]) and p["pictures"].value != before


def test_a_long_run_without_a_folder_keeps_few_pictures(monkeypatch):
    monkeypatch.setattr(live, "KEPT", 8)
    own = live.OwnRun(Run(None, {}))
    for e in range(100):
        own.run.rows.append(dict(epoch=e))
        own.run.latest = Latest(torch.rand(1, 3, 4, 4), ["a"], torch.zeros(1), torch.zeros(1))
        own.take()
    kept = list(own.sheets)
    assert len(kept) <= 8 and kept[0] == 0 and kept[-1] > 90


def test_a_board_does_not_keep_the_pipeline():
    "It stays on the page for hours; what it shows is small."
    run, rows = made_up(2)
    pipe = weakref.ref(run.pipe)
    with live.dashboard(run) as callback: run.rows.extend(rows)
    board = callback.board
    del run, callback
    assert pipe() is None and board.shows.see().done == 2


# ---- a kernel that is busy

class Kernel:
    "A real kernel, and a front end that speaks to it as JupyterLab does: what is done with a widget goes to a subshell."
    def __init__(self, folder):
        from jupyter_client import KernelManager
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_PATH": ""}
        self.manager = KernelManager()
        self.manager.start_kernel(cwd=str(folder), env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(60)
        self.widgets, self.state, self.printed = {}, {}, ""
        reply = self.ask("create_subshell_request")
        self.subshell = reply["content"]["subshell_id"]

    def ask(self, kind):
        "On the control channel, which is heard at any time."
        message = self.client.session.msg(kind, {})
        self.client.control_channel.send(message)
        while (reply := self.client.get_control_msg(timeout=60))["parent_header"].get("msg_id") != message["header"]["msg_id"]: pass
        return reply

    def heard(self, so, seconds=120):
        "Take what the kernel publishes until something is so."
        end = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < end, f"it did not happen; printed:\n{self.printed}"
            try: message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty: continue
            content, kind = message["content"], message["msg_type"]
            if kind == "comm_open": self.widgets[content["comm_id"]] = dict(content["data"]["state"])
            if kind == "comm_msg" and content["data"].get("method") == "update":
                self.widgets.setdefault(content["comm_id"], {}).update(content["data"]["state"])
            if kind == "stream": self.printed += content["text"]
            if kind == "error": self.printed += "\n".join(content["traceback"])
            if kind == "display_data": self.printed += f"<{', '.join(sorted(content['data']))}>"

    def of(self, model): return [c for c, state in self.widgets.items() if state.get("_model_name") == model]
    def value(self, model): return [self.widgets[c] for c in self.of(model)]

    def do(self, comm, data):
        "What a user does with a widget, sent to the subshell."
        message = self.client.session.msg("comm_msg", dict(comm_id=comm, data=data))
        message["header"]["subshell_id"] = self.subshell
        self.client.shell_channel.send(message)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


TRAIN = """
import warnings
warnings.simplefilter("ignore")
from alignkit.ddpo import DDPOConfig, train
cfg = DDPOConfig(num_epochs=300, samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=2, fast="onednn", progress=False)
run = train({pipe!r}, lambda images, prompts: images.mean((1, 2, 3)), ["a cat"], cfg, live=True)
print("handed back:", len(run.rows), run.stopped)
"""
HANDED_BACK = re.compile(r"handed back: (\d+) .*\n")


def test_the_button_is_heard_while_the_kernel_trains(pipe_folder, tmp_path):
    "And so is the slider; where nothing is heard, an interrupt ends the run and hands it back."
    kernel = Kernel(tmp_path)
    try:
        kernel.client.execute(TRAIN.format(pipe=pipe_folder))
        kernel.heard(lambda: any(len(s["_options_labels"]) > 4 and not s["disabled"] for s in kernel.value("SelectionSliderModel")))
        slider, (button,) = kernel.of("SelectionSliderModel")[0], kernel.of("ButtonModel")
        kernel.do(slider, dict(method="update", state=dict(index=1), buffer_paths=[]))
        kernel.heard(lambda: kernel.widgets[slider]["index"] == 1)
        kernel.do(button, dict(method="custom", content=dict(event="click")))
        kernel.heard(lambda: HANDED_BACK.search(kernel.printed))
        assert "by the callback stop_button" in kernel.printed and "application/vnd.jupyter.widget-view+json" in kernel.printed
        assert int(HANDED_BACK.search(kernel.printed)[1]) < 300
        assert any("stopped, after epoch" in s.get("value", "") for s in kernel.value("HTMLModel"))
        kernel.printed = ""
        kernel.client.execute(TRAIN.format(pipe=pipe_folder))
        kernel.heard(lambda: len(kernel.of("ButtonModel")) == 2)
        kernel.heard(lambda: sum(len(s["_options_labels"]) > 2 for s in kernel.value("SelectionSliderModel")) == 2)
        kernel.manager.interrupt_kernel()
        kernel.heard(lambda: HANDED_BACK.search(kernel.printed))
        assert "interrupted in epoch" in kernel.printed
    finally: kernel.close()


# ---- several runs; no notebook; no widget in a notebook

def test_two_runs_side_by_side(tmp_path):
    "Curves, what differs, the pictures of the same epoch; a run that is not there yet is waited for."
    for name in ("a", "b"): shutil.copytree(RECORDED, tmp_path / name)
    record = json.loads((tmp_path / "b" / "config.json").read_text())
    record["config"].update(learning_rate=1e-4, reward="tiny_aesthetic")
    (tmp_path / "b" / "config.json").write_text(json.dumps(record))
    board = live.compare(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    p = parts_of(board)
    assert "learning_rate" in p["table"].value and "0.0001" in p["table"].value and "seed" not in p["table"].value
    assert p["head"].value.count("finished") == 2 and p["head"].value.count("waiting") == 1 and not board.over
    assert is_png(p["curve"]) and is_png(p["pictures"]) and [e for _, e in p["at"].options] == [-1, 39]
    curve, pictures = p["curve"].value, p["pictures"].value
    p["x"].value, p["at"].value = "epoch", -1
    assert p["curve"].value != curve and p["pictures"].value != pictures
    shutil.copytree(RECORDED, tmp_path / "c")
    board.refresh()
    assert board.over and p["head"].value.count("finished") == 3


def test_a_run_that_cannot_be_asked_says_so(tmp_path):
    "Its folder is gone."
    board = live.watch(tmp_path / "gone")
    board.shows.parts["stop"].disabled = False
    board.shows.parts["stop"].click()
    assert "cannot be asked to stop" in parts_of(board)["note"].value


def test_without_a_notebook_a_summary_is_printed(tmp_path):
    "In plain Python: once, and no thread is left."
    shutil.copytree(RECORDED, tmp_path / "run")
    code = "import threading\nfrom alignkit.live import watch\nwatch('run')\nprint(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120, encoding="utf-8")
    first, settings, numbers, threads = done.stdout.splitlines()
    assert first == "run: finished" and settings == "ddpo_is on jpeg_compressibility (kB), pipeline tiny, prompts simple_animals"
    assert numbers.startswith("40 of 40 epochs, reward -1.9 → -1.333, held out -2.288 → -1.514, 2560 queries") and threads == "1"


def test_no_saved_widget_lies_in_a_notebook():
    "Outputs of widgets are dead where no kernel runs, and their state is large: a page keeps pictures."
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        page = json.loads(path.read_text(encoding="utf-8"))
        how = f"{path.name}: delete it (nbconvert: --ExecutePreprocessor.store_widget_state=False, and the view out of the output)"
        assert "widgets" not in page["metadata"], how
        for cell in page["cells"]:
            for output in cell.get("outputs", ()):
                assert not [kind for kind in output.get("data", ()) if "jupyter.widget" in kind], f"{how}: {cell['id']}"


def test_signs_are_silent_about_short_and_strange_histories():
    "Nothing is said of what is not known, and nothing warns."
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert live.signs([], {}) == []
        assert live.signs([dict(epoch=0, reward_mean=1., reward_std=0.3)], {}) == []
        rows = read_run(RECORDED).rows
        for n in range(len(rows)): assert live.signs(rows[:n], read_run(RECORDED).eval_base) == []
