"Several runs side by side: a failure is named and does not stop the others."
import subprocess
from types import SimpleNamespace
import pandas as pd
import pytest
from alignkit import curves, ddpo, mdp
from alignkit.curves import final_evaluation, reproduce
from alignkit.runs import read_run

FEW = """
from alignkit import curves, ddpo, mdp
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
    for word in ("jpeg_compressibility_alignprop_k1_seed0: ", "has no gradient", "jpeg_compressibility_alignprop_k1_seed0.log"):
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


FULL = dict(task="jpeg_soft", method="ddpo_is", seeds=[1], before=[], watching=dict(eval_every=1, save_every=1, eval_samples=12))
RULES = {"run": [  # two small entries, one with settings of its own and a weighted sum
    dict(FULL, id="small/plain"),
    dict(FULL, id="small/sum", reward={"jpeg_soft": 2., "jpeg_compressibility": 1.}, settings=dict(learning_rate=0.001)),
], "measure": [], "claim": [dict(number=1, says="a", source="b", budget=32, looked_at_before=False, where="12_curves", test=[
    dict(id="higher", statistic="height", a=["small/plain"], b=["small/sum"], each=-100., mean=-100., none=-101.),
    dict(id="gain", statistic="final_gain", when="last", a=["small/sum"], each=100., mean=100., none=99.)])]}


def test_a_claim_is_run_kept_and_judged(tmp_path, monkeypatch):
    "What is missing is made once and kept without checkpoints; then there is a verdict, and nothing is made a second time."
    few = dict(num_inference_steps=5, num_epochs=2, samples_per_epoch=16, updates_per_epoch=2)
    for name, value in few.items(): monkeypatch.setitem(curves.TASKS["jpeg_soft"], name, value)
    monkeypatch.setattr(curves, "read_rules", lambda: RULES)
    made = []
    def here(out, runs, calls, jobs):
        for name in calls:
            entry, seed = name.split("_seed")
            made.append(entry.replace("_", "/"))
            curves.record(made[-1], int(seed), out, RULES)
    monkeypatch.setattr(curves, "_side_by_side", here)
    found = curves.reproduce_claims([1], tmp_path)
    assert sorted(made) == ["small/plain", "small/sum"] and found.verdict.tolist() == ["seen", "not seen"]
    kept = sorted(str(f.relative_to(tmp_path / "runs")) for f in (tmp_path / "runs").rglob("*.*"))
    files = ["config.json", "eval_base.json", "eval_final.json", "history.csv"]
    assert kept == [f"claims/small/sum_seed1/{f}" for f in files] + [f"small/plain_seed1/{f}" for f in files]
    assert curves.reproduce_claims([1], tmp_path).equals(found) and len(made) == 2
    work = tmp_path / "work" / "runs" / "small" / "plain_seed1"
    assert (work / "history.csv").read_text() == (tmp_path / "runs" / "small" / "plain_seed1" / "history.csv").read_text()
    with pytest.raises(ValueError, match="claim"): curves.reproduce_claims([7], tmp_path)
    with pytest.raises(ValueError, match="small/plain, small/sum"): curves.of_entry("small/other", 1, RULES)


def test_the_command_line_judges_claims(monkeypatch, capsys):
    asked = []
    def found(numbers, out, anew, jobs):
        asked.append((numbers, out, anew, jobs))
        return pd.DataFrame([dict(claim=3, test="queries", decides=True, d="1 2 3", mean=2., low=1., high=3., seeds=3, verdict="in part")])
    monkeypatch.setattr(curves, "reproduce_claims", found)
    curves.main(["--claim", "3", "--jobs", "1"])
    assert asked == [([3], "runs/claims", False, 1)]
    told = capsys.readouterr().out
    assert "claim 3: in part" in told and "AlignProp reaches DDPO's reward many times faster" in told and "1 2 3" in told


def test_the_peers_order_of_rounding_loses_pairs_before_any_update():
    "In bf16 with the peers' clip: scored before rounding, pairs are past it while no weight has moved; in our order none is."
    few = dict(num_epochs=1, samples_per_epoch=8, updates_per_epoch=2, num_inference_steps=4, eval_every=0, eval_rewards=(), progress=False)
    def first(**how):
        cfg = ddpo.DDPOConfig(**few, mixed_precision="bf16", clip_range=1e-4, **how)
        return ddpo.train("tiny", "jpeg_compressibility", "simple_animals", cfg).history.clipfrac_first[0]
    assert first() == 0
    walk = mdp.walk
    with curves.score_then_round(): assert first(recompute_log_probs=False) > 0.1
    assert mdp.walk is walk
