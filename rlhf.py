"""
Teach a model what people prefer, and what a program can check.

    completion_logprobs                      what a model thinks of the tokens of a response
    group_advantages, gae                    how much better a response, or a token, was than expected
    Rollout, reinforce_loss ... gspo_loss    policy gradients: sampled responses -> loss
    Pairs, dpo_loss ... reward_loss          preferences: a chosen and a rejected response -> loss
    train_on_pairs, train_on_rollouts        the two loops

Run     python rlhf.py dpo --model=out/merged                      # preferences; --loss=ipo, kto, orpo, simpo, cpo ...
        python rlhf.py reward --model=out/merged                   # a reward model from the same pairs
        python rlhf.py grpo --model=out/merged                     # rewards of a program; --loss=dapo, rloo, gspo ...
        python rlhf.py ppo --model=out/merged --reward=out/reward  # ... or a reward model, or FILE.py:FUNCTION
        python rlhf.py collect --model=out/merged --out=mine.jsonl # you choose between two samples: pairs for dpo
        python rlhf.py judge --model=out/aligned --other=out/merged           # win rate of two models
Reads   a plain model folder (finetune_lora.py --merge makes one), preferences or tasks as prepare.py tinyworld writes
Writes  <out>/  a plain model folder; log.jsonl (every quantity is defined below); loss.png, or for grpo and ppo
        rewards.png; manifest.json, state/
You see held-out rewards rise. The tiny world, right and terse answers: dpo 0.00 -> 0.99 in 13 s, grpo 0.10 -> 0.85 in
        62 s (2026-11-26, one core; bench/rlhf.py); then python rlhf.py judge says by how much a model is better
Next    python evaluate.py --model out/merged out/aligned
Papers  REINFORCE (Williams 1992), PPO (arXiv:1707.06347), GAE (1506.02438), RLHF (2203.02155), RLOO (2402.14740),
        GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071),
        DPO (2305.18290), robust DPO (2403.00409), IPO (2310.12036), KTO (2402.01306), ORPO (2403.07691),
        SimPO (2405.14734), CPO (2401.08417), APO (2408.06266), estimates of the KL divergence (Schulman 2020,
        joschu.net/blog/kl-approx.html)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import contextlib
import copy
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tyro.conf import Positional

import sample
from data.metrics import ece
from data.pairs import end_of_answer, open_pairs, open_tasks, pairs_of_step
from finetune_lora import add_adapters, adapters_off, make_classifier, merge, trained, unmerge
from model import Linear, load_model, save_model, upcast
from nanopath.collect import check_command, collect_or_judge
from nanopath.devices import Machine
from nanopath.finetuning import check_same, hashes_of
from nanopath.flags import Bound, Count, Positive, Rate, Share
from nanopath.rewards import plot_rewards, reward_functions
from nanopath.run import Guard, Log, check_settings, earlier_run, run_stage
from train import AdamW, finish_gradients, lr_at, set_rates


@dataclass
class Config:
    # dpo, reward: learn from pairs; grpo, ppo: from rewards; collect: votes of people; judge: win rate of two models
    what: Positional[Literal["dpo", "reward", "grpo", "ppo", "collect", "judge"]] = "dpo"
    model: str = ""                 # plain model folder, or OWNER/NAME on the Hub; empty: the newest merged one in out/
    dataset: str = ""               # preferences or tasks: a folder under data/, or a file; empty: the tiny world
    out: str = "out/aligned"        # folder to write; collect and judge: a file, NAME.jsonl
    # what is learnt
    method: Literal["lora", "full"] = "lora"  # full: a frozen copy of the model is the reference
    rank: Positive = 16             # of LoRA
    alpha: Rate = 32.0              # scale = alpha / rank
    loss: str = ""                  # see PREFERENCE_LOSSES and POLICY_LOSSES; empty: dpo, grpo, ppo
    beta: Rate = 0.0                # dpo: how strongly the reference holds; 0: as the paper of the loss has it
    smoothing: Share = 0.0          # dpo: share of pairs that are believed to be the wrong way round
    margin: Rate = 1.0              # simpo: gamma, how much better the chosen response must be
    # roll-outs
    reward: str = ""                # FILE.py:FUNCTION(row, text), a reward model's folder, grade or style; empty: grade
    gold: str = ""                  # another reward, only measured: it shows when --reward is cheated
    prompts: Positive = 16          # of each step, over all processes
    group_size: Positive = 8        # responses to each prompt
    max_new_tokens: Positive = 48   # of a response
    temperature: Annotated[float, Bound(0.01)] = 1.0  # of the samples
    updates: Positive = 1           # optimizer steps with the responses of one step
    kl: Rate = 0.0                  # weight of the KL to the model as it was: in the loss (grpo), in the reward (ppo)
    kl_budget: Rate = 0.0           # stop when the KL of a response (nats) is larger than this; 0: never
    length_penalty: Rate = 0.0      # times length / max_new_tokens is taken from the reward of a response
    # people and judges
    other: str = ""                 # judge: the model to compare with; collect: one of the two samples is of this model
    votes: str = ""                 # collect: read the votes from this file, a key on each line
    page: bool = False              # collect: vote on a local page instead of in the terminal
    judge: str = ""                 # judge: a model folder or http://HOST:PORT/v1 decides, not --reward
    judge_model: str = ""           # the name of the judge at that address
    # batch and length
    batch_size: Positive = 32       # pairs per optimizer step, over all processes
    micro_batch: Count = 0          # pairs or responses per forward pass and process; 0: all of its share
    max_steps: Count = 40           # optimizer steps, or roll-outs with `updates` steps each
    # optimizer
    learning_rate: Rate = 0.0       # peak rate of AdamW; 0: 0.02 / n_embd (grpo, ppo: 0.25 / n_embd), a tenth for full
    warmup_steps: Count = 0         # linear warm-up
    cooldown: Share = 0.5           # last part of the run, in which the rate falls linearly to zero
    grad_clip: Rate = 1.0           # largest global gradient norm; 0: off
    # watching and saving
    eval_every: Count = 10          # steps between looks at held-out pairs or tasks; 0: only at the end
    eval_rows: Positive = 120       # how many of them
    save_every: Count = 100         # steps between checkpoints to resume from; 0: only at the end
    log_every: Positive = 5         # steps between lines on the screen; log.jsonl has every step
    beside: tuple[str, ...] = ()    # other runs in the picture of rewards against the KL
    wandb: bool = False             # also log to Weights & Biases (WANDB_MODE=offline needs no account)
    # machine
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # number format of the matmuls
    seed: Count = 0                 # of initialisation, data order and samples
    resume: bool = False            # continue the run in --out with its own settings; flags still win


# ---------------------------------------------------------------------------------------------------------------------
# What a model thinks of the tokens of a response

def predicting_states(model, ids, starts, ends, width=0):
    """(states (N, C), tokens (N), mask (B, T)): what the output head, or a value head, reads to predict each token of
    the responses; these tokens; and where they are among T columns. The state at a place predicts the token after it.

    ids (B, W), right-padded: row i is a prompt up to starts[i] and a response up to ends[i]. The lengths decide, not
    the ids: many models pad with the id that ends a response. width: T; 0: the length of the longest response.
    """
    longest = int((ends - starts).max())
    assert int(starts.min()) > 0, "a response needs at least one id before it"
    assert not width or width >= longest, f"width={width}: a response has {longest} tokens"
    mask = torch.arange(width or longest, device=ids.device) < (ends - starts)[:, None]
    row, t = mask.nonzero(as_tuple=True)                           # row by row
    place = starts[row] + t
    return model(ids[:, :-1], hidden=True)[row, place - 1], ids[row, place], mask


def token_logprobs(model, states, tokens, temperature=1.0):
    """Log-probabilities (N) of tokens, and entropies (nats, without a gradient) of the distributions they came from.

    Where all logits would be too many, a chunk is in memory at a time, and the backward pass computes it again. A CPU
    multiplies few rows by another kernel, which rounds differently (below 16 rows, measured): they get padded to 32.
    """
    def score(states, tokens):
        states = F.pad(states, (0, 0, 0, max(0, 32 - len(tokens))))
        logprobs = (model.logits(states)[:len(tokens)] / temperature).log_softmax(dim=-1)          # (n, V)
        known = logprobs.detach()
        return logprobs.gather(1, tokens[:, None])[:, 0], -(known.exp() * known).sum(dim=-1)

    rows = max(1, model.max_logits // model.config.vocab_size)
    if len(tokens) <= rows:
        return score(states, tokens)
    chunks = [checkpoint(score, *chunk, use_reentrant=False) for chunk in zip(states.split(rows), tokens.split(rows))]
    return [torch.cat(parts) for parts in zip(*chunks)]


def spread(values, mask):
    """Values (N) at the N places of a mask (B, T), zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def completion_logprobs(model, ids, starts, ends, temperature=1.0, width=0):
    """(log-probabilities of the tokens of the responses, entropies, mask), each (B, T), with zeros in the padding.

    temperature: the one that sampled, since at another one these are not the distributions that were sampled from. On a
    CPU in float32 the bits are the same with and without gradients, and in any micro-batch with the same W.
    """
    states, tokens, mask = predicting_states(model, ids, starts, ends, width)
    logprobs, entropy = token_logprobs(model, states, tokens, temperature)
    return spread(logprobs, mask), spread(entropy, mask), mask


