"""
An independent version of everything QVPO computes, in float64 NumPy with plain loops, written from the paper.

It shares no code with the package and is never imported by it: the tests compare the two. One sample at a time, no
batching, no split first layers, gradients by hand. Slow on purpose.

Equation and table numbers are those of arXiv 2405.16173; DDPM is Ho et al. (2020), arXiv 2006.11239.
"""

import math

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Noise schedules
# ---------------------------------------------------------------------------------------------------------------------


def cosine_betas(n_steps, offset=0.008):
    """Nichol and Dhariwal (2021), Eq. 17."""

    def alpha_bar(u):
        return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((t + 1) / n_steps) / alpha_bar(t / n_steps), 0.999) for t in range(n_steps)])


def vp_betas(n_steps, beta_min=0.1, beta_max=10.0):
    """1 - beta_t = exp of minus the integral of a linearly growing rate over ((t-1)/T, t/T)."""

    def integrated_rate(u):
        return beta_min * u + (beta_max - beta_min) * u**2 / 2

    return np.array(
        [1 - math.exp(integrated_rate((t - 1) / n_steps) - integrated_rate(t / n_steps)) for t in range(1, n_steps + 1)]
    )


def linear_betas(n_steps, beta_start=1e-4, beta_end=2e-2):
    """DDPM, Sec. 4: 1000 steps, of which ``n_steps`` evenly spaced ones are kept (at most 1000 here)."""
    kept_before = 0
    betas = []
    for i in range(1, n_steps + 1):
        kept = round(i * 1000 / n_steps)
        signal = 1.0
        for t in range(kept_before, kept):
            signal *= 1 - (beta_start + (beta_end - beta_start) * t / 999)
        betas.append(1 - signal)
        kept_before = kept
    return np.array(betas)


