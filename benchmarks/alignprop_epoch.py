"""One epoch of AlignProp: alignkit against TRL 0.23.1's AlignPropTrainer, at equal work, on one CPU thread.

    python benchmarks/alignprop_epoch.py --out alignprop_epoch.json
    python benchmarks/alignprop_epoch.py --trl-python PATH   # an environment that has TRL already

The work: one update from 16 pictures, guidance 5, 20 DDIM steps with eta 1 in float32, LoRA of rank 4 on the attention layers, the
learned aesthetic as reward; with the last 15 steps kept, and with steps kept anew at random (per_step; TRL is handed alignkit's draws,
so that both keep the same steps). Each library takes its own batches and its own way to save memory, which change neither gradient nor
update: TRL goes back through 4 pictures at a time and always checkpoints the UNet; alignkit takes --micro-batch pictures, checkpoints
too (it may store the activations of --stored steps) and decodes 4 pictures at a time. Rounds alternate the order; in each, either
library runs one epoch to warm up and three that are timed (their mean: random truncation differs from epoch to epoch), in a process of
its own. The gradients of both on the same start latents and the same noise are compared in a process of TRL's environment. Rewards are
those of the first epoch: the means must agree within noise.
"""
import argparse, json, sys
from types import SimpleNamespace
import common
from common import CLOCKS, now, peak

PICTURES, STEPS, KEPT, GUIDANCE, LR, TIMED = 16, 20, 15, 5., 1e-3, 3

class Meter:
    def __init__(self):
        from alignkit.rewards import get_reward
        self.score, self.rewards, self.epochs = get_reward("tiny_aesthetic"), [], []
        self.loaded, self.start = peak(), now()
    def reward(self, images, prompts):
        r = self.score(images, prompts)
        if not self.epochs: self.rewards += r.tolist()  # of the untrained model
        return r
    def end_epoch(self, *_):
        end = now()
        self.epochs.append([b - a for a, b in zip(self.start, end)])
        self.start = now()
    def report(self):
        timed = self.epochs[1:]
        seconds = {clock: dict(epoch=sum(e[k] for e in timed) / len(timed)) for k, clock in enumerate(CLOCKS)}
        return dict(**seconds, rewards=self.rewards, peak_rss_mb=peak(), rss_growth_mb=peak() - self.loaded)

def alignkit_epochs(pipe, seed, strategy, micro_batch, stored):
    from alignkit.alignprop import AlignPropConfig, train
    from alignkit.pipelines import load
    from alignkit.rewards import Reward
    from alignkit.folder import environment
    pipe, meter = load(pipe), Meter()
    cfg = AlignPropConfig(
        num_epochs=1 + TIMED, seed=seed, samples_per_epoch=PICTURES, updates_per_epoch=1, micro_batch_size=micro_batch,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, eta=1., learning_rate=LR, max_grad_norm=1.,
        strategy=strategy, truncation_k=KEPT, checkpointing="step", stored_steps=stored, vae_slicing=4)
    train(pipe, Reward(meter.reward, "tiny_aesthetic", differentiable=True), "simple_animals", cfg, callbacks=(meter.end_epoch,))
    return dict(meter.report(), environment=environment())

def trl_epochs(pipe, seed, strategy, *_):
    from accelerate import PartialState
    PartialState()  # before TRL's logger asks for it
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    from alignkit.prompts import get_prompts
    from alignkit.folder import environment
    pipe, source = DefaultDDPOStableDiffusionPipeline(pipe), get_prompts("simple_animals")
    drawn = (source.sample(seed, epoch, i) for epoch in range(1 + TIMED) for i in range(PICTURES))  # as alignkit draws them
    meter = Meter()
    cfg = AlignPropConfig(
        mixed_precision="no", seed=seed, sample_num_steps=STEPS, sample_guidance_scale=GUIDANCE, sample_eta=1.,
        train_batch_size=4, train_gradient_accumulation_steps=PICTURES // 4, train_learning_rate=LR, save_freq=10**6,
        truncated_backprop_rand=strategy == "per_step", truncated_backprop_timestep=STEPS - KEPT, truncated_rand_backprop_minmax=(0, STEPS))
    if strategy == "per_step": keep_as_alignkit(seed)
    def score(images, prompts, _): return meter.reward(images.clamp(0, 1), prompts), {}
    trainer = AlignPropTrainer(cfg, score, lambda: (next(drawn), {}), pipe)
    pipe.set_progress_bar_config(disable=True)
    for epoch in range(1 + TIMED):
        trainer.step(epoch, epoch)
        meter.end_epoch()
    return dict(meter.report(), environment=environment())

