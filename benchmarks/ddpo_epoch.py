"""One epoch of DDPO: alignkit against TRL 0.23.1's DDPOTrainer, at equal work, on one CPU thread.

    python benchmarks/ddpo_epoch.py --out ddpo_epoch.json
    python benchmarks/ddpo_epoch.py --trl-python PATH   # an environment that has TRL already

The work is that of TRL's documented example (the command line in its examples/scripts/ddpo.py): 24 pictures an epoch, guidance 5, LoRA of rank 4 on the
attention layers, AdamW 3e-4, 8 updates an epoch, here with 20 DDIM steps in float32. Each library takes its own batches, which change speed and memory and not
the update: TRL, as in that example, samples 4 x 6 pictures and trains on one timestep of 3 at a time; alignkit samples 24 and trains on --pairs pairs of
picture and timestep. Rounds alternate the order; in each, either library runs one epoch to warm up and one that is timed, in a process of its own. Reported
are medians over the rounds, and the ratio of every round. Rewards are those of the epochs before any update: the means must agree within noise.
TRL needs an environment of its own: without --trl-python one is made in --cache (1.5 GB).
"""
import argparse, json, math, os, resource, subprocess, sys, time
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch==2.13.0 trl==0.23.1 diffusers==0.42.1 transformers peft accelerate pandas".split()
PICTURES, STEPS, GUIDANCE, LR, UPDATES = 24, 20, 5., 3e-4, 8
CLOCKS = ("wall_s", "cpu_s")

# ---- one library, in a process of its own

class Meter:
    "The reward is called between sampling and training, so it can tell the parts of an epoch apart, for either library."
    def __init__(self):
        from alignkit.rewards import jpeg_compressibility
        self.score, self.rewards, self.epochs = jpeg_compressibility, [], []
        self.loaded = self.peak()
        self.start, self.calls = self.now(), []
    def now(self): return time.perf_counter(), time.process_time()
    def peak(self): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    def reward(self, images, prompts):
        began = self.now()
        r = self.score(images, prompts)
        if not self.epochs: self.rewards += r.tolist()  # of the untrained model
        self.calls.append((began, self.now()))
        return r
    def end_epoch(self, *_):
        marks = self.start, self.calls[0][0], self.calls[-1][1], self.now()
        wall, cpu = ([b[k] - a[k] for a, b in zip(marks, marks[1:])] for k in (0, 1))
        self.epochs.append({clock: dict(zip(("sample", "reward", "train", "epoch"), [*parts, sum(parts)])) for clock, parts in zip(CLOCKS, (wall, cpu))})
        self.start, self.calls = self.now(), []
    def report(self): return dict(**self.epochs[-1], rewards=self.rewards, peak_rss_mb=self.peak(), rss_growth_mb=self.peak() - self.loaded)

def alignkit_epochs(pipe, seed, pairs):
    from alignkit.ddpo import preset, train
    from alignkit.pipelines import load
    from alignkit.runs import environment
    pipe, meter = load(pipe), Meter()
    cfg = preset("trl", mixed_precision="no", num_epochs=2, seed=seed, samples_per_epoch=PICTURES, updates_per_epoch=UPDATES, num_inference_steps=STEPS,
                 guidance_scale=GUIDANCE, learning_rate=LR, sample_batch_size=PICTURES, micro_batch_size=pairs)
    train(pipe, meter.reward, "simple_animals", cfg, callbacks=(meter.end_epoch,))
    return dict(meter.report(), environment=environment())

