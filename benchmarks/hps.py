"""Human preference scores: alignkit's `hps` against hpsv2's own `score`, on the same weights, pictures and prompts.

    python -m venv other && other/bin/pip install -e '.[hps]'   # an environment of its own, see below
    other/bin/python benchmarks/hps.py --checkpoint HPS_v2.1_compressed.pt --version v2.1
    other/bin/python benchmarks/hps.py          # a small random model in the same layout: nothing is downloaded

hpsv2x wants pytest 7.2.0 and protobuf before 4, and a torchvision made for the torch that is there: the three together break other
environments, and so alignkit needs none of them for its own `hps`. Both sides are asked for every pair of picture and prompt; both
compute in float32 on the CPU, where hpsv2's autocast does nothing. The pictures are smooth noise of several shapes.
"""
import argparse, json, sys, tempfile
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from common import ROOT

SMALL = dict(embed_dim=24, vision_cfg=dict(image_size=56, layers=2, width=48, head_width=3, patch_size=14),
             text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=16, layers=2))
SIZES = [(512, 512), (768, 512), (300, 640), (224, 224), (90, 130)]
PROMPTS = ["a cat", "a hippopotamus riding a bike", "Salt &amp; pepper: 2 grey   mice, oil on canvas",
           "an octopus playing chess " + "very " * 90]
MOST = 5e-5  # between two cosines of float32 networks of 32 layers, and pictures whose resizing rounds on its own

def pictures():
    rng = np.random.RandomState(0)
    rough = [rng.randint(0, 256, (-(-h // 16), -(-w // 16), 3), dtype=np.uint8) for h, w in SIZES]
    return [Image.fromarray(r).resize((w, h), Image.BICUBIC) for r, (h, w) in zip(rough, SIZES)]

def own_tokenizer(folder):
    "hpsv2's vocabulary as transformers reads it."
    from hpsv2.src.open_clip.tokenizer import SimpleTokenizer
    known = SimpleTokenizer()
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({marks.get(k, k): v for k, v in known.encoder.items()}), encoding="utf-8")
    merges = sorted(known.bpe_ranks, key=known.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    return folder

def theirs(config, checkpoint, images):
    "hpsv2.img_score.score of every picture and prompt; it reads its checkpoint at every call."
    from hpsv2 import img_score
    from hpsv2.src import open_clip
    img_score.device = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "of-the-benchmark.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
    torch.manual_seed(0)
    how = dict(precision="fp32", light_augmentation=True, output_dict=True)
    model, _, look = open_clip.create_model_and_transforms("of-the-benchmark", None, **how)
    img_score.model_dict.update(model=model, preprocess_val=look)
    if not checkpoint.exists():
        torch.save({"state_dict": model.state_dict()}, checkpoint)
    return torch.tensor([[float(img_score.score(image, prompt, cp=str(checkpoint))[0]) for prompt in PROMPTS] for image in images])

def ours(version, checkpoint, tokenizer, images):
    sys.path.insert(0, str(ROOT))
    from alignkit.clip_rewards import hps
    reward = hps(version, str(checkpoint), str(tokenizer))
    def asked(image): return reward(torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].expand(len(PROMPTS), -1, -1, -1) / 255, PROMPTS)
    with torch.no_grad(): return torch.stack([asked(image) for image in images])

def config_of(hpsv2_folder): return json.loads((hpsv2_folder / "src/open_clip/model_configs/ViT-H-14.json").read_text())

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="hpsv2's weights; without it a small random model")
    parser.add_argument("--version", default="v2.1", choices=("v2", "v2.1"))
    args = parser.parse_args()
    import hpsv2
    full = config_of(Path(hpsv2.__file__).parent)
    with tempfile.TemporaryDirectory() as scratch:
        folder, images = Path(scratch), pictures()
        tokenizer = own_tokenizer(folder)
        checkpoint = args.checkpoint or folder / "HPS_v2.1_compressed.pt"
        asked = theirs(full if args.checkpoint else SMALL, checkpoint, images)
        got = ours(args.version, checkpoint, tokenizer, images)
    off = (got - asked).abs().max().item()
    print(f"{got.numel()} scores from {asked.min():.4f} to {asked.max():.4f}; largest difference {off:.1e} (at most {MOST:g})")
    sys.exit(off > MOST)