# ---------------------------------------------------------------------------------------------------------------------
# How much better a response, or a token, was than expected

def k1(logprobs, reference):
    """Estimate of KL(pi, reference) = E[log pi - log reference] from a token of pi; right on average."""
    return logprobs - reference


def k2(logprobs, reference):
    return (logprobs - reference).square() / 2


def k3(logprobs, reference):
    """r - 1 - log r with r = reference / pi: never negative, varies less. Too small where pi never samples what the
    reference would. expm1 keeps its digits near r = 1; above r = e^20 it is constant: float32 ends at e^88."""
    log_r = (reference - logprobs).clamp(max=20)
    return torch.expm1(log_r) - log_r


@torch.no_grad()
def rewards_with_kl(scores, logprobs, reference, mask, coefficient):
    """r_t = -c (log pi - log reference), and the score (B) of the response at its last token  (arXiv:2203.02155)."""
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return scores[:, None] * last - coefficient * k1(logprobs, reference) * mask


@torch.no_grad()
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t  (arXiv:1506.02438, equation 16).
    All (B, T); V_t judges the text before token t, and is 0 after the last token. Returns (A, returns R = A + V)."""
    values = values * mask
    delta = (rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values) * mask
    advantages, following = torch.zeros_like(delta), 0.0
    for t in reversed(range(delta.shape[1])):
        advantages[:, t] = following = delta[:, t] + gamma * lam * following
    return advantages, advantages + values


@torch.no_grad()
def whiten(x, mask, add=list):
    """(x - mean) / sqrt(variance + 1e-8) over real tokens. add: sums a list of numbers over processes (Machine.sum)."""
    count, total = add([mask.sum(), (x * mask).sum()])
    centred = (x - total / max(1, count)) * mask
    variance, = add([centred.square().sum()])
    return centred / (variance / max(1, count - 1) + 1e-8) ** 0.5


@torch.no_grad()
def group_advantages(rewards, size, kind="grpo"):
    """Rewards (N), `size` responses to each prompt in a row -> (advantages (N), number of groups with equal rewards).

    grpo      A = (r - mean) / (std + 1e-4)  (arXiv:2402.03300, section 4.1.2)
    dr_grpo   A = r - mean  (arXiv:2503.20783: the std gives more weight to questions that are too easy or too hard)
    rloo      A = r - mean of the others  (arXiv:2402.14740)
    A reward of NaN does not count and has A = 0. Equal rewards have A = 0 exactly, whatever the rounding of their mean.
    """
    r = rewards.view(-1, size)
    count = (~r.isnan()).sum(dim=1, keepdim=True)
    A = r - r.nanmean(dim=1, keepdim=True)
    if kind == "grpo":
        A = A / ((A.square().nansum(dim=1, keepdim=True) / (count - 1)).sqrt() + 1e-4)
    elif kind == "rloo":
        A = A * count / (count - 1)
    equal = r.nan_to_num(nan=-torch.inf).amax(dim=1) <= r.nan_to_num(nan=torch.inf).amin(dim=1)
    return A.masked_fill(equal[:, None], 0).nan_to_num(nan=0.0).flatten(), int(equal.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Policy gradients. A loss is -J; rho = pi(token) / pi_old(token), and A is the advantage. Losses are sums: the caller
# divides by the `units` of the whole batch, so that micro-batches and processes add up to exactly that batch


@dataclass
class Rollout:
    """Sampled responses, one in a row: (B, T), with zeros in the padding on the right."""
    mask: torch.Tensor              # True at tokens of the response; the id that ends it is one of them
    logprobs: torch.Tensor          # log pi(token); only this and values may have a gradient
    old_logprobs: torch.Tensor      # log pi_old(token), of the policy that sampled
    advantages: torch.Tensor
    reference_logprobs: torch.Tensor | None = None  # of the model from which pi should not move far
    values: torch.Tensor | None = None      # PPO: V of the text before the token
    old_values: torch.Tensor | None = None  # PPO: the same when it was sampled
    returns: torch.Tensor | None = None     # PPO: what V should be
    entropy: torch.Tensor | None = None     # of pi before the token; only measured

    def rows(self, part):
        """A micro-batch. part: a slice, or indices of rows."""
        return Rollout(**{name: None if x is None else x[part] for name, x in vars(self).items()})

    def sum(self, x):
        return (x * self.mask).sum(dim=1, keepdim=True)            # (B, 1)

    def mean(self, x):
        return self.sum(x) / self.mask.sum(dim=1, keepdim=True).clamp(min=1)

    def ratio(self, reduce=lambda x: x):
        """rho, at most e^20. In the first step after sampling it is exactly 1, and has the gradient of log pi."""
        return (reduce(self.logprobs) - reduce(self.old_logprobs)).clamp(max=20).exp()


def clip_objective(rho, A, low, high):
    """min(rho A, clip(rho) A), clip(rho) from 1 - low to 1 + high: once pi has moved that far from pi_old, in the
    direction of A, there is no gradient. Also returns where this is so."""
    limited = rho.clamp(1 - low, 1 + high) * A
    return torch.minimum(rho * A, limited), limited < rho * A


def finish_loss(b, reduce, rho, objective, clipped, beta=0.0, **measured):
    """(-J, metrics) of an objective per token (B, T). reduce: b.sum or b.mean. beta: weight of the KL to the reference.

    Metrics are sums over tokens: divide by `tokens`, or by `responses` for a number per response. ratio: rho, clipped:
    no gradient, step_kl: KL from pi_old, kl: KL from the reference, entropy: of pi (nats).
    """
    measured |= {"ratio": rho, "clipped": clipped, "step_kl": k3(b.old_logprobs, b.logprobs)}
    if b.reference_logprobs is not None:
        measured["kl"] = k3(b.logprobs, b.reference_logprobs)
        objective = objective - beta * measured["kl"] if beta else objective
    if b.entropy is not None:
        measured["entropy"] = b.entropy
    metrics = {name: b.sum(x.detach()).sum() for name, x in measured.items()}
    return -reduce(objective).sum(), metrics | {"tokens": b.mask.sum(), "responses": b.mask.any(dim=1).sum()}


def reinforce_loss(b, beta=0.0):
    """J = sum_t A_t log pi(token_t)  (Williams 1992). For samples of pi itself: nothing corrects older ones."""
    return finish_loss(b, b.sum, b.ratio(), b.advantages * b.logprobs, torch.zeros_like(b.mask), beta)


def rloo_loss(b, low=0.2, high=0.2, beta=0.0):
    """J = min(rho A, clip(rho) A), rho = pi(response) / pi_old(response): a response is one action  (arXiv:2402.14740;
    rho, as TRL has it, allows to use samples more than once)."""
    rho = b.ratio(b.sum)                                           # (B, 1)
    return finish_loss(b, b.mean, rho, *clip_objective(rho, b.advantages, low, high), beta)


def ppo_loss(b, low=0.2, high=0.2, value_clip=0.2, value_weight=0.1):
    """J = min(rho A, clip(rho) A) - c/2 max((V - R)^2, (V_clipped - R)^2), V_clipped: at most value_clip from V_old
    (arXiv:1707.06347, equations 7 and 9; the clipped V is in the code of its authors)."""
    rho, near = b.ratio(), b.values.clamp(b.old_values - value_clip, b.old_values + value_clip)
    error = torch.maximum((b.values - b.returns).square(), (near - b.returns).square()) / 2
    objective, clipped = clip_objective(rho, b.advantages, low, high)
    return finish_loss(b, b.sum, rho, objective - value_weight * error, clipped, value_loss=error)


def grpo_loss(b, low=0.2, high=0.2, beta=0.0):
    """J = 1/|o| sum_t [min(rho_t A, clip(rho_t) A) - beta k3_t]: a mean per response o  (arXiv:2402.03300, eq. 3)."""
    rho = b.ratio()
    return finish_loss(b, b.mean, rho, *clip_objective(rho, b.advantages, low, high), beta)


def dr_grpo_loss(b, low=0.2, high=0.2, beta=0.0):
    """J = sum_t min(rho_t A, clip(rho_t) A), without 1/|o|: long wrong responses are not cheap  (arXiv:2503.20783)."""
    rho = b.ratio()
    return finish_loss(b, b.sum, rho, *clip_objective(rho, b.advantages, low, high), beta)


def dapo_loss(b, low=0.2, high=0.28, beta=0.0):
    """The same sum, for a mean over the tokens of all responses; high > low lets unlikely tokens become likely
    (arXiv:2503.14476, equation 8)."""
    return dr_grpo_loss(b, low, high, beta)


def cispo_loss(b, low=1.0, high=4.0, beta=0.0):
    """J = sum_t clip(rho_t) A log pi(token_t), no gradient through the clip, so that all tokens learn
    (arXiv:2506.13585). low = 1: no lower limit."""
    rho = b.ratio().detach()
    limited = rho.clamp(1 - low, 1 + high)
    return finish_loss(b, b.sum, rho, limited * b.advantages * b.logprobs, limited != rho, beta)


def gspo_loss(b, low=3e-4, high=4e-4, beta=0.0):
    """J = min(rho A, clip(rho) A), rho = (pi(o) / pi_old(o))^(1/|o|), the same for all tokens of a response o
    (arXiv:2507.18071, equations 5 and 7)."""
    rho = b.ratio(b.mean)                                          # (B, 1)
    return finish_loss(b, b.mean, rho, *clip_objective(rho, b.advantages, low, high), beta)


POLICY_LOSSES = {"reinforce": (reinforce_loss, "responses"), "rloo": (rloo_loss, "responses"),
                 "ppo": (ppo_loss, "tokens"), "grpo": (grpo_loss, "responses"), "dr_grpo": (dr_grpo_loss, "places"),
                 "dapo": (dapo_loss, "tokens"), "cispo": (cispo_loss, "tokens"), "gspo": (gspo_loss, "responses")}


def units(name, mask, max_new_tokens):
    """What the sum of this loss is divided by: tokens, responses, or places for tokens, used or not. Empty responses do
    not count."""
    responses = int(mask.any(dim=1).sum())
    counts = {"tokens": int(mask.sum()), "responses": responses, "places": responses * max_new_tokens}
    return counts[POLICY_LOSSES[name][1]]


# ---------------------------------------------------------------------------------------------------------------------
# Preferences. w: chosen, l: rejected, r = log pi(response) - log reference(response). The caller divides by the pairs

@dataclass
class Pairs:
    """A chosen and a rejected response to each prompt, (N) each; log-probabilities are sums over tokens."""
    chosen: torch.Tensor            # log pi(chosen); only this, rejected and nll may have a gradient
    rejected: torch.Tensor
    reference_chosen: torch.Tensor | float = 0.0
    reference_rejected: torch.Tensor | float = 0.0
    chosen_tokens: torch.Tensor | float = 1.0
    rejected_tokens: torch.Tensor | float = 1.0
    nll: torch.Tensor | float = 0.0  # CPO: -log pi(chosen); ORPO: -log pi(prompt and chosen)
    nll_tokens: float = 1.0         # mean number of its tokens in the whole batch: makes nll a mean over tokens

    def ratios(self):
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def means(self):
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def finish_pairs(losses, w, l, **measured):
    """(sum, metrics) of losses (N), with w, l the rewards of the responses. Metrics are sums: divide by `pairs`.

    accuracy: w > l, margin: w - l. Both can be perfect while the chosen response becomes impossible: look at
    chosen_logprob too.
    """
    measured |= {"accuracy": w > l, "margin": w - l}
    metrics = {name: x.detach().sum() for name, x in measured.items()}
    return losses.sum(), metrics | {"pairs": torch.tensor(len(losses))}


def dpo_loss(p, beta=0.1, smoothing=0.0, robust=False):
    """-log sigma(beta (r_w - r_l))  (arXiv:2305.18290, equation 7). smoothing s: share of pairs that are the wrong way
    round: (1 - s) loss + s flipped;  robust: ((1 - s) loss - s flipped) / (1 - 2 s)  (arXiv:2403.00409)."""
    w, l = (beta * r for r in p.ratios())
    loss, flipped = -(1 - smoothing) * F.logsigmoid(w - l), -smoothing * F.logsigmoid(l - w)
    losses = (loss - flipped) / (1 - 2 * smoothing) if robust else loss + flipped
    return finish_pairs(losses, w, l, chosen_logprob=p.chosen)


def ipo_loss(p, beta=0.1):
    """(r_w/|w| - r_l/|l| - 1/(2 beta))^2  (arXiv:2310.12036, equation 17; means over tokens as in TRL, not sums)."""
    w, l = p.ratios()
    losses = (w / p.chosen_tokens - l / p.rejected_tokens - 1 / (2 * beta)).square()
    return finish_pairs(losses, beta * w, beta * l, chosen_logprob=p.chosen)


def kto_loss(p, z0, beta=0.1, desirable=1.0, undesirable=1.0):
    """The mean of d (1 - sigma(beta (r_w - z0))) and u (1 - sigma(beta (z0 - r_l)))  (arXiv:2402.01306, equation 7).
    z0: a number, max(0, mean r of responses beside prompts that are not theirs), over the whole batch."""
    w, l = (beta * r for r in p.ratios())
    losses = desirable * torch.sigmoid(beta * z0 - w) + undesirable * torch.sigmoid(l - beta * z0)
    return finish_pairs(losses / 2, w, l, chosen_logprob=p.chosen)


def orpo_loss(p, beta=0.1):
    """nll - beta log sigma(o_w - o_l), o = log P - log(1 - P), log P: mean log pi per token  (arXiv:2403.07691,
    equations 6 and 7). 1 - P = -expm1(log P) keeps its digits near P = 1, and must not become 0."""
    w, l = (mean.clamp(max=-1e-7) for mean in p.means())
    o_w, o_l = (mean - torch.log(-torch.expm1(mean)) for mean in (w, l))
    losses = p.nll / p.nll_tokens - beta * F.logsigmoid(o_w - o_l)
    return finish_pairs(losses, beta * w, beta * l, chosen_logprob=p.chosen)


def simpo_loss(p, beta=2.0, gamma=1.0):
    """-log sigma(beta (m_w - m_l) - gamma), m: mean log pi per token  (arXiv:2405.14734, equation 6)."""
    w, l = (beta * mean for mean in p.means())
    return finish_pairs(-F.logsigmoid(w - l - gamma), w, l, chosen_logprob=p.chosen)


def cpo_loss(p, beta=0.1, alpha=1.0):
    """-log sigma(beta (log pi_w - log pi_l)) + alpha nll  (arXiv:2401.08417)."""
    w, l = beta * p.chosen, beta * p.rejected
    return finish_pairs(alpha * p.nll / p.nll_tokens - F.logsigmoid(w - l), w, l, chosen_logprob=p.chosen)


def apo_zero_loss(p, beta=0.1):
    """1 - sigma(beta r_w) + sigma(beta r_l): one up, the other down, each by itself  (arXiv:2408.06266, equation 7)."""
    w, l = (beta * r for r in p.ratios())
    return finish_pairs(torch.sigmoid(-w) + torch.sigmoid(l), w, l, chosen_logprob=p.chosen)


PREFERENCE_LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "kto": kto_loss, "orpo": orpo_loss, "simpo": simpo_loss,
                     "cpo": cpo_loss, "apo_zero": apo_zero_loss}


def reward_loss(w, l, margin=0.0, centre=0.0):
    """-log sigma(w - l - margin) + centre (w + l)^2, w and l (N): rewards, read at the last token. Bradley-Terry
    (arXiv:2203.02155, equation 1), with margins (2307.09288), and rewards that are 0 on average (2312.09244)."""
    losses = -F.logsigmoid(w - l - margin) + centre * (w + l).square()
    return finish_pairs(losses, w, l, chosen_reward=w, rejected_reward=l)


# ---------------------------------------------------------------------------------------------------------------------
# What both loops share

@dataclass
class Texts:
    """Prompts, each with a response: ids (B, W), zeros on the right; a response is ids[i, starts[i]:ends[i]]."""
    ids: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, rows, device):
        """rows: [(ids of prompt and response, where the response begins)]."""
        width = max(len(ids) for ids, _ in rows)
        padded = [[*ids, *[0] * (width - len(ids))] for ids, _ in rows]
        numbers = padded, [start for _, start in rows], [len(ids) for ids, _ in rows]
        return cls(*(torch.tensor(n, device=device) for n in numbers))

    @property
    def longest(self):
        """Tokens of the longest response."""
        return int((self.ends - self.starts).max())

    def rows(self, part):
        return Texts(self.ids[part], self.starts[part], self.ends[part])

    def sums(self, model):
        """(sums of the log-probabilities of the responses (B), their tokens (B))."""
        logprobs, _, mask = completion_logprobs(model, self.ids, self.starts, self.ends)
        return logprobs.sum(dim=1), mask.sum(dim=1)


def open_policy(cfg):
    """(cfg, machine, the run's folder, manifest of the run to resume, model with what it learns, its frozen copy or
    None, tokenizer). With LoRA the model is its own reference: adapters_off. There is no dropout anywhere: a response
    has one log-probability."""
    machine, sampling = Machine(cfg.device), cfg.what in ("grpo", "ppo")
    cfg, out, before = earlier_run(cfg, machine)
    check_same(cfg, before, out, ("what", "model", "method", "rank", "alpha", "loss", "reward"))
    if sampling:
        cfg = replace(cfg, batch_size=cfg.prompts * cfg.group_size)                    # of which a micro-batch is part
    check_settings(cfg, out, machine)
    machine.measure(cfg.dtype)
    torch.manual_seed(cfg.seed % 2 ** 63)
    try:
        model, tokenizer = load_model(cfg.model, machine.device)
        if model.prefix is not None or any(hasattr(module, "base") for module in model.modules()):
            raise ValueError(f"is an adapter. Merge it first: python finetune_lora.py --merge={cfg.model}")
        if model.config.labels:
            raise ValueError("is a classifier or a reward model, which cannot answer")
        end_of_answer(tokenizer)                                   # has it a chat template, and a token for the end?
        add_adapters(model, cfg.method, **({"rank": cfg.rank, "alpha": cfg.alpha} if cfg.method == "lora" else {}))
    except ValueError as error:
        raise SystemExit(str(error) if str(error).startswith("--") else f"--model={cfg.model}: {error}") from None
    model.dtype = machine.dtype
    model = model.double() if machine.dtype == torch.float64 else model
    frozen = copy.deepcopy(model).requires_grad_(False) if cfg.method == "full" and cfg.what != "reward" else None
    rate = (0.25 if sampling else 0.02) / model.config.n_embd
    rate = cfg.learning_rate or (rate if cfg.method == "lora" else rate / 10)
    return replace(cfg, learning_rate=rate), machine, out, before, model.eval(), frozen, tokenizer


def begin(cfg, model, tokenizer, rows, before, machine, out):
    """(optimizer, log, guard) of a run on these rows."""
    data = hashes_of(cfg, rows, before, out)
    optimizer = AdamW([dict(params=list(trained(model).values()), peak_lr=cfg.learning_rate)], lr=cfg.learning_rate,
                      betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    log = Log(out, cfg, machine)
    guard = Guard(log, model, [optimizer], before, compiled=False)
    log.open(guard.progress, tokenizer, data, model.config, before)
    log.say(f"resuming at step {guard.progress.step}" if guard.resumed else f"{cfg.what}: "
            f"{sum(p.numel() for p in trained(model).values()):,} numbers learn, rate {cfg.learning_rate:.2g}")
    return optimizer, log, guard


def reference_of(model, frozen):
    """Context with the model as it was before training."""
    return adapters_off(model) if frozen is None else contextlib.nullcontext(frozen)


def add_up(parts, loss_of, interrupted):
    """Gradients of the sum of loss_of(part) = (loss, metrics). Returns the sums, or None after a signal."""
    total, metrics = 0.0, Counter()
    for part in parts:
        if interrupted():
            return None
        loss, found = loss_of(part)
        loss.backward()
        total += loss.item()
        metrics.update({name: float(value) for name, value in found.items()})
    return total, metrics


def sum_metrics(metrics, machine):
    """Sums over all processes of numbers by name."""
    names = sorted(metrics)
    return dict(zip(names, machine.sum([metrics[name] for name in names])))


def finish_step(found, count, guard):
    """Turn summed gradients into those of a mean over `count` units of all processes. Returns the mean loss, the norm
    of the gradient, and the sums of the metrics. No wrapper around the model adds up gradients: processes may have
    different numbers of responses."""
    (total, metrics), machine = found, guard.machine
    for p in trained(guard.raw).values() if machine.world > 1 else ():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    metrics = sum_metrics(metrics | {"loss": total, "asked": guard.asked}, machine)
    guard.stop = metrics.pop("asked") > 0
    return metrics.pop("loss") / count, finish_gradients(guard.raw, 1 / count, guard.cfg.grad_clip), metrics


def write_policy(model, tokenizer, guard):
    """The run's folder: the model as one plain model, merged and put back exactly."""
    value = model.__dict__["_modules"].pop("value", None)          # PPO's critic is not part of the result
    found = merge(model)
    guard.write(save_model, model, tokenizer)
    unmerge(model, found)
    if value is not None:
        model.value = value