def karras_levels(n_steps, sigma_min=0.02, sigma_max=3.0, rho=7.0):
    """Karras et al. (2022), Eq. 5, in ascending order."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    if n_steps == 1:
        return [sigma_max]
    return [(low + i / (n_steps - 1) * (high - low)) ** rho for i in range(n_steps)]


def betas_of_levels(levels):
    """Variances whose noise-to-signal ratios are the levels: 1 + sigma_t^2 = (1 + sigma_(t-1)^2) / (1 - beta_t)."""
    betas, before = [], 0.0
    for level in levels:
        betas.append(1 - (1 + before**2) / (1 + level**2))
        before = level
    return np.array(betas)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion of one action
# ---------------------------------------------------------------------------------------------------------------------


def alpha_bar(betas, t):
    """Eq. 2: the product of (1 - beta_s) for s = 0 ... t; an empty product (t = -1) is 1."""
    product = 1.0
    for s in range(t + 1):
        product *= 1 - betas[s]
    return product


def add_noise(action, t, noise, betas):
    """Eq. 2."""
    return math.sqrt(alpha_bar(betas, t)) * action + math.sqrt(1 - alpha_bar(betas, t)) * noise


def reverse_chain(predict_noise, noise, betas, clip=True):
    """
    DDPM, Algorithm 2, in posterior form (its Eqs. 6 and 7). ``predict_noise(x_t, t)``; ``noise`` is (T, A): the start, then
    one draw for each step but the last.
    """
    n_steps = len(betas)
    x = noise[0]
    for t in range(n_steps - 1, -1, -1):
        bar, bar_before = alpha_bar(betas, t), alpha_bar(betas, t - 1)
        x0 = (x - math.sqrt(1 - bar) * predict_noise(x, t)) / math.sqrt(bar)
        if clip:
            x0 = np.clip(x0, -1, 1)
        mean = (math.sqrt(bar_before) * betas[t] * x0 + math.sqrt(1 - betas[t]) * (1 - bar_before) * x) / (1 - bar)
        variance = (1 - bar_before) / (1 - bar) * betas[t]
        x = mean if t == 0 else mean + math.sqrt(variance) * noise[n_steps - t]
    return np.clip(x, -1, 1) if clip else x


def respaced_chain(predict_noise, noise, betas, steps, eta, clip=True):
    """
    Song et al. (2021), Eq. 12 with the sigma of Eq. 16, over a few of the trained steps. The direction to x_t is computed from
    the clamped x_0. ``noise`` is as in :func:`reverse_chain`, one draw for each of ``steps``, which ascend.
    """
    x = noise[0]
    for i in range(len(steps) - 1, -1, -1):
        bar = alpha_bar(betas, steps[i])
        bar_before = alpha_bar(betas, steps[i - 1]) if i > 0 else 1.0
        x0 = (x - math.sqrt(1 - bar) * predict_noise(x, steps[i])) / math.sqrt(bar)
        if clip:
            x0 = np.clip(x0, -1, 1)
        direction = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        sigma = eta * math.sqrt((1 - bar_before) / (1 - bar) * (1 - bar / bar_before))
        x = math.sqrt(bar_before) * x0 + math.sqrt(max(0.0, 1 - bar_before - sigma**2)) * direction
        if i > 0 and sigma > 0:
            x = x + sigma * noise[len(steps) - i]
    return np.clip(x, -1, 1) if clip else x


def velocity(action, t, noise, betas):
    """Salimans and Ho (2022), Sec. 4: v of a clean action and its noise."""
    return math.sqrt(alpha_bar(betas, t)) * noise - math.sqrt(1 - alpha_bar(betas, t)) * action


def noise_of_velocity(x_t, t, v, betas):
    """The noise in x_t, if v is its velocity: the two equations for x_t and v, solved for the noise."""
    return math.sqrt(1 - alpha_bar(betas, t)) * x_t + math.sqrt(alpha_bar(betas, t)) * v


def solver_chain(predict_noise, noise, betas, steps, clip=True):
    """
    DPM-Solver++(2M), Lu et al. (2022), Algorithm 2, with data predictions. ``steps`` ascend; ``noise`` is (A,). The last step
    ends at no noise, where lambda is infinite, so it is of first order.
    """

    def coefficients(t):
        bar = alpha_bar(betas, t)
        return math.sqrt(bar), math.sqrt(1 - bar), math.log(math.sqrt(bar) / math.sqrt(1 - bar))

    x, estimates = noise, []
    for i in range(len(steps) - 1, -1, -1):
        alpha, sigma, lam = coefficients(steps[i])
        x0 = (x - sigma * predict_noise(x, steps[i])) / alpha
        if clip:
            x0 = np.clip(x0, -1, 1)
        estimates.append(x0)
        if i == 0:
            x = x0
            continue
        alpha_next, sigma_next, lam_next = coefficients(steps[i - 1])
        h = lam_next - lam
        data = x0
        if len(estimates) > 1:
            r = (lam - coefficients(steps[i + 1])[2]) / h
            data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * estimates[-2]
        x = sigma_next / sigma * x - alpha_next * (math.exp(-h) - 1) * data
    return np.clip(x, -1, 1) if clip else x


# ---------------------------------------------------------------------------------------------------------------------
# Networks: a list of (weight, bias), Mish between the layers
# ---------------------------------------------------------------------------------------------------------------------


def mish(x):
    """x tanh(softplus(x)), Table 2."""
    return x * np.tanh(np.log1p(np.exp(x)))


def mish_derivative(x):
    tanh = np.tanh(np.log1p(np.exp(x)))
    return tanh + x * (1 - tanh**2) / (1 + np.exp(-x))


def mlp_forward(layers, x):
    """Output and the inputs and outputs of each layer, which the backward pass needs."""
    trace = []
    for i, (weight, bias) in enumerate(layers):
        before = weight @ x + bias
        trace.append((x, before))
        x = mish(before) if i < len(layers) - 1 else before
    return x, trace


def mlp_backward(layers, trace, output_gradient):
    """Gradients of all (weight, bias) and of the input."""
    gradients = []
    gradient = output_gradient
    for i in range(len(layers) - 1, -1, -1):
        x, before = trace[i]
        if i < len(layers) - 1:
            gradient = gradient * mish_derivative(before)
        gradients.insert(0, (np.outer(gradient, x), gradient))
        gradient = layers[i][0].T @ gradient
    return gradients, gradient


def sinusoidal_embedding(t, dim):
    half = dim // 2
    angles = [t * 10_000 ** (-i / (half - 1)) for i in range(half)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def predict_noise(actor, x_t, state, t):
    """epsilon_theta(a_t, s, t): the MLP ``actor["main"]`` over [a_t, emb(t), s], emb the MLP ``actor["time"]``."""
    embedding, _ = mlp_forward(actor["time"], sinusoidal_embedding(t, actor["time"][0][0].shape[1]))
    return mlp_forward(actor["main"], np.concatenate([x_t, embedding, state]))[0]


def q_values(critics, state, action):
    """The value of each critic."""
    return [mlp_forward(layers, np.concatenate([state, action]))[0][0] for layers in critics]


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------


def draw_candidates(actor, state, noise, betas, prediction="noise", solver_steps=None):
    """
    K samples of the policy for one state; ``noise`` is (T, K, A). With ``solver_steps``, those of DPM-Solver++(2M), it takes
    the place of DDPM.
    """

    def noise_in(x, t):
        output = predict_noise(actor, x, state, t)
        return noise_of_velocity(x, t, output, betas) if prediction == "v" else output

    if solver_steps is not None:
        return [solver_chain(noise_in, noise[0, k], betas, solver_steps) for k in range(noise.shape[1])]
    return [reverse_chain(noise_in, noise[:, k], betas) for k in range(noise.shape[1])]


def best_of_k(critics, state, candidates):
    """Sec. 4.4: the candidate with the largest minimum over critics, and that value."""
    values = [min(q_values(critics, state, action)) for action in candidates]
    best = max(range(len(candidates)), key=lambda k: values[k])
    return candidates[best], values[best]


def qadv(values):
    """Eq. 9, V(s) the mean over the state's samples."""
    baseline = sum(values) / len(values)
    return [max(value - baseline, 0.0) for value in values]


