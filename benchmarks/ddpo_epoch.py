"""One epoch of DDPO: alignkit against TRL 0.23.1's DDPOTrainer, at equal work, on one CPU thread or on a GPU.

    python benchmarks/ddpo_epoch.py --out ddpo_epoch.json
    python benchmarks/ddpo_epoch.py --trl-python PATH   # an environment that has TRL already

The work is that of TRL's documented example (the command line in its examples/scripts/ddpo.py): 24 pictures an epoch, guidance 5,
LoRA of rank 4 on the attention layers, AdamW 3e-4, 8 updates an epoch, here with 20 DDIM steps, in float32 unless --precision says
otherwise. Each library takes its own batches, which change speed and memory and not the update: TRL, as in that example, samples 4 x 6
pictures and trains on one timestep of 3 at a time; alignkit samples 24 and trains on --pairs pairs of picture and timestep. Rounds
alternate the order; in each, either library runs one epoch to warm up and one that is timed, in a process of its own. Reported are medians
over the rounds, and the ratio of every round. Rewards are those of the epochs before any update: the means must agree within noise.
TRL needs an environment of its own: without --trl-python one is made in --cache (1.5 GB).
"""
import argparse, json, sys
import common
from common import CLOCKS, now, peak, peak_gpu

PICTURES, STEPS, GUIDANCE, LR, UPDATES = 24, 20, 5., 3e-4, 8

# ---- one library, in a process of its own

class Meter:
    "The reward is called between sampling and training, so it can tell the parts of an epoch apart, for either library."
    def __init__(self):
        from alignkit.rewards import jpeg_compressibility
        self.score, self.rewards, self.epochs = jpeg_compressibility, [], []
        self.loaded = peak()
        self.start, self.calls = now(), []
    def reward(self, images, prompts):
        began = now()
        r = self.score(images, prompts)
        if not self.epochs: self.rewards += r.tolist()  # of the untrained model
        self.calls.append((began, now()))
        return r
    def end_epoch(self, *_):
        marks = self.start, self.calls[0][0], self.calls[-1][1], now()
        wall, cpu = ([b[k] - a[k] for a, b in zip(marks, marks[1:])] for k in (0, 1))
        names = "sample", "reward", "train", "epoch"
        self.epochs.append({clock: dict(zip(names, [*parts, sum(parts)])) for clock, parts in zip(CLOCKS, (wall, cpu))})
        self.start, self.calls = now(), []
    def report(self):
        memory = dict(peak_rss_mb=peak(), rss_growth_mb=peak() - self.loaded, **peak_gpu())
        return dict(**self.epochs[-1], rewards=self.rewards, **memory)

def alignkit_epochs(pipe, seed, pairs, precision):
    from alignkit.ddpo import preset, train
    from alignkit.pipelines import load
    from alignkit.folder import environment
    pipe, meter = load(pipe), Meter()
    cfg = preset(
        "trl", mixed_precision=precision, num_epochs=2, seed=seed, samples_per_epoch=PICTURES, updates_per_epoch=UPDATES,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, learning_rate=LR, sample_batch_size=PICTURES, micro_batch_size=pairs)
    train(pipe, meter.reward, "simple_animals", cfg, callbacks=(meter.end_epoch,))
    return dict(meter.report(), environment=environment())

def trl_epochs(pipe, seed, _, precision):
    from accelerate import PartialState
    PartialState()  # before TRL's logger asks for it
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from alignkit.prompts import get_prompts
    from alignkit.folder import environment
    pipe, source = DefaultDDPOStableDiffusionPipeline(pipe), get_prompts("simple_animals")
    drawn = (source.sample(seed, epoch, i) for epoch in range(2) for i in range(PICTURES))  # as alignkit draws them
    meter = Meter()
    cfg = DDPOConfig(
        mixed_precision=precision, seed=seed, sample_batch_size=PICTURES // 4, sample_num_batches_per_epoch=4, sample_num_steps=STEPS,
        sample_guidance_scale=GUIDANCE, train_batch_size=PICTURES // UPDATES, train_gradient_accumulation_steps=1,
        train_learning_rate=LR, save_freq=10**6)
    trainer = DDPOTrainer(cfg, lambda images, prompts, _: (meter.reward(images, prompts), {}), lambda: (next(drawn), {}), pipe)
    pipe.set_progress_bar_config(disable=True)
    for epoch in range(2):
        trainer.step(epoch, epoch * UPDATES)
        meter.end_epoch()
    return dict(meter.report(), environment=environment())

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.arguments(parser)
    parser.add_argument("--pairs", type=int, default=30, help="alignkit's micro_batch_size")
    parser.add_argument("--precision", default="no", choices=("no", "fp16", "bf16"), help="mixed precision of both")
    a = parser.parse_args()
    if a.worker:
        name, *args = json.loads(a.worker)
        return print(json.dumps(dict(alignkit=alignkit_epochs, trl=trl_epochs)[name](*args)))
    runs = common.rounds(__file__, a, a.pairs, a.precision)
    setting = dict(pipe=a.pipe.name, pictures=PICTURES, steps=STEPS, guidance_scale=GUIDANCE, lora_rank=4, learning_rate=LR,
                   updates=UPDATES, rounds=a.rounds, micro_batch_size=a.pairs, mixed_precision=a.precision)
    result = dict(setting=setting, **common.compare(runs), environment=runs["alignkit"][0]["environment"],
                  trl_versions=runs["trl"][0]["environment"]["versions"])
    common.write(a, result)
    if not result["rewards_agree"]: sys.exit("the rewards of the untrained model differ: the work was not equal")

if __name__ == "__main__": main()
