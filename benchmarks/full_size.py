"""SD 1.5 at its real size: what `memory.plan` foretells, and what a GPU took.

    python benchmarks/full_size.py --plan plans.json    # anywhere: settings that fit cards of several sizes, and their plans
    python benchmarks/full_size.py --run plans.json --out measured.json # on a GPU: each setting trained for one epoch

The pipeline has the architecture of Stable Diffusion 1.5 and random weights (bytes and seconds do not depend on their values), and is
built once in --pipe; a folder with real weights there does as well. Presets are the papers' own with an epoch of few pictures; what is
done at a time is chosen by `memory.fit` for 95 % of each card. AlignProp keeps all 50 steps, the worst that its random cuts can draw.
Each setting runs in a process of its own: peak bytes are those of PyTorch's allocator from the first picture on, with the weights;
seconds are of the second epoch, after one that warms up. Then the log-probs of sampling are taken again from the training path, with
unchanged weights, in each precision: the ratio of DDPO starts at 1 exactly, or by how much it does not.
"""
import argparse, json, sys, time
from dataclasses import replace
from pathlib import Path
import common

BUDGETS = {"ddpo": (80, 24, 16, 12), "rwr": (24,), "alignprop": (80, 40, 24, 16)}  # GB of the card
FEW = dict(num_epochs=2, samples_per_epoch=8, updates_per_epoch=1)

def config(method):
    "A paper's preset, with epochs of a few pictures and one update."
    from alignkit import alignprop, ddpo, rwr
    if method == "ddpo": return ddpo.preset("ddpo-pytorch", **FEW)
    if method == "rwr": return rwr.preset("rwr-paper", **FEW)
    return alignprop.preset("alignprop-paper", strategy="full", **FEW)

def plans():
    from alignkit.memory import fit, plan
    rows = []
    for method, budgets in BUDGETS.items():
        for gb in budgets:
            began = time.perf_counter()
            try: cfg = fit("sd15", config(method), 0.95 * gb)
            except ValueError as e: rows.append(dict(method=method, card_gb=gb, why=str(e)))
            else:
                found = plan("sd15", cfg)
                chosen = {k: getattr(cfg, k) for k in cfg.knobs()[0]}
                rows.append(dict(method=method, card_gb=gb, chosen=chosen, plan_gb=found.peak_gb, plan_at=found.peak_at))
            print(rows[-1], f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return rows

def build(folder):
    "A StableDiffusionPipeline with the architecture of SD 1.5 and random weights."
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from alignkit import tiny
    from alignkit.memory import ARCHITECTURES
    parts = ARCHITECTURES["sd15"]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        unet = UNet2DConditionModel.from_config(parts["unet"][2]).half()
        vae = AutoencoderKL.from_config(parts["vae"][2]).half()
        text = CLIPTextModel(CLIPTextConfig(**parts["text_encoder"][2])).half()
    tokenizer, scheduler = tiny.make_tokenizer(folder / "tokenizer"), DDIMScheduler.from_config(parts["scheduler"][2])
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(folder)

def trained(pipe, method, chosen):
    "One setting, in a process of its own."
    from alignkit import alignprop, ddpo, rwr
    cfg = replace(config(method), **chosen)
    reward = "jpeg_soft" if method == "alignprop" else "jpeg_compressibility"
    run = dict(ddpo=ddpo, rwr=rwr, alignprop=alignprop)[method].train(pipe, reward, "simple_animals", cfg)
    first, second = run.rows
    seconds = {k: round(second[k], 2) for k in ("sample_s", "reward_s", "train_s")}
    return dict(measured_gb=second["peak_mem_bytes"] / 1e9, epoch_s=round(second["wall_s"] - first["wall_s"], 2), **seconds)

def ratios(pipe, precision):
    "How far the ratio is from 1 before any update: log-probs of sampling against those of training micro-batches of other sizes."
    import torch
    from alignkit.ddpo import pair_log_prob
    from alignkit.logprob import step_log_prob
    from alignkit.mdp import get_sampler, policy, rollout, sample_noise
    from alignkit.pipelines import cast, open_model
    dtype, B, S = dict(no=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[precision], 4, 6
    model = open_model(pipe, device="cuda")
    for part in (model.net, *model.frozen): cast(part, dtype)
    sampler, cond, empty = get_sampler(model, S, 1.), model.encode(["a cat", "a dog"] * (B // 2)), model.encode([None])
    noise = sample_noise(0, "rollout", 0, range(B), (S + 1, *model.latent_shape)).to("cuda", dtype)
    by_step = [(torch.arange(B), torch.full((B,), i)) for i in range(S)]
    row, at = torch.cartesian_prod(torch.arange(B), torch.arange(S)).T
    mixed = {"4, mixed": 4, "2": 2, "1": 1, "24": 24}
    ways = {"4, the same": by_step} | {name: list(zip(row.split(n), at.split(n))) for name, n in mixed.items()}
    found = {}
    with torch.no_grad():
        walk = rollout(policy(model, model.net, sampler, cond, empty, 5.), noise, step_log_prob)
        for name, batches in ways.items():
            def now(r, i): return pair_log_prob(policy(model, model.net, sampler, cond[r], empty, 5.), walk, r, i)
            shift = [now(r, i) - walk.log_probs[r, i] for r, i in batches]
            found[name] = torch.cat(shift).exp().sub(1).abs().max().item()
    return found

def measured(a):
    if not (a.pipe / "model_index.json").is_file(): build(a.pipe)
    from alignkit.folder import environment
    setting = dict(pipe="the architecture of Stable Diffusion 1.5 at 512 pixels", changes=FEW, alignprop_strategy="full")
    rows, result = [], dict(setting=setting, **environment())
    for row in json.loads(a.run.read_text()):
        if "chosen" not in row: continue
        began = time.perf_counter()
        try: found = common.in_process(__file__, sys.executable, "train", str(a.pipe), row["method"], row["chosen"])
        except SystemExit as e: found = dict(failed=str(e)[-600:])
        rows.append({**row, **found})
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    away = {p: common.in_process(__file__, sys.executable, "ratio", str(a.pipe), p) for p in ("no", "bf16", "fp16")}
    return dict(result, runs=rows, largest_ratio_minus_1=away)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, help="choose settings, and write them with their plans to this file")
    parser.add_argument("--run", type=Path, help="train the settings of this file")
    parser.add_argument("--pipe", type=Path, default=Path("runs/sd15-random"), help="folder of the pipeline; made where there is none")
    parser.add_argument("--out", type=Path, help="JSON file; without it the result is printed")
    parser.add_argument("--worker", help="for the processes of the measurement itself")
    a = parser.parse_args()
    if a.worker:
        what, *args = json.loads(a.worker)
        return print(json.dumps(dict(train=trained, ratio=ratios)[what](*args)))
    if a.plan: return a.plan.write_text(json.dumps(plans(), indent=1) + "\n")
    if a.run: return common.write(a, measured(a))
    parser.error("--plan FILE or --run FILE")

if __name__ == "__main__": main()
