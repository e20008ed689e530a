"The rules of the house and the wall, on the project as it is; and each of them on a fault that was planted."
import ast, importlib, json
from functools import cache
import pytest
import house, wall
from house import ROOT

HOUSE = house.read()
FILES = wall.files()


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
    "Imports from pages before only, no circle, five tables, methods that know nothing of each other, no private name of another library."
    found = sorted(set(rule(HOUSE)))
    assert not found, f"{rule.__doc__}\n" + "\n".join(map(str, found))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_wall(path):
    "Short lines, one statement a line, short cells, no unused name."
    found = wall.breaks(path)
    assert not found, "\n".join(map(str, found))


def test_every_entry_of_a_table_resolves():
    "What a name of FAMILIES, SAMPLERS, ADVANTAGES, REWARDS or BUILDERS leads to is there, and can be called."
    found = house.tables(HOUSE)
    assert set(found) == set(house.TABLES)
    for table, (home, entries) in found.items():
        assert entries, table
        for name, (module, function) in entries.items():
            assert callable(getattr(importlib.import_module(f"alignkit.{module}"), function)), f"{home}.{table}: {name}"


def test_the_house_in_contributing_is_current():
    "`make house` would change nothing."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert house.with_drawing(text, HOUSE) == text


# ---- each rule sees a fault that is planted in a module of the real house

def planted(module, code):
    "The house with some more code at the end of a module."
    source = (ROOT / "alignkit" / f"{module}.py").read_text(encoding="utf-8")
    return HOUSE._replace(trees={**HOUSE.trees, module: ast.parse(f"{source}\n{code}\n")})


@cache
def before(rule): return set(rule(HOUSE))


def new(rule, module, code):
    "What a rule says of the planted code, and did not say before."
    return [f.what for f in set(rule(planted(module, code))) - before(rule)]


IMPORTS = [  # of the page `evaluate`, which comes later
    "from .evaluate import evaluate",
    "from . import evaluate",
    "from alignkit import evaluate",
    "from alignkit.evaluate import evaluate as e",
    "import alignkit.evaluate",
    "import alignkit.evaluate as e",
    "import alignkit\ndef f(): return alignkit.evaluate.evaluate",
    "import importlib\nm = importlib.import_module('alignkit.evaluate')",
    "from importlib import import_module\nm = import_module('.evaluate', 'alignkit')",
    "m = __import__('alignkit.evaluate')",
]
NESTED = {
    "top": "{}",
    "function": "def f():\n    {}",
    "method": "class A:\n    def f(self):\n        if self:\n            {}",
    "try": "try:\n    {}\nexcept ImportError: pass",
}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("code", IMPORTS)
def test_an_import_of_a_later_page_is_seen(code, nested):
    "Late imports and imports by name are imports."
    indent = " " * (len(nested.split("{}")[0]) - len(nested.split("{}")[0].rstrip(" ")))
    code = nested.replace("{}", code.replace("\n", "\n" + indent))
    assert new(house.upward, "prompts", code) == ["prompts imports evaluate, which is no page before it"]


def test_a_page_that_imports_itself_is_seen():
    assert new(house.upward, "prompts", "from alignkit import prompts") == ["prompts imports prompts, which is no page before it"]


@pytest.mark.parametrize("module", ["prompts", "pipelines"])
def test_a_circle_is_seen(module):
    "Short or long: rewards stands on both."
    ring, *_ = new(house.circles, module, "def f():\n    from .rewards import score")
    assert {module, "rewards"} <= set(ring.removeprefix("a circle: ").split(" -> "))


