"""Policy gradient for language (PPO): KL, rewards per token, advantages, clipped losses, controllers, statistics.

Everything is packed: N agent tokens in the order in which they were written, episode behind episode, no padding and no
environment text, so a mean over the N is the mean over agent tokens and nothing has to be masked. Losses return one
number per token; the caller sums and divides by the number of agent tokens of the minibatch, micro-batches included.
Schulman et al. 2017 (PPO); Ziegler et al. 2019 for what language adds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_lmrl.ops.precision import at_least_float32
from offline_lmrl.ops.shapes import check_shapes


def kl_k1(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """log π(a|s) − log π_ref(a|s): the unbiased estimate of KL(π‖π_ref) from actions of π. Schulman 2020, note on
    approximating KL divergences. Args and result: (N,) nats; single values may be negative."""
    check_shapes("n, n", log_prob, ref_log_prob)
    return log_prob - ref_log_prob


def kl_k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """e^{−k1} − 1 + k1: unbiased as `kl_k1`, never negative, lower variance near π = π_ref. Schulman 2020, same note.

    The actions must be π's: with the log-probabilities of the policy that acted first and those of the updated policy
    second it is the `approx_kl` of PPO. Args and result: (N,) nats.
    """
    k1 = kl_k1(log_prob, ref_log_prob)
    return torch.expm1(-k1) + k1


def entropy(logits: Tensor) -> Tensor:
    """−Σ_a π(a|s) log π(a|s) = logsumexp(l) − Σ_a π(a|s) l_a, in at least fp32; tokens at −inf count 0.

    Args: logits (..., V), at the temperature of the rollout. Returns: (...) nats.
    """
    logits = at_least_float32(logits)
    # 0 · −inf is not a number, and neither is its gradient: forbidden tokens leave the sum before the product.
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    return logits.logsumexp(-1) - (logits.softmax(-1) * finite).sum(-1)


def kl_shaped_reward(reward: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """r_t − β · kl_t, what PPO maximises. Ziegler et al. 2019, section 2, their reward R laid over tokens.

    Args:
      reward: (N,) scores of turns on the tokens that close them. kl: (N,) `kl_k1` or `kl_k3` to the reference.
    Returns: (N,) detached, in reward units.
    """
    check_shapes("n, n", reward, kl)
    return (reward - kl_weight * kl).detach()


def replace_unfinished(score: Tensor, closed: Tensor, fixed: float) -> Tensor:
    """The score where the turn was closed by its stop token, else `fixed`, whatever the text was worth (Ziegler et
    al. 2019: −1). Args: score (M,), closed (M,) bool. Returns: (M,)."""
    check_shapes("m, m", score, closed)
    return torch.where(closed, score, fixed)


def penalize_unfinished(score: Tensor, closed: Tensor, penalty: float) -> Tensor:
    """The score, less `penalty` where no stop token closed the turn. Args: score (M,), closed (M,) bool. Returns:
    (M,)."""
    check_shapes("m, m", score, closed)
    return torch.where(closed, score, score - penalty)


def generalized_advantage(
    td_target: Tensor, v: Tensor, discount: Tensor | float, episode: Tensor, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """A_t = Σ_k (Π_{j<k} γ_{t+j} λ) δ_{t+k},  δ = y − V(s),  over the agent's tokens only, and the returns A + V.

    Schulman et al. 2016 (GAE), section 3. Environment text is no step: the token after an utterance's last is the
    first of the agent's next utterance. Where an episode ends the sum ends; whether V counts there, as after a cut,
    or not, as after a terminal action, is already said by y = `value_learning.td_target`. λ = 0 gives δ, λ = 1 the
    return minus V.

    Args:
      td_target: (N,) r + γ · bootstrap · V(s′). v: (N,) of the rollout.
      discount: γ of each step, (N,) or one number.
      episode: (N,) long; tokens of one episode lie together, in time. Steps without a target are left out before.
    Returns: advantages (N,) and returns (N,), both detached and in reward units. The returns are what V learns; they
      are made here so that they come from the advantages as they are, before any whitening.
    """
    check_shapes("n, n, n", td_target, v, episode)
    advantage = (td_target - v).detach()
    decay = torch.where(_is_last(episode), 0.0, gae_lambda * torch.as_tensor(discount, dtype=v.dtype, device=v.device))
    reach = 1  # so many steps are summed up in each entry; doubling takes log₂ N rounds instead of N
    while reach < len(v):
        advantage = advantage + decay * F.pad(advantage[reach:], (0, reach))
        decay = decay * F.pad(decay[reach:], (0, reach))
        reach *= 2
    return advantage, advantage + v.detach()


def whiten(x: Tensor, keep_mean: bool = False) -> Tensor:
    """(x − μ) / √(σ² + 1e-8), plus μ if the mean is kept (Ziegler et al. 2019, as in their code: population σ).

    Advantages lose their mean. Rewards that keep it gain μ (1 − 1/σ) on every token, a bonus or a malus for length.
    Args and result: (N,).
    """
    check_shapes("n", x)
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(correction=0) + 1e-8)
    return white + mean if keep_mean else white


def policy_loss(log_prob: Tensor, behaviour_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε))  with  ρ = π(a|s) / π_behaviour(a|s). Schulman et al. 2017 (PPO), section 3,
    the clipped surrogate objective with its sign turned.

    Args:
      log_prob: (N,) of the policy being trained. behaviour_log_prob: (N,) of the policy that acted, same temperature
        and same mask. advantage: (N,).
      clip_range: ε; math.inf = no clipping.
    Returns: (N,); gradients reach log_prob alone.
    """
    check_shapes("n, n, n", log_prob, behaviour_log_prob, advantage)
    advantage = advantage.detach()
    ratio = (log_prob - behaviour_log_prob.detach()).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_loss(v: Tensor, behaviour_v: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """½ max((V − G)², (V_b + clip(V − V_b, ±ε) − G)²). Not in the paper; from OpenAI's code (baselines, ppo2).

    Args:
      v: (N,) online. behaviour_v: (N,) at the rollout. returns: (N,), of `generalized_advantage`.
      clip_range: ε in reward units; math.inf = no clipping.
    Returns: (N,); gradients reach v alone.
    """
    check_shapes("n, n, n", v, behaviour_v, returns)
    behaviour_v, returns = behaviour_v.detach(), returns.detach()
    clipped = behaviour_v + (v - behaviour_v).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((v - returns).square(), (clipped - returns).square())


def adaptive_kl_weight(kl_weight: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """β (1 + e · n / h)  with  e = clip(KL / target − 1, ±0.2). Ziegler et al. 2019, section 2.2.

    Args:
      kl: mean KL of an episode to the reference, in nats, as measured on the last batch. target: of the same kind.
      episodes: n, how many the batch held. horizon: h, in episodes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_weight * (1 + error * episodes / horizon)


class Moments(NamedTuple):
    """Running mean and spread of all scores seen: three numbers to save with the run."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # Σ (x − mean)²

    def updated(self, x: Tensor) -> "Moments":
        """With the values of a batch, any shape (Chan et al. 1979, the parallel update of sums of squares)."""
        x = x.detach().double()
        count, shift = self.count + x.numel(), x.mean().item() - self.mean
        squares = x.var(correction=0).item() * x.numel() + shift**2 * self.count * x.numel() / count
        return Moments(count, self.mean + shift * x.numel() / count, self.squares + squares)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where nothing has varied yet, for there is nothing to scale."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0


def scale_scores(score: Tensor, std: float, clip: float) -> Tensor:
    """clip(score / σ, ±c): scaled first, so that c is in standard deviations. The mean stays, as its sign means
    something. Args: score (M,), std of `Moments`, clip in σ (math.inf = none). Returns: (M,)."""
    check_shapes("m", score)
    return (score / std).clamp(-clip, clip)


def tensorflow_adam_eps(eps: float, beta2: float, step: int) -> float:
    """ε for step 1, 2, ... of PyTorch's Adam that makes it TensorFlow's:  ε / √(1 − β₂^step).

    TensorFlow adds ε before the bias correction of the second moment (Kingma & Ba 2015, end of section 2), PyTorch
    after it, so early steps are damped more with TensorFlow, as OpenAI's runs were.
    """
    return eps / (1 - beta2**step) ** 0.5


def policy_statistics(log_prob: Tensor, behaviour_log_prob: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What to watch in an update of the policy; all scalars, from (N,) log-probabilities.

    approx_kl: mean k3 of KL(behaviour‖policy), in nats, also the measure for stopping an epoch early. clip_fraction:
    share of tokens whose ratio left 1 ± ε. ratio_max: the largest ratio.
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
    """What to watch in an update of V; all scalars, from (N,) values and returns.

    value_clip_fraction: share of tokens whose V left V_b ± ε. explained_variance: 1 − Var(G − V_b) / Var(G), of the
    values that the advantages were made with; not a number where the returns do not vary.
    """
    check_shapes("n, n, n", v, behaviour_v, returns)
    spread = returns.var(correction=0)
    explained = 1 - (returns - behaviour_v).var(correction=0) / spread
    return {
        "value_clip_fraction": ((v - behaviour_v).abs() > clip_range).float().mean().detach(),
        "explained_variance": torch.where(spread > 0, explained, torch.nan).detach(),
    }


def _is_last(index: Tensor) -> Tensor:
    """(N,) True where a run of equal entries ends."""
    return F.pad(index[1:] != index[:-1], (0, 1), value=True)