def respond(cfg, model, tokenizer, prompts, temperature, seeds=0, each=1):
    """`each` responses to prompts (lists of messages), in a row: [(ids of prompt and response, where it begins)], where
    the id that ends a response is one of its ids; texts; whether each came to an end, or was cut at max_new_tokens; the
    log-probabilities of its tokens as they were sampled.

    In float32 the adapters are merged while the model writes, which makes it 1.3 x as fast. In bf16 they are not: small
    changes of the weights would be rounded away, and the samples would be those of the model before training.
    """
    end, found = end_of_answer(tokenizer), merge(model) if model.dtype != torch.bfloat16 else {}
    prompts = [tokenizer.render(prompt, add_generation_prompt=True)[0] for prompt in prompts]
    prompts = [prompt for prompt in prompts for _ in range(each)]
    new, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    for row, token, logprob in sample.stream(model, prompts, cfg.max_new_tokens, temperature=temperature, seed=seeds,
                                             stop_ids={end}):
        new[row].append(token)
        logprobs[row].append(logprob)
    unmerge(model, found)
    ended = [len(ids) < cfg.max_new_tokens for ids in new]
    coded = [([*prompt, *ids, *[end] * done], len(prompt)) for prompt, ids, done in zip(prompts, new, ended)]
    return coded, [tokenizer.decode(ids).strip() for ids in new], ended, logprobs