def qadv_normalized(values):
    """Eq. 9 over the deviation of the state's values."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [weight / deviation if weight > 0 else 0.0 for weight in qadv(values)]


def improve(critics, state, action, n_steps, length):
    """Gradient steps of one length on the minimum over critics, each clamped to the box. Returns the actions after each."""
    actions = []
    for _ in range(n_steps):
        layers = min(critics, key=lambda layers: mlp_forward(layers, np.concatenate([state, action]))[0][0])
        _, trace = mlp_forward(layers, np.concatenate([state, action]))
        gradient = mlp_backward(layers, trace, np.ones(1))[1][len(state) :]
        norm = math.sqrt(float(np.sum(gradient**2)))
        action = np.clip(action + length * gradient / norm, -1, 1)
        actions.append(action)
    return actions


def qcut(values, epsilon):
    """Sec. 4.2: only the best action has a weight; its value, or epsilon if that is negative."""
    weights = [0.0] * len(values)
    best = max(range(len(values)), key=lambda k: values[k])
    weights[best] = values[best] if values[best] >= 0 else epsilon
    return weights


def td_target(reward, done, discount, next_value):
    """Line 10."""
    return reward + discount * (1 - done) * next_value


def weighted_loss(actor, states, actions, weights, timesteps, noise, betas, prediction="noise"):
    """
    Eq. 6 plus Eq. 10 for given actions (B, N, A) and weights (B, N): (1/B) sum of weight times the mean squared error over
    dimensions, of the noise or of v. Returns the loss, the part of the actions after the first of each state (Eq. 10) and all
    gradients.
    """
    batch_size, n_actions, action_dim = actions.shape
    loss = entropy_loss = 0.0
    gradients = {part: [[np.zeros_like(w), np.zeros_like(b)] for w, b in actor[part]] for part in ("time", "main")}
    embedding_dim = actor["time"][0][0].shape[1]
    for b in range(batch_size):
        for i in range(n_actions):
            embedding, time_trace = mlp_forward(actor["time"], sinusoidal_embedding(timesteps[b, i], embedding_dim))
            x_t = add_noise(actions[b, i], timesteps[b, i], noise[b, i], betas)
            predicted, main_trace = mlp_forward(actor["main"], np.concatenate([x_t, embedding, states[b]]))
            wanted = noise[b, i] if prediction == "noise" else velocity(actions[b, i], timesteps[b, i], noise[b, i], betas)
            error = wanted - predicted
            term = weights[b, i] * np.mean(error**2) / batch_size
            loss += term
            entropy_loss += term if i > 0 else 0.0
            output_gradient = -2 * weights[b, i] * error / action_dim / batch_size
            main_gradients, input_gradient = mlp_backward(actor["main"], main_trace, output_gradient)
            time_gradients, _ = mlp_backward(
                actor["time"], time_trace, input_gradient[action_dim : action_dim + embedding_dim]
            )
            for part, new in (("main", main_gradients), ("time", time_gradients)):
                for total, (weight_gradient, bias_gradient) in zip(gradients[part], new, strict=True):
                    total[0] += weight_gradient
                    total[1] += bias_gradient
    return loss, entropy_loss, gradients


def critic_loss(critics, states, actions, targets):
    """Line 11: the sum over critics of the mean squared error, and the gradients of each critic."""
    loss = 0.0
    gradients = []
    for layers in critics:
        totals = [[np.zeros_like(w), np.zeros_like(b)] for w, b in layers]
        for state, action, target in zip(states, actions, targets, strict=True):
            value, trace = mlp_forward(layers, np.concatenate([state, action]))
            loss += (value[0] - target) ** 2 / len(states)
            new, _ = mlp_backward(layers, trace, 2 * (value - target) / len(states))
            for total, (weight_gradient, bias_gradient) in zip(totals, new, strict=True):
                total[0] += weight_gradient
                total[1] += bias_gradient
        gradients.append(totals)
    return loss, gradients


# ---------------------------------------------------------------------------------------------------------------------
# Other critics
# ---------------------------------------------------------------------------------------------------------------------


def normalized_forward(layers, rows, epsilon=1e-3, running=None, corrections=None):
    """
    A network with batch normalisation before each linear layer, in training mode. ``layers``: (gain, shift, weight, bias).
    ReLU between the layers. Returns the outputs and the mean and (biased) variance before each layer.

    With ``running``, a mean and variance for each layer, it is batch renormalisation. What each layer's r and d are is
    appended to the list ``corrections``, or taken from it if it is not empty.
    """
    statistics = []
    held = list(corrections or [])
    for i, (gain, shift, weight, bias) in enumerate(layers):
        n = len(rows)
        mean = sum(rows) / n
        variance = sum((row - mean) ** 2 for row in rows) / n
        statistics.append((mean, variance))
        r, d = np.ones(len(mean)), np.zeros(len(mean))
        if held:
            r, d = held[i]
        elif running is not None:
            r, d = renorm_correction(mean, variance, *running[i], epsilon)
            corrections.append((r, d))
        rows = [weight @ (gain * ((row - mean) / np.sqrt(variance + epsilon) * r + d) + shift) + bias for row in rows]
        if i < len(layers) - 1:
            rows = [np.maximum(row, 0) for row in rows]
    return rows, statistics


def renorm_correction(mean, variance, running_mean, running_variance, epsilon=1e-3, largest_scale=3.0, largest_shift=5.0):
    """r and d of batch renormalisation (Ioffe 2017, Algorithm 1), from the statistics of a batch and the running ones."""
    r, d = np.ones(len(mean)), np.zeros(len(mean))
    for j in range(len(mean)):
        running = np.sqrt(running_variance[j] + epsilon)
        r[j] = min(max(np.sqrt(variance[j] + epsilon) / running, 1 / largest_scale), largest_scale)
        d[j] = min(max((mean[j] - running_mean[j]) / running, -largest_shift), largest_shift)
    return r, d


def batch_renorm(batches, start, momentum, gain, shift, epsilon=1e-3):
    """
    Batch renormalisation in training mode, batch after batch. The first ``start`` batches have r = 1 and d = 0. Returns for
    each batch the output, and the running mean and variance after it. As in torch, the running variance is of the unbiased
    kind, and starts at 1.
    """
    running_mean, running_variance = np.zeros(len(gain)), np.ones(len(gain))
    results = []
    for i, batch in enumerate(batches):
        n = len(batch)
        mean = sum(batch) / n
        variance = sum((row - mean) ** 2 for row in batch) / n
        r, d = np.ones(len(gain)), np.zeros(len(gain))
        if i >= start:
            r, d = renorm_correction(mean, variance, running_mean, running_variance, epsilon)
        rows = [gain * ((row - mean) / np.sqrt(variance + epsilon) * r + d) + shift for row in batch]
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_variance = (1 - momentum) * running_variance + momentum * variance * n / (n - 1)
        results.append((rows, running_mean, running_variance))
    return results


def running_statistics(batches, momentum):
    """
    Mean and (biased) variance of features after each batch. A batch counts for 1 / n, n batches so far, but never for less
    than ``momentum``; the rest is what was known. Of a mixture: E[x] and E[x^2] are mixed, and the variance follows.
    """
    mean, square = 0.0, 0.0
    statistics = []
    for n, batch in enumerate(batches, start=1):
        share = max(1 / n, momentum)
        mean = (1 - share) * mean + share * sum(batch) / len(batch)
        square = (1 - share) * square + share * sum(row**2 for row in batch) / len(batch)
        statistics.append((mean, square - mean**2))
    return statistics


def pessimistic_value(values, pessimism):
    """Of two critics: their mean less ``pessimism`` times their standard deviation (Moskovitz et al., 2021)."""
    mean = sum(values) / 2
    return mean - pessimism * np.sqrt(sum((value - mean) ** 2 for value in values) / 2)


def crossq_loss(critics, batch, next_actions, gamma, running=None, pessimism=1.0):
    """
    CrossQ, Sec. 3: (s, a) and (s', a') in one batch, targets from the same pass. ``running``: for each critic what
    :func:`normalized_forward` takes for batch renormalisation. Returns the loss, the targets and each critic's statistics.
    """
    n = len(batch["rewards"])
    rows = [np.concatenate([s, a]) for s, a in zip(batch["observations"], batch["actions"], strict=True)]
    rows += [np.concatenate([s, a]) for s, a in zip(batch["next_observations"], next_actions, strict=True)]
    known = running or [None] * len(critics)
    results = [normalized_forward(critics[c], rows, running=known[c], corrections=[]) for c in range(len(critics))]
    outputs, statistics = zip(*results, strict=True)
    next_values = [pessimistic_value([values[n + i][0] for values in outputs], pessimism) for i in range(n)]
    targets = [td_target(batch["rewards"][i], batch["dones"][i], gamma, next_values[i]) for i in range(n)]
    loss = sum((values[i][0] - targets[i]) ** 2 / n for values in outputs for i in range(n))
    return loss, targets, statistics


def truncated_mixture(quantiles, n_dropped):
    """TQC, Sec. 3: all critics' quantiles of one action in one list, without the largest n_dropped of each critic."""
    pooled = sorted(value for each in quantiles for value in each)
    return pooled[: len(pooled) - n_dropped * len(quantiles)]


