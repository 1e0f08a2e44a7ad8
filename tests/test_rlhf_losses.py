"""rlhf.py, its losses: equal to TRL's own functions or to float64 twins from the papers, exact in any micro-batches, finite."""
import math
from collections import defaultdict
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import rlhf as r
from model import GPT, GPTConfig

MAX_NEW = 9


def rollout(seed=0, lengths=(5, 1, 8, 3, 8, 6), dtype=torch.float64, distance=0.3):
    """A Rollout of random numbers. distance: of pi from pi_old and from the reference, in nats."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    def noise(scale):
        return torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype) * scale * mask
    logprobs = -noise(1.0).abs()
    values = noise(1.0)
    A = torch.randn(B, 1, generator=g, dtype=torch.float64).to(dtype) * mask
    return r.Rollout(mask, logprobs.requires_grad_(), logprobs.detach() + noise(distance), A, logprobs.detach() + noise(distance),
                     values.requires_grad_(), values.detach() + noise(distance), values.detach() + noise(1.0), noise(1.0).abs())


def pairs(seed=0, N=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    def sums(scale=6.0):
        return (-torch.rand(N, generator=g, dtype=torch.float64) * scale - 0.1).to(dtype)
    tokens = [torch.randint(1, 9, (N,), generator=g) for _ in range(2)]
    return r.Pairs(sums().requires_grad_(), sums().requires_grad_(), sums(), sums(), *tokens)


def gradients(loss, *tensors):
    return [x for x in torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True) if x is not None]


def near(a, b, rtol=1e-6, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)


# ---------------------------------------------------------------------------------------------------------------------
# TRL's own functions, called with what they read of their trainer

class Accelerator:
    device, num_processes, process_index = torch.device("cpu"), 1, 0

    def gather(self, x):
        return x
    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trainer(**more):
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    return SimpleNamespace(accelerator=Accelerator(), _metrics=defaultdict(lambda: defaultdict(list)), aux_loss_enabled=False,
                           model=model, **more)


def trl_policy_loss(b, loss_type="grpo", level="token", low=0.2, high=0.2, beta=0.0):
    from trl import GRPOTrainer
    self = trainer(top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta,
                   loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False, _entropy_bonus_enabled=False,
                   current_gradient_accumulation_steps=1, max_completion_length=MAX_NEW,
                   args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
                   _get_per_token_logps_and_entropies=lambda *a, **k: (b.logprobs, b.entropy, None))
    nothing = torch.zeros(len(b.mask), 0, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(self, None, {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": b.mask.long(), "completion_mask": b.mask.long(),
        "advantages": b.advantages, "old_per_token_logps": b.old_logprobs, "ref_per_token_logps": b.reference_logprobs,
        "num_items_in_batch": b.mask.sum()})
    return loss, {name: values[-1] for name, values in self._metrics["train"].items()}


def trl_rloo_loss(b, low, high):
    from trl import RLOOTrainer
    self = trainer(epsilon_low=low, epsilon_high=high,
                   _get_per_token_logps_and_entropies=lambda *a, **k: (b.logprobs, b.entropy, None))
    nothing = torch.zeros(len(b.mask), 0, dtype=torch.long)
    loss = RLOOTrainer._compute_loss(self, None, {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": b.mask.long(), "completion_mask": b.mask.long(),
        "advantages": b.advantages[:, 0], "old_logps": (b.old_logprobs * b.mask).sum(1)})
    return loss, {name: values[-1] for name, values in self._metrics["train"].items()}


POLICY = {  # ours, its name in POLICY_LOSSES, TRL's
    "grpo": (partial(r.grpo_loss, beta=0.1), "grpo", partial(trl_policy_loss, beta=0.1)),
    "dr_grpo": (r.dr_grpo_loss, "dr_grpo", partial(trl_policy_loss, loss_type="dr_grpo")),
    "dapo": (partial(r.dapo_loss, beta=0.04), "dapo", partial(trl_policy_loss, loss_type="dapo", high=0.28, beta=0.04)),
    "cispo": (r.cispo_loss, "cispo", partial(trl_policy_loss, loss_type="cispo", high=5.0)),
    "cispo, clipped": (partial(r.cispo_loss, high=0.1), "cispo", partial(trl_policy_loss, loss_type="cispo", high=1.1)),
    "gspo": (partial(r.gspo_loss, low=0.05, high=0.05), "gspo", partial(trl_policy_loss, level="sequence", low=0.05, high=0.05)),
    "rloo": (r.rloo_loss, "rloo", partial(trl_rloo_loss, low=0.2, high=0.2)),
}


@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_equal_trl(name):
    ours, unit, theirs = POLICY[name]
    b = rollout()
    loss, metrics = ours(b)
    expected, logged = theirs(b)
    loss = loss / r.units(unit, b.mask, MAX_NEW)
    near(loss, expected)
    near(*gradients(loss, b.logprobs), *gradients(expected, b.logprobs))
    tokens = metrics["tokens"]
    assert tokens == b.mask.sum() and 0 < metrics["clipped"] < tokens or name == "cispo"
    near(metrics["entropy"] / tokens, torch.tensor(logged["entropy"]), rtol=1e-5)
    if "kl" in logged:
        near(metrics["kl"] / tokens, torch.tensor(logged["kl"]), rtol=1e-5)
    if name in ("grpo", "dr_grpo", "dapo"):
        near(metrics["clipped"] / tokens, torch.tensor(logged["clip_ratio/region_mean"]), rtol=1e-5)


def trl_advantages(rewards, size, kind):
    """TRL's: its whole method that scores responses, with a sampler that writes one token, and these rewards."""
    from trl import GRPOTrainer, RLOOTrainer
    N = len(rewards)
    written = [[1]] * N, [[2]] * N, ["x"] * N
    if kind != "rloo":
        written = *written[:2], None, written[2], None, {}, None, None
    self = trainer(environment_factories=None, environments=None, tools=None, pad_to_multiple_of=None, use_vllm=False, beta=0.0,
                   _tokenizer=SimpleNamespace(pad_token_id=0), mask_truncated_completions=False, num_iterations=1,
                   args=SimpleNamespace(per_device_train_batch_size=N, steps_per_generation=1, gradient_accumulation_steps=1,
                                        gradient_checkpointing_kwargs=None), reward_weights=torch.ones(1), reward_funcs=[None],
                   multi_objective_aggregation="sum_then_normalize", scale_rewards="group" if kind == "grpo" else "none",
                   reward_func_names=["f"], normalize_advantages=False, reward_clip_range=None, num_generations=size,
                   _generate=lambda prompts: written, _calculate_rewards=lambda *args: rewards[:, None].clone(),
                   _get_per_token_logps_and_entropies=lambda *a, **k: (torch.zeros(N, 1), None, None), _pending_extra_logs={},
                   _pending_metrics={}, _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)))
    method = (RLOOTrainer if kind == "rloo" else GRPOTrainer)._generate_and_score_completions
    return method(self, [{"prompt": "x"} for _ in range(N)])["advantages"]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_equal_trl(kind):
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards[3] = rewards[8] = rewards[9] = math.nan                # some that could not be scored
    ours, equal = r.group_advantages(rewards, 4, kind)
    assert equal == 0 and ours[3] == ours[8] == 0 and ours.abs().sum() > 5
    near(ours, trl_advantages(rewards, 4, kind), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_groups_with_equal_rewards_teach_nothing_and_are_counted(kind):
    groups = [[0.7] * 7, [0.0] * 6 + [1.0], [math.nan] * 7, [math.nan] * 6 + [2.0]]
    rewards = torch.tensor(groups).flatten()
    advantages, equal = r.group_advantages(rewards, 7, kind)
    assert rewards[:7].mean() != rewards[0]                        # the rounding that would be divided by 1e-4
    assert equal == 3 and advantages[:7].tolist() == [0] * 7 and advantages[14:].tolist() == [0] * 14
    assert advantages[13] > 0 > advantages[12]


# ---------------------------------------------------------------------------------------------------------------------
# TRL's preference losses

def trl_dpo_loss(p, loss_type, beta=0.1, smoothing=0.0):
    """DPOTrainer, with a model whose log-probability of a response is in its first token."""
    from trl import DPOTrainer
    lengths = torch.cat([p.chosen_tokens, p.rejected_tokens])
    W = int(lengths.max()) + 1
    def model(chosen, rejected):
        def outputs(**kwargs):
            logprobs = F.pad(torch.cat([chosen, rejected])[:, None], (0, W - 2))
            return SimpleNamespace(log_probs=logprobs, entropy=logprobs, mean_logits=logprobs, is_top1=logprobs > 0)
        return outputs
    self = trainer(ld_alpha=None, precompute_ref_logps=False, ref_model=model(p.reference_chosen, p.reference_rejected), beta=beta,
                   args=SimpleNamespace(gradient_checkpointing_kwargs=None), f_divergence_type="reverse_kl", loss_types=[loss_type],
                   loss_weights=[1.0], label_smoothing=smoothing, use_weighting=False, _total_train_tokens=0, _tp_size=1)
    mask = (torch.arange(W) > 0) & (torch.arange(W) <= lengths[:, None])                 # place 0 is the prompt
    inputs = {"input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long()}
    loss = DPOTrainer._compute_loss(self, model(p.chosen, p.rejected), inputs, False)
    return loss, {name: values[-1] for name, values in self._metrics["train"].items()}


def trl_kto_loss(p, mismatched, reference_mismatched, beta=0.1, desirable=1.0, undesirable=1.0):
    from trl import KTOTrainer
    N, logprobs = len(p.chosen), torch.cat([p.chosen, p.rejected])[:, None]
    self = trainer(_compute_kl_logps=lambda model, batch: mismatched, precompute_ref_logps=True, calculate_KL=True, loss_type="kto",
                   beta=beta, desirable_weight=desirable, undesirable_weight=undesirable, _total_train_tokens=0, _tp_size=1)
    two = torch.ones(2 * N, 2, dtype=torch.long)
    batch = {"label": torch.tensor([True] * N + [False] * N), "input_ids": two, "attention_mask": two, "completion_mask": two,
             "ref_logps": torch.cat([p.reference_chosen, p.reference_rejected]), "ref_KL_logps": reference_mismatched}
    outputs = SimpleNamespace(log_probs=logprobs, entropy=logprobs, mean_logits=logprobs)
    loss = KTOTrainer._compute_loss(self, lambda **kwargs: outputs, batch, False)
    return loss, {name: values[-1] for name, values in self._metrics["train"].items()}


def trl_pair_loss(p, stage, averages, **settings):
    """ORPOTrainer or CPOTrainer from where it has the log-probabilities of the responses."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    stage = {"orpo": ORPOTrainer, "cpo": CPOTrainer}[stage]
    w, l = p.means() if averages else (p.chosen, p.rejected)
    nll = (p.nll / p.nll_tokens).mean() if torch.is_tensor(p.nll) else torch.zeros(())
    self = trainer(concatenated_forward=lambda model, batch: (w, l, w, l, nll), **settings)
    for name in ("odds_ratio_loss", "cpo_loss"):
        if hasattr(stage, name):
            setattr(self, name, partial(getattr(stage, name), self))
    return stage.get_batch_loss_metrics(self, None, None)


def with_nll(p):
    """The pairs, with a summed negative log-likelihood that depends on the log-probability of the chosen response."""
    return replace(p, nll=-2 * p.chosen, nll_tokens=3.5)


PREFERENCE = {
    "dpo": (r.dpo_loss, partial(trl_dpo_loss, loss_type="sigmoid")),
    "dpo, smoothing": (partial(r.dpo_loss, beta=0.3, smoothing=0.2), partial(trl_pair_loss, stage="cpo", averages=False, beta=0.3,
                       loss_type="sigmoid", label_smoothing=0.2, alpha=0.0, cpo_alpha=0.0)),     # DPO without a reference
    "dpo, robust": (partial(r.dpo_loss, smoothing=0.2, robust=True), partial(trl_dpo_loss, loss_type="robust", smoothing=0.2)),
    "ipo": (partial(r.ipo_loss, beta=0.4), partial(trl_dpo_loss, loss_type="ipo", beta=0.4)),
    "apo_zero": (r.apo_zero_loss, partial(trl_dpo_loss, loss_type="apo_zero")),
    "orpo": (partial(r.orpo_loss, beta=0.2), partial(trl_pair_loss, stage="orpo", averages=True, beta=0.2)),
    "simpo": (r.simpo_loss, partial(trl_pair_loss, stage="cpo", averages=True, loss_type="simpo", beta=2.0, simpo_gamma=1.0,
                                    alpha=0.0, label_smoothing=0.0, cpo_alpha=0.0)),
    "cpo": (partial(r.cpo_loss, alpha=0.7), partial(trl_pair_loss, stage="cpo", averages=False, loss_type="sigmoid", beta=0.1,
                                                    alpha=0.0, label_smoothing=0.0, cpo_alpha=0.7)),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_losses_equal_trl(name):
    ours, theirs = PREFERENCE[name]
    p = pairs()
    if name == "dpo, smoothing":
        p = replace(p, reference_chosen=0.0, reference_rejected=0.0)
    p = with_nll(p) if name in ("orpo", "cpo") else p
    (loss, metrics), (expected, logged) = ours(p), theirs(p)
    loss = loss / metrics["pairs"]
    tolerance = dict(rtol=2e-6, atol=1e-7) if name == "orpo" else {}                     # TRL computes the odds in float32
    near(loss, expected, **tolerance)
    for mine, its in zip(gradients(loss, p.chosen, p.rejected), gradients(expected, p.chosen, p.rejected), strict=True):
        near(mine, its, **tolerance)
        assert mine.abs().min() > 0
    for name_here, name_there in (("accuracy", "accuracies"), ("margin", "margins")):
        near(float(metrics[name_here] / 7), float(logged[f"rewards/{name_there}"]), rtol=1e-5)
    if not name.startswith(("orpo", "simpo")):                     # they log the mean of the means per token
        near(float(metrics["chosen_logprob"] / 7), float(logged["logps/chosen"]), rtol=1e-5)


@pytest.mark.parametrize("shift", [2.0, -50.0])                    # z0 > 0, and a negative estimate, which counts as 0
def test_kto_equals_trl_and_has_no_gradient_through_z0(shift):
    p = pairs()
    mismatched = (torch.randn(14, dtype=torch.float64) + shift).requires_grad_()
    z0 = max(0.0, mismatched.mean().item())
    loss, metrics = r.kto_loss(p, z0, desirable=1.3, undesirable=0.8)
    loss = loss / metrics["pairs"]
    expected, logged = trl_kto_loss(p, mismatched, torch.zeros(14), desirable=1.3, undesirable=0.8)
    near(loss, expected)
    for mine, its in zip(gradients(loss, p.chosen, p.rejected), gradients(expected, p.chosen, p.rejected), strict=True):
        near(mine, its)
    near(float(metrics["margin"] / 7), logged["rewards/margins"])


@pytest.mark.parametrize("margin, centre", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (torch.linspace(0, 1, 7), 0.2)])
def test_reward_loss_equals_trl(margin, centre):
    from trl import RewardTrainer
    w, l = (torch.randn(7, dtype=torch.float64).requires_grad_() for _ in range(2))
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=centre or None), _total_train_tokens=0, _tp_size=1)
    expected = RewardTrainer.compute_loss(self, lambda **inputs: SimpleNamespace(logits=torch.cat([w, l])[:, None]),
                                          {"margin": margin, "attention_mask": torch.ones(14, 3)})
    loss, metrics = r.reward_loss(w, l, margin, centre)
    loss = loss / 7
    near(loss, expected)
    for mine, its in zip(gradients(loss, w, l), gradients(expected, w, l), strict=True):
        near(mine, its)
    near(float(metrics["accuracy"] / 7), self._metrics["train"]["accuracy"][0])


# ---------------------------------------------------------------------------------------------------------------------
# What TRL does not have, from the papers, in plain Python floats

def test_ppo_equals_its_equations():
    b = rollout()
    loss, metrics = r.ppo_loss(b, low=0.2, high=0.3, value_clip=0.25, value_weight=0.5)
    total, value_total, clipped, drift = 0.0, 0.0, 0, 0.0
    rows = {f.name: getattr(b, f.name).tolist() for f in fields(b)}
    for i, row in enumerate(rows["mask"]):
        for t in range(sum(row)):
            new, old, A, V, V_old, R = (rows[name][i][t] for name in ("logprobs", "old_logprobs", "advantages", "values",
                                                                      "old_values", "returns"))
            rho = math.exp(new - old)
            total -= min(rho * A, max(0.8, min(1.3, rho)) * A)
            near_old = max(V_old - 0.25, min(V_old + 0.25, V))
            value_total += 0.5 * max((V - R) ** 2, (near_old - R) ** 2)
            clipped += A > 0 and rho > 1.3 or A < 0 and rho < 0.8
            drift += rho - 1 - math.log(rho)                       # KL(pi_old, pi) from a token of pi_old
    assert loss.item() == pytest.approx(total + 0.5 * value_total, rel=1e-12)
    assert float(metrics["value_loss"]) == pytest.approx(value_total, rel=1e-12)
    assert metrics["clipped"] == clipped > 3
    assert metrics["step_kl"].item() == pytest.approx(drift, rel=1e-9)


def test_gae_equals_the_sum_of_its_definition():
    """A_t = sum_l (gamma lam)^l delta_{t+l} over the real tokens, whatever stands in the padding."""
    b = rollout(3)
    rewards = torch.randn(b.mask.shape, dtype=torch.float64)       # numbers in the padding too
    values = b.old_values + 100.0 * ~b.mask
    gamma, lam = 0.97, 0.9
    advantages, returns = r.gae(rewards, values, b.mask, gamma, lam)
    for i, n in enumerate(b.mask.sum(1).tolist()):
        V = values[i, :n].tolist() + [0.0]                         # no bootstrapping after the end
        delta = [rewards[i, t].item() + gamma * V[t + 1] - V[t] for t in range(n)]
        for t in range(n):
            A = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert advantages[i, t].item() == pytest.approx(A, rel=1e-12)
            assert returns[i, t].item() == pytest.approx(A + V[t], rel=1e-12)
        assert advantages[i, n:].abs().sum() == returns[i, n:].abs().sum() == 0
    near(r.gae(rewards, values, b.mask, 1.0, 1.0)[1][:, 0], (rewards * b.mask).sum(1))   # the plain sum of rewards


def test_rewards_with_kl_put_the_score_on_the_last_real_token():
    b = rollout(4, lengths=(3, 1, 0, 6))
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    rewards = r.rewards_with_kl(scores, b.logprobs, b.reference_logprobs, b.mask, 0.05)
    for i, n in enumerate((3, 1, 0, 6)):
        expected = -0.05 * (b.logprobs - b.reference_logprobs)[i, :n].detach()
        if n:
            expected[n - 1] += scores[i]
        near(rewards[i, :n], expected)
        assert rewards[i, n:].tolist() == [0] * (6 - n)
    assert not rewards.requires_grad


def test_whiten_reads_real_tokens_of_all_processes():
    b = rollout(5)
    x = torch.randn(b.mask.shape, dtype=torch.float64) * 3 + 7
    white = r.whiten(x, b.mask)
    near(white[b.mask], (x[b.mask] - x[b.mask].mean()) / x[b.mask].std())
    assert white[~b.mask].abs().sum() == 0
    halves = [(x[:2], b.mask[:2]), (x[2:], b.mask[2:])]            # two processes, whose sums are added up
    counts = [sum(float(f(x, m)) for x, m in halves) for f in (lambda x, m: m.sum(), lambda x, m: (x * m).sum())]
    squares = sum(((x - counts[1] / counts[0]) * m).square().sum().item() for x, m in halves)
    for (x_part, mask), place in zip(halves, (slice(2), slice(2, None))):
        answers = iter([counts, [squares]])
        near(r.whiten(x_part, mask, add=lambda values: next(answers)), white[place])
    assert r.whiten(x[:1, :1], b.mask[:1, :1]).tolist() == [[0.0]]  # one token has no variance


def test_estimates_of_the_kl_divergence():
    """Their means under pi, computed exactly: k1 and k3 are the divergence, k2 nearly so."""
    g = torch.Generator().manual_seed(0)
    pi, reference = torch.randn(2, 50, generator=g, dtype=torch.float64).mul(0.3).log_softmax(dim=1)
    kl = (pi.exp() * (pi - reference)).sum()
    for estimate, error in ((r.k1, 1e-12), (r.k3, 1e-12), (r.k2, 0.2)):
        near((pi.exp() * estimate(pi, reference)).sum(), kl, rtol=error)
    close = pi.float() + 1e-4                                      # float32: exp(d) - 1 - d would be 0 or negative
    near(r.k3(close, close - 1e-4), (close - (close - 1e-4)).double().square() / 2, rtol=2e-3, atol=0)
    assert (r.k3(pi, reference) >= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, micro-batches, the first step, numbers at the edge

LOSSES = {name: (function, name) for name, (function, unit) in r.POLICY_LOSSES.items()}
LOSSES |= {"grpo, kl": (partial(r.grpo_loss, beta=0.1), "grpo"), "dapo, kl": (partial(r.dapo_loss, beta=0.1), "dapo"),
           "reinforce, kl": (partial(r.reinforce_loss, beta=0.1), "reinforce")}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"cispo"}))         # its gradient is that of no function: see the next test
def test_policy_gradients_are_those_of_finite_differences(name):
    function, _ = LOSSES[name]
    b = rollout(6)
    inputs = (b.logprobs, b.values) if name == "ppo" else (b.logprobs,)
    assert torch.autograd.gradcheck(lambda logprobs, values=b.values: function(replace(b, logprobs=logprobs, values=values))[0],
                                    inputs)
    loss, _ = function(b)
    assert torch.autograd.grad(loss, b.logprobs)[0][~b.mask].abs().sum() == 0            # nothing from the padding


def test_cispo_weighs_each_token_by_its_clipped_ratio():
    b = rollout(6)
    loss, metrics = r.cispo_loss(b, low=0.1, high=0.1)
    rho = (b.logprobs - b.old_logprobs).exp().detach()
    near(*gradients(loss, b.logprobs), -(rho.clamp(0.9, 1.1) * b.advantages * b.mask))
    assert metrics["clipped"] == (((rho > 1.1) | (rho < 0.9)) & b.mask).sum() > 3


@pytest.mark.parametrize("name", [*PREFERENCE, "kto", "reward"])
def test_preference_gradients_are_those_of_finite_differences(name):
    p = pairs(1)
    ours = {"kto": partial(r.kto_loss, z0=0.4), "reward": lambda p: r.reward_loss(p.chosen, p.rejected, 0.3, 0.1)}.get(
        name, PREFERENCE.get(name, [None])[0])
    assert torch.autograd.gradcheck(lambda w, l: ours(with_nll(replace(p, chosen=w, rejected=l)))[0], (p.chosen, p.rejected))


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_whole_batch(name):
    """Float32, many ways to divide a batch: the error is rounding, and its mean over batches is nearly zero."""
    function, unit = LOSSES[name]
    errors, size = [], 0.0
    for seed in range(12):
        lengths = torch.randint(1, 9, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        b = rollout(seed, [*lengths, 8], dtype=torch.float32)
        count = r.units(unit, b.mask, MAX_NEW)
        loss, metrics = function(b)
        whole, = torch.autograd.grad(loss / count, b.logprobs, retain_graph=True)
        for parts in ([slice(0, 2), slice(2, 9)], [slice(i, i + 1) for i in range(9)], [[8, 1, 3, 5, 7], [0, 2, 4, 6]]):
            results = [function(b.rows(part)) for part in parts]
            summed, = torch.autograd.grad(sum(loss for loss, _ in results) / count, b.logprobs, retain_graph=True)
            near(summed, whole, rtol=1e-5, atol=1e-7)
            near(sum(loss for loss, _ in results), loss, rtol=1e-5, atol=1e-5)
            for key, value in metrics.items():
                near(sum(m[key] for _, m in results).double(), value.double(), rtol=1e-5)
            errors.append((summed - whole).double().sum().item())
            size += whole.double().abs().sum().item()
    assert abs(sum(errors)) < 1e-7 * size


@pytest.mark.parametrize("name", [*PREFERENCE, "kto"])
def test_pairs_add_up_to_the_whole_batch(name):
    ours = PREFERENCE[name][0] if name in PREFERENCE else partial(r.kto_loss, z0=0.2)
    p = with_nll(pairs(2))
    (loss, metrics) = ours(p)
    parts = [ours(r.Pairs(**{f.name: v[part] if torch.is_tensor(v := getattr(p, f.name)) else v for f in fields(p)}))
             for part in (slice(0, 3), slice(3, 7))]
    near(sum(loss for loss, _ in parts), loss)
    for key, value in metrics.items():
        near(sum(m[key] for _, m in parts).double(), value.double())


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_step_has_ratio_one_and_the_gradient_of_reinforce(name):
    """pi = pi_old: rho is 1 exactly, nothing is clipped, and the gradient is -A, times the weight of a token."""
    function, unit = LOSSES[name]
    b = rollout(7, dtype=torch.float32)
    b = replace(b, old_logprobs=b.logprobs.detach(), reference_logprobs=b.logprobs.detach())
    loss, metrics = function(b)
    assert metrics["ratio"] == metrics["tokens"] == b.mask.sum() and metrics["clipped"] == metrics["step_kl"] == 0
    weight = 1 / b.mask.sum(1, keepdim=True) if unit in ("grpo", "gspo") else 1
    near(*gradients(loss, b.logprobs), -b.advantages * weight * b.mask, rtol=1e-5)
    assert gradients(loss, b.logprobs)[0].abs().sum() > 1


@pytest.mark.parametrize("name", LOSSES)
def test_empty_responses_count_nowhere(name):
    function, unit = LOSSES[name]
    b, lengths = rollout(8, (5, 0, 3, 8, 0)), torch.tensor([0, 2, 3])
    (loss, metrics), (expected, without) = function(b), function(b.rows(lengths))
    near(loss, expected)
    assert r.units(unit, b.mask, MAX_NEW) == r.units(unit, b.mask[lengths], MAX_NEW)
    assert all(metrics[key].isclose(without[key]) for key in metrics) and metrics["responses"] == 3
    empty, zeros = function(b.rows([1, 4]))
    assert empty == 0 and not any(zeros.values()) and torch.autograd.grad(empty, b.logprobs)[0].abs().sum() == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_log_ratios_stay_finite(name, dtype):
    function, _ = LOSSES[name]
    b = rollout(9, dtype=dtype)
    for new, old in ((-0.0, -300.0), (-300.0, -0.0), (-1e4, -1e4)):
        near_zero = torch.zeros_like(b.logprobs)
        b = replace(b, logprobs=(near_zero + new * b.mask).requires_grad_(), old_logprobs=near_zero + old * b.mask,
                    reference_logprobs=near_zero + old * b.mask)
        loss, metrics = function(b)
        assert loss.isfinite() and all(torch.as_tensor(m).isfinite() for m in metrics.values())
        assert all(g.isfinite().all() for g in gradients(loss, b.logprobs))
    b = replace(b, logprobs=torch.full_like(b.logprobs, -0.1).requires_grad_(), reference_logprobs=b.logprobs.detach() * 0 - 60)
    pull, = gradients(r.grpo_loss(replace(b, advantages=b.advantages * 0), beta=1.0)[0], b.logprobs)
    assert (pull[b.mask] > 0).all()                                # far above the reference there still is a way back


@pytest.mark.parametrize("name", [*PREFERENCE, "kto"])
def test_extreme_pairs_stay_finite(name):
    ours = PREFERENCE[name][0] if name in PREFERENCE else partial(r.kto_loss, z0=0.0)
    values = torch.tensor([0.0, -1e-9, -1e-3, -1.0, -1e3, -3e4])
    w, l = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    loss, metrics = ours(r.Pairs(w, l, torch.full((36,), -5.0), torch.full((36,), -5.0)))
    assert loss.isfinite() and all(torch.as_tensor(m).isfinite() for m in metrics.values())
    assert all(g.isfinite().all() for g in gradients(loss, w, l))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of responses

LENGTHS = [(3, 9), (1, 4), (7, 8), (2, 12), (5, 5)]                # where responses start and end; the last is empty


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.25)
    return model.eval()


@pytest.fixture(scope="module")
def texts():
    """ids (5, 12), starts, ends. Every row is padded with its own last id: the id that ends a text is often the padding."""
    ids = torch.randint(61, (5, 12), generator=torch.Generator().manual_seed(1))
    starts, ends = torch.tensor(LENGTHS).T
    for row, end in zip(ids, ends):
        row[end:] = row[end - 1]
    return ids, starts, ends


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [1 << 24, 4 * 61])          # at once, and four rows at a time
def test_completion_logprobs_are_those_of_each_token_given_what_is_before_it(model, texts, temperature, max_logits, monkeypatch):
    monkeypatch.setattr(model, "max_logits", max_logits)
    ids, starts, ends = texts
    logprobs, entropy, mask = r.completion_logprobs(model, *texts, temperature)
    assert logprobs.shape == entropy.shape == mask.shape == (5, 10) and mask.sum() == (ends - starts).sum() == 20
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(2))
    (logprobs * weights).sum().backward()
    chunked = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for i, (start, end) in enumerate(LENGTHS):
        for t in range(end - start):                               # alone, without any padding; the last one ends the text
            p = (model(ids[i:i + 1, :start + t])[0, -1] / temperature).softmax(dim=-1)
            near(logprobs[i, t], p[ids[i, start + t]].log(), rtol=1e-4, atol=1e-5)
            near(entropy[i, t], torch.distributions.Categorical(p).entropy(), rtol=1e-4, atol=1e-5)
            total = total + p[ids[i, start + t]].log() * weights[i, t]
        assert logprobs[i, end - start:].abs().sum() == 0 and not mask[i, end - start:].any()
    total.backward()
    for name, p in model.named_parameters():
        near(chunked[name], p.grad, rtol=1e-3, atol=1e-4)
    model.zero_grad()
    wide = r.completion_logprobs(model, *texts, temperature, width=13)
    assert wide[0].shape == (5, 13) and torch.equal(wide[0][:, :10], logprobs)
    alone = r.completion_logprobs(model, ids[4:], starts[4:], ends[4:])                  # only an empty response
    assert alone[0].shape == (1, 0)
    for wrong in (dict(starts=starts * 0), dict(width=9)):
        with pytest.raises(AssertionError):
            r.completion_logprobs(model, **{"ids": ids, "starts": starts, "ends": ends} | wrong)


@pytest.mark.parametrize("max_logits", [1 << 24, 4 * 61])
def test_the_same_bits_with_and_without_gradients(model, texts, max_logits, monkeypatch):
    monkeypatch.setattr(model, "max_logits", max_logits)
    with torch.no_grad():
        before = r.completion_logprobs(model, *texts, 0.8)
    after = r.completion_logprobs(model.train(), *texts, 0.8)
    model.eval()
    assert after[0].requires_grad and not after[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    b = r.Rollout(after[2], after[0], before[0], after[2] * 1.0)
    assert torch.equal(b.ratio(), torch.ones_like(before[0]))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="measured with the matmuls of MKL and oneDNN")
def test_the_same_bits_in_any_micro_batch_of_the_same_width(monkeypatch):
    """So the ratio is 1 exactly, however the samples are shuffled and divided, and whatever the padding is."""
    g = torch.Generator().manual_seed(4)
    big = GPT(GPTConfig(vocab_size=300, block_size=64))
    for p in big.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1, generator=g)
    ids, starts = torch.randint(300, (6, 40), generator=g), torch.randint(1, 20, (6,), generator=g)
    ends = starts + torch.tensor([1, 2, 9, 20, 5, 13])
    with torch.no_grad():
        whole, entropy, mask = r.completion_logprobs(big, ids, starts, ends, 0.8)
        for part in ([0], [1], [2, 0], [5, 4, 3, 2, 1, 0]):
            padded = torch.where(torch.arange(40) < ends[part][:, None], ids[part], 7)
            for max_logits in (1 << 24, 300 * 5):
                monkeypatch.setattr(big, "max_logits", max_logits)
                parts = r.completion_logprobs(big, padded, starts[part], ends[part], 0.8, width=20)
                assert torch.equal(parts[0], whole[part]) and torch.equal(parts[1], entropy[part])
    assert whole[mask].std() > 0.1


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "ppo"])
def test_a_model_gets_the_same_gradient_from_micro_batches(model, texts, name):
    """As a stage calls it: log-probabilities at the time of sampling, then the loss in parts, divided by units of the whole."""
    loss_of, _ = r.POLICY_LOSSES[name]
    ids, starts, ends = texts
    with torch.no_grad():
        old, _, mask = r.completion_logprobs(model, *texts, 0.8)
    g = torch.Generator().manual_seed(5)
    old = old + 0.1 * torch.randn(old.shape, generator=g) * mask   # some steps ago
    A, values = torch.randn(5, 1, generator=g) * mask, torch.zeros_like(old)
    batch = r.Rollout(mask, old, old, A, values=values, old_values=values, returns=A)
    found = []
    for parts in ([[0, 1, 2, 3, 4]], [[3, 0], [1, 2], [4]]):
        model.zero_grad()
        for part in parts:
            logprobs, entropy, again = r.completion_logprobs(model, ids[part], starts[part], ends[part], 0.8, width=mask.shape[1])
            assert torch.equal(again, mask[part])
            loss, _ = loss_of(replace(batch.rows(part), logprobs=logprobs, entropy=entropy))
            (loss / r.units(name, mask, MAX_NEW)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for whole, summed in zip(*found):
        near(summed, whole, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in found[0]) > 1e-3


def test_values_are_read_where_the_token_is_predicted(model, texts):
    """spread puts what a head makes of the states at the places of the tokens that they predict."""
    ids, starts, ends = texts
    states, tokens, mask = r.predicting_states(model, ids, starts, ends)
    head = torch.randn(32, generator=torch.Generator().manual_seed(3))
    values, chosen = r.spread(states @ head, mask), r.spread(tokens, mask)
    for i, (start, end) in enumerate(LENGTHS):
        near(values[i, :end - start], model(ids[i:i + 1], hidden=True)[0, start - 1:end - 1] @ head, rtol=1e-4, atol=1e-5)
        assert chosen[i].tolist() == ids[i, start:end].tolist() + [0] * (10 - end + start)
