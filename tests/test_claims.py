"The rules of the reproduction can be run as they stand: every entry is a valid run, none is there twice, and every name leads somewhere."
import ast, math
from dataclasses import asdict
import pytest
from alignkit.claims import STATISTICS, place, read_rules, spelled
from alignkit.curves import METHODS, TASKS, task_config
from alignkit.prompts import get_prompts
from alignkit.rewards import REWARDS, get_reward
from alignkit.runs import read_run

RULES = read_rules()
CLAIMS, RUNS, MEASURES = RULES["claim"], {r["id"]: r for r in RULES["run"]}, {m["id"]: m for m in RULES["measure"]}
FIELDS = "number id says source checked compares budget runs refuted_by looked_at_before looked where test".split()
RUN_FIELDS = {*"id task reward method seeds before again settings watching alone after needs chosen seconds".split()}
_WATCHING = ("eval_every eval_samples eval_prompts eval_guidance_scale eval_rewards eval_kl early_stop early_stop_drop early_stop_patience "
             "save_every keep_checkpoints progress trackers fast")
WATCHING = set(_WATCHING.split())  # change no picture that is trained on
_FASTER = "sample_batch_size micro_batch_size memory_budget_gb reward_memory_gb checkpointing stored_steps vae_slicing"
FASTER = set(_FASTER.split())  # neither do these: speed and memory only


def built(run, seed):
    "Reward, prompts and config of one seed of an entry, as [how] says."
    changes = dict(run.get("settings", {}), **run.get("watching", {}))
    prompts, cfg = task_config(run["task"], run["method"], seed=seed, fast="onednn", progress=False, memory_budget_gb=None, **changes)
    return run.get("reward", run["task"]), prompts, cfg.check()


def trains_on(reward, prompts, config):
    "What makes a run that run: neither what only watches it nor how long it goes on."
    own = {k: v for k, v in config.items() if k not in WATCHING | FASTER | {"num_epochs"}}
    return repr((reward, prompts if isinstance(prompts, str) else list(prompts), sorted(own.items(), key=str)))


TESTS = [(c, t) for c in CLAIMS for test in c["test"] for t in spelled(test)]


def test_the_twenty_claims_have_all_their_fields():
    assert [c["number"] for c in CLAIMS] == list(range(1, 21))
    assert len({c["id"] for c in CLAIMS}) == 20
    for c in CLAIMS:
        assert set(FIELDS) <= set(c) <= {*FIELDS, "budgets", "measures", "needs", "cannot", "by_eye"}, c["id"]
        assert c["checked"] in ("read", "secondary", "not verified") and isinstance(c["looked_at_before"], bool)
        assert all(c[k] for k in ("says", "source", "compares", "refuted_by", "looked")) and (c["runs"] or c["measures"]), c["id"]
        assert any(t.get("decides", True) for t in c["test"]), f"{c['id']}: no test decides it"
        assert len({t["id"] for t in c["test"]}) == len(c["test"])


@pytest.mark.parametrize("name", RUNS)
def test_every_entry_is_a_valid_run(name):
    run = RUNS[name]
    assert set(run) <= RUN_FIELDS and {"id", "task", "method", "seeds", "before", "seconds"} <= set(run)
    assert run["task"] in TASKS and run["method"] in METHODS and run["seconds"] > 0 and len(run["seeds"]) == len(set(run["seeds"]))
    assert set(run.get("watching", {})) <= WATCHING and not set(run.get("settings", {})) & WATCHING
    assert set(run.get("again", [])) <= set(run["before"])
    for seed in run["seeds"]:
        reward, prompts, cfg = built(run, seed)
        assert type(cfg) is METHODS[run["method"]][1] and cfg.seed == seed
    for part in reward if isinstance(reward, dict) else [reward]: assert part in REWARDS
    assert set(cfg.eval_rewards) <= set(REWARDS)
    assert not run["method"].startswith("alignprop") or get_reward(reward).differentiable
    assert get_prompts(prompts).texts
    for other in run.get("chosen", {}).get("among", []): assert run["chosen"]["setting"] in RUNS[other]["settings"]


def test_no_run_is_there_twice():
    assert len(RUNS) == len(RULES["run"])
    seen = {}
    for name, run in RUNS.items():
        if "chosen" in run or "score_then_round" in run.get("needs", []): continue  # settled by a search; another order of rounding
        for seed in run["seeds"]:
            reward, prompts, cfg = built(run, seed)
            key = trains_on(reward, prompts, asdict(cfg))
            assert key not in seen, f"{name} and {seen[key]}, seed {seed}"
            seen[key] = name


