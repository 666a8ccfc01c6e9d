"""Dr. GRPO: GRPO without two of its biases (Understanding R1-Zero-Like Training, arXiv 2503.20783).

Theirs (§3.2), for G answers o_i to a question, with A_i = R_i - mean R:

    1/G Σ_i Σ_t min(ρ_it A_i, clip(ρ_it) A_i)     instead of     1/G Σ_i 1/|o_i| Σ_t ...

Ours, for the N episodes of an optimiser step, over all tokens of all turns:

    1/(N · token_budget) Σ_i Σ_t min(ρ_it A_i, clip(ρ_it) A_i)

So neither an easy group (a small σ) nor a short episode (few tokens) weighs more than others.

 1. A return is in points of 100: A_i is divided by 100 (`fixed_std`), so that a success counts 1.
 2. The constant is theirs as well: in their code (Listing 1) the longest answer that can be
    generated. Ours is for a whole episode. N is `minibatch_episodes`, also in a smaller step.
 3. The dual clip (`clip_c`) stays.
"""

from dataclasses import dataclass

import settings
from empo2 import Algorithm
from settings import setting


@dataclass
class Settings(settings.Settings):
    """Those of Dr. GRPO."""

    fixed_std: float = setting(100.0, "points that count 1, instead of the standard deviation")
    token_budget: int = setting(256, "tokens of an episode that its losses are divided by")


class DrGRPO(Algorithm):
    """Overrides the normaliser; the advantage without σ is a setting of GRPO."""

    Settings = Settings
    preset = "grpo"

    def normaliser(self, pairs):
        """The same for all steps, however many tokens they have."""
        return self.s.minibatch_episodes * self.s.token_budget
