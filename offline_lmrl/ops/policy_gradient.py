"""Policy gradient for language (PPO): KL, rewards per token, advantages, clipped losses, controllers, statistics.

Everything is packed: N agent tokens in the order in which they were written, one episode after another, without
padding and without environment text. A mean over the N is therefore the mean over agent tokens, and no mask is needed.
Losses return one number per token. The caller sums them and divides by the number of agent tokens in the whole
minibatch, over all its micro-batches.

Schulman et al. 2017 (PPO); Ziegler et al. 2019 for the additions for language.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_lmrl.ops.inputs import at_least_float32, check_shapes


def kl_k1(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Compute k1 = log π(a|s) − log π_ref(a|s), an unbiased estimate of KL(π‖π_ref) if a was drawn from π.

    Schulman 2020, "Approximating KL Divergence" (a web page).

    Args:
      log_prob: (N,) log π of the actions taken, in nats.
      ref_log_prob: (N,) log π_ref of the same actions, in nats.
    Returns: (N,) nats; single values may be negative.
    """
    check_shapes("n, n", log_prob, ref_log_prob)
    return log_prob - ref_log_prob


def kl_k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Compute k3 = e^{−k1} − 1 + k1  with  k1 = log π(a|s) − log π_ref(a|s), an estimate of KL(π‖π_ref).

    k3 is unbiased if a was drawn from π, as k1 is. It is never negative, and near π = π_ref it varies less than k1
    (Schulman 2020, "Approximating KL Divergence", a web page). In PPO's statistic `approx_kl`, π is therefore the
    policy that chose the actions, and π_ref is the updated policy.

    Args:
      log_prob: (N,) log π of the actions taken, in nats.
      ref_log_prob: (N,) log π_ref of the same actions, in nats.
    Returns: (N,) nats.
    """
    k1 = kl_k1(log_prob, ref_log_prob)
    return torch.expm1(-k1) + k1


def kl_exact(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Compute KL(π‖π_ref) = Σ_a π(a|s) (log π(a|s) − log π_ref(a|s)).

    Args:
      log_prob: log π of all tokens, (..., V), in nats; those with −inf contribute 0.
      ref_log_prob: log π_ref of all tokens, (..., V), in nats.
    Returns: (...) nats.
    """
    # 0 · −inf is nan, and so is its gradient: replace the difference for tokens that π drops before the product.
    difference = (log_prob - ref_log_prob).masked_fill(log_prob == -torch.inf, 0.0)
    return (log_prob.exp() * difference).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Compute the entropy  −Σ_a π(a|s) log π(a|s) = logsumexp(l) − Σ_a π(a|s) l_a,  in at least fp32.

    Args:
      logits: l, (..., V), at the temperature of the rollout; tokens with −inf contribute 0.
    Returns: (...) nats.
    """
    logits = at_least_float32(logits)
    # 0 · −inf is nan, and so is its gradient: replace the logits of forbidden tokens before the product.
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    return logits.logsumexp(-1) - (logits.softmax(-1) * finite).sum(-1)


def kl_shaped_reward(reward: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """Compute r_t − β · kl_t, the reward per token that PPO maximises.

    Ziegler et al. 2019, section 2; their reward R is the sum of this over the tokens of a reply.

    Args:
      reward: (N,) r: the score of a turn at the token that closes the turn, 0 at other tokens.
      kl: (N,) `kl_k1` or `kl_k3` to the reference policy, in nats.
      kl_weight: β, in reward units per nat.
    Returns: (N,) detached, in reward units.
    """
    check_shapes("n, n", reward, kl)
    return (reward - kl_weight * kl).detach()


def replace_unfinished(score: Tensor, closed: Tensor, fixed: float) -> Tensor:
    """Replace the score of every turn that was not closed by its stop token by a fixed score.

    Args:
      score: (M,), one score per turn.
      closed: (M,) bool, True if the stop token closed the turn.
      fixed: the score of unfinished turns (Ziegler et al. 2019: −1).
    Returns: (M,).
    """
    check_shapes("m, m", score, closed)
    return torch.where(closed, score, fixed)


def penalize_unfinished(score: Tensor, closed: Tensor, penalty: float) -> Tensor:
    """Subtract a penalty from the score of every turn that was not closed by its stop token.

    Args:
      score: (M,), one score per turn.
      closed: (M,) bool, True if the stop token closed the turn.
      penalty: in units of the score.
    Returns: (M,).
    """
    check_shapes("m, m", score, closed)
    return torch.where(closed, score, score - penalty)


def generalized_advantage(
    td_target: Tensor, v: Tensor, discount: Tensor | float, episode: Tensor, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Compute advantages  A_t = Σ_k (Π_{j<k} γ_{t+j} λ) δ_{t+k},  δ = y − V(s),  and the returns A + V.

    Schulman et al. 2016 (GAE), section 3. Steps are the agent's tokens only: the step after the last token of an
    utterance is the first token of the agent's next utterance. The sum ends with the episode. Whether y includes V of
    the state after the last step (yes if the episode was cut, no after a terminal action) was decided when
    `value_learning.td_target` computed y. λ = 0 gives δ, λ = 1 the return minus V.

    Args:
      td_target: y, (N,) r + γ · bootstrap · V(s′).
      v: (N,) V(s) at the time of the rollout.
      discount: γ of each step, (N,) or one number for all.
      episode: (N,) long, the index of each token's episode; tokens of an episode are adjacent and in order of time.
        Steps without a target must be left out.
      gae_lambda: λ in [0, 1].
    Returns: advantages (N,) and returns (N,), both detached and in reward units. The returns, which are the targets of
      V, are computed here from advantages before any whitening.
    """
    check_shapes("n, n, n", td_target, v, episode)
    advantage = (td_target - v).detach()
    # A factor of 0 at the last token of an episode keeps sums from crossing into the next episode.
    decay = torch.where(_is_last(episode), 0.0, gae_lambda * torch.as_tensor(discount, dtype=v.dtype, device=v.device))
    # Each entry holds the sum over `reach` steps, and `decay` the factor of the step after them. Adding the sum that
    # begins there doubles the reach, so log₂ N rounds suffice instead of N.
    reach = 1
    while reach < len(v):
        advantage = advantage + decay * F.pad(advantage[reach:], (0, reach))
        decay = decay * F.pad(decay[reach:], (0, reach))
        reach *= 2
    return advantage, advantage + v.detach()