def quantile_loss(quantiles, targets):
    """TQC, Eq. 13, of one sample, ``quantiles`` (C, M): the sum over critics of the mean over quantiles and targets."""
    loss = 0.0
    for each in quantiles:
        for m, theta in enumerate(each):
            fraction = (2 * m + 1) / (2 * len(each))
            for y in targets:
                error = y - theta
                huber = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
                loss += abs(fraction - (1.0 if error < 0 else 0.0)) * huber / len(each) / len(targets)
    return loss


def flatten(layers):
    """All weights and biases in order."""
    return [array for pair in layers for array in pair]


def clip_gradients(gradients, max_norm):
    """Scale all gradients so that their joint Euclidean norm is at most ``max_norm`` (in place)."""
    norm = math.sqrt(sum(float(np.sum(gradient**2)) for gradient in gradients))
    if norm > max_norm:
        for gradient in gradients:
            gradient *= max_norm / norm


def adam_step(parameters, gradients, moments, step, learning_rate, epsilon, beta1=0.9, beta2=0.999):
    """Kingma and Ba (2015), Algorithm 1, in place. ``moments`` is a list of [m, v]."""
    for parameter, gradient, moment in zip(parameters, gradients, moments, strict=True):
        moment[0] = beta1 * moment[0] + (1 - beta1) * gradient
        moment[1] = beta2 * moment[1] + (1 - beta2) * gradient**2
        m_hat = moment[0] / (1 - beta1**step)
        v_hat = moment[1] / (1 - beta2**step)
        parameter -= learning_rate * m_hat / (np.sqrt(v_hat) + epsilon)


def polyak(target, online, tau):
    """Target networks, in place."""
    for target_array, online_array in zip(target, online, strict=True):
        target_array *= 1 - tau
        target_array += tau * online_array


