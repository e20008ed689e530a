"""What the claims of the papers need beside training runs: memory planned and really used, operations, a toy with exact likelihood.

    python benchmarks/measures.py line flops memory_k memory_plan memory_executed    # some of them, into data/measures.json

`data/claims.toml` says under [[measure]] what each is. memory_executed makes one update of Stable Diffusion 1.5's architecture with random
weights at 256 pixels, twice, each in a process of its own: about 8 GB of memory and ten minutes on one thread of a CPU. memory_gpu does the
same at 512 pixels where there is a GPU, with all 50 steps.
"""
import argparse, json, sys, time
from pathlib import Path
import common, full_size

OUT = common.ROOT / "data" / "measures.json"
TERA = 1e12

def chain(**changes):
    "AlignProp on one picture, 50 steps, guidance on, float32."
    from alignkit.alignprop import AlignPropConfig
    one = dict(num_epochs=1, samples_per_epoch=1, updates_per_epoch=1, micro_batch_size=1, sample_batch_size=1, num_inference_steps=50)
    return AlignPropConfig(**{**one, "strategy": "full", "guidance_scale": 7.5, "checkpointing": "none", "vae_slicing": 0, **changes})

def of_ddpo(**changes):
    "DDPO on one picture at a time, 50 steps, guidance on."
    from alignkit.ddpo import DDPOConfig
    one = dict(num_epochs=1, samples_per_epoch=2, updates_per_epoch=1, micro_batch_size=1, sample_batch_size=1, num_inference_steps=50)
    return DDPOConfig(**{**one, "guidance_scale": 7.5, **changes})

def memory_plan():
    "GB by `memory.plan` for SD 1.5 at 512 pixels, with the softmax of attention written out as in the papers' time (09_memory)."
    from alignkit.memory import plan
    ways = dict(
        gb_chain_all=chain(trainable="full"), gb_chain_lora=chain(), gb_chain_lora_checkpointed=chain(checkpointing="step"),
        gb_ddpo_lora=of_ddpo(mixed_precision="fp16"))
    return {name: plan("sd15", cfg, attention="math").peak_gb for name, cfg in ways.items()}

def memory_k():
    "GB of AlignProp with the last K of 50 steps kept, by plan."
    from alignkit.memory import plan
    kept = {k: chain() if k == 50 else chain(strategy="last", truncation_k=k) for k in (1, 5, 50)}
    return {f"gb_k{k}": plan("sd15", cfg).peak_gb for k, cfg in kept.items()}

def flops():
    "10^12 operations of a query by what `benchmarks/cards.py` counted, at 512 pixels, 50 steps, guidance; and an A100's rate."
    of = json.loads((common.ROOT / "data" / "cards.json").read_text(encoding="utf-8"))["operations"]
    steps, rows = 50, 2  # guidance draws and trains two rows
    drawn = steps * rows * of["UNet, drawing"]["forward"] + of["decoder"]["forward"]
    lora, inner, decoder = of["UNet, LoRA"], of["UNet, LoRA, in a chain"], of["decoder"]
    ddpo = drawn + steps * rows * (lora["forward"] + lora["backward"])
    again = steps / 2 * rows * (inner["forward"] + inner["backward"])  # checkpointed: each kept step is computed again
    alignprop = drawn + again + decoder["forward"] + decoder["backward"]
    return dict(flops_ddpo=ddpo, flops_alignprop=alignprop, rate_a100=25600 * ddpo / (4 * 3600 * 8))

