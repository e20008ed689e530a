"Several runs side by side: a failure is named and does not stop the others."
import subprocess
from types import SimpleNamespace
import pytest
from alignkit import curves
from alignkit.curves import final_evaluation, reproduce
from alignkit.runs import read_run

FEW = """
from alignkit import curves
curves.SHORT.update(samples_per_epoch=16, eval_samples=12, num_inference_steps=6, eval_rewards=("clip_named",))
"""


def run_few(command, **kw):
    "The process that was asked for, with few pictures and steps: what is tested is how runs start, fail, end and are read again."
    python, c, code = command
    return subprocess.run([python, c, FEW + code], **kw)


def test_a_failing_run_is_named_and_the_other_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "subprocess", SimpleNamespace(run=run_few))
    tasks = [("jpeg_compressibility", "alignprop_k1", 0), ("jpeg_compressibility", "ddpo_sf", 0)]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed") as error: reproduce(tmp_path, tasks, num_epochs=1, short=True, jobs=2)
    for word in ("jpeg_compressibility alignprop_k1 0", "has no gradient", "jpeg_compressibility_alignprop_k1_seed0.log"):
        assert word in str(error.value)
    assert len(read_run(tmp_path / "jpeg_compressibility" / "ddpo_sf_seed0").history) == 1
    runs = reproduce(tmp_path, tasks[1:], num_epochs=1, short=True)  # finished: only read
    assert [r.config["method"] for r in runs] == ["ddpo_sf"]
    before = final_evaluation(runs[0])
    (runs[0].folder.path / "eval_final.json").unlink()
    again = final_evaluation(read_run(runs[0].folder.path))  # from the checkpoints, on a fresh pipeline
    assert before.loc["last", "eval_reward_mean"] != before.loc["base", "eval_reward_mean"]
    assert again.eval_reward_mean.tolist() == pytest.approx(before.eval_reward_mean.tolist(), abs=5e-3)


def test_unknown_tasks_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="method: one of ddpo_is, ddpo_sf"): reproduce(tmp_path, [("tiny_aesthetic", "ppo", 0)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["ddpo_is", "rwr", "alignprop_uniform"])
def test_short_runs_ask_as_often(tmp_path, monkeypatch, method):
    "1024 queries, whatever the epochs of a method are."
    class Seen(Exception): pass
    def train(pipe, reward, prompts, cfg, **kw): raise Seen(cfg)
    monkeypatch.setattr(getattr(curves, method.split("_")[0]), "train", train)
    with pytest.raises(Seen) as seen: curves.run_one(tmp_path, "tiny_aesthetic", method, 0, short=True)
    cfg = seen.value.args[0]
    assert (cfg.num_epochs * cfg.samples_per_epoch, cfg.eval_samples) == (1024, 48)
