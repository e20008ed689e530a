# make demo: every method on the embedded pipeline, one plot    make test: everything CI runs
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE ?= 1
.PHONY: demo test readme

demo: .venv/ready
	.venv/bin/python -m alignkit.curves --short --out runs/demo

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -q -n 2 --dist worksteal --durations=8

readme: .venv/ready
	.venv/bin/python nbs/make_readme.py

.venv/ready: settings.ini setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else 'alignkit needs Python 3.10 to 3.13, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt 'torch==2.13.0'
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
