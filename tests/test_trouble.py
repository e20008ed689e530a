"What the numbers of a run say: every column has its line, and a finding is there exactly where a number has left its range."
import os, re
from dataclasses import fields
import pandas as pd
import pytest
import torch
from alignkit.alignprop import AlignPropConfig, train as backprop
from alignkit.ddpo import DDPOConfig
from alignkit.folder import locked
from alignkit.rewards import Reward
from alignkit.runs import Run, read_run, recorded
from alignkit.rwr import RWRConfig, train as regress
from alignkit.trouble import CHECKS, COLUMNS, FOLLOWS, PATTERNS, about, diagnose
from conftest import PROMPTS, brightness, go, in_child

CLIP = 2e-3
FEW = dict(num_epochs=1, samples_per_epoch=4, num_inference_steps=2, eval_every=1, eval_samples=2, eval_kl=True, fast="onednn",
           eval_rewards=("jpeg_compressibility",), eval_prompts=("a cow",))


def names(run, **how): return [f.name for f in diagnose(run, **how)]


# the columns -------------------------------------------------------------------------------------------------------------------------

def redness(images, prompts): return images[:, 0].mean((1, 2))


def with_kl(kind):
    "Where the method has a KL term, it is on."
    return dict(kl_weight=0.1) if "kl_weight" in {f.name for f in fields(kind)} and kind is DDPOConfig else {}


@pytest.fixture(scope="module")
def written(pipe_folder, tmp_path_factory):
    "Method -> the columns in the file of a run with evaluations, a judge, a drift and a weighted sum."
    out, found = tmp_path_factory.mktemp("columns"), {}
    both = {Reward(brightness, "brightness", differentiable=True): 1., Reward(redness, "redness", differentiable=True): 1.}
    go(pipe_folder, out / "ddpo_is", both, **FEW, updates_per_epoch=2, **with_kl(DDPOConfig))
    go(pipe_folder, out / "ddpo_sf", both, **FEW, updates_per_epoch=1, method="ddpo_sf")
    for kind, train in ((RWRConfig, regress), (AlignPropConfig, backprop)):
        train(pipe_folder, both, PROMPTS, kind(**FEW, updates_per_epoch=2), out / kind().method)
    for folder in out.iterdir(): found[folder.name] = list(pd.read_csv(folder / "history.csv"))
    return found


def test_every_column_of_every_method_has_its_line(written):
    "Of each: unit, meaning, and what leaves its range. A column that nothing tells of is an error, which names those that are told of."
    assert set(written) == {"ddpo_is", "ddpo_sf", "rwr", "alignprop"}
    for columns in written.values():
        for column in columns:
            unit, meaning, _ = about(column)
            assert meaning, column
    with pytest.raises(ValueError, match="column: one of epoch, step, .*got 'beauty'"): about("beauty")
    assert about("reward_redness_mean") == PATTERNS["reward_"] and about("eval_jpeg_compressibility_mean") == PATTERNS["eval_"]
    assert "reward_redness_mean" in written["rwr"] and "eval_jpeg_compressibility_mean" in written["rwr"]


def test_no_line_tells_of_a_column_that_nobody_writes(written):
    "But that of a term which is off unless it is asked for."
    assert set(COLUMNS) - set().union(*written.values()) <= {"kl_base"}


def test_lines_name_findings_that_exist():
    "Each word in `code` is a finding, a column or a setting; what follows from a finding is one as well."
    settings = {f.name for kind in (DDPOConfig, RWRConfig, AlignPropConfig) for f in fields(kind)} | {"kl_weight", "run.eval_base"}
    for told in (*COLUMNS.values(), *PATTERNS.values()):
        for word in re.findall(r"`([^`]+)`", " ".join(told)): assert word in {*CHECKS, *COLUMNS, *settings}, word
    assert set(FOLLOWS) | {cause for causes in FOLLOWS.values() for cause in causes} <= set(CHECKS)


# the findings, on either side of their lines --------------------------------------------------------------------------------------------

def run_of(method="ddpo_is", epochs=6, config=(), base=(), **columns):
    "A made-up run that is in its range, but for some columns: one value for all epochs, or a list of them."
    c = dict(method=method, num_epochs=epochs, samples_per_epoch=16, updates_per_epoch=2, num_inner_epochs=1, learning_rate=1e-3, beta=4.,
             clip_range=CLIP, max_skipped=10, sample_batch_size=8, mixed_precision="no", weights="softmax", early_stop="") | dict(config)
    h = dict(epoch=list(range(epochs)), reward_mean=[0.1 * e for e in range(epochs)], reward_std=0.1, loss=0.01, grad_norm=0.5, skipped=0,
             sample_s=1., reward_s=0.1, train_s=1., peak_mem_bytes=10e9)
    if method == "ddpo_is": h |= dict(approx_kl=0.5 * CLIP**2, clipfrac=0.1, ratio_off=2 * CLIP)
    if method == "rwr": h |= dict(effective_samples=8.)
    h |= columns
    rows = [{k: v[e] if isinstance(v, list) else v for k, v in h.items()} for e in range(epochs)]
    return Run(None, c, rows=rows, eval_base=dict(base))


