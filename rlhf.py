"""
Teach a model what people prefer, and what a program can check.

    completion_logprobs                      what a model thinks of the tokens of a response
    group_advantages, gae                    how much better a response, or a token, was than expected
    Rollout, reinforce_loss ... gspo_loss    policy gradients: sampled responses -> loss
    Pairs, dpo_loss ... reward_loss          preferences: a chosen and a rejected response -> loss

Papers  REINFORCE (Williams 1992), PPO (arXiv:1707.06347), GAE (1506.02438), RLHF (2203.02155), RLOO (2402.14740),
        GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071),
        DPO (2305.18290), robust DPO (2403.00409), IPO (2310.12036), KTO (2402.01306), ORPO (2403.07691),
        SimPO (2405.14734), CPO (2401.08417), APO (2408.06266), estimates of the KL divergence (Schulman 2020,
        joschu.net/blog/kl-approx.html)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    """Estimate of KL(pi, reference) = E[log pi - log reference] from a token of pi; right on average, as k3 is."""
    return logprobs - reference


def k2(logprobs, reference):
    return (logprobs - reference).square() / 2


def k3(logprobs, reference):
    """r - 1 - log r with r = reference / pi: never negative, varies less. expm1 keeps its digits near r = 1; above r =
    e^20 it is constant, because float32 ends at e^88."""
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
