"""Boards in a real JupyterLab, looked at by a real browser: a run of this kernel and one of another process are watched and stopped.

`python tests/browser.py FOLDER` leaves its screenshots in a folder. Needs jupyterlab, playwright and a chromium; see `make browser`."""
import io, json, os, re, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import ipywidgets
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from alignkit import live  # this checkout's
PATIENCE = 120_000  # milliseconds
CFG = """DDPOConfig(num_epochs=60, samples_per_epoch=16, sample_batch_size=16, updates_per_epoch=2, num_inference_steps=4, progress=False,
                   micro_batch_size=32, fast='onednn', {more})"""
JUDGED = "eval_every=1, eval_samples=16, eval_rewards=('clip_named',)"
OTHER = f"""
from alignkit.ddpo import DDPOConfig, train
cfg = {CFG.format(more=JUDGED)}
print(train(cfg=cfg, out="runs/other").stopped)
"""
CELLS = dict(
    imports="""
import os, warnings
from alignkit.ddpo import DDPOConfig, train
from alignkit.live import compare, watch
warnings.simplefilter("ignore")""",
    watch="""
watch("runs/other", refresh=0.5)""",
    live=f"""
run = train(cfg={CFG.format(more=JUDGED + ", seed=1, learning_rate=1e-3")}, out="runs/mine", live=True)
print("handed back:", run.stopped)""",
    alone=f"""
alone = train(cfg={CFG.format(more="seed=1")}, live=True)
print("handed back:", alone.stopped)""",
    interrupted=f"""
mine = train(cfg={CFG.format(more="seed=2")}, live=True)
print("handed back:", mine.stopped)""",
    compare="""
compare("runs/other", "runs/mine")""",
)


def notebook(path):
    "The cells above, none of them run."
    cells = [dict(cell_type="code", id=name, metadata={}, outputs=[], execution_count=None, source=s.strip()) for name, s in CELLS.items()]
    kernel = dict(name="python3", display_name="python3", language="python")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)), encoding="utf-8")


def environment(home):
    "One thread a process, this checkout's alignkit, and the widgets of wherever ipywidgets is installed."
    widgets = Path(ipywidgets.__file__).parents[4] / "share" / "jupyter"
    paths = {"PYTHONPATH": str(ROOT), "JUPYTER_PATH": str(widgets), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", **paths}


@contextmanager
def started(command, log, **how):
    "A process that is stopped at the end, whatever happened."
    with open(log, "w", encoding="utf-8") as out: process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **how)
    try: yield process
    finally:
        if process.poll() is None: process.send_signal(signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


@contextmanager
def jupyterlab(folder, env):
    "A server of a folder; its port."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    with started([sys.executable, "-m", "jupyterlab", *options], folder / "server.log", env=env, cwd=folder) as server:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t")
                break
            except OSError: time.sleep(0.25)
        if server.poll() is not None: raise RuntimeError((folder / "server.log").read_text(encoding="utf-8"))
        yield port


@contextmanager
def opened(port, name, shots):
    "The notebook in a browser, its kernel connected; on a failure what it shows is kept."
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, headless=True, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=dict(width=1560, height=1700))
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/{name}?reset&token=t")
        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
        page.evaluate("""async () => {
            const app = window.jupyterapp
            await app.restored
            const context = app.shell.currentWidget.sessionContext
            await context.ready
            await context.session.kernel.info
        }""")
        page.add_style_tag(content=".Toastify { display: none }")  # JupyterLab asks whether one wants its news
        try: yield page
        except BaseException:
            page.screenshot(path=shots / "failed.png")
            raise
        finally: browser.close()


class Cell:
    "A cell of the open notebook."
    def __init__(self, page, name): self.page, self.n = page, list(CELLS).index(name)
    @property
    def where(self): return self.page.locator(".jp-Notebook .jp-Cell").nth(self.n)
    def part(self, name): return self.where.locator(f".alignkit-{name}")

    def run(self):
        "Asked of the application itself; does not wait."
        self.page.evaluate("""n => {
            const app = window.jupyterapp, notebook = app.shell.currentWidget.content
            notebook.activeCellIndex = n
            notebook.deselectAll()
            app.commands.execute('notebook:run-cell')
        }""", self.n)
        return self

    def wait(self, words, where=".jp-OutputArea", no=False):
        "Until the output has these words."
        found = self.where.locator(where).filter(has_text=words)
        found.first.wait_for(state="visible")
        return self

    def done(self):
        self.page.wait_for_function("""n => {
            const prompt = document.querySelectorAll('.jp-Notebook .jp-Cell')[n].querySelector('.jp-InputPrompt')
            return /\\[\\d+\\]/.test(prompt.innerText)
        }""", arg=self.n)
        return self

    def busy(self): return "[*]" in self.where.locator(".jp-InputPrompt").inner_text()
    def picture(self, name): return self.part(name).get_attribute("src")

    def changed(self, name, before):
        "Until another picture is there."
        self.page.wait_for_function("""([n, name, before]) => {
            const shown = document.querySelectorAll('.jp-Notebook .jp-Cell')[n].querySelector('.alignkit-' + name)
            return shown && shown.src && shown.src != before
        }""", arg=[self.n, name, before])

    def slide(self, key):
        "The slider, by its keys."
        self.part("at").locator(".noUi-handle").focus()
        self.page.keyboard.press(key)

    def bytes(self, name):
        "Of a picture, as the browser has it."
        code = "async src => [...new Uint8Array(await (await fetch(src)).arrayBuffer())]"
        return bytes(self.page.evaluate(code, self.picture(name)))

    def back_to_first(self, folder=None):
        "The slider followed the run; the first epoch has other pictures, to the byte those that its folder gives."
        self.wait(re.compile("epoch [2-9]"), ".alignkit-at")
        before = self.picture("pictures")
        self.slide("Home")
        self.wait("epoch 0", ".alignkit-at")
        if folder is None: return self.changed("pictures", before)
        wanted, end = io.BytesIO(), time.time() + PATIENCE / 1000
        live.pictures(live.look(folder), 0).save(wanted, "png")
        while self.bytes("pictures") != wanted.getvalue():
            assert time.time() < end, "the pictures of epoch 0 did not come"
            time.sleep(0.1)

    def shot(self, file):
        self.where.scroll_into_view_if_needed()
        self.where.locator(".jp-OutputArea").first.screenshot(path=file)