class Learner:
    """
    The state of a QVPO learner and one update of it: Algorithm 1, lines 5-11, critic first.

    ``actor`` and ``critics`` (and their targets) are changed in place; ``settings`` holds ``betas``, ``tau``, ``gamma``,
    ``weighting`` (values of one state -> weights), ``ent_coef``, ``actor_learning_rate``, ``critic_learning_rate``,
    ``adam_epsilon``, ``max_grad_norm`` and ``policy_delay``. What the paper has not may be left out: ``prediction``,
    ``solver_steps``, ``n_improvement_steps``, ``improvement_step`` and ``training_action_noise``.
    """

    def __init__(self, actor, actor_target, critics, critics_target, settings):
        self.actor, self.actor_target = actor, actor_target
        self.critics, self.critics_target = critics, critics_target
        self.settings = settings
        self.critic_moments = [[np.zeros_like(array), np.zeros_like(array)] for array in self.critic_arrays()]
        self.actor_moments = [[np.zeros_like(array), np.zeros_like(array)] for array in self.actor_arrays(actor)]
        self.n_updates = self.n_actor_updates = 0
        self.metrics = {}
        self.prediction = settings.get("prediction", "noise")
        self.chain = (settings["betas"], self.prediction, settings.get("solver_steps"))

    def critic_arrays(self):
        return [array for layers in self.critics for array in flatten(layers)]

    @staticmethod
    def actor_arrays(actor):
        return flatten(actor["time"]) + flatten(actor["main"])

    def update(self, batch, target_noise, actor_noise):
        """``batch``: arrays by name; ``target_noise`` (T, B, K_t, A); ``actor_noise``: arrays by name."""
        self.n_updates += 1
        critic_gradients = self.critic_step(batch, target_noise)
        if self.n_updates % self.settings["policy_delay"]:
            return critic_gradients, None
        actor_gradients = self.actor_step(batch["observations"], actor_noise)
        tau = self.settings["tau"]
        polyak(self.actor_arrays(self.actor_target), self.actor_arrays(self.actor), tau)
        for target, online in zip(self.critics_target, self.critics, strict=True):
            polyak(flatten(target), flatten(online), tau)
        return critic_gradients, actor_gradients

    def critic_step(self, batch, target_noise):
        targets = []
        for i, next_state in enumerate(batch["next_observations"]):
            candidates = draw_candidates(self.actor_target, next_state, target_noise[:, i], *self.chain)
            _, next_value = best_of_k(self.critics_target, next_state, candidates)
            discount = self.settings["gamma"] if batch["discounts"] is None else batch["discounts"][i]
            targets.append(td_target(batch["rewards"][i], batch["dones"][i], discount, next_value))
        values = [min(q_values(self.critics, s, a)) for s, a in zip(batch["observations"], batch["actions"], strict=True)]
        loss, gradients = critic_loss(self.critics, batch["observations"], batch["actions"], targets)
        self.metrics.update(critic_loss=loss, q_value=np.mean(values))
        gradients = [array for layers in gradients for array in flatten(layers)]
        self.step(self.critic_arrays(), gradients, self.critic_moments, self.n_updates, "critic_learning_rate")
        return gradients

    def actor_step(self, states, noise):
        actions, weights, contrasts, spreads = [], [], [], []
        for i, state in enumerate(states):
            candidates = draw_candidates(self.actor, state, noise["chain"][:, i], *self.chain)  # line 5
            spreads.append(np.mean(np.std(candidates, axis=0)))
            if self.settings.get("n_improvement_steps"):
                best, _ = best_of_k(self.critics, state, candidates)
                length = self.settings["improvement_step"] * math.sqrt(len(best))
                candidates = candidates + improve(self.critics, state, best, self.settings["n_improvement_steps"], length)
            values = [min(q_values(self.critics, state, action)) for action in candidates]
            omega = self.settings["weighting"](values)  # line 6
            best = max(range(len(candidates)), key=lambda k: (omega[k], values[k]))  # line 7
            chosen = candidates[best]
            if self.settings.get("training_action_noise"):
                chosen = np.clip(chosen + self.settings["training_action_noise"] * noise["action"][i], -1, 1)
            actions.append([chosen, *noise["uniform_actions"][i]])
            omega_ent = self.settings["ent_coef"] * omega[best]  # line 8
            weights.append([omega[best]] + [omega_ent] * len(noise["uniform_actions"][i]))
            contrasts.append(max(values) - np.mean(values))
        loss, entropy_loss, gradients = weighted_loss(  # line 9
            self.actor, states, np.array(actions), np.array(weights), noise["timesteps"], noise["denoising"],
            self.settings["betas"], self.prediction,
        )  # fmt: skip
        self.metrics.update(
            actor_loss=loss,
            entropy_loss=entropy_loss,
            weight=np.mean([row[0] for row in weights]),
            critic_contrast=np.mean(contrasts),
            candidate_std=np.mean(spreads),
        )
        gradients = flatten(gradients["time"]) + flatten(gradients["main"])
        self.n_actor_updates += 1
        self.step(self.actor_arrays(self.actor), gradients, self.actor_moments, self.n_actor_updates, "actor_learning_rate")
        return gradients

    def step(self, arrays, gradients, moments, count, rate_name):
        if self.settings["max_grad_norm"] is not None:
            clip_gradients(gradients, self.settings["max_grad_norm"])
        adam_step(arrays, gradients, moments, count, self.settings[rate_name], self.settings["adam_epsilon"])


def normal_cdf(z):
    return math.erfc(-z / math.sqrt(2)) / 2


def truncated_normal(mean, std, u):
    """The number below which a normal variable cut to [-1, 1] lies with probability u, by bisection."""
    low, high = (-1 - mean) / std, (1 - mean) / std
    # Of the mirrored variable where both ends are in the upper tail, whose probabilities round to 1
    if low > 0:
        return -truncated_normal(-mean, std, 1 - u)
    wanted = normal_cdf(low) + u * (normal_cdf(high) - normal_cdf(low))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if normal_cdf(middle) < wanted else (low, middle)
    return mean + std * low


def log_truncated_density(action, mean, std):
    """Of a normal variable cut to [-1, 1], by the error function."""
    low, high = (-1 - mean) / std, (1 - mean) / std
    if low > 0:  # the lower tail keeps its digits
        low, high = -high, -low
    z = (action - mean) / std
    return -(z**2) / 2 - math.log(std * math.sqrt(2 * math.pi)) - math.log(normal_cdf(high) - normal_cdf(low))