PLANTS = [
    (house.twice, "mdp", "def walk(): pass", "mdp defines walk twice"),
    (house.bad_tables, "mdp", "REWARDS = {'x': 'mdp:draw'}", "REWARDS stands in 2 modules"),
    (house.bad_tables, "mdp", "REWARDS['x'] = 'mdp:draw'", "REWARDS is changed after it was written"),
    (house.bad_tables, "mdp", "SAMPLERS |= {}", "SAMPLERS is changed after it was written"),
    (house.bad_tables, "mdp", "from alignkit import rewards\nrewards.REWARDS.update(x=1)", "REWARDS is changed after it was written"),
    (house.bad_tables, "mdp", "SAMPLERS = dict(x='mdp:draw')", "SAMPLERS is no dict that is written out"),
    (house.bad_tables, "mdp", "SAMPLERS = {'x': 'nowhere:draw'}", "SAMPLERS: 'x' does not lead to"),
    (house.bad_tables, "mdp", "SAMPLERS:dict = {'x': draw}", "SAMPLERS: 'x' does not lead to"),
    (house.bad_tables, "mdp", "SAMPLERS = {**OTHERS}", "SAMPLERS: OTHERS does not lead to"),
    (house.later_names, "mdp", "LAZY = {'x': 'evaluate:evaluate'}", "'evaluate:evaluate' names the later page evaluate"),
    (house.later_names, "mdp", "def f(): return 'alignkit.evaluate:mix'", "names the later page evaluate"),
    (house.later_names, "mdp", "def f(name): return f'alignkit.evaluate.{name}'", "names the later page evaluate"),
    (house.method_names, "runs", "def f(cfg): return cfg.method == 'rwr'", "runs names a method: 'rwr'"),
    (house.method_names, "runs", "x = ('softmax', 'ddpo_is')", "runs names a method: 'ddpo_is'"),
    (house.method_names, "memory", "class AlignPropPlan: pass", "memory names a method: AlignPropPlan"),
    (house.method_names, "memory", "def f(cfg): return cfg.ddpo", "memory names a method: ddpo"),
    (house.method_names, "rewards", "def f(): raise ValueError('AlignProp needs a gradient')", "rewards names a method: 'AlignProp'"),
    (house.method_names, "mdp", "from alignkit.ddpo import train as t", "mdp names a method: ddpo"),
    (house.method_to_method, "alignprop", "def f():\n    from .ddpo import train", "alignprop imports the method ddpo"),
    (house.method_to_method, "ddpo", "from alignkit import rwr", "ddpo imports the method rwr"),
    (house.private_names, "mdp", "from torch._subclasses import Fake", "mdp touches the private torch._subclasses.Fake"),
    (house.private_names, "mdp", "def f():\n    import torch._dynamo", "mdp touches the private torch._dynamo"),
    (house.private_names, "mdp", "from diffusers.training_utils import _x", "mdp touches the private diffusers.training_utils._x"),
    (house.private_names, "mdp", "import torch as t\nx = t._C._get_x()", "mdp touches the private t._C"),
    (house.private_names, "mdp", "def f(pipe): return pipe._execution_device", "mdp touches the private pipe._execution_device"),
    (house.private_names, "mdp", "def f(net): return getattr(net, '_orig_mod', net)", "mdp touches the private net._orig_mod"),
    (house.private_names, "mdp", "def f(net): net._hook_of_mine = 1", "mdp touches the private net._hook_of_mine"),
]


@pytest.mark.parametrize("rule, module, code, words", PLANTS, ids=[f"{rule.__name__}-{k}" for k, (rule, *_) in enumerate(PLANTS)])
def test_a_planted_fault_is_seen(rule, module, code, words):
    assert any(words in what for what in new(rule, module, code)), new(rule, module, code)


FREE = [
    (house.upward, "prompts", "import alignkit\nx = alignkit.__version__"),
    (house.upward, "curves", "def f():\n    from alignkit import pipelines"),
    (house.later_names, "evaluate", "x = 'alignkit.pipelines'"),
    (house.later_names, "prompts", "x = 'evaluate: how good it is'"),
    (house.method_names, "runs", "def f():\n    'As in DDPO.'\n    # ddpo\n    return 'ddpo-pytorch'"),
    (house.method_names, "runs", "def overwrite(rewritten): return rewritten"),
    (house.method_names, "evaluate", "x = 'ddpo_is'"),
    (house.private_names, "mdp", "import os\ndef f(pair): return pair._replace(a=1), os._exit"),
    (house.private_names, "mdp", "class A:\n    def __init__(self): self._mine = 1\n    def f(self): return self._mine"),
    (house.private_names, "mdp", "from torch import cat as _cat\nx = __name__"),
]


@pytest.mark.parametrize("rule, module, code", FREE, ids=[f"{rule.__name__}-{k}" for k, (rule, *_) in enumerate(FREE)])
def test_what_is_free_is_not_reported(rule, module, code):
    assert new(rule, module, code) == []


def test_private_names_are_free_in_their_own_page():
    "`fast` and `compat` may touch them, whoever else may not."
    code = ast.parse("from torch._subclasses import FakeTensorMode")
    inside, outside = (HOUSE._replace(pages={**HOUSE.pages, m: m}, trees={**HOUSE.trees, m: code}) for m in ("compat", "elsewhere"))
    assert set(house.private_names(inside)) <= before(house.private_names)
    assert len(set(house.private_names(outside)) - before(house.private_names)) == 1


# ---- a small house in a folder of its own: read, drawn, behind the wall