def score(rows, coded, texts, ended, rewards, machine):
    """{"reward": (N), "gold": (N)} of responses to tasks; NaN where it could not be computed. A response that was cut
    gets the lowest reward of all responses, at most 0."""
    found = {}
    for name, reward in rewards.items():
        values = torch.tensor(reward(rows, texts, coded), dtype=torch.float32)
        worst = machine.least(float(values.nan_to_num(nan=0.0).min().clamp(max=0.0)))
        found[name] = torch.where(torch.tensor(ended) | values.isnan(), values, worst)
    return found


def look_at_responses(cfg, model, tokenizer, tasks, rewards, machine):
    """Greedy responses to held-out tasks: ({"reward": mean, "gold": mean}, what to show: three of them)."""
    coded, texts, ended, _ = respond(cfg, model, tokenizer, [task["prompt"] for task in tasks], temperature=0.0)
    scores = score([task["row"] for task in tasks], coded, texts, ended, rewards, machine)
    values = scores["reward"].tolist() if "reward" in scores else [math.nan] * len(tasks)
    shown = [f"  ? {task['prompt'][-1]['content']}\n  > {text}" + (f"  ({value:g})" if "reward" in scores else "")
             for task, text, value in list(zip(tasks, texts, values))[:3]]
    if sum(ended) < len(ended) / 2:
        shown.append(f"  {len(ended) - sum(ended)} of {len(ended)} responses were cut: try a larger --max_new_tokens")
    means = {name: values.nanmean().item() for name, values in scores.items()}
    if math.isnan(means.get("reward", 0.0)):
        raise SystemExit(f"--reward={cfg.reward}: not one held-out response has a reward")
    return means, "\n".join(shown)