def whiten(x: Tensor, keep_mean: bool = False) -> Tensor:
    """Compute (x − μ) / √(σ² + 1e-8), plus μ if the mean is kept.

    Ziegler et al. 2019, as in their code: σ is the population standard deviation. They whiten advantages without the
    mean, and rewards with it. Compared with rewards x / σ, every token then gains μ (1 − 1/σ), which rewards or
    punishes long replies.

    Args:
      x: (N,).
      keep_mean: True: add μ again after the division.
    Returns: (N,).
    """
    check_shapes("n", x)
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(correction=0) + 1e-8)
    return white + mean if keep_mean else white


def policy_loss(log_prob: Tensor, behaviour_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Compute max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε))  with  ρ = π(a|s) / π_behaviour(a|s).

    Schulman et al. 2017 (PPO), section 3, the negative of the clipped surrogate objective.

    Args:
      log_prob: (N,) of the policy being trained.
      behaviour_log_prob: (N,) of the policy that acted, at the same temperature and with the same forbidden tokens.
      advantage: A, (N,).
      clip_range: ε; math.inf = no clipping.
    Returns: (N,); gradients reach log_prob alone.
    """
    check_shapes("n, n, n", log_prob, behaviour_log_prob, advantage)
    advantage = advantage.detach()
    ratio = (log_prob - behaviour_log_prob.detach()).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_loss(v: Tensor, behaviour_v: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Compute the clipped value loss  ½ max((V − G)², (V_b + clip(V − V_b, ±ε) − G)²).

    From OpenAI's code (baselines, ppo2), not from Schulman et al. 2017.

    Args:
      v: V, (N,), online.
      behaviour_v: V_b, (N,), at the rollout.
      returns: G, (N,), from `generalized_advantage`.
      clip_range: ε in reward units; math.inf = no clipping.
    Returns: (N,); gradients reach v alone.
    """
    check_shapes("n, n, n", v, behaviour_v, returns)
    behaviour_v, returns = behaviour_v.detach(), returns.detach()
    clipped = behaviour_v + (v - behaviour_v).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((v - returns).square(), (clipped - returns).square())


