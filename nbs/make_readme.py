"Write README.md from index.ipynb: `python nbs/make_readme.py` (or `make readme`)."
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

NBS = Path(__file__).parent

def readme() -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the pictures it shows by path from the top of the repository."
    nb = nbformat.read(NBS / "index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*hide", c.source)]
    for c in nb.cells:
        if re.match(r"#\|\s*echo:\s*false", c.source): c.metadata["tags"] = ["remove_input"]
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    exporter = MarkdownExporter(config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ("remove_input",)}})
    body, resources = exporter.from_notebook_node(nb, resources={"output_files_dir": "nbs/index_files"})
    body = body.replace("](../", "](")  # links of the notebook start in nbs/
    body = re.sub(r"\]\((\d\d\w+\.ipynb)\)", r"](nbs/\1)", body)
    return "<!-- Made from nbs/index.ipynb by nbs/make_readme.py: edit the notebook. -->\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", resources["outputs"]

if __name__ == "__main__":
    text, pictures = readme()
    (NBS.parent / "README.md").write_text(text)
    for path, data in pictures.items():
        (NBS.parent / path).parent.mkdir(exist_ok=True)
        (NBS.parent / path).write_bytes(data)