def keep_best(found, worth, model, tokenizer, log, guard, shown=""):
    """Say and log what was found on held-out rows. If it is the best so far (worth: the larger, the better), the model
    is written. Every process calls it."""
    progress = guard.progress
    better = progress.best is None or -worth <= progress.best
    progress.best = -worth if better else progress.best
    log.line(f"step {progress.step:5d}  held out: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items())
             + "  <- best" * better + f"\n{shown}" * bool(shown))
    log.record(step=progress.step, **{f"val_{key}": value for key, value in found.items()})
    if better:
        write_policy(model, tokenizer, guard)


# ---------------------------------------------------------------------------------------------------------------------
# The loop over pairs

def sides_of(model, pairs):
    """The chosen responses, then the rejected ones."""
    return Texts.of([pair[side] for side in (0, 1) for pair in pairs], model.embed_tokens.weight.device)


def scores_of_sides(model, pairs):
    """What a reward model says of the chosen (N) and of the rejected responses (N): its output at the last token."""
    texts = sides_of(model, pairs)
    return model(texts.ids)[range(len(texts.ids)), texts.ends - 1, 0].chunk(2)


def pair_loss(cfg, model, frozen, pairs, nll_tokens=1.0, z0=0.0):
    """(sum of the losses, metrics) of some pairs."""
    if cfg.what == "reward":
        return reward_loss(*scores_of_sides(model, pairs))
    name, texts = cfg.loss or "dpo", sides_of(model, pairs)
    sums, tokens = texts.sums(model)
    reference, nll = torch.zeros_like(sums), -sums.chunk(2)[0]
    if name in ("dpo", "ipo", "kto", "apo_zero"):
        with torch.no_grad(), reference_of(model, frozen) as other:
            reference, _ = texts.sums(other)
    if name == "orpo":                                             # of the prompt and the response
        chosen = texts.rows(slice(len(pairs)))
        nll = -Texts(chosen.ids, torch.ones_like(chosen.starts), chosen.ends).sums(model)[0]
    p = Pairs(*sums.chunk(2), *reference.chunk(2), *tokens.chunk(2), nll, nll_tokens)
    options = {"dpo": {"smoothing": cfg.smoothing}, "simpo": {"gamma": cfg.margin}, "kto": {"z0": z0}}.get(name, {})
    return PREFERENCE_LOSSES[name](p, **options | ({"beta": cfg.beta} if cfg.beta else {}))