def posterior_mean_on_a_grid(x, bar, q_value, temperature, n_points=20_001):
    """E[a | x] for one dimension, the prior exp(q_value(a) / temperature) on [-1, 1], and x = sqrt(bar) a + noise."""
    total = weighted = 0.0
    largest = max(q_value(a) for a in (-1.0, 0.0, 1.0))
    for i in range(n_points):
        a = -1 + 2 * (i + 0.5) / n_points
        density = math.exp((q_value(a) - largest) / temperature - (x - math.sqrt(bar) * a) ** 2 / (2 * (1 - bar)))
        total, weighted = total + density, weighted + density * a
    return weighted / total


def softmax(values, temperature):
    exponents = [math.exp((value - max(values)) / temperature) for value in values]
    return [exponent / sum(exponents) for exponent in exponents]


class SoftLearner(Learner):
    """
    The same with SDAC's actor. ``settings`` also holds ``temperature``, ``box``, ``spread`` (whether the temperature is in
    units of the deviation of a state's values) and, for one that is learnt, ``target_divergence`` and ``temperature_rate``.
    With ``improved``, a number of steps, their length and a deviation, half of the draws are around an improved action.
    ``training_action_noise`` is the deviation of the noise on actions that are learnt.
    """

    log_temperature = 0.0
    spread_mean = spread_weight = 0.0

    def actor_step(self, states, noise):
        """``noise`` also holds the buffer's ``actions``; ``chain`` is None if noisy actions start from them."""
        n_draws = noise["reverse"].shape[1]
        betas, settings = self.settings["betas"], self.settings
        clean, values, ratios = [], [], np.zeros((len(states), n_draws))
        n_improved, sigma = n_draws // 2 if "improved" in settings else 0, settings.get("training_action_noise", 0)
        for b, state in enumerate(states):
            start = noise["actions"][b]
            if noise["chain"] is not None:
                candidates = draw_candidates(self.actor, state, noise["chain"][:, b], *self.chain)
                start, _ = best_of_k(self.critics, state, candidates)
            t = noise["timesteps"][b, 0]
            bar, x = alpha_bar(betas, t), add_noise(start, t, noise["forward"][b, 0], betas)
            std = math.sqrt((1 - bar) / bar + sigma**2)
            if settings["box"] == "truncated":
                draws = [
                    [truncated_normal(x[j] / math.sqrt(bar), std, u) for j, u in enumerate(row)] for row in noise["reverse"][b]
                ]
            else:
                draws = [x / math.sqrt(bar) - std * row for row in noise["reverse"][b]]
            if n_improved:
                n_steps, length, width = settings["improved"]
                known = [start, *improve(self.critics, state, start, n_steps, length)]
                around, _ = best_of_k(self.critics, state, np.array(known))
                for m in range(n_draws):
                    if m < n_improved:
                        draws[m] = [truncated_normal(around[j], width, u) for j, u in enumerate(noise["reverse"][b, m])]
                    at_noisy = sum(log_truncated_density(a, x[j] / math.sqrt(bar), std) for j, a in enumerate(draws[m]))
                    at_improved = sum(log_truncated_density(a, around[j], width) for j, a in enumerate(draws[m]))
                    share = n_improved / n_draws  # of the draws' density, where that at the noisy action was wanted
                    # Of logarithms, because a rare draw's factor is beyond all numbers
                    log_mixture = np.logaddexp(math.log(1 - share), math.log(share) + at_improved - at_noisy)
                    ratios[b, m] = math.exp(-log_mixture)
            clean.append((x, np.array(draws)))
            values.append([min(q_values(self.critics, state, np.clip(action, -1, 1))) for action in clean[b][1]])
        unit = 1.0
        if settings["spread"]:
            variance = np.mean([np.var(row[n_improved:], ddof=1) for row in values])
            self.spread_mean += 0.01 * (variance - self.spread_mean)
            self.spread_weight += 0.01 * (1 - self.spread_weight)
            unit = math.sqrt(self.spread_mean / self.spread_weight)
        temperature = settings["temperature"] * math.exp(self.log_temperature)
        weights = [softmax(row, temperature * unit) for row in values]
        if n_improved:
            products = [[w * ratio for w, ratio in zip(*pair, strict=True)] for pair in zip(weights, ratios, strict=True)]
            weights = [[w / sum(row) for w in row] for row in products]
        preferred = [softmax(row[n_improved:], temperature * unit) for row in values]
        divergence = np.mean([sum(w * math.log(w * len(row)) for w in row) for row in preferred])
        if "target_divergence" in settings:
            self.log_temperature += settings["temperature_rate"] * (divergence - settings["target_divergence"])
        # M rows for each state, all at the same noisy action
        timesteps = np.repeat(noise["timesteps"], n_draws, axis=1)
        rows, noises = np.array([draws for _, draws in clean]), np.zeros_like(noise["reverse"])
        for b, (x, _) in enumerate(clean):
            bar = alpha_bar(betas, timesteps[b, 0])
            # What is learnt has the prior N(draw, sigma^2), and is seen as x: the mean of two normal densities' product
            rows[b] = (rows[b] * (1 - bar) + math.sqrt(bar) * x * sigma**2) / (1 - bar + bar * sigma**2)
            noises[b] = (x - math.sqrt(bar) * rows[b]) / math.sqrt(1 - bar)
        _, _, gradients = weighted_loss(self.actor, states, rows, np.array(weights), timesteps, noises, betas, self.prediction)
        effective = 1 / np.mean([sum(w**2 for w in row) for row in weights])
        self.metrics.update(divergence=divergence, temperature=temperature, effective_actions=effective)
        gradients = flatten(gradients["time"]) + flatten(gradients["main"])
        self.n_actor_updates += 1
        self.step(self.actor_arrays(self.actor), gradients, self.actor_moments, self.n_actor_updates, "actor_learning_rate")
        return gradients


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion-QL
# ---------------------------------------------------------------------------------------------------------------------


