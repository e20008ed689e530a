"""The house: which page imports which, read from the sources without running them, and whether the rules of the house are kept.

`python tests/house.py` draws it into CONTRIBUTING.md."""
import ast, json, re, sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("FAMILIES", "SAMPLERS", "ADVANTAGES", "REWARDS", "BUILDERS")  # name -> "module:function", the only way to a later page
FOREIGN = ("torch", "peft", "diffusers", "accelerate")  # their private names are touched in INNER only
INNER = ("fast", "compat")
PUBLIC_ALL_THE_SAME = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}  # of a namedtuple, documented as public


class Fault(NamedTuple):
    "One place that breaks a rule of the house."
    module: str
    line: int
    what: str

    def __str__(self): return f"alignkit/{self.module}.py:{self.line}: {self.what}"


class House(NamedTuple):
    "What the rules look at."
    pages: dict  # module -> the name of its notebook, in reading order
    trees: dict  # module -> its syntax tree

    def before(self, module): return list(self.pages)[:list(self.pages).index(module)]


def read(root=ROOT):
    "The house in a folder: its notebooks give the order, the modules the code."
    pages = {}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        for module in re.findall(r"^#\|\s*default_exp\s+(\w+)", code, re.M): pages[module] = path.stem
    return House(pages, {m: ast.parse((root / "alignkit" / f"{m}.py").read_text(encoding="utf-8")) for m in pages})


@cache
def walk(tree): return list(ast.walk(tree))


def literal(node):
    "The text of a string in the code; '' for anything else."
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def dotted(node):
    "The names of `a.b.c`, outermost first; none where it does not begin with a plain name."
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


# ---- rule 1: a module imports from pages before it

def path_by_name(call):
    "The path in `importlib.import_module('alignkit.x')`, `import_module('.x', 'alignkit')` or `__import__('alignkit.x')`."
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("import_module", "__import__") or not call.args: return ""
    path = literal(call.args[0])
    return "alignkit" + path if path.startswith(".") else path


def imported(
    node,  # of a syntax tree
    modules,  # of the kit
):
    "The modules of the kit that one node brings in, whichever way it is written."
    paths = []
    if isinstance(node, ast.Import): paths = [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        base = [*["alignkit"] * bool(node.level), *filter(None, [node.module])]
        paths = [".".join([*base, a.name]) for a in node.names]
    if isinstance(node, ast.Attribute): paths = [".".join(dotted(node))]
    if isinstance(node, ast.Call): paths = [path_by_name(node)]
    parts = [path.split(".") for path in paths]
    return [p[1] for p in parts if p[0] == "alignkit" and len(p) > 1 and p[1] in modules]


def arrows(house):
    "Module -> {module that it imports: line}, late imports included."
    found = {}
    for module, tree in house.trees.items():
        found[module] = lines = {}
        for node in walk(tree):
            for other in imported(node, house.pages): lines[other] = min(node.lineno, lines.get(other, node.lineno))
    return found


def upward(house):
    "Imports of a page that does not stand before the one that imports it."
    for module, others in arrows(house).items():
        for other in sorted(set(others) - set(house.before(module))):
            yield Fault(module, others[other], f"{module} imports {other}, which is no page before it")


def circles(house):
    "Modules that import each other in a ring, each ring once."
    graph, seen = arrows(house), set()

    def follow(path, visited):
        for other in graph[path[-1]]:
            if other in path: yield [*path[path.index(other):], other]
            elif other not in visited:
                visited.add(other)
                yield from follow([*path, other], visited)

    for module in graph:
        for ring in follow([module], {module}):
            if frozenset(ring) not in seen: yield Fault(ring[0], graph[ring[0]][ring[1]], "a circle: " + " -> ".join(ring))
            seen.add(frozenset(ring))


# ---- rule 2: later pages are reached through five tables

def written(tree):
    "The tables that are written at the top of a module: (name, value, place)."
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and target.id in TABLES: yield target.id, node.value, node.lineno


def changed(tree):
    "Places where a table changes after it was written: `REWARDS['x'] = ...`, `REWARDS |= ...`, `REWARDS.update(...)`."
    for node in walk(tree):
        target = None
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load): target = node.value
        if isinstance(node, ast.AugAssign): target = node.target
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("update", "setdefault"):
            target = node.func.value
        if target is not None and (dotted(target) or [""])[-1] in TABLES: yield dotted(target)[-1], node.lineno


def entries(value):
    "The pairs of a dict that is written out: (key node, value node)."
    return list(zip(value.keys, value.values)) if isinstance(value, ast.Dict) else []


