"What the comparisons with TRL share: an environment for it, a process for each library, and a summary."
import json, math, os, resource, subprocess, sys, time
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch==2.13.0 trl==0.23.1 diffusers==0.42.1 transformers peft accelerate pandas".split()
CLOCKS = ("wall_s", "cpu_s")

def gpu():
    "torch.cuda where there is one."
    import torch
    return torch.cuda if torch.cuda.is_available() else None

def now():
    if cuda := gpu(): cuda.synchronize()
    return time.perf_counter(), time.process_time()

def peak_gpu(): return dict(peak_gpu_mb=cuda.max_memory_allocated() / 2**20) if (cuda := gpu()) else {}

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # MB

def in_process(script, python, name, *args):
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
               PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    done = subprocess.run([python, script, "--worker", json.dumps([name, *args])], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])

def trl_environment(folder):
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making an environment for TRL in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *PACKAGES], check=True)
        (folder / "complete").touch()
    return str(python)

def arguments(parser):
    parser.add_argument("--out", type=Path, help="JSON file; without it the result is printed")
    parser.add_argument("--pipe", type=Path, default=ROOT / "data" / "tiny-sd", help="folder of a pipeline in diffusers format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl-python", help="python of an environment with trl==0.23.1")
    cache = Path.home() / ".cache" / "alignkit" / "trl-0.23.1"
    parser.add_argument("--cache", type=Path, default=cache, help="where an environment for TRL is made")
    parser.add_argument("--worker", help="for the processes of the comparison itself")

def rounds(script, a, *args):
    "Both libraries in turn, the order alternating; each run in a process of its own."
    if not (a.pipe / "model_index.json").is_file(): sys.exit(f"--pipe: {a.pipe} has no model_index.json")
    python = dict(alignkit=sys.executable, trl=a.trl_python or trl_environment(a.cache))
    runs = dict(alignkit=[], trl=[])
    for k in range(a.rounds):
        for name in sorted(runs, reverse=k % 2 == 1):
            run = in_process(script, python[name], name, str(a.pipe.resolve()), k, *args)
            runs[name].append(run)
            wall, cpu = (run[clock]["epoch"] for clock in CLOCKS)
            print(f"round {k + 1}, {name}: {wall:.2f} s an epoch, {cpu:.2f} s of processor time", file=sys.stderr)
    return runs

def summary(runs):
    rewards = [r for run in runs for r in run["rewards"]]
    out = {clock: {part: round(median(r[clock][part] for r in runs), 3) for part in runs[0][clock]} for clock in CLOCKS}
    memory = [name for name in ("peak_rss_mb", "rss_growth_mb", "peak_gpu_mb") if name in runs[0]]
    out |= {name: round(median(r[name] for r in runs)) for name in memory}
    sem = stdev(rewards) / len(rewards)**0.5
    return dict(out, reward_mean=round(mean(rewards), 4), reward_sem=round(sem, 4), pictures=len(rewards))

def compare(runs):
    ours, theirs = summary(runs["alignkit"]), summary(runs["trl"])
    def ratios(clock): return {part: round(theirs[clock][part] / ours[clock][part], 2) for part in ours[clock] if part != "reward"}
    each = [round(b["wall_s"]["epoch"] / a["wall_s"]["epoch"], 2) for a, b in zip(runs["alignkit"], runs["trl"])]
    apart = (ours["reward_mean"] - theirs["reward_mean"]) / math.hypot(ours["reward_sem"], theirs["reward_sem"])
    return dict(alignkit=ours, trl=theirs, ratio_trl_to_alignkit={clock: ratios(clock) for clock in CLOCKS}, ratio_of_each_round=each,
                reward_difference_in_standard_errors=round(apart, 2), rewards_agree=abs(apart) < 3)

def write(a, result):
    text = json.dumps(result, indent=1)
    if a.out: a.out.write_text(text + "\n")
    else: print(text)