@pytest.mark.parametrize("name", [n for n, r in RUNS.items() if r["before"]])
def test_what_is_recorded_is_what_the_rules_say(name):
    for seed in RUNS[name]["before"]:
        old = read_run(place(name, seed, RULES)).config
        reward, prompts, cfg = built(RUNS[name], seed)
        now, then = asdict(cfg), cfg.renamed(old)
        assert (then["reward"], then["prompts"]) == (reward, prompts)
        both = {k for k in now if k in then} - WATCHING - FASTER
        off = {k: (then[k], now[k]) for k in both if (list(now[k]) if isinstance(now[k], tuple) else now[k]) != then[k]}
        assert not off, f"{name}, seed {seed}: {off}"
        assert {"learning_rate", "num_epochs", "samples_per_epoch", "updates_per_epoch", "eta", "seed"} <= both


def test_every_name_leads_somewhere():
    used = set()
    for c in CLAIMS:
        assert set(c["runs"]) <= set(RUNS) and set(c.get("measures", [])) <= set(MEASURES), c["id"]
        used |= set(c["runs"])
    assert used | {"jpeg_soft/alignprop_uniform", "clip_similarity/alignprop_uniform"} == {*RUNS}  # both recorded, and only drawn
    for c, t in TESTS:
        where = f"{c['id']}, {t['id']}"
        assert t["statistic"] in RULES["statistics"] and t["statistic"] in STATISTICS, where
        for name in [*t.get("a", []), *t.get("b", []), *t.get("control", [])]:
            assert name in c["runs"], f"{where}: {name}"
            assert set(t.get("seeds", [])) <= set(RUNS[name]["seeds"]), f"{where}: {name}"
        assert ("a" in t) != (t["statistic"] == "number"), where


def test_two_sides_of_a_test_have_seeds_in_common():
    for c, t in TESTS:
        seeds = [set(t.get("seeds") or RUNS[n]["seeds"]) for n in [*t.get("a", []), *t.get("b", [])]]
        if seeds: assert len(set.intersection(*seeds)) >= (2 if t.get("decides", True) is False else 3), f"{c['id']}, {t['id']}"


def test_what_is_measured_after_a_run_is_measured_on_these_seeds():
    after = dict(exam="exams", picture="pictures", style="pictures", halves="halves", path="mixing", fooled="witness")
    for c, t in TESTS:
        for name in [*t.get("a", []), *t.get("control", [])] if t["statistic"] in after else []:
            run = RUNS[name]
            assert after[t["statistic"]] in run.get("after", []), f"{c['id']}, {t['id']}: {name} keeps no {after[t['statistic']]}"
            kept = set(run["seeds"]) - set(run["before"]) | set(run.get("again", []))
            assert set(t.get("seeds", run["seeds"])) <= kept, f"{c['id']}, {t['id']}: {name} is not made again for all of its seeds"


def test_thresholds_are_in_order():
    for c, t in TESTS:
        assert all(math.isfinite(t[k]) for k in ("each", "mean", "none")), t["id"]
        assert t["none"] <= t["mean"] and t["each"] <= t["mean"], f"{c['id']}, {t['id']}: seen and not seen overlap"


def test_expressions_ask_for_what_is_given():
    halves = {f"{what}_{when}" for what in ("coarse", "fine") for when in ("early", "late")}
    for c, t in TESTS:
        if "expression" not in t: continue
        given = halves if t["statistic"] == "halves" else {g for m in c["measures"] for g in MEASURES[m]["gives"]}
        asked = {n.id for n in ast.walk(ast.parse(t["expression"], mode="eval")) if isinstance(n, ast.Name)}
        assert asked and asked <= given | {"abs", "max", "min", "log"}, f"{c['id']}, {t['id']}: {asked - given}"


def test_the_stages_hold_every_new_run_once_and_their_sum():
    def makings(run): return len(set(run["seeds"]) - set(run["before"])) + len(run.get("again", []))
    staged = [name for s in RULES["stage"] for name in s["runs"]]
    assert sorted(staged) == sorted(n for n, r in RUNS.items() if makings(r))
    for s in RULES["stage"]: assert s["seconds"] == sum(RUNS[n]["seconds"] * makings(RUNS[n]) for n in s["runs"])
    assert RULES["cost"]["hours"] == pytest.approx(sum(s["seconds"] for s in RULES["stage"]) / 3600, abs=0.06)
    assert RULES["cost"]["new_runs"] == sum(len(set(r["seeds"]) - set(r["before"])) for r in RUNS.values())
    for r in RUNS.values():  # a search is over before what it decides begins
        for other in r.get("chosen", {}).get("among", []): assert staged.index(other) < staged.index(r["id"])


def test_a_change_says_when_and_why():
    for change in RULES["changed"]: assert set(change) == {"date", "what", "why"} and change["date"] >= RULES["written"]
