"Write README.md from index.ipynb: `python nbs/make_readme.py` (or `make readme`)."
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

NBS = Path(__file__).parent
FIRST = "<!-- Made from nbs/index.ipynb by nbs/make_readme.py: edit the notebook. -->\n\n"

def directive(cell, name):
    "What `#| name: text` says in a cell; '' where it says nothing."
    found = re.search(rf"^#\|\s*{name}:\s*(.+)$", cell.source, re.M)
    return found[1].strip() if found else ""

def shown(picture, path, alt):
    "A picture in the page. It was drawn at double density: half its pixels are its width."
    width = int.from_bytes(picture[16:20], "big") // 2  # of a PNG
    return f'<img src="{path}" width="{width}" alt="{alt}">'

def readme() -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the pictures it shows by path from the top of the repository."
    nb = nbformat.read(NBS / "index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*hide", c.source)]
    named = [(directive(c, "label"), directive(c, "fig-alt")) for c in nb.cells]
    for c in nb.cells:
        if directive(c, "echo") == "false": c.metadata["tags"] = ["remove_input"]
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    exporter = MarkdownExporter(config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ("remove_input",)}})
    body, resources = exporter.from_notebook_node(nb, resources={"output_files_dir": "nbs/index_files"})
    pictures = {}
    for old, data in resources["outputs"].items():
        name, alt = named[int(re.search(r"output_(\d+)_", old)[1])]
        path = f"nbs/index_files/{name}.png"
        pictures[path] = data
        body = body.replace(f"![png]({old})", shown(data, path, alt))
    body = body.replace("](../", "](")  # links of the notebook start in nbs/
    body = re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", body)
    return FIRST + re.sub(r"\n\s*\n\s*\n+", "\n\n", body).strip() + "\n", pictures

if __name__ == "__main__":
    text, pictures = readme()
    (NBS.parent / "README.md").write_text(text, encoding="utf-8")
    for old in (NBS / "index_files").glob("*.png"): old.unlink()
    for path, data in pictures.items():
        (NBS.parent / path).parent.mkdir(exist_ok=True)
        (NBS.parent / path).write_bytes(data)
