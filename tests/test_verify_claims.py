"""Every number of the reproduction from `data/runs`: the verdicts, the tables of 12_curves and of the README, the numbers in 12's prose.

`python tests/test_verify_claims.py` writes data/verdicts.csv anew."""
import json, os, re
from pathlib import Path
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from alignkit.claims import table, verdicts
from alignkit.pipelines import data_dir

ROOT = Path(__file__).resolve().parent.parent
PAGE, FILE = ROOT / "nbs" / "12_curves.ipynb", data_dir() / "verdicts.csv"
LAST = "## Run it again"  # what follows trains

# A phrase of the prose of 12_curves, its numbers computed by that page's own functions, and what must hold for it to be said.
PROSE = [
    ("only epoch {kept_epoch(of['ddpo_is', 5])} of {of['ddpo_is', 5].rows[-1]['epoch']} with seed 5", "True"),
    ("DDPO_IS may keep its last epoch with seed 3", "kept_epoch(of['ddpo_is', 3]) == of['ddpo_is', 3].rows[-1]['epoch']"),
    ("Standard errors count the {of['ddpo_is', 5].config['eval_samples']} pictures", "True"),
    ("Both keep an epoch a fifth to a third below the base", "finals.change_percent.between(20, 37).all()"),
    ("DDPO_IS with seed 5, whose best reward is not one to keep", "kept_epoch(of['ddpo_is', 5]) < evaluations(of['ddpo_is', 5]).eval_reward_mean.argmax() * 4"),
    ("With seeds 4 and 5 the two then part, and more than a quarter of gold's gain goes back",
     "[s for s, r in zip(SEEDS, by_ddpo) if gone(r) > 0.25] == [4, 5]"),
    ("The held-out score falls with seed 4 and rises with seed 5", "since(by_ddpo[1]) < 0 < since(by_ddpo[2])"),
    ("The score of the run's own samples never: with both seeds it rises", "all('+' in turn(r)['since then: score of its own samples'] for r in by_ddpo[1:])"),
    ("Seed 3, base, kept and last (which are one epoch here)", "kept_epoch(by_ddpo[0]) == by_ddpo[0].rows[-1]['epoch']"),
    ("is with two seeds and lies beyond it with the third", "(table.kept_epoch == best_gold).sum() == 2"),
    ("AlignProp draws {run_of[learned, 'alignprop_full', 3].config['samples_per_epoch']} pictures an epoch for two updates", "True"),
    ("the paper's factor is {paper('time to DDPO')} in time", "True"),
    ("With every truncation gold is best before a third of DDPO's queries are spent",
     "all(golds_best(m, s).queries < 3840 / 3 for m in truncations for s in SEEDS)"),
    ("Where the score stands at 8.25, full, `uniform` and $K=5$ have about as much of that distance left, and $K=1$, the shortest truncation, least",
     "max(left(m, 8.25).mean() for m in truncations) == max(left(m, 8.25).mean() for m in truncations[:3]) and min(truncations, key=lambda m: left(m, 8.25).mean()) == 'alignprop_k1'"),
    ("Full backpropagation is the first to reach either level, $K=1$ the last", "min(slower) > 1"),
]