@torch.no_grad()
def mismatched_kl(model, frozen, pairs, machine):
    """KTO's z0: mean of log pi - log reference over responses beside prompts that are not theirs; at least 0. pairs: of
    all processes, each of which reads its share."""
    others = [chosen for chosen, _ in pairs[1:] + pairs[:1]]
    rows = [(ids[:start] + other[first:], start) for ((ids, start), _), (other, first) in zip(pairs, others)]
    rows, total = [(ids[:model.config.block_size], start) for ids, start in rows][machine.rank::machine.world], 0.0
    for i in range(0, len(rows), 32):
        texts = Texts.of(rows[i:i + 32], machine.device)
        with reference_of(model, frozen) as other:
            reference, _ = texts.sums(other)
        total += float((texts.sums(model)[0] - reference).sum())
    total, count = machine.sum([total, len(rows)])
    return max(0.0, total / count)


def whole_batch(cfg, model, frozen, pairs, machine):
    """What a loss needs to know of all pairs of a batch: the mean number of tokens that CPO's or ORPO's nll counts, and
    KTO's z0."""
    nll_tokens = sum(len(ids) - (1 if cfg.loss == "orpo" else start) for (ids, start), _ in pairs) / len(pairs)
    return nll_tokens, mismatched_kl(model, frozen, pairs, machine) if cfg.loss == "kto" else 0.0


def look_at_pairs(cfg, model, frozen, held_out, machine):
    """Means over held-out pairs, by name; of a reward model also how well its probabilities are calibrated."""
    sums, margins, more = Counter(), [], whole_batch(cfg, model, frozen, held_out, machine)
    with torch.no_grad():
        for i in range(0, len(held_out), 32):
            loss, metrics = pair_loss(cfg, model, frozen, held_out[i:i + 32], *more)
            sums.update({"loss": float(loss)} | {key: float(value) for key, value in metrics.items()})
            if cfg.what == "reward":
                w, l = scores_of_sides(model, held_out[i:i + 32])
                margins.append((w - l).float().cpu())
    found = {key: value / sums["pairs"] for key, value in sums.items() if key != "pairs"}
    if cfg.what == "reward":                                       # sigma(margin): the probability that it is better
        found["ece"] = float(ece(torch.cat(margins).abs().sigmoid().numpy(), (torch.cat(margins) > 0).numpy()))
    return found


