# make help lists the commands
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE ?= 1
.DEFAULT_GOAL := help
.PHONY: help demo test verify-claims fast check t export house readme browser

PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q
BOTH_CORES = -n 2 --dist worksteal
CHECK = test_house or change_nothing or has_its_module or stand_alone or light or readme
FAST = $(CHECK) or 00_show or 04_prompts or ratio_is_exactly_one or depend_on_the_batch or see_pictures_in_0_1 or \
       loss_is_the_definition or softmax_weights or sparse_weights or bad_weights or test_groups or jackknife or \
       bitsandbytes or preset_lists or tasks_are_refused

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

demo: .venv/ready  ## every method on the embedded pipeline, one plot
	.venv/bin/python -m alignkit.curves --short --out runs/demo

test: .venv/ready  ## everything CI runs: every notebook, every test
	$(PYTEST) tests $(BOTH_CORES) --durations=8

verify-claims: .venv/ready  ## every number of the reproduction, from data/runs: verdicts, tables, prose
	$(PYTEST) tests/test_verify_claims.py tests/test_claims.py

fast: .venv/ready  ## under a minute: the wall, imports, clean and export, ratio 1, pure functions, two pages
	$(PYTEST) tests $(BOTH_CORES) -k "$(FAST)"

check: .venv/ready  ## what a change must leave in order: the wall, the house, clean and export, README
	.venv/bin/python tests/wall.py
	$(PYTEST) tests/test_house.py tests/test_package.py $(BOTH_CORES) -k "$(CHECK)"

t: .venv/ready  ## the tests and notebooks whose name matches: make t K=ratio, make t K=03_logprob
	$(if $(K),,$(error K: a part of a name, as in make t K=ratio))
	$(PYTEST) tests --durations=5 -k "$(K)"

export: .venv/ready  ## clean the notebooks and write alignkit/ from them
	.venv/bin/nbdev_clean
	.venv/bin/nbdev_export

browser: .venv/ready  ## boards in a real JupyterLab, looked at by a real browser; screenshots in SHOTS=runs/browser
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev,browser]'
	.venv/bin/python tests/browser.py $(or $(SHOTS),runs/browser)

house: .venv/ready  ## draw the imports into CONTRIBUTING.md
	.venv/bin/python tests/house.py

readme: .venv/ready  ## write README.md from nbs/index.ipynb
	.venv/bin/python nbs/make_readme.py

.venv/ready: settings.ini setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else 'alignkit needs Python 3.10 to 3.13, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt 'torch==2.13.0'
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
