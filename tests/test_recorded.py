"The first epochs of recorded runs, drawn and trained again: what is in `data/runs` is what the code as it is computes."
import pandas as pd
import pytest
from alignkit.claims import place, read_rules
from alignkit.curves import METHODS, of_entry, task_config
from alignkit.runs import read_run, recorded

# Another processor rounds otherwise. A picture then differs in its last bits, a few of its 8-bit values fall on the other side, and a
# JPEG file grows or shrinks by some bytes. Between two processors, with and without AVX-512, the mean of an epoch moved by up to 0.0014
# of its pictures' standard deviation (compressibility) and by less than a millionth (a smooth reward). The band is ten times the former;
# a wrong seed, prompt or update moves it by a tenth or more.
BAND = 0.015


TASKS = [("jpeg_compressibility", "ddpo_is", 2), ("jpeg_compressibility", "rwr_sparse", 1), ("tiny_aesthetic", "alignprop_uniform", 2)]


@pytest.mark.parametrize("reward, method, epochs", TASKS)
def test_the_first_epochs_are_the_recorded_ones(reward, method, epochs):
    "Two epochs, so that the update of the first is seen in the second; RWR makes 20 updates in one, each seen in the next gradient."
    run, = [r for r in recorded(reward) if r.folder.path.name == f"{method}_seed3"]
    then = run.history[:epochs]
    prompts, cfg = task_config(reward, method, seed=3, num_epochs=epochs, eval_every=0, eval_rewards=(), fast="onednn")  # as all was computed then
    same(METHODS[method][0].train("tiny", reward, prompts, cfg).history, then, method)


@pytest.mark.parametrize("name, epochs", [("jpeg_incompressibility/ddpo_is", 2), ("combined/weight50", 2), ("tiny_aesthetic/paper_k1", 1)])
def test_the_runs_of_three_claims_are_made_again(name, epochs):
    "Claims 1 and 9, 16, and 4, from their rules: the first epochs of seed 3."
    rules = read_rules()
    entry = next(e for e in rules["run"] if e["id"] == name)
    reward, prompts, cfg = of_entry(name, 3, rules)
    cfg.num_epochs, cfg.eval_every, cfg.eval_rewards, cfg.eval_kl = epochs, 0, (), False
    same(METHODS[entry["method"]][0].train("tiny", reward, prompts, cfg).history, read_run(place(name, 3, rules)).history[:epochs], name)


def same(now, then, what):
    "Rewards within the band, and gradients of a length."
    off = ((now.reward_mean - then.reward_mean) / then.reward_std).abs()
    print(f"{what}: off by {off.max():.1e} standard deviations")
    assert off.max() < BAND
    pd.testing.assert_series_equal(now.queries, then.queries)
    assert ((now.grad_norm / then.grad_norm - 1).abs() < 0.05).all()