def target(text):
    "(module, function) of 'module:function' or 'alignkit.module:function', else None."
    found = re.fullmatch(r"(?:alignkit\.)?(\w+):(\w+)", text)
    return found and found.groups()


def tables(house):
    "Table -> (the module in which it stands, {name: (module, function)})."
    found = {}
    for module, tree in house.trees.items():
        for name, value, _ in written(tree): found[name] = module, {literal(k): target(literal(v)) for k, v in entries(value)}
    return found


def bad_tables(house):
    "A table that is missing, stands twice, is no dict of 'module:function', or is changed after it was written."
    homes = {name: [] for name in TABLES}
    for module, tree in house.trees.items():
        for name, value, line in written(tree):
            homes[name].append(module)
            if not entries(value): yield Fault(module, line, f"{name} is no dict that is written out")
            for k, v in entries(value):
                leads = target(literal(v))
                if not (literal(k) and leads and leads[0] in house.pages):
                    yield Fault(module, v.lineno, f"{name}: {ast.unparse(k or v)} does not lead to a 'module:function' of the kit")
        for name, line in changed(tree): yield Fault(module, line, f"{name} is changed after it was written")
    for name, where in homes.items():
        if len(where) != 1: yield Fault((where or ["*"])[-1], 0, f"{name} stands in {len(where)} modules, and should in one")


def code_strings(tree):
    "Every string of the code, docstrings left out."
    prose = {id(node.value) for node in walk(tree) if isinstance(node, ast.Expr)}
    return [node for node in walk(tree) if literal(node) and id(node) not in prose]


def later_names(house):
    "Strings that name a later page ('alignkit.x', 'x:y') and stand in none of the tables."
    for module, tree in house.trees.items():
        in_tables = {id(v) for _, value, _ in written(tree) for _, v in entries(value)}
        later = set(house.pages) - {module, *house.before(module)}
        for node in code_strings(tree):
            if id(node) in in_tables: continue
            named = {*re.findall(r"\balignkit\.(\w+)", node.value), *(target(node.value) or ())[:1]}
            for other in sorted(named & later): yield Fault(module, node.lineno, f"{node.value[:60]!r} names the later page {other}")


# ---- rule 4: methods know nothing of each other, and the ground they share knows no method

def methods(house):
    "The pages that hold a method: their module has a `train` of its own."
    has_train = lambda tree: any(isinstance(n, ast.FunctionDef) and n.name == "train" for n in tree.body)
    return [m for m, tree in house.trees.items() if has_train(tree)]


def identifiers(tree):
    "Every name in the code with its node: variables, attributes, arguments, keywords, imports, definitions."
    for node in walk(tree):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname", "module")]
        for name in filter(None, names):
            if isinstance(name, str): yield from ((part, node) for part in name.split("."))


def method_names(house):
    "A method's name in the code of a page that is no method and stands before the last of them. Docstrings and comments are free."
    found = methods(house)
    base = [m for m in house.before(found[-1]) if m not in found] if found else []
    names = "|".join(found)
    in_text = re.compile(rf"(?<![\w-])(?:{names})(?:_\w+)?(?![\w-])", re.I)  # 'ddpo', 'ddpo_is'; not the project 'ddpo-pytorch'
    in_name = re.compile(rf"(?:^|_)(?i:{names})(?=$|[_\dA-Z])")  # DDPOConfig, _plan_ddpo; not overwrite
    for module in base:
        tree = house.trees[module]
        for name, node in identifiers(tree):
            if in_name.search(name): yield Fault(module, node.lineno, f"{module} names a method: {name}")
        for node in code_strings(tree):
            text = in_text.search(node.value)
            if text: yield Fault(module, node.lineno, f"{module} names a method: {text[0]!r} in {node.value[:50]!r}")


def method_to_method(house):
    "Imports from one method to another."
    found, graph = methods(house), arrows(house)
    for module in found:
        for other in sorted(set(graph[module]) & set(found)):
            yield Fault(module, graph[module][other], f"{module} imports the method {other}")


# ---- the wall's last rule: private names of other libraries

def is_private(name): return re.match(r"_[^_]", name or "") is not None


@cache
def own_names(tree):
    "Names that code makes itself: definitions, variables, arguments, attributes of self, names given to imports."
    return set(_made(tree))


def _made(tree):
    for node in walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, ast.arg): yield node.arg
        if isinstance(node, ast.alias) and node.asname: yield node.asname
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if dotted(node.value) in (["self"], ["cls"]): yield node.attr