def train_on_pairs(cfg):
    """dpo and reward: every step takes batch_size pairs; an epoch shuffles them. Metrics are means over pairs.

    The best model is the one with the best responses, because a loss of pairs still falls while a model forgets how to
    answer. Of a reward model, and where no reward is known, it is the one with the lowest loss of held-out pairs.
    """
    cfg, machine, out, before, model, frozen, tokenizer = open_policy(cfg)
    pairs, held_out, tasks, lost, cfg = open_pairs(cfg, tokenizer, model.config.block_size)
    if cfg.what == "reward":
        make_classifier(model, ["reward"])
    known = cfg.reward or all("skill" in task["row"] for task in tasks)
    rewards = reward_functions(cfg, machine, load_model, [tokenizer]) if known and cfg.what == "dpo" else {}
    optimizer, log, guard = begin(cfg, model, tokenizer, [pairs, held_out], before, machine, out)
    progress, flops = guard.progress, model.flops_per_token(64)
    names = ("accuracy", "margin") + ("chosen_logprob",) * (cfg.what == "dpo")

    def look():
        found, shown = look_at_pairs(cfg, model, frozen, held_out, machine), ""
        if cfg.what == "dpo":
            means, shown = look_at_responses(cfg, model, tokenizer, tasks, rewards, machine)
            found |= means
        keep_best(found, found.get("reward", -found["loss"]), model, tokenizer, log, guard, shown)

    if progress.step == 0:
        for line in lost:
            log.say(line)
        look()

    while progress.step < cfg.max_steps and not guard.stop:
        log.start_step()
        rate = lr_at(progress.step, cfg) * progress.lr_factor
        set_rates([optimizer], rate)
        batch = pairs_of_step(pairs, progress.step, cfg)
        mine, N = batch[machine.rank::machine.world], len(batch)
        more = whole_batch(cfg, model, frozen, batch, machine)
        found = guard.attempt(lambda micro: add_up(
            [mine[i:i + micro] for i in range(0, len(mine), micro)],
            lambda part: pair_loss(cfg, model, frozen, part, *more), guard.interrupted))
        if found is None:                                          # a signal within a step: the step is dropped
            guard.stop = True
            guard.save(last=True)
            break
        loss, norm, metrics = finish_step(found, N, guard)
        progress.step += 1
        if math.isfinite(norm):
            guard.update()
            tokens = sum(len(ids) for pair in batch for ids, _ in pair)
            log.step(progress, loss, norm, rate, flops, tokens, **{key: metrics[key] / N for key in names})
        elif guard.not_finite(loss, norm, None):
            continue
        evaluating, _, saving = guard.due()
        if saving:
            guard.save(last=guard.stop or progress.step == cfg.max_steps)
        if evaluating and not guard.stop:
            look()
        if evaluating or saving:
            log.plot()
    best = f"reward {-progress.best:.4f}" if rewards else f"loss {progress.best:.4f}"
    log.finish(progress, best=f"; best held-out {best}",
               then=f"python rlhf.py ppo --reward={out}" if cfg.what == "reward" else "")
    machine.close()


# ---------------------------------------------------------------------------------------------------------------------
# The loop over roll-outs

def roll_out(cfg, model, frozen, tokenizer, tasks, step, rewards, machine):
    """group_size responses to each of this process's share of the step's prompts: (Texts, Rollout without advantages,
    rewards (N), sums of what is logged)."""
    share = cfg.prompts // machine.world
    generator = torch.Generator().manual_seed((cfg.seed * 1_000_003 + step) % 2 ** 63)
    order = torch.randperm(len(tasks), generator=generator)
    mine = [tasks[int(order[i % len(tasks)])] for i in range(machine.rank * share, (machine.rank + 1) * share)]
    N = share * cfg.group_size
    first = ((cfg.seed * 100_003 + step) * machine.world + machine.rank) * N
    coded, words, ended, sampled = respond(cfg, model, tokenizer, [task["prompt"] for task in mine], cfg.temperature,
                                           list(range(first, first + N)), cfg.group_size)
    scores = score([task["row"] for task in mine for _ in range(cfg.group_size)], coded, words, ended, rewards, machine)
    texts, parts = Texts.of(coded, machine.device), []
    with torch.no_grad():
        for i in range(0, N, 64):                                  # as much memory as a micro-batch of 64
            part = texts.rows(slice(i, i + 64))
            how = part.ids, part.starts, part.ends, cfg.temperature, texts.longest
            old, entropy, mask = completion_logprobs(model, *how)
            with reference_of(model, frozen) as other:
                parts.append((old, entropy, mask, completion_logprobs(other, *how)[0]))
    old, entropy, mask, reference = (torch.cat(part) for part in zip(*parts))
    lengths = (texts.ends - texts.starts).float()
    logged = {"length": lengths.sum(), "cut": ended.count(False), "kl": (k1(old, reference) * mask).sum(),
              "entropy": entropy.sum(), "responses": N, "tokens": mask.sum()}
    for name, values in scores.items():
        logged |= {name: values.nansum(), f"{name}s": (~values.isnan()).sum()}
    if cfg.temperature == 1:  # |log pi as it sampled - log pi as it learns|: other kernels, by length and batch
        logged["sampler"] = sum(abs(a - b) for row, own in zip(old.tolist(), sampled) for a, b in zip(row, own))
    worth = scores["reward"].to(machine.device) - cfg.length_penalty * lengths / cfg.max_new_tokens
    return texts, Rollout(mask, old, old, torch.zeros_like(old), reference, entropy=entropy), worth, logged


def shown_of(logged, cfg):
    """What a line of the log says of the sums of all processes: rewards, lengths and KL per response, entropy and
    sampler per token, the share of responses that were cut, that have no reward, and whose group has equal rewards."""
    N, tokens = logged["responses"], logged["tokens"]
    found = {name: logged[name] / max(1, logged[f"{name}s"]) for name in ("reward", "gold") if name in logged}
    found |= {"kl": logged["kl"] / N, "length": logged["length"] / N, "entropy": logged["entropy"] / tokens}
    found |= {"cut": logged["cut"] / N, "unscored": 1 - logged["rewards"] / N,
              "equal": logged["equal"] * cfg.group_size / N}
    return found | ({"sampler": logged["sampler"] / tokens} if "sampler" in logged else {})


