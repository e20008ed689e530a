"""Every number of the reproduction from `data/runs`: the verdicts, the tables of 12_curves and of the README, the numbers in 12's prose.

`make verify-claims` runs it; `python tests/test_verify_claims.py` writes data/verdicts.csv anew."""
import json, os, re, sys
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from alignkit.claims import verdicts
from alignkit.pipelines import data_dir

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NBS, FILE = ROOT / "nbs", data_dir() / "verdicts.csv"
PROSE = tomllib.loads((ROOT / "tests" / "prose.toml").read_text(encoding="utf-8"))
NUMBERS = ("mean", "low", "high", "low_prompts", "high_prompts")
FIRST, LAST = "## Claim by claim", "## Run it again"  # of 12_curves: its results begin, and what trains
ASK = """
import json, re
def worked_out(m):
    value, _, how = m[1].partition("!:")
    return format(eval(value), how.strip())
print(json.dumps([[re.sub("<<(.*?)>>", worked_out, s["phrase"]), bool(eval(s.get("holds", "True")))] for s in {said!r}]))
"""


def text_of(output):
    "What a reader reads of an output: not where an object lies, nor a picture."
    shown = output.get("text") or output.get("data", {}).get("text/markdown") or output.get("data", {}).get("text/plain") or ""
    return re.sub(r" at 0x[0-9a-f]+", "", "".join(shown)) if output.get("data", {}).get("image/png") is None else ""


def texts_of(outputs): return "".join(map(text_of, outputs))  # a kernel may hand over what is printed in pieces


def run(cells):
    "These cells in a fresh kernel; their outputs."
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ALIGNKIT_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(NBS)}}).execute(env=environment)
    return [c.outputs for c in book.cells]


def page(name): return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


@pytest.fixture(scope="module")
def curves():
    "The cells of 12_curves up to what trains, as they are stored; their outputs now; and the prose that is worked out now."
    cells = page("12_curves")
    cells = cells[:next(k for k, c in enumerate(cells) if source(c).startswith(LAST))]
    code = [c for c in cells if c["cell_type"] == "code" and "#| cuda" not in source(c)]
    outputs = run([*map(source, code), PROSE["functions"], ASK.format(said=PROSE["said"])])
    return cells, list(zip(code, outputs)), json.loads(text_of(outputs[-1][0]))


def differing(pairs): return [f"{a} | {b}" for a, b in pairs if a != b]


def test_the_verdicts_are_those_of_the_runs():
    now, then = verdicts(), pd.read_csv(FILE, keep_default_na=False, na_values=dict.fromkeys(NUMBERS, ""))
    assert list(now.columns) == list(then.columns) and len(now) == len(then)
    for column in ("claim", "test", "decides", "fresh", "missing", "seeds", "verdict"):
        assert not differing(zip(now[column], then[column])), f"{column}: python tests/test_verify_claims.py writes {FILE.name} anew"
    for a, b in zip(now.d, then.d.astype(str)):
        assert list(map(float, a.split())) == pytest.approx(list(map(float, b.split())), rel=2e-3)  # three digits are written
    for column in NUMBERS:
        assert list(now[column]) == pytest.approx(list(then[column].astype(float)), rel=1e-6, abs=1e-9, nan_ok=True), column


def test_every_output_of_the_page_is_that_of_the_runs(curves):
    for cell, outputs in curves[1]:
        stored, now = texts_of(cell["outputs"]), texts_of(outputs)
        assert stored == now, f"12_curves, cell {cell['id']}: what is stored is not what the runs give; execute the page"


def test_every_number_in_the_prose_is_worked_out(curves):
    cells, _, said = curves
    texts = [source(c) for c in cells if c["cell_type"] == "markdown"]
    first = next(k for k, t in enumerate(texts) if t.startswith(FIRST))
    prose = "\n\n".join(texts[first:])
    for phrase, holds in said:
        assert phrase in prose, f"12_curves does not say, and by the runs it should: {phrase}"
        assert holds, f"12_curves says, and the runs do not: {phrase}"
    for phrase in [*(p for p, _ in said), *PROSE["told"]]:
        assert phrase in prose, phrase
        prose = prose.replace(phrase, " ")
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|\[\d\d\w*_\w+|d_s|\$K=1\$", " ", prose)
    left = re.findall(r"[^.\n]*\b\d[\d.,]*\b[^.\n]*", plain)
    assert not left, f"numbers in the prose of 12_curves that nothing works out (tests/prose.toml): {left}"


def test_the_readme_has_the_same_table():
    cells = page("index")
    asked = [c for c in cells if c["cell_type"] == "code" and ("table()" in source(c) or "result_table(" in source(c))]
    needed = [c for c in cells if c["cell_type"] == "code" and re.search(r"^def as_table|^rewards = |^shown = ", source(c), re.M)]
    outputs = run([source(cells[1]), *map(source, needed), *map(source, asked)])[1 + len(needed):]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for cell, now in zip(asked, outputs):
        stored, now = texts_of(cell["outputs"]), texts_of(now)
        assert stored == now, f"index, cell {cell['id']}: what is stored is not what the runs give; execute the page"
        for row in now.splitlines():
            cells_of_row = [x.strip() for x in re.sub(r"\]\([^)]*\)", "]", row).split("|") if x.strip(" -:")]
            for words in cells_of_row: assert words in re.sub(r"\]\([^)]*\)", "]", readme), f"README: {words}"


if __name__ == "__main__": verdicts().to_csv(FILE, index=False)