def judged(values, rewards, name="clip_named", **how):
    "A run of a judge's values, the untrained model's first."
    column, (first, *rest) = f"eval_{name}_mean", values
    return run_of(epochs=len(rest), base={"eval_reward_mean": rewards[0], "eval_reward_sem": 0.01, column: first},
                  **{"eval_reward_mean": rewards[1:], "eval_reward_sem": 0.01, column: rest, "reward_mean": 0.}, **how)


def kl(widths): return 0.5 * (widths * CLIP)**2


one = dict(config=dict(updates_per_epoch=1), clipfrac=0., approx_kl=0.)
NAN, INF, FP16 = float("nan"), float("inf"), dict(mixed_precision="fp16")
CASES = {  # name -> runs that have the finding and no other; runs just inside
    "broken": ([run_of(loss=[0.1] * 5 + [NAN]), run_of(grad_norm=[INF] + [1.] * 5), run_of(config=FP16, grad_norm=INF)],
               [run_of(config=FP16, grad_norm=[INF, INF] + [1.] * 4)]),
    "skipped": ([run_of(skipped=[0, 0, 1, 1, 1, 1]), run_of("alignprop", skipped=3)], [run_of("alignprop", skipped=0)]),
    "flat": ([run_of(reward_std=0.), run_of(reward_std=0., grad_norm=0.), run_of("alignprop", grad_norm=0.), run_of(grad_norm=0.)],
             [run_of("alignprop", reward_std=0.), run_of(grad_norm=[0., 0., 1., 1., 1., 1.])]),
    "equal": ([run_of("rwr", effective_samples=15.9), run_of("rwr", effective_samples=16., config=dict(weights="sparse", share=1.))],
              [run_of("rwr", effective_samples=15.7)]),
    "few": ([run_of("rwr", effective_samples=1.9)], [run_of("rwr", effective_samples=2.1)]),
    "still": ([run_of(approx_kl=kl(0.009), clipfrac=0.)], [run_of(approx_kl=kl(0.011), clipfrac=0.), run_of("ddpo_sf")]),
    "slow": ([run_of(epochs=10, reward_mean=[0., 0.01] * 5)],
             [run_of(epochs=9, reward_mean=[0., 0.01, 0.] * 3), run_of(epochs=10)]),
    "worse": ([run_of(epochs=9, reward_mean=[-0.1 * e for e in range(9)])], [run_of(epochs=9, reward_mean=[-0.011 * e for e in range(9)])]),
    "off": ([run_of(**one, ratio_off=0.11 * CLIP), run_of(**one, ratio_off=[CLIP] + [0.] * 5)],
            [run_of(**one, ratio_off=0.09 * CLIP), run_of(ratio_off=CLIP)]),
    "clipped": ([run_of(clipfrac=0.26)], [run_of(clipfrac=0.24), run_of(clipfrac=[0.5, 0.5, 0.1, 0.1, 0.1, 0.1])]),
    "far": ([run_of(approx_kl=kl(10.5))], [run_of(approx_kl=kl(9.5))]),
    "drift": ([run_of(eval_kl=[0.5, 0.6, 7., 8., 9., 9.]), run_of(kl_base=[0., 1., 4., 41., 50., 60.])],
              [run_of(eval_kl=[0.5, 1.9, 7.6, 30., 121., 480.]), run_of(kl_base=[0.1, 1.6, 5., 9., 16., 25.]),
               run_of(eval_kl=[1e-6, 1e-3, 0.9, 1., 1., 1.])]),
    "steep": ([run_of(grad_norm=[1.] * 3 + [11.] * 3)],
              [run_of(grad_norm=[1.] * 3 + [9.] * 3), run_of(grad_norm=[1.] * 3 + [11., 11., 1.])]),
    "judge": ([judged([0.9, 0.8, 0.7], [0, 1, 2]), judged([6., 7., 6.4], [0, 1, 2], "beauty"),
               judged([0.9, 0.88], [0, 1], config=dict(early_stop="clip_named", early_stop_drop=0.01, early_stop_patience=5))],
              [judged([0.9, 0.85, 0.78], [0, 1, 2]), judged([6., 7., 6.6], [0, 1, 2], "beauty"), judged([0.9, 0.1, 0.9], [0, 1, 2])]),
    "alike": ([judged([0.6, 0.5, 0.39], [0, 1, 2], "clip_diversity_all")],
              [judged([0.6, 0.5, 0.41], [0, 1, 2], "clip_diversity_all")]),
    "waiting": ([run_of(reward_s=2.1)],
                [run_of(reward_s=1.9), run_of(reward_s=[60.] + [0.1] * 5), run_of(sample_s=0.01, train_s=0.01, reward_s=0.09)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_finding_is_where_a_number_left_its_range(name):
    "Just outside of the line it is the only one; just inside there is none. It says what, why and what to do, and where it was seen."
    outside, inside = CASES[name]
    for run in outside:
        finding, = diagnose(run)
        assert finding.name == name
        assert finding.what and finding.why and finding.todo
        column, (first, last) = run.history[finding.column], finding.epochs
        assert -1 <= first <= last < len(run.history)
        assert finding.value in column.tolist() or finding.value != finding.value and column.isna().any()
        said = str(finding).splitlines()
        assert said[0].startswith(f"{name}: ") and max(map(len, said)) <= 140
    for run in inside: assert names(run) == []


def test_a_card_that_is_nearly_full():
    "Nine tenths; a run on a CPU has no card, unless one is given."
    run = run_of(peak_mem_bytes=[20e9] * 5 + [22e9])
    assert names(run) == names(run, card_gb=24.5) == []
    finding, = diagnose(run, card_gb=24.4)
    assert finding.name == "memory" and finding.epochs == (5, 5) and "22.0 of 24.4 GB" in finding.what


def test_a_cause_is_said_and_not_what_follows_from_it():
    "A flat reward moves no ratio; each is a finding where it stands alone."
    assert names(run_of(approx_kl=0., clipfrac=0., grad_norm=0., reward_std=0., reward_mean=0.5, epochs=12)) == ["flat"]
    assert names(run_of(approx_kl=0., clipfrac=0., reward_mean=[0.5, 0.51] * 6, epochs=12)) == ["still"]


def test_the_fallen_judge_names_the_weights_to_go_back_to():
    "The best held-out reward among the evaluations before the fall; where the first one is a fall already, the untrained model."
    assert "the weights of epoch 1 were the best before" in diagnose(judged([1., 0.98, 0.95, 0.2], [0., 1., 2., 3.]))[0].todo
    assert "the untrained model was best" in diagnose(judged([1., 0.3, 0.2], [0., 1., 2.]))[0].todo


# real runs -----------------------------------------------------------------------------------------------------------------------------

def test_a_run_can_be_asked_at_any_time():
    "Every beginning of recorded runs that are healthy to their end: no false alarm, no error, and nothing of a run is changed by asking."
    for run in recorded("clip_similarity") + recorded("tiny_alignment"):
        before = [dict(row) for row in run.rows]
        for n in range(0, len(run.rows) + 1, 3):
            part = Run(None, run.config, rows=run.rows[:n], eval_base=run.eval_base)
            assert names(part) == [], (run.folder.path, n)
        assert str(before) == str(run.rows)


def test_files_say_what_memory_says(pipe_folder, tmp_path):
    "The same findings of a run in memory, of its folder, and of a reader of floats that were written as text."
    with pytest.warns(UserWarning, match="nothing can be learned"):
        run = go(pipe_folder, tmp_path / "run", lambda images, prompts: torch.zeros(len(images)), eval_every=0, advantages="batch")
    assert names(run) == names(read_run(tmp_path / "run")) == ["flat"]


def _dies(pipe_folder, out):
    "A process that is killed in its third epoch."
    def third(run, row):
        if row["epoch"] == 2: os._exit(9)
    go(pipe_folder, out, callbacks=third)


def test_a_killed_run_ended_and_one_at_work_did_not(pipe_folder, tmp_path):
    "Rows are missing in both; only in one nobody is at work. Resumed with another setting it has its epochs, and says what changed."
    out = tmp_path / "run"
    assert in_child(_dies, pipe_folder, out) == 9
    ended, = [f for f in diagnose(read_run(out)) if f.name == "ended"]
    assert ended.what.startswith("3 of 4 epochs are there") and "resume" in ended.todo
    run = read_run(out)
    with locked(run.folder.lock_file): assert "ended" not in names(run)
    go(pipe_folder, out, resume=True)
    assert {"ended", "changed"} & set(names(read_run(out))) == set()


def test_a_change_on_the_way_is_said(pipe_folder, tmp_path):
    from alignkit.ddpo import train
    out = tmp_path / "run"
    go(pipe_folder, out, num_epochs=1, eval_every=0)
    train(out=out, reward=brightness, resume=True, override=dict(learning_rate=5e-3, num_epochs=2))
    changed, = [f for f in diagnose(read_run(out)) if f.name == "changed"]
    assert "from epoch 1 on" in changed.what and "learning_rate=0.005 (was 0.01)" in changed.what


def test_a_callback_that_stops_a_run_is_why_it_ended(pipe_folder):
    run = go(pipe_folder, callbacks=lambda run, row: row["epoch"] == 1)
    assert [f.what for f in diagnose(run) if f.name == "ended"] == ["stopped after epoch 1 by the callback <lambda>, with 2 of 4 epochs"]
