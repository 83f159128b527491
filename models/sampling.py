"""Which of the next tokens may be drawn. Free of TensorFlow."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: with probabilities that are the softmax of `logits / temperature`, of some tokens alone.

    `temperature`: 0 for the most likely token always. `top_k`: of the k most likely tokens, 0 for all. `top_p`: of the
    fewest most likely tokens whose probabilities have this sum at least, after `top_k`. `seed`: of the chance; token
    number n is a function of it, of n and of the logits alone. Source of `top_p`: Holtzman et al., "The curious case
    of neural text degeneration", ICLR 2020.

    Raises:
      ValueError: a value that cannot be.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature {self.temperature:g} is not a number from 0 on; pass 1, or 0 for no chance")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(
                f"top_k {self.top_k} is outside [0, 2^31); pass how many tokens may be drawn, or 0 for all"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p:g} is outside (0, 1]; pass a probability, or 1 for all tokens")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside [0, 2^63); pass a whole number from 0 on")
