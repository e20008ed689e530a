"The first epochs of recorded runs, drawn and trained again: what is in `data/runs` is what the code as it is computes."
import pandas as pd
import pytest
from alignkit.curves import METHODS, task_config
from alignkit.runs import recorded

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
    now = METHODS[method][0].train("tiny", reward, prompts, cfg).history
    off = ((now.reward_mean - then.reward_mean) / then.reward_std).abs()
    print(f"{method}: off by {off.max():.1e} standard deviations")
    assert off.max() < BAND
    pd.testing.assert_series_equal(now.queries, then.queries)
    assert ((now.grad_norm / then.grad_norm - 1).abs() < 0.05).all()