def line():
    "By seed, 0 to 9: mean over both rewards of 07_rwr's toy after 320 queries, and how far equal weights move the density."
    import contextlib, io
    import matplotlib
    matplotlib.use("Agg")
    cells = json.loads((common.ROOT / "nbs" / "07_rwr.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    page = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        first = next(k for k, c in enumerate(code) if c.startswith("modes, mode_std"))
        for c in [c for c in code[:first] if c.startswith(("#| export", "import", "from"))] + code[first:first + 2]: exec(c, page)
        exec(next(c for c in code if "def learn(" in c), page)
    learn, seeds = page["learn"], range(10)
    problems, base = ((page["bump"], 5.), (page["climb"], 3.)), page["density"](page["Line"](seeds), page["grid"].expand(10, -1)).detach()
    found = {}
    for kind in ("exact", "walk", "denoising"):
        curves = [learn(kind, *problem, seeds=seeds)[0][:, 5] for problem in problems]
        found[f"reward_{kind}"] = [float(x) for x in sum(curves) / 2]
        density = learn("flat", page["bump"], 5., seeds=seeds)[1] if kind == "denoising" else learn(kind, page["bump"], 0., seeds=seeds)[1]
        found[f"moved_{kind}"] = (0.5 * (density - base).abs().sum(1) * page["dx"]).tolist()
    return found

def settings_of(method, pixels, on_gpu):
    "One update that is really made: few steps on a CPU, AlignProp's last of them kept; on a GPU all 50, all kept, and DDPO in float16."
    few = dict(height=pixels, width=pixels, eval_every=0, progress=False, fast="off")
    if not on_gpu: few |= dict(num_inference_steps=4)
    if method == "ddpo": return of_ddpo(**few, mixed_precision="fp16" if on_gpu else "no")
    return chain(checkpointing="step", **few, **({} if on_gpu else dict(strategy="last", truncation_k=1)))

def updated(pipe, method, pixels, on_gpu):
    "GB at the peak of an update, above what Python and the kit take by themselves."
    from alignkit import alignprop, ddpo
    import psutil, torch
    before = psutil.Process().memory_info().rss / 1e9
    module, reward = (alignprop, "jpeg_soft") if method == "alignprop" else (ddpo, "jpeg_compressibility")
    module.train(pipe, reward, "simple_animals", settings_of(method, pixels, on_gpu))
    if on_gpu: return dict(gb=torch.cuda.max_memory_allocated() / 1e9)
    return dict(gb=common.peak() * 2**20 / 1e9 - before)

def _executed(pixels, on_gpu):
    "Peaks of an update by AlignProp and by DDPO, and what the planner says of each."
    from alignkit.memory import plan
    pipe, found = common.ROOT / "runs" / "sd15-random", {}
    if not (pipe / "model_index.json").is_file(): full_size.build(pipe)
    for method in ("alignprop", "ddpo"):
        began = time.perf_counter()
        found[method] = common.in_process(__file__, sys.executable, str(pipe), method, pixels, on_gpu)["gb"]
        device = "cuda" if on_gpu else "cpu"
        found[f"{method}_planned"] = plan(str(pipe), settings_of(method, pixels, on_gpu), resolution=pixels, device=device).peak_gb
        print(method, found, f"{time.perf_counter() - began:.0f} s", flush=True)
    return found

def memory_executed(): return {f"gb_{k.replace('alignprop', 'alignprop_k1')}": v for k, v in _executed(256, False).items()}

def memory_gpu():
    import torch
    if not torch.cuda.is_available(): sys.exit("memory_gpu: there is no GPU here")
    found = _executed(512, True)
    return dict(gb_alignprop_gpu=found["alignprop"], gb_ddpo_gpu=found["ddpo"])

def sd3():
    "A StableDiffusion3Pipeline with the architecture of SD 3 medium and random weights in bfloat16, made where it will be used."
    import tempfile, diffusers, torch, transformers
    from alignkit import tiny
    from alignkit.memory import ARCHITECTURES
    device, parts = "cuda" if torch.cuda.is_available() else "cpu", ARCHITECTURES["sd3"]
    def made(kind, settings):
        if hasattr(diffusers, kind): return getattr(diffusers, kind).from_config(settings)
        return getattr(transformers, kind)(getattr(transformers, kind).config_class(**settings))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device): models = {name: made(*parts[name][-2:]) for name in parts if name not in ("pipeline", "scheduler")}
    torch.set_default_dtype(torch.float32)
    words = tiny.make_tokenizer(tempfile.mkdtemp())
    texts = dict(tokenizer=words, tokenizer_2=words, tokenizer_3=words)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**parts["scheduler"][-1])
    return diffusers.StableDiffusion3Pipeline(scheduler=scheduler, **models, **texts)

def memory_flow(pixels=1024):
    "GB of a DDPO update by Flow-SDE on SD 3's architecture in bfloat16, ten steps, guidance: by plan, and by a GPU."
    import torch
    from alignkit import ddpo
    from alignkit.memory import plan
    cfg = of_ddpo(num_inference_steps=10, sampler="flow_sde", eta=0.7, mixed_precision="bf16", height=pixels, width=pixels, eval_every=0,
                  progress=False, fast="off")
    if not torch.cuda.is_available(): sys.exit("memory_flow: there is no GPU here")
    pipe = sd3()
    torch.cuda.reset_peak_memory_stats()
    ddpo.train(pipe, "jpeg_compressibility", "simple_animals", cfg)
    planned = plan("sd3", cfg, resolution=pixels, device="cuda").peak_gb
    return dict(gb_ddpo_sd3=torch.cuda.max_memory_allocated() / 1e9, gb_ddpo_sd3_planned=planned)

MEASURES = dict(memory_plan=memory_plan, memory_k=memory_k, flops=flops, line=line, memory_executed=memory_executed, memory_gpu=memory_gpu,
                memory_flow=memory_flow)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(MEASURES))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help="for the processes of the measurement itself")
    a = parser.parse_args()
    if a.worker: return print(json.dumps(updated(*json.loads(a.worker))))
    if odd := set(a.what) - set(MEASURES): parser.error(f"what: some of {', '.join(MEASURES)}, got {', '.join(sorted(odd))}")
    from alignkit.folder import environment, write_atomic
    for name in a.what:
        began, gives = time.perf_counter(), MEASURES[name]()
        found = json.loads(a.out.read_text(encoding="utf-8")) if a.out.is_file() else {}
        found[name] = dict(gives=gives, seconds=round(time.perf_counter() - began), **environment())
        write_atomic(a.out, json.dumps(found, indent=1))
        print(name, {k: v if isinstance(v, list) else round(v, 3) for k, v in gives.items()}, flush=True)

if __name__ == "__main__": main()