def adaptive_kl_weight(kl_weight: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Return the next KL weight  β (1 + e · n / h)  with  e = clip(KL / target − 1, ±0.2).

    Ziegler et al. 2019, section 2.2.

    Args:
      kl_weight: β, the present weight.
      kl: mean over the last batch of an episode's KL to the reference policy, in nats.
      target: the intended value of `kl`, in nats.
      episodes: n, the number of episodes in the batch.
      horizon: h, in episodes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_weight * (1 + error * episodes / horizon)


class Moments(NamedTuple):
    """The count, mean and sum of squared deviations of all scores so far in training; saved in checkpoints."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # Σ (x − mean)²

    def updated(self, x: Tensor) -> "Moments":
        """Return the moments after adding a batch of values of any shape.

        Chan et al. 1979, the parallel update of sums of squares.
        """
        x = x.detach().double()
        count, shift = self.count + x.numel(), x.mean().item() - self.mean
        squares = x.var(correction=0).item() * x.numel() + shift**2 * self.count * x.numel() / count
        return Moments(count, self.mean + shift * x.numel() / count, self.squares + squares)

    @property
    def std(self) -> float:
        """The population standard deviation; 1 if the scores have not varied yet, so that they are not scaled."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0


def scale_scores(score: Tensor, std: float, clip: float) -> Tensor:
    """Compute clip(score / σ, ±c).

    The mean is not subtracted, because the sign of a score has a meaning.

    Args:
      score: (M,), one score per turn.
      std: σ, from `Moments`.
      clip: c, in standard deviations; math.inf = no clipping.
    Returns: (M,).
    """
    check_shapes("m", score)
    return (score / std).clamp(-clip, clip)


def tensorflow_adam_eps(eps: float, beta2: float, step: int) -> float:
    """Return the ε with which PyTorch's Adam makes the same step as TensorFlow's:  ε / √(1 − β₂^step).

    TensorFlow adds ε before the bias correction of the second moment (Kingma & Ba 2015, end of section 2), PyTorch
    after it. With TensorFlow, which OpenAI used, ε therefore shortens early steps more.

    Args:
      eps: ε of TensorFlow's Adam.
      beta2: β₂.
      step: the number of the step, from 1.
    """
    return eps / (1 - beta2**step) ** 0.5


def policy_statistics(log_prob: Tensor, behaviour_log_prob: Tensor, clip_range: float) -> dict[str, Tensor]:
    """Compute statistics of an update of the policy.

    Args:
      log_prob: (N,) of the policy being trained.
      behaviour_log_prob: (N,) of the policy that acted.
      clip_range: ε.
    Returns: name -> scalar tensor.
      approx_kl: mean of the estimate k3 of KL(behaviour‖policy), in nats, also used to stop an epoch early.
      clip_fraction: share of tokens whose ratio is outside 1 ± ε.
      ratio_max: the largest ratio.
    """
    check_shapes("n, n", log_prob, behaviour_log_prob)
    log_prob, behaviour_log_prob = log_prob.detach(), behaviour_log_prob.detach()
    ratio = (log_prob - behaviour_log_prob).exp()
    return {
        "approx_kl": kl_k3(behaviour_log_prob, log_prob).mean(),
        "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean(),
        "ratio_max": ratio.max(),
    }


def value_statistics(v: Tensor, behaviour_v: Tensor, returns: Tensor, clip_range: float) -> dict[str, Tensor]:
    """Compute statistics of an update of V.

    Args:
      v: V, (N,), online.
      behaviour_v: V_b, (N,), the values from which advantages were computed.
      returns: G, (N,).
      clip_range: ε in reward units.
    Returns: name -> scalar tensor.
      value_clip_fraction: share of tokens whose V is outside V_b ± ε.
      explained_variance: 1 − Var(G − V_b) / Var(G); nan if the returns do not vary.
    """
    check_shapes("n, n, n", v, behaviour_v, returns)
    spread = returns.var(correction=0)
    explained = 1 - (returns - behaviour_v).var(correction=0) / spread
    return {
        "value_clip_fraction": ((v - behaviour_v).abs() > clip_range).float().mean().detach(),
        "explained_variance": torch.where(spread > 0, explained, torch.nan).detach(),
    }


def _is_last(index: Tensor) -> Tensor:
    """Return (N,) bool, True where the next entry is different, and at the end."""
    return F.pad(index[1:] != index[:-1], (0, 1), value=True)
