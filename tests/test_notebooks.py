"Every notebook runs top to bottom on one thread, offline, in a process of its own; those that compare floats on plainer kernels too."
import multiprocessing, os, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# torch's, oneDNN's and MKL's plainest kernels: other widths of vectors, hence other orders of summation, than the processor's own
PLAIN = dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_CBWR="COMPATIBLE")
FLOATS = ["02_mdp", "03_logprob"]
# imported once, by a server that knows nothing else, and from there in every process that it forks: four seconds a page
SHARED = ["torch", "pandas", "matplotlib.pyplot", "peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "nbdev.test"]


def run(notebook):
    "No cell fails; cells flagged slow or cuda are left out."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    os.chdir(ROOT)
    return test_nb(Path(notebook), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)[0]


def _forked(notebook, log):
    with open(log, "w") as out:
        for fd in (1, 2): os.dup2(out.fileno(), fd)
        sys.exit(not run(notebook))


def test_there_are_notebooks():
    "The list below is not empty."
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook_runs(notebook, tmp_path):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(SHARED)
    child = server.Process(target=_forked, args=(str(notebook), str(tmp_path / "log")))
    child.start()
    child.join(600)
    if child.exitcode is None: child.kill()
    assert child.exitcode == 0, (tmp_path / "log").read_text()[-4000:]


@pytest.mark.parametrize("name", FLOATS)
def test_notebook_runs_as_another_processor_rounds(name):
    "A check that passes on one processor's rounding only is no check of the code: these pages hold with the plainest kernels too."
    code = f"import sys, test_notebooks as t\nsys.exit(not t.run(t.ROOT / 'nbs' / '{name}.ipynb'))"
    there = dict(cwd=ROOT / "tests", env={**os.environ, **PLAIN})  # kernels are chosen when torch is imported
    done = subprocess.run([sys.executable, "-c", code], **there, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
