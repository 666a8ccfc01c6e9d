"""The step that samples one token for each dialogue, all of it on the device.

Infrastructure: skip it on a first reading.

A step of a 7B model is well over a thousand kernels, and Python may take longer to launch them than
a GPU to run them; neither was measured. So what changes from token to token is in tensors that stay
where they are, shapes come in few sizes, and nothing is asked of the device: the GPU can record the
step once and repeat it. (torch.compile takes the step whole, too, but compiles it anew for each
size.)
"""

import weakref

import torch

from engine.cache import batch_size, key_width

LOOK_EVERY = 8  # tokens between checks whether all have stopped, with CUDA graphs


class Step:
    """Append to each dialogue its last token, and draw the next one. All tensors are [rows]."""

    def __init__(self, policy, rows, temperature):
        self.policy = policy
        self.temperature = temperature
        self.recorded = {}  # width -> what repeats the step
        device = policy.device
        self.stop = torch.tensor(policy.stop_ids, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.logp = torch.zeros(rows, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)  # where the token goes
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)  # stopped before the token
        self.uniform = torch.zeros(rows, dtype=torch.double, device=device)

    def begin(self, states, lengths, uniform):
        """Draw the first token of B dialogues, after states [B, d]; the other rows do nothing."""
        batch = len(states)
        self.done.fill_(True)
        self.done[:batch] = False
        self.position[:batch] = torch.tensor(lengths, device=self.policy.device)
        self.uniform[:batch] = uniform
        self.draw(states)

    def run(self, cache, width):
        """width: how many positions are looked at."""
        position = torch.where(self.done, -1, self.position)
        # No cast may be kept: a recorded step would look for it where it is no more.
        with self.policy.autocast(cache_enabled=False):
            model = self.policy.model.get_base_model().model
            states = cache.append(model, self.token, position, width)
        self.done |= self.stops()
        self.position += 1
        self.draw(states)

    def draw(self, states):
        """The next token of the first dialogues, after states [B, d]."""
        batch = len(states)
        token, logp = self.policy.draw(states, self.uniform[:batch], self.temperature)
        self.token[:batch] = token
        self.logp[:batch] = logp

    def advance(self, cache, width):
        """Run the step; at its second call it is recorded as a CUDA graph and then replayed."""
        record = self.policy.record
        if record is None or width not in self.recorded:
            self.recorded[width] = None
            self.run(cache, width)
            return
        if self.recorded[width] is None:
            self.recorded[width] = record(lambda: self.run(cache, width))
        self.recorded[width]()

    def stops(self):
        """Which tokens end an action. (Not torch.isin: with few rows it waits for the device.)"""
        return (self.token[:, None] == self.stop).any(-1)

    def finished(self):
        """Have all stopped? Waits for the device."""
        return bool((self.done | self.stops()).all())


def decode(policy, cache, states, lengths, uniforms, temperature):
    """Sample until all have stopped, or n tokens: states [B, d], uniforms [B, n] -> [B, m] twice.

    lengths: of the dialogues, which are the first B of the cache. Returns tokens and log-probs;
    those after a first control token mean nothing.
    """
    batch, most = uniforms.shape
    longest = max(lengths) + most
    cache.grow(0, longest)
    rows = batch_size(batch) if policy.record else batch
    key = rows, temperature
    if key not in cache.steps:
        cache.steps[key] = Step(policy, rows, temperature)
    step = cache.steps[key]
    step.begin(states, lengths, uniforms[:, 0])
    tokens = [step.token[:batch].clone()]
    logps = [step.logp[:batch].clone()]
    look_every = LOOK_EVERY if policy.record else 1
    for i in range(1, most):
        if i % look_every == 0 and step.finished():
            break
        step.uniform[:batch] = uniforms[:, i]
        step.advance(cache, key_width(longest))
        tokens.append(step.token[:batch].clone())
        logps.append(step.logp[:batch].clone())
    return torch.stack(tokens, 1), torch.stack(logps, 1)


class CudaGraphs:
    """Records what a function does on a GPU -> a function that repeats it."""

    def __init__(self):
        self.live = weakref.WeakSet()

    def __call__(self, function):
        # No step leaves anything behind in the memory that it works in, so all can share it.
        pool = next((graph.pool() for graph in self.live), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function()
        self.live.add(graph)
        return graph.replay