def trl_epochs(pipe, seed, _):
    from accelerate import PartialState
    PartialState()  # before TRL's logger asks for it
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from alignkit.prompts import get_prompts
    from alignkit.runs import environment
    pipe, source = DefaultDDPOStableDiffusionPipeline(pipe), get_prompts("simple_animals")
    drawn = (source.sample(seed, epoch, i) for epoch in range(2) for i in range(PICTURES))  # as alignkit draws them
    meter = Meter()
    cfg = DDPOConfig(mixed_precision="no", seed=seed, sample_batch_size=PICTURES // 4, sample_num_batches_per_epoch=4, sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE,
                     train_batch_size=PICTURES // UPDATES, train_gradient_accumulation_steps=1, train_learning_rate=LR, save_freq=10**6)
    trainer = DDPOTrainer(cfg, lambda images, prompts, _: (meter.reward(images, prompts), {}), lambda: (next(drawn), {}), pipe)
    pipe.set_progress_bar_config(disable=True)
    for epoch in range(2):
        trainer.step(epoch, epoch * UPDATES)
        meter.end_epoch()
    return dict(meter.report(), environment=environment())

def in_process(python, name, *args):
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
               PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    done = subprocess.run([python, __file__, "--worker", json.dumps([name, *args])], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])

# ---- the comparison

def trl_environment(folder):
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making an environment for TRL in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *PACKAGES], check=True)
        (folder / "complete").touch()
    return str(python)

def summary(runs):
    rewards = [r for run in runs for r in run["rewards"]]
    out = {clock: {part: round(median(r[clock][part] for r in runs), 3) for part in runs[0][clock]} for clock in CLOCKS}
    out |= {name: round(median(r[name] for r in runs)) for name in ("peak_rss_mb", "rss_growth_mb")}
    return dict(out, reward_mean=round(mean(rewards), 4), reward_sem=round(stdev(rewards) / len(rewards)**0.5, 4), pictures=len(rewards))

def compare(runs):
    ours, theirs = summary(runs["alignkit"]), summary(runs["trl"])
    ratio = {clock: {part: round(theirs[clock][part] / ours[clock][part], 2) for part in ("sample", "train", "epoch")} for clock in CLOCKS}
    rounds = [round(b["wall_s"]["epoch"] / a["wall_s"]["epoch"], 2) for a, b in zip(runs["alignkit"], runs["trl"])]
    apart = (ours["reward_mean"] - theirs["reward_mean"]) / math.hypot(ours["reward_sem"], theirs["reward_sem"])
    return dict(alignkit=ours, trl=theirs, ratio_trl_to_alignkit=ratio, ratio_of_each_round=rounds, reward_difference_in_standard_errors=round(apart, 2), rewards_agree=abs(apart) < 3)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; without it the result is printed")
    parser.add_argument("--pipe", type=Path, default=ROOT / "data" / "tiny-sd", help="folder of a pipeline in diffusers format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=30, help="alignkit's micro_batch_size")
    parser.add_argument("--trl-python", help="python of an environment with trl==0.23.1")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "alignkit" / "trl-0.23.1", help="where an environment for TRL is made")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        name, *args = json.loads(a.worker)
        return print(json.dumps(dict(alignkit=alignkit_epochs, trl=trl_epochs)[name](*args)))
    if not (a.pipe / "model_index.json").is_file(): parser.error(f"--pipe: {a.pipe} has no model_index.json")
    python = dict(alignkit=sys.executable, trl=a.trl_python or trl_environment(a.cache))
    runs = dict(alignkit=[], trl=[])
    for k in range(a.rounds):
        for name in sorted(runs, reverse=k % 2 == 1):
            runs[name].append(in_process(python[name], name, str(a.pipe.resolve()), k, a.pairs))
            print(f"round {k + 1}, {name}: {runs[name][-1]['wall_s']['epoch']:.2f} s an epoch, {runs[name][-1]['cpu_s']['epoch']:.2f} s of processor time", file=sys.stderr)
    result = dict(setting=dict(pipe=a.pipe.name, pictures=PICTURES, steps=STEPS, guidance_scale=GUIDANCE, lora_rank=4, learning_rate=LR, updates=UPDATES, rounds=a.rounds, micro_batch_size=a.pairs),
                  **compare(runs), environment=runs["alignkit"][0]["environment"], trl_versions=runs["trl"][0]["environment"]["versions"])
    text = json.dumps(result, indent=1)
    if a.out: a.out.write_text(text + "\n")
    else: print(text)
    if not result["rewards_agree"]: sys.exit("the rewards of the untrained model differ: the work was not equal")

if __name__ == "__main__": main()
