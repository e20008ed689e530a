"""Package metadata, read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", url=cfg["git_url"],
    # data/ ships inside the package as alignkit/data, so that a wheel needs no checkout
    packages=[*find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]), "alignkit.data"],
    package_dir={"alignkit.data": "data"}, package_data={"alignkit.data": ["**/*"]},
    python_requires=">=" + cfg["min_python"],
    classifiers=["Development Status :: 3 - Alpha", *(f"Programming Language :: Python :: 3.{v}" for v in (10, 11, 12, 13))],
    install_requires=cfg.get("requirements", "").split(),
    extras_require={extra: " ".join(cfg[f"{name}_requirements"] for name in names).split() for extra, names in dict(
        rewards=["rewards"], track=["track"], data=["data"], hps=["hps"], browser=["browser"],
        dev=["rewards", "track", "data", "dev"]).items()},
    long_description=(root / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    entry_points={"console_scripts": [f"{cfg['lib_name']}={cfg['lib_path']}.cli:main"], "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
