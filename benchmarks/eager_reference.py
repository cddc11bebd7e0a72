"""
QVPO in the structure of its authors' code, from the paper, in plain eager float32 torch. The package is timed against it.

Every candidate is a row of its own that carries its state and its time embedding through the whole network. States are
repeated for each candidate, the time embedding's MLP runs on every row at every step, and nothing is shared. The equations are
those of the package. ``tests/project/test_benchmarks.py`` compares the losses of both on the same numbers.
"""

import copy
import math
from itertools import pairwise

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn
from torch.nn import functional as F


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with Mish between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.Mish()]
    return nn.Sequential(*layers[:-1])


class RowActor(nn.Module):
    """epsilon_theta over rows [a_t, emb(t), s], and its reverse chain."""

    def __init__(self, obs_dim: int, action_dim: int, betas: th.Tensor, hidden: list[int], time_dim: int = 32):
        super().__init__()
        self.action_dim, self.time_dim, self.n_steps = action_dim, time_dim, len(betas)
        self.time_mlp = mlp([time_dim, 8 * time_dim, time_dim])
        self.network = mlp([action_dim + time_dim + obs_dim, *hidden, action_dim])
        self.alpha_bars = th.cumprod(1 - betas, 0)
        previous = th.cat([th.ones(1, device=betas.device), self.alpha_bars[:-1]])
        self.x0_coef = betas * previous.sqrt() / (1 - self.alpha_bars)
        self.x_t_coef = (1 - previous) * (1 - betas).sqrt() / (1 - self.alpha_bars)
        self.posterior_std = (betas * (1 - previous) / (1 - self.alpha_bars)).sqrt()

    def forward(self, x_t: th.Tensor, t: th.Tensor, states: th.Tensor) -> th.Tensor:
        half = self.time_dim // 2
        frequencies = th.exp(-math.log(10_000) * th.arange(half, device=t.device) / (half - 1))
        angles = t.unsqueeze(-1) * frequencies
        embedding = self.time_mlp(th.cat([angles.sin(), angles.cos()], dim=-1))
        return self.network(th.cat([x_t, embedding, states], dim=-1))

    def sample(self, states: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """One action for each row; noise of shape (T, rows, A) is drawn if None."""
        shape = (self.n_steps, len(states), self.action_dim)
        noise = th.randn(shape, device=states.device) if noise is None else noise
        x_t = noise[0]
        for i, step in enumerate(reversed(range(self.n_steps)), start=1):
            t = th.full((len(states),), step, device=states.device)
            alpha_bars = self.alpha_bars[t].unsqueeze(-1)
            x0 = ((x_t - (1 - alpha_bars).sqrt() * self(x_t, t, states)) / alpha_bars.sqrt()).clamp(-1, 1)
            x_t = self.x0_coef[t].unsqueeze(-1) * x0 + self.x_t_coef[t].unsqueeze(-1) * x_t
            if step > 0:
                x_t = x_t + self.posterior_std[t].unsqueeze(-1) * noise[i]
        return x_t.clamp(-1, 1)


class RowCritic(nn.Module):
    """Twin critics over rows [s, a]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: list[int]):
        super().__init__()
        self.critics = nn.ModuleList(mlp([obs_dim + action_dim, *hidden, 1]) for _ in range(2))

    def forward(self, states: th.Tensor, actions: th.Tensor) -> list[th.Tensor]:
        rows = th.cat([states, actions], dim=-1)
        return [critic(rows) for critic in self.critics]

    def minimum(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """The smaller of both values, shape (rows, 1)."""
        return th.minimum(*self(states, actions))


class EagerReference:
    """Actor, critics, their moving averages, actions and updates, where the betas are; the symbols are the paper's."""

    def __init__(self, obs_dim: int, action_dim: int, betas: th.Tensor, hidden: list[int], n_d: int, n_e: int, k_t: int):
        with betas.device:
            self.actor, self.critic = RowActor(obs_dim, action_dim, betas, hidden), RowCritic(obs_dim, action_dim, hidden)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = th.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_optimizer = th.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.n_d, self.n_e, self.k_t = n_d, n_e, k_t
        self.gamma, self.tau, self.ent_coef = 0.99, 0.005, 0.01

    def act(self, state: th.Tensor, n_candidates: int) -> th.Tensor:
        """Best of K for one state of shape (1, S)."""
        with th.no_grad():
            states = state.repeat(n_candidates, 1)
            actions = self.actor.sample(states)
            return actions[self.critic.minimum(states, actions).argmax()]

    def critic_loss(self, batch: ReplayBufferSamples, noise: th.Tensor | None = None) -> th.Tensor:
        """Algorithm 1, lines 10-11; noise of shape (T, B * K_t, A)."""
        with th.no_grad():
            next_states = batch.next_observations.repeat_interleave(self.k_t, 0)
            next_values = self.critic_target.minimum(next_states, self.actor_target.sample(next_states, noise))
            next_values = next_values.view(-1, self.k_t).max(1, keepdim=True).values
            target = batch.rewards + (1 - batch.dones) * self.gamma * next_values
        return th.stack([F.mse_loss(q, target) for q in self.critic(batch.observations, batch.actions)]).sum()

    def actor_loss(self, states: th.Tensor, draws: tuple[th.Tensor, ...] | None = None) -> th.Tensor:
        """Algorithm 1, lines 5-9; draws are chain noise, uniform actions, steps and noise of the loss, all as rows."""
        size, action_dim, device = len(states), self.actor.action_dim, states.device
        rows = size * (1 + self.n_e)
        if draws is None:
            uniform = 2 * th.rand(size * self.n_e, action_dim, device=device) - 1
            steps = th.randint(self.actor.n_steps, (rows,), device=device)
            draws = (None, uniform, steps, th.randn(rows, action_dim, device=device))
        chain_noise, uniform, t, noise = draws
        with th.no_grad():
            repeated = states.repeat_interleave(self.n_d, 0)
            candidates = self.actor.sample(repeated, chain_noise)
            q_values = self.critic.minimum(repeated, candidates).view(size, self.n_d)
            best = candidates.view(size, self.n_d, action_dim)[th.arange(size, device=device), q_values.argmax(1)]
            weight = q_values.max(1).values - q_values.mean(1)
            all_states = th.cat([states, states.repeat_interleave(self.n_e, 0)])
            actions = th.cat([best, uniform])
            weights = th.cat([weight, self.ent_coef * weight.repeat_interleave(self.n_e, 0)])
            alpha_bars = self.actor.alpha_bars[t].unsqueeze(-1)
            noisy = alpha_bars.sqrt() * actions + (1 - alpha_bars).sqrt() * noise
        losses = ((noise - self.actor(noisy, t, all_states)) ** 2).mean(-1)
        return (weights * losses).sum() / size

    def update(self, batch: ReplayBufferSamples) -> None:
        """One update."""
        for loss_function, optimizer in ((self.critic_loss, self.critic_optimizer), (self.actor_loss, self.actor_optimizer)):
            loss = loss_function(batch if optimizer is self.critic_optimizer else batch.observations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with th.no_grad():
            for online, average in ((self.actor, self.actor_target), (self.critic, self.critic_target)):
                for parameter, mean in zip(online.parameters(), average.parameters(), strict=True):
                    mean.lerp_(parameter, self.tau)