def whole(cell, *names):
    "Every picture of a board is there, and as large as it should be; its slider and head too."
    for name in names:
        cell.part(name).wait_for(state="visible")
        size = cell.page.evaluate("""([n, name]) => {
            const p = document.querySelectorAll('.jp-Notebook .jp-Cell')[n].querySelector('.alignkit-' + name)
            return [p.naturalWidth, p.clientWidth, p.parentElement.clientWidth]
        }""", [cell.n, name])
        assert size[0] > 300 and 250 < size[1] <= size[2] + 1, (name, size)


def stopped(folder):
    "What the history says of a run that was asked to stop."
    epochs = len((folder / "history.csv").read_text(encoding="utf-8").splitlines()) - 1
    assert 1 <= epochs < 60, epochs
    assert not (folder / "stop").exists() and not (folder / "lock").exists()
    return epochs


def of_another_process(page, folder, other, shots):
    "A run of another process is watched, browsed and stopped, while this kernel is free."
    cell = Cell(page, "watch").run()
    cell.wait("running, process").wait("3 of 60 epochs")
    whole(cell, "curve", "panels", "pictures", "spread")
    cell.shot(shots / "1_watch_running.png")
    cell.back_to_first(folder / "runs" / "other")
    cell.shot(shots / "2_watch_first_epoch.png")
    cell.part("stop").click()
    cell.wait("asked to stop after this epoch", ".alignkit-stop")
    assert other.wait(60) == 0
    cell.wait("stopped, before its last epoch")
    print(f"another process: stopped after {stopped(folder / 'runs' / 'other')} epochs")


def of_this_kernel(page, folder, shots):
    "While its cell runs, a training is browsed and stopped."
    cell = Cell(page, "live").run()
    cell.wait("running, in this process").wait("3 of 60 epochs")
    whole(cell, "curve", "panels", "pictures", "spread")
    cell.back_to_first(folder / "runs" / "mine")
    assert cell.busy()  # all of this while the kernel runs the cell
    cell.shot(shots / "3_live_running.png")
    cell.part("stop").click()
    cell.wait("asked to stop after this epoch", ".alignkit-stop")
    assert cell.busy()
    cell.wait("handed back: stopped after epoch").done().wait("stopped, after epoch")
    cell.shot(shots / "4_live_stopped.png")
    print(f"this kernel: stopped after {stopped(folder / 'runs' / 'mine')} epochs")


def without_a_folder(page, shots):
    "The pictures come from the run itself."
    cell = Cell(page, "alone").run()
    cell.wait("3 of 60 epochs")
    whole(cell, "curve", "panels", "pictures", "spread")
    cell.back_to_first()
    assert cell.busy()
    cell.part("stop").click()
    cell.wait("handed back: stopped after epoch").done()
    cell.shot(shots / "5_live_without_folder.png")
    print("this kernel, no folder: stopped")


def interrupted(page, shots):
    "What works in every front end: the cell is interrupted, and the run handed back."
    cell = Cell(page, "interrupted").run()
    cell.wait("2 of 60 epochs")
    page.evaluate("window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    cell.wait("handed back: interrupted in epoch").done().wait("stopped, interrupted in epoch")
    print("this kernel: interrupted")


def of_two(page, shots):
    "Curves of two runs, by another axis; pictures of another epoch."
    cell = Cell(page, "compare").run().done()
    whole(cell, "curve", "pictures")
    before = cell.picture("curve")
    cell.part("x").get_by_text("queries").click()
    cell.changed("curve", before)
    before = cell.picture("pictures")
    cell.slide("Home")
    cell.changed("pictures", before)
    cell.shot(shots / "6_compare.png")
    print("two runs: compared")


def main(shots):
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = Path(scratch) / "work", Path(scratch) / "home"
        folder.mkdir()
        home.mkdir()
        env = environment(home)
        notebook(folder / "live.ipynb")
        with jupyterlab(folder, env) as port, opened(port, "live.ipynb", shots) as page:
            Cell(page, "imports").run().done()
            with started([sys.executable, "-c", OTHER], shots / "other.log", env=env, cwd=folder) as other:
                of_another_process(page, folder, other, shots)
            of_this_kernel(page, folder, shots)
            without_a_folder(page, shots)
            interrupted(page, shots)
            of_two(page, shots)
            page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
            page.screenshot(path=shots / "7_page.png")
    print(f"screenshots in {shots}")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