def notebook(path, *sources):
    "A notebook of code cells."
    cells = [dict(cell_type="code", id=f"c{k}", metadata={}, outputs=[], execution_count=None, source=s) for k, s in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def small_house(folder, **modules):
    "Pages 05_a, 05a_b, 06_c, ...: their order is that of the notebooks' names, not of the modules'."
    (folder / "alignkit").mkdir()
    for name, module in zip(("05_{}", "05a_{}", "06_{}"), modules):
        notebook(folder / "nbs" / f"{name.format(module)}.ipynb", f"#| default_exp {module}")
        (folder / "alignkit" / f"{module}.py").write_text(modules[module])
    return house.read(folder)


def test_the_order_is_that_of_the_notebooks(tmp_path):
    small = small_house(tmp_path, rewards="", clip="from .rewards import x", runs="from .clip import y\nfrom .rewards import x")
    assert list(small.pages) == ["rewards", "clip", "runs"]
    assert [*house.upward(small), *house.circles(small)] == []
    text = house.drawing(small)
    assert [line.strip() for line in text.splitlines() if "-->" in line] == ["rewards --> clip", "clip --> runs"]
    page = f"before\n{house.BEGIN}\nold\n{house.END}\nafter"
    assert house.with_drawing(page, small) == f"before\n{house.BEGIN}\n{text}\n{house.END}\nafter"


def test_a_house_with_an_arrow_up_is_not_drawn(tmp_path):
    small = small_house(tmp_path, rewards="def f():\n    from alignkit import runs", clip="", runs="from .rewards import f")
    with pytest.raises(ValueError, match="rewards imports runs"): house.drawing(small)
    with pytest.raises(ValueError, match="a circle: rewards -> runs -> rewards"): house.drawing(small)


WALL = [  # cells, kind of the break, where it is
    (["x = '{}'".format("a" * 135)], "columns", "nbs/a.ipynb [0] c0:1"),
    (["x = 1", "#| export\ny = 1\nz = '{}'  # {}".format("a" * 100, "b" * 60)], "columns", "nbs/a.ipynb [1] c1:3"),
    (["# " + "a" * 139], "columns", "nbs/a.ipynb [0] c0:1"),
    (["x = 1\ny = 2; z = 3"], "semicolon", "nbs/a.ipynb [0] c0:2"),
    (["[1].sort();"], "semicolon", "nbs/a.ipynb [0] c0:1"),
    (["#| export\nx = 0\n" + "x += 1\n" * 40], "cell", "nbs/a.ipynb [0] c0"),
    (["#| export\ndef train(\n    a,\n): pass\n" + "x = 1\n" * 58], "cell", "nbs/a.ipynb [0] c0"),
    (["import os, sys", "sys.exit()"], "name", "nbs/a.ipynb [0] c0:1"),
    (["def f():\n    unused = 1\n    return 2"], "name", "nbs/a.ipynb [0] c0:2"),
    (["x = 1", "y = undefined_name"], "name", "nbs/a.ipynb [1] c1:1"),
    (["x = ("], "syntax", "nbs/a.ipynb"),
]


@pytest.mark.parametrize("sources, kind, where", WALL, ids=[f"{kind}-{k}" for k, (_, kind, _) in enumerate(WALL)])
def test_what_breaks_the_wall_is_seen(tmp_path, sources, kind, where):
    found = wall.breaks(notebook(tmp_path / "nbs" / "a.ipynb", *sources), tmp_path)
    assert [(b.kind, b.where) for b in found] == [(kind, where)]


def test_math_with_two_backslashes_is_seen(tmp_path):
    "A line break of an array is none."
    path = notebook(tmp_path / "nbs" / "a.ipynb", "1", "2")
    nb = json.loads(path.read_text())
    texts = r"a $\\eta$ too many", r"$\begin{aligned}a&=b\\ c&=\eta\end{aligned}$ and $x$"
    nb["cells"] = [dict(cell_type="markdown", id=f"c{k}", metadata={}, source=text) for k, text in enumerate(texts)]
    path.write_text(json.dumps(nb))
    assert [(b.kind, b.where) for b in wall.breaks(path, tmp_path)] == [("math", "nbs/a.ipynb [0] c0")]


def test_a_saved_widget_is_seen(tmp_path):
    "As JupyterLab saves a board: a view as output, and its state in the notebook's metadata, which `nbdev_clean` leaves there."
    path = notebook(tmp_path / "nbs" / "a.ipynb", "1", "2")
    nb = json.loads(path.read_text())
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    view = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"}
    nb["cells"][1]["outputs"] = [dict(output_type="display_data", metadata={}, data=view)]
    path.write_text(json.dumps(nb))
    assert [(b.kind, b.where) for b in wall.breaks(path, tmp_path)] == [("widget", "nbs/a.ipynb"), ("widget", "nbs/a.ipynb [1] c1")]


def test_what_stands_behind_the_wall(tmp_path):
    "Lines at the limit, a docment past it, a long cell that is not exported, magics, semicolons in text, names used in a later cell."
    cells = [
        "x = '{}'".format("a" * 134),
        "y = 1  # " + "b" * 151,
        "x = 0\n" + "x += 1\n" * 50,
        "%matplotlib inline\n!ls; pwd\nx = 'a; b'  # c; d",
        "import os",
        "#| export\n" + "os.sep\n" * 40,
        "#| export\ndef train(a): pass\n" + "os.sep\n" * 59,
        "%%bash\nls; pwd",
        "display(os.sep)",
    ]
    assert wall.breaks(notebook(tmp_path / "nbs" / "a.ipynb", *cells), tmp_path) == []


LINES = {"name": "import os\n", "semicolon": "x = 1; y = 2\n", "columns": "x = '{}'\n".format("a" * 140)}


@pytest.mark.parametrize("kind, code", LINES.items(), ids=LINES)
def test_a_test_stands_behind_the_wall_too(tmp_path, kind, code):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(code)
    path, = wall.files(tmp_path)
    assert [b.kind for b in wall.breaks(path, tmp_path)] == [kind]