def with_advantages(cfg, model, texts, b, scores, machine):
    """(the roll-out with its advantages, and for PPO values and returns; how many groups had equal rewards)."""
    if cfg.what == "grpo":
        kind = {"dr_grpo": "dr_grpo", "rloo": "rloo", "reinforce": "rloo"}.get(cfg.loss, "grpo")
        A, equal = group_advantages(scores, cfg.group_size, kind)
        return replace(b, advantages=A[:, None] * b.mask), equal
    total, count = machine.sum([scores.nansum(), (~scores.isnan()).sum()])
    scores = scores.nan_to_num(nan=total / max(1, count))          # neither better nor worse than the others
    with torch.no_grad():
        parts = [value_of(model, texts.rows(slice(i, i + 64)), texts.longest) for i in range(0, len(texts.ids), 64)]
    values = torch.cat(parts)
    rewards = rewards_with_kl(scores, b.old_logprobs, b.reference_logprobs, b.mask, cfg.kl)
    A, returns = gae(rewards, values, b.mask)
    return replace(b, advantages=whiten(A, b.mask, machine.sum), values=values, old_values=values, returns=returns), 0


def value_of(model, texts, width):
    """What the critic says of the text before each token (B, T)."""
    states, _, mask = predicting_states(model, texts.ids, texts.starts, texts.ends, width)
    return spread(upcast(model.value(states)[:, 0]), mask)


def without_zeros(cfg, texts, b):
    """The responses that have a gradient. Those of a group with equal rewards have none, unless the KL is in the loss.
    At least one is returned."""
    if cfg.what == "ppo" or cfg.kl:
        return texts, b
    kept = b.advantages.any(dim=1)
    kept[0] = True
    return texts.rows(kept), b.rows(kept)


def rollout_loss(cfg, model, texts, b, name):
    """(sum of the losses, metrics) of some responses, with today's policy."""
    states, tokens, mask = predicting_states(model, texts.ids, texts.starts, texts.ends, b.mask.shape[1])
    logprobs, entropy = token_logprobs(model, states, tokens, cfg.temperature)
    b = replace(b, logprobs=spread(logprobs, mask), entropy=spread(entropy, mask))
    if name == "ppo":                                              # V reads the model's own last layer
        b = replace(b, values=spread(upcast(model.value(states)[:, 0]), mask))
    return POLICY_LOSSES[name][0](b, **({} if name == "ppo" else {"beta": cfg.kl}))


def train_on_rollouts(cfg):
    """grpo and ppo: every step samples responses, and learns `updates` times from them."""
    cfg, machine, out, before, model, frozen, tokenizer = open_policy(cfg)
    tasks, held_out, lost, cfg = open_tasks(cfg, machine, tokenizer, model.config.block_size)
    if cfg.what == "ppo":                                          # the critic: one number per state, at first zero
        model.value = Linear(model.config.n_embd, 1, device=machine.device, dtype=model.embed_tokens.weight.dtype)
        nn.init.zeros_(model.value.weight)
        nn.init.zeros_(model.value.bias)
    rewards, name = reward_functions(cfg, machine, load_model, [tokenizer]), cfg.loss or cfg.what
    optimizer, log, guard = begin(cfg, model, tokenizer, [tasks, held_out], before, machine, out)
    progress, flops, over = guard.progress, model.flops_per_token(64), False

    def look():
        found, shown = look_at_responses(cfg, model, tokenizer, held_out, rewards, machine)
        keep_best(found, found["reward"], model, tokenizer, log, guard, shown)

    if progress.step == 0:
        for line in lost:
            log.say(line)
        look()
    while progress.step < cfg.max_steps and not guard.stop:
        log.start_step()
        rate = lr_at(progress.step, cfg) * progress.lr_factor
        set_rates([optimizer], rate)
        texts, b, scores, logged = roll_out(cfg, model, frozen, tokenizer, tasks, progress.step, rewards, machine)
        b, equal = with_advantages(cfg, model, texts, b, scores, machine)
        shown = shown_of(sum_metrics(logged | {"equal": equal}, machine), cfg)
        if shown["unscored"] == 1:
            raise SystemExit(f"--reward={cfg.reward}: not one response of step {progress.step} has a reward")
        if over := 0 < cfg.kl_budget < shown["kl"]:
            log.line(f"--kl_budget={cfg.kl_budget}: the KL of a response is {shown['kl']:.2f} nats: stopped")
            guard.save(last=True)
            break
        count = machine.sum([units(name, b.mask, cfg.max_new_tokens)])[0]
        texts, b = without_zeros(cfg, texts, b)
        for update in range(cfg.updates):
            found = guard.attempt(lambda micro: add_up(
                [slice(i, i + micro) for i in range(0, len(texts.ids), micro)],
                lambda part: rollout_loss(cfg, model, texts.rows(part), b.rows(part), name),
                lambda: update == 0 and guard.interrupted()))      # only before the first update can a step be dropped
            if found is None:
                break
            loss, norm, metrics = finish_step(found, count, guard)
            if not math.isfinite(norm):
                break
            guard.update()
        if found is None:                                          # a signal within a step: the step is dropped
            guard.stop = True
            guard.save(last=True)
            break
        progress.step += 1
        if math.isfinite(norm):
            log.step(progress, loss, norm, rate, flops, int(logged["tokens"]) * machine.world, **shown,
                     clipped=metrics["clipped"] / metrics["tokens"])
        elif guard.not_finite(loss, norm, None):
            continue
        evaluating, _, saving = guard.due()
        if saving:
            guard.save(last=guard.stop or progress.step == cfg.max_steps)
        if evaluating and not guard.stop:
            look()
        if (evaluating or saving) and machine.rank == 0:
            plot_rewards(out, [out, *cfg.beside])
    log.finish(progress, early=over, best=f"; best held-out reward {-progress.best:.4f}", picture="rewards.png")
    machine.close()


def main(cfg):
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    cfg = check_command(cfg, {"dpo": PREFERENCE_LOSSES, "grpo": POLICY_LOSSES, "ppo": ["ppo"]})
    if cfg.what in ("collect", "judge"):
        collect_or_judge(cfg, load_model, respond, sample.generate)
    else:
        (train_on_pairs if cfg.what in ("dpo", "reward") else train_on_rollouts)(cfg)


# flags of other stages that this one does not have: nanopath/ reads them
Config.tensor_parallel, Config.shards, Config.dry_run, Config.parallel, Config.checkpointing = 1, 0, False, "ddp", False
Config.block_size, Config.sample_every = 64, 0                     # every evaluation shows responses


if __name__ == "__main__":
    run_stage(main, Config, {}, __doc__)