def central_differences(loss, arrays, step=1e-6):
    """The gradient of a function of no arguments with respect to arrays that it reads, one number at a time."""
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            before = array[index]
            array[index] = before + step
            above = loss()
            array[index] = before - step
            gradient[index] = (above - loss()) / (2 * step)
            array[index] = before
        gradients.append(gradient)
    return gradients


class QLLearner(Learner):
    """
    The same with Diffusion-QL's losses and targets. ``settings`` also holds ``eta``, ``q_normalization``, ``max_q_backup``,
    ``target_actor_interval`` and ``target_actor_start``.
    """

    def update(self, batch, target_noise, actor_noise):
        self.n_updates += 1
        critic_gradients = self.critic_step(batch, target_noise)
        self.n_actor_updates += 1
        actor_gradients = central_differences(
            lambda: self.actor_loss(batch["observations"], batch["actions"], actor_noise), self.actor_arrays(self.actor)
        )
        self.metrics["actor_loss"] = self.actor_loss(batch["observations"], batch["actions"], actor_noise)
        online = self.actor_arrays(self.actor)
        self.step(online, actor_gradients, self.actor_moments, self.n_actor_updates, "actor_learning_rate")
        for target, critic in zip(self.critics_target, self.critics, strict=True):
            polyak(flatten(target), flatten(critic), self.settings["tau"])
        late = self.n_updates >= self.settings["target_actor_start"]
        if late and self.n_updates % self.settings["target_actor_interval"] == 0:
            polyak(self.actor_arrays(self.actor_target), online, self.settings["tau"])
        return critic_gradients, actor_gradients

    def critic_step(self, batch, target_noise):
        targets = []
        for i, next_state in enumerate(batch["next_observations"]):
            candidates = draw_candidates(self.actor_target, next_state, target_noise[:, i], *self.chain)
            by_critic = np.array([q_values(self.critics_target, next_state, action) for action in candidates]).T
            next_value = min(max(row) for row in by_critic)
            discount = self.settings["gamma"] if batch["discounts"] is None else batch["discounts"][i]
            targets.append(td_target(batch["rewards"][i], batch["dones"][i], discount, next_value))
        loss, gradients = critic_loss(self.critics, batch["observations"], batch["actions"], targets)
        self.metrics.update(critic_loss=loss)
        gradients = [array for layers in gradients for array in flatten(layers)]
        self.step(self.critic_arrays(), gradients, self.critic_moments, self.n_updates, "critic_learning_rate")
        return gradients

    def actor_loss(self, states, actions, noise):
        """Eq. 3. The denominator is a number: it is taken from the actor before it is varied."""
        betas, cloning, values, at_data = self.settings["betas"], [], [], []
        for b, state in enumerate(states):
            t, eps = noise["timesteps"][b, 0], noise["denoising"][b, 0]
            x = add_noise(actions[b], t, eps, betas)
            cloning.append(np.mean((predict_noise(self.actor, x, state, t) - eps) ** 2))
            (action,) = draw_candidates(self.actor, state, noise["chain"][:, b], *self.chain)
            values.append(q_values(self.critics, state, action))
            at_data.append(q_values(self.critics, state, actions[b]))
        chosen = int(noise["coin"] * len(self.critics))
        if self.n_updates not in self.sizes:
            other = (chosen + 1) % len(self.critics)
            rows = (
                [row[chosen] for row in at_data]
                if self.settings["q_normalization"] == "data"
                else [row[other] for row in values]
            )
            self.sizes[self.n_updates] = np.mean(np.abs(rows))
        guidance = -np.mean([row[chosen] for row in values]) / self.sizes[self.n_updates]
        return np.mean(cloning) + self.settings["eta"] * guidance

    @property
    def sizes(self):
        """Denominators by update."""
        return self.__dict__.setdefault("_sizes", {})


# ---------------------------------------------------------------------------------------------------------------------
# DTQL
# ---------------------------------------------------------------------------------------------------------------------


def edm_level(u, sigma_min, sigma_max, sigma_data):
    """The noise level below which a share u of the cut log-logistic distribution lies, by bisection of its logarithm."""

    def share_below(sigma):
        return 1 / (1 + (sigma_data / sigma) ** 2)

    wanted = share_below(sigma_min) + u * (share_below(sigma_max) - share_below(sigma_min))
    low, high = math.log(sigma_min), math.log(sigma_max)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if share_below(math.exp(middle)) < wanted else (low, middle)
    return math.exp(low)


def edm_denoised(network, x, sigma, sigma_data):
    """The estimate of the clean action; ``network(scaled_x, time)``."""
    variance = sigma**2 + sigma_data**2
    output = network(x / math.sqrt(variance), math.log(sigma) / 4)
    return np.clip(sigma_data**2 / variance * x + sigma * sigma_data / math.sqrt(variance) * output, -1, 1)


def edm_loss(network, action, sigma, noise, sigma_data):
    """Eq. 2 for one action, with the weight 1 / c_out^2."""
    c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
    estimate = edm_denoised(network, action + sigma * noise, sigma, sigma_data)
    return np.mean(((estimate - action) / c_out) ** 2)