def keep_as_alignkit(seed):
    "Hand TRL the steps that alignkit keeps: it keeps step i if i >= randint."
    from trl.models import modeling_sd_base
    from alignkit.alignprop import kept_steps
    from alignkit.mdp import generator_for
    def draws():
        for epoch in range(1 + TIMED):
            for _ in range(PICTURES // 4): yield from kept_steps("per_step", STEPS, generator_for(seed, "kept", epoch, 0))
    kept = draws()
    modeling_sd_base.random = SimpleNamespace(randint=lambda low, high: low if next(kept) else high)

def gradients(pipe, seed, *_):
    "Both libraries on the same latents, noise and adapter: the largest difference of a gradient, in parts of the largest entry."
    import torch
    from accelerate import PartialState
    PartialState()
    from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline, pipeline_step_with_grad
    from alignkit.alignprop import backprop_rollout, kept_steps
    from alignkit.mdp import get_sampler, policy
    from alignkit.pipelines import add_lora, open_model
    from alignkit.rewards import get_reward
    reward, prompts = get_reward("tiny_aesthetic"), ["cat", "dog", "bee", "fox"]
    model = open_model(pipe)
    params = add_lora(model.net, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for p in params: p.data += 0.02 * torch.randn(p.shape, generator=g)  # an adapter that does something
    torch.manual_seed(seed)
    start = torch.randn(4, 4, 16, 16)
    step_noise = [torch.randn(4, 4, 16, 16) for _ in range(STEPS)]
    cond, empty = model.encode(prompts), model.encode([None])
    step = policy(model, model.net, get_sampler(model, STEPS, 1.), cond, empty, GUIDANCE)
    latents = backprop_rollout(step, torch.stack([start, *step_noise], 1), kept_steps("last", STEPS, truncation_k=KEPT))
    mine = torch.autograd.grad(reward(model.decode(latents), prompts).mean(), params)
    theirs = DefaultDDPOStableDiffusionPipeline(pipe, use_lora=True)
    theirs.sd_pipeline.unet = model.net
    theirs.set_progress_bar_config(disable=True)
    torch.manual_seed(seed)
    torch.randn(4, 4, 16, 16)
    out = pipeline_step_with_grad(
        theirs.sd_pipeline, prompt_embeds=cond["text"], negative_prompt_embeds=empty.expand(4)["text"], num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, eta=1., latents=start, output_type="pt",
        truncated_backprop=True, truncated_backprop_rand=False, truncated_backprop_timestep=STEPS - KEPT)
    images = out.images if hasattr(out, "images") else out[0]
    other = torch.autograd.grad(reward(images.clamp(0, 1), prompts).mean(), params)
    largest = max(g.abs().max() for g in other)
    return max(((a - b).abs().max() / largest).item() for a, b in zip(mine, other))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.arguments(parser)
    parser.add_argument("--micro-batch", type=int, default=16, help="alignkit's micro_batch_size, pictures")
    parser.add_argument("--stored", type=int, default=0, help="alignkit's stored_steps")
    a = parser.parse_args()
    if a.worker:
        name, *args = json.loads(a.worker)
        return print(json.dumps(dict(alignkit=alignkit_epochs, trl=trl_epochs, gradients=gradients)[name](*args)))
    result = dict(setting=dict(
        pipe=a.pipe.name, pictures=PICTURES, steps=STEPS, guidance_scale=GUIDANCE, lora_rank=4, learning_rate=LR, updates=1,
        rounds=a.rounds, kept_steps=KEPT, micro_batch_size=a.micro_batch, stored_steps=a.stored))
    for strategy in ("last", "per_step"):
        runs = common.rounds(__file__, a, strategy, a.micro_batch, a.stored)
        result[strategy] = common.compare(runs)
    python = a.trl_python or common.trl_environment(a.cache)
    result["gradient_difference"] = common.in_process(__file__, python, "gradients", str(a.pipe.resolve()), 0)
    result |= dict(environment=runs["alignkit"][0]["environment"], trl_versions=runs["trl"][0]["environment"]["versions"])
    common.write(a, result)
    if not all(result[s]["rewards_agree"] for s in ("last", "per_step")):
        sys.exit("the rewards of the untrained model differ: the work was not equal")
    if result["gradient_difference"] > 1e-3: sys.exit("the gradients differ: the work was not equal")

if __name__ == "__main__": main()