def library_of(tree):
    "Name in this file -> the library that it was imported from."
    found = {}
    for node in walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        for a in node.names:
            path = a.name if isinstance(node, ast.Import) else "alignkit" if node.level else node.module
            found[a.asname or a.name.split(".")[0]] = path.split(".")[0]
    return found


def foreign_imports(node):
    "Paths with a private part that an import takes from one of the four libraries."
    paths = []
    if isinstance(node, ast.Import): paths = [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level: paths = [f"{node.module}.{a.name}" for a in node.names]
    return [p for p in paths if p.split(".")[0] in FOREIGN and any(map(is_private, p.split(".")))]


def touched(node):
    "(private name, what it is taken from) of an attribute, or of `getattr(x, '_y')` and its like."
    if isinstance(node, ast.Attribute) and is_private(node.attr): return node.attr, node.value
    if isinstance(node, ast.Call) and len(node.args) > 1 and is_private(literal(node.args[1])):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("getattr", "setattr", "hasattr", "delattr"): return literal(node.args[1]), node.args[0]


def private_uses(
    tree,
    own,  # private names that the kit makes itself
):
    "(line, text) of every private name of another library. Of an object of unknown kind it counts where the kit has no such name."
    libraries = library_of(tree)
    for node in walk(tree):
        for path in foreign_imports(node): yield node.lineno, path
        name, base = touched(node) or (None, None)
        if not name or name in PUBLIC_ALL_THE_SAME: continue
        library = libraries.get((dotted(base) or [""])[0])
        if library in FOREIGN or (name not in own and library in (None, "alignkit")):  # os._exit is another matter
            yield node.lineno, f"{ast.unparse(base)}.{name}"


def private_names(house):
    "Private names of torch, peft, diffusers and accelerate outside `fast` and `compat`."
    own = set().union(*map(own_names, house.trees.values()))
    for module, tree in house.trees.items():
        if module in INNER: continue
        for line, text in private_uses(tree, own): yield Fault(module, line, f"{module} touches the private {text}")


def twice(house):
    "A name that a page defines twice: the later one silently takes the place of the earlier."
    for module, tree in house.trees.items():
        seen = set()
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            if node.name in seen: yield Fault(module, node.lineno, f"{module} defines {node.name} twice")
            seen.add(node.name)


RULES = (upward, circles, bad_tables, later_names, method_names, method_to_method, private_names, twice)


# ---- the drawing

CHAPTERS = {  # from this number on
    "00": "tools",
    "01": "model and sampler",
    "05": "rewards",
    "06": "runs and training",
    "07": "methods",
    "11": "what came of it",
    "13": "appendix",
}
BEGIN, END = "<!-- the house: drawn by `make house` -->", "<!-- end of the house -->"


def chapter(notebook): return CHAPTERS[max(n for n in CHAPTERS if n <= notebook[:2])]


def needed(graph):
    "The arrows that no longer way says already: those that a drawing needs."
    def reach(module): return {module}.union(*map(reach, graph[module]))
    return {m: [o for o in others if not any(o in reach(p) for p in others if p != o)] for m, others in graph.items()}


def drawing(house):
    "The house as a Mermaid flowchart, an arrow from each page to those that import it; below it the tables, in words."
    if bad := [*upward(house), *circles(house)]: raise ValueError("the house cannot be drawn:\n" + "\n".join(map(str, bad)))
    lines, above = ["```mermaid", "flowchart TB"], []
    for k, part in enumerate(dict.fromkeys(map(chapter, house.pages.values()))):
        inside = [m for m, notebook in house.pages.items() if chapter(notebook) == part]
        lines += [f'  subgraph part{k} ["{part}"]', *(f'    {m}["{house.pages[m].replace("_", " ", 1)}"]' for m in inside), "  end"]
        lines += [f"  {above[-1]} ~~~ {inside[0]}"] if above else []  # unseen: a chapter stands below the one before it
        above = inside
    for module, others in needed(arrows(house)).items(): lines += [f"  {other} --> {module}" for other in others]
    lines += ["```", ""]
    for name, (home, pairs) in tables(house).items():
        later = [m for m in house.pages if m != home and m in {leads[0] for leads in pairs.values() if leads}]
        lines += [f"- `{home}.{name}` reaches {', '.join(f'`{m}`' for m in later) or 'nothing but its own page'}."]
    return "\n".join(lines)


def with_drawing(
    text,  # of CONTRIBUTING.md
    house,
):
    "The same page with the drawing between its two marks."
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{drawing(house)}\n{END}{rest.split(END)[1]}"


def main():
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(with_drawing(page.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__": sys.exit(main())
