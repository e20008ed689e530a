"""What fits on which card, and how much work an epoch is: the presets of the papers on Stable Diffusion 1.5, counted.

    python benchmarks/cards.py --out data/cards.json    # anywhere; two minutes on one thread of a CPU

Nothing is measured. For cards of several sizes `memory.fit` chooses what is done at a time within nine tenths of their memory, as `train`
does on a card that is otherwise empty; `memory.plan` says what that needs. The operations of one row through the networks are counted by
PyTorch's counter on tensors without memory, with attention written out as matrix products. What they come to in an epoch, and in what
time a GPU may do them, is worked out on the page on cost.
"""
import argparse, sys, time
from pathlib import Path
import common

CARDS = (24, 16, 12, 8)  # GB
PRESETS = (("ddpo", "ddpo-pytorch"), ("ddpo", "trl"), ("ddpo", "ddpo-paper"), ("rwr", "rwr-paper"), ("alignprop", "alignprop-paper"),
           ("alignprop", "aesthetic-k1"))

def network(kind, part):
    "A part of SD 1.5 on the meta device, its attention as matrix products."
    import torch
    from diffusers.models.attention_processor import AttnProcessor
    from alignkit.memory import ARCHITECTURES
    with torch.device("meta"): net = kind.from_config(ARCHITECTURES["sd15"][part][2])
    net.set_attn_processor(AttnProcessor())
    return net.requires_grad_(False).eval()

def counted(run):
    "Floating-point operations of a call and of its backward, in 10^12; a multiplication and an addition are two."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as forward: out = run()
    if not out.requires_grad: return dict(forward=forward.get_total_flops() / 1e12)
    with FlopCounterMode(display=False) as backward: out.sum().backward()
    return dict(forward=forward.get_total_flops() / 1e12, backward=backward.get_total_flops() / 1e12)

def operations():
    "Of one row, at 512 pixels."
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from alignkit.pipelines import add_lora
    unet, vae = network(UNet2DConditionModel, "unet"), network(AutoencoderKL, "vae")
    x, text = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 77, 768, device="meta")
    def step(x): return unet(x, torch.tensor(1, device="meta"), text, return_dict=False)[0]
    def decoding(x): return vae.decode(x, return_dict=False)[0]
    found = {"UNet, drawing": counted(lambda: step(x)), "decoder": counted(lambda: decoding(x.requires_grad_()))}
    full = counted(lambda: (unet.requires_grad_(True), step(x.detach()))[1])
    unet.requires_grad_(False)
    with torch.device("meta"): add_lora(unet)
    inner = counted(lambda: step(x.detach().requires_grad_()))  # of a chain: the input has a gradient too
    return {**found, "UNet, LoRA": counted(lambda: step(x.detach())), "UNet, LoRA, in a chain": inner, "UNet, all weights": full}

def rows():
    "Each preset on each card."
    from alignkit import alignprop, ddpo, rwr
    from alignkit.memory import MARGIN, NothingFits, fit, plan
    for module, name in PRESETS:
        cfg = dict(ddpo=ddpo, rwr=rwr, alignprop=alignprop)[module].preset(name)
        for gb in CARDS:
            began = time.perf_counter()
            try: best = fit("sd15", cfg, MARGIN * gb)
            except NothingFits as e: row = dict(least_gb=float(str(e).split()[-2]))
            else:
                found = plan("sd15", best)
                row = dict(chosen={k: getattr(best, k) for k in best.knobs()[0]}, plan_gb=found.peak_gb, plan_at=found.peak_at)
            row = dict(method=module, preset=name, card_gb=gb, **row)
            print(row, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            yield row

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; without it the result is printed")
    a = parser.parse_args()
    import torch
    setting = dict(pipe="sd15", pixels=512, budget="0.9 of a card's 10^9 bytes")
    common.write(a, dict(setting=setting, operations=operations(), rows=[*rows()], torch=torch.__version__))

if __name__ == "__main__": main()
