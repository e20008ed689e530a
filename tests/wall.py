"""The wall, over notebooks and tests: how long a line and a cell may be, no ';', no unused name, no widget's state,
no TeX with two backslashes.

`python tests/wall.py [file ...]` lists what breaks it."""
import ast, io, json, re, sys, tokenize
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from pyflakes import messages
from pyflakes.checker import Checker

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, WITH_COMMENT = 140, 160  # of a line of code; of one that ends in a comment
CELL, TRAIN = 40, 60  # lines of an exported cell; of the one that holds a method's `train`
NAMES = (messages.UnusedImport, messages.UnusedVariable, messages.UndefinedName)


class Break(NamedTuple):
    "One place that breaks the wall."
    where: str  # file, cell and line
    kind: str  # 'columns', 'semicolon', 'cell', 'name', 'widget', 'math' or 'syntax'
    what: str

    def __str__(self): return f"{self.where}: {self.what}"


class Cell(NamedTuple):
    "A piece of code: a cell of a notebook, or a whole Python file."
    where: str
    source: str  # without magics
    exported: bool


def without_magics(source):
    "The same lines; those that only IPython reads (%, !) become `pass`."
    if source.lstrip().startswith("%%"): return ""
    return re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.M)


def cells(
    path,  # a notebook or a Python file
    root=ROOT,  # names are given from here
):
    "The code of a file, cell by cell."
    name = str(path.relative_to(root))
    if path.suffix == ".py": return [Cell(name, path.read_text(encoding="utf-8"), False)]
    found = []
    for k, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code": continue
        source = "".join(cell["source"])
        exported = re.search(r"^#\|\s*export\b", source, re.M) is not None
        found.append(Cell(f"{name} [{k}] {cell['id']}", without_magics(source), exported))
    return found


def lines_of(cell):
    "Lines that are too long, and statements that share a line."
    comments, semicolons = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(cell.source).readline):
        if token.type == tokenize.COMMENT: comments[token.start[0]] = token.start[1]
        if token.type == tokenize.OP and token.string == ";": semicolons.add(token.start[0])
    for n, line in enumerate(cell.source.split("\n"), 1):
        after_code = line[:comments.get(n, 0)].strip()
        if len(line) > (WITH_COMMENT if after_code else COLUMNS): yield Break(f"{cell.where}:{n}", "columns", f"{len(line)} columns")
    for n in sorted(semicolons): yield Break(f"{cell.where}:{n}", "semicolon", "';'")


def length_of(cell):
    "An exported cell that is too long; directives (`#|`) do not count."
    n = sum(not line.startswith("#|") for line in cell.source.rstrip("\n").split("\n"))
    most = TRAIN if re.search(r"^def train\(", cell.source, re.M) else CELL
    if cell.exported and n > most: yield Break(cell.where, "cell", f"an exported cell of {n} lines, {most} are allowed")


def names_of(pieces):
    "Names that are never used, or never defined, in the cells of one file read as one program."
    starts, lines = [], []
    for cell in pieces:
        starts.append(len(lines))
        lines += cell.source.split("\n")
    found = Checker(ast.parse("\n".join(lines) + "\n"), builtins={"display", "get_ipython"}).messages
    for m in sorted(found, key=lambda m: m.lineno):
        if not isinstance(m, NAMES): continue
        k = max(k for k, start in enumerate(starts) if start < m.lineno)
        yield Break(f"{pieces[k].where}:{m.lineno - starts[k]}", "name", m.message % m.message_args)


def widgets_in(path, root=ROOT):
    "Widgets that were saved with a notebook: their state is heavy, and without a kernel they show nothing."
    if path.suffix != ".ipynb": return
    nb, name = json.loads(path.read_text(encoding="utf-8")), str(path.relative_to(root))
    if "widgets" in nb["metadata"]: yield Break(name, "widget", "the state of widgets in its metadata")
    for k, cell in enumerate(nb["cells"]):
        kinds = [kind for out in cell.get("outputs", ()) for kind in out.get("data", ())]
        if any("jupyter.widget" in kind for kind in kinds): yield Break(f"{name} [{k}] {cell['id']}", "widget", "a widget as output")


def math_in(path, root=ROOT):
    "Commands of TeX with two backslashes: a line break and a word, where a symbol is meant."
    if path.suffix != ".ipynb": return
    for k, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "markdown": continue
        for formula in re.findall(r"\$[^$\n]+\$", "".join(cell["source"])):
            if word := re.search(r"\\\\[a-zA-Z]{2,}", formula):
                yield Break(f"{path.relative_to(root)} [{k}] {cell['id']}", "math", f"{word[0]!s} in a formula, with two backslashes")


def breaks(
    path,  # a notebook or a Python file
    root=ROOT,
):
    "Everything in one file that breaks the wall."
    pieces = cells(path, root)
    try:
        found = [b for cell in pieces for check in (lines_of, length_of) for b in check(cell)]
        return found + list(names_of(pieces)) + list(widgets_in(path, root)) + list(math_in(path, root))
    except (SyntaxError, tokenize.TokenError) as error: return [Break(str(path.relative_to(root)), "syntax", f"does not parse: {error}")]


def files(root=ROOT):
    "What stands behind the wall: every notebook, every test, the scripts beside them."
    return [p for pattern in ("nbs/*.ipynb", "nbs/*.py", "tests/*.py", "benchmarks/*.py") for p in sorted(root.glob(pattern))]


def main(arguments):
    found = [b for path in [Path(a).resolve() for a in arguments] or files() for b in breaks(path)]
    for b in found: print(b)
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(b.kind for b in found).most_common())
    print(f"the wall: {len(found)} breaks" + f" ({counts})" * bool(found))
    return len(found) > 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