def layer_norm_forward(layers, x, epsilon=1e-5):
    """Hidden layers (weight, bias, gain, shift): linear, layer norm, Mish. The last one is (weight, bias)."""
    for weight, bias, gain, shift in layers[:-1]:
        z = weight @ x + bias
        x = mish(gain * (z - np.mean(z)) / math.sqrt(np.mean((z - np.mean(z)) ** 2) + epsilon) + shift)
    weight, bias = layers[-1]
    return weight @ x + bias


def relu_forward(layers, x):
    for weight, bias in layers[:-1]:
        x = np.maximum(weight @ x + bias, 0)
    weight, bias = layers[-1]
    return weight @ x + bias


def gaussian_policy(layers, state):
    """Mean and standard deviation before tanh."""
    mean, log_std = np.split(relu_forward(layers, state), 2)
    return mean, np.exp(np.clip(log_std, -5, 2))


def expectile(error, tau):
    """Eq. 6 for one error."""
    return (tau if error >= 0 else 1 - tau) * error**2


class TrustedLearner:
    """
    Algorithm 1 of DTQL, one update after the other, all gradients by central differences.

    ``policy``: layers of the Gaussian policy. ``cloned``: the diffusion model, as ``predict_noise`` takes it. ``critics`` and
    ``critics_target``: layers with norms. ``value``: layers of V. ``settings``: DTQL's arguments by name, ``sigma_data`` and
    the learning rates.
    """

    def __init__(self, policy, cloned, critics, critics_target, value, settings):
        self.policy, self.cloned, self.critics, self.critics_target = policy, cloned, critics, critics_target
        self.value, self.settings = value, settings
        self.arrays = {
            "critic": [*(array for layers in critics for array in flatten(layers)), *flatten(value)],
            "cloned": flatten(cloned["time"]) + flatten(cloned["main"]),
            "actor": flatten(policy),
        }
        self.moments = {
            name: [[np.zeros_like(array), np.zeros_like(array)] for array in arrays] for name, arrays in self.arrays.items()
        }
        self.counts = dict.fromkeys(self.arrays, 0)
        self.n_updates, self.metrics, self.gradients = 0, {}, {}

    def update(self, batch, cloned_noise, policy_noise):
        """The noises: arrays ``levels``, ``denoising`` and, of the policy, ``chain``, one row for each state."""
        self.n_updates += 1
        # Targets are numbers: they are taken before anything is varied
        teacher = self.critics_target if self.settings["value_target"] == "target" else self.critics
        followed = [min(self.q(teacher, s, a)) for s, a in zip(batch["observations"], batch["actions"], strict=True)]
        targets = []
        for i, state in enumerate(batch["next_observations"]):
            discount = self.settings["gamma"] if batch["discounts"] is None else batch["discounts"][i]
            targets.append(td_target(batch["rewards"][i], batch["dones"][i], discount, mlp_forward(self.value, state)[0][0]))
        self.step("critic", lambda: self.critic_loss(batch, followed, targets), "critic_learning_rate")
        self.step("cloned", lambda: self.cloning_loss(batch["observations"], batch["actions"], cloned_noise), "learning_rate")
        pretraining = self.n_updates <= self.settings["n_pretraining_updates"]
        if not pretraining:
            self.step("actor", lambda: self.policy_loss(batch, policy_noise), "learning_rate")
        if self.settings["value_target"] == "target" or not pretraining:
            for target, online in zip(self.critics_target, self.critics, strict=True):
                polyak(flatten(target), flatten(online), self.settings["tau"])

    def step(self, name, loss, rate):
        gradients = central_differences(loss, self.arrays[name])
        self.gradients[name] = gradients
        self.metrics[f"{name}_loss"] = loss()
        if self.settings["max_grad_norm"] is not None:
            clip_gradients(gradients, self.settings["max_grad_norm"])
        self.counts[name] += 1
        rates = (self.settings[rate], self.settings["adam_epsilon"])
        adam_step(self.arrays[name], gradients, self.moments[name], self.counts[name], *rates)

    @staticmethod
    def q(critics, state, action):
        return [layer_norm_forward(layers, np.concatenate([state, action]))[0] for layers in critics]

    def critic_loss(self, batch, followed, targets):
        total = 0.0
        for i, (state, action) in enumerate(zip(batch["observations"], batch["actions"], strict=True)):
            total += sum((value - targets[i]) ** 2 for value in self.q(self.critics, state, action))
            total += expectile(followed[i] - mlp_forward(self.value, state)[0][0], self.settings["expectile"])
        return total / len(targets)

    def cloning_loss(self, states, actions, noise):
        """Eq. 2; with the policy's actions Eq. 4."""
        losses = []
        for i, (state, action) in enumerate(zip(states, actions, strict=True)):

            def network(x, time, state=state):
                return predict_noise(self.cloned, x, state, time)

            losses.append(
                edm_loss(network, action, noise["levels"][i, 0], noise["denoising"][i, 0], self.settings["sigma_data"])
            )
        return np.mean(losses)

    def policy_loss(self, batch, noise):
        """Eq. 5, and the data's likelihood."""
        actions, values, densities = [], [], []
        for i, state in enumerate(batch["observations"]):
            mean, std = gaussian_policy(self.policy, state)
            actions.append(np.tanh(mean + std * noise["chain"][i]))
            values.append(min(self.q(self.critics, state, actions[i])))
            z = (np.arctanh(batch["actions"][i] / 1.001) - mean) / std
            densities.append(sum(-(z**2) / 2 - np.log(std) - math.log(math.sqrt(2 * math.pi))))
        trust = self.cloning_loss(batch["observations"], actions, noise)
        return self.settings["alpha"] * trust - np.mean(values) - self.settings["log_prob_coef"] * np.mean(densities)
