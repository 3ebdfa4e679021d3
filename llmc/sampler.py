"""Drawing tokens: the xorshift64* generator and the two sampling rules of llm.c (sampler.h), and top-k and top-p."""

import numpy as np

MASK64 = (1 << 64) - 1
MULTIPLIER = 0x2545F4914F6CDD1D


class Sampler:
    """Random numbers by xorshift64* (Vigna 2016; llm.c random_u32 and random_f32). `state` is all there is to save."""

    def __init__(self, seed: int = 1337):
        """Raises ValueError for a seed that is 0 modulo 2^64: from there every number would be 0."""
        self.state = seed & MASK64
        if self.state == 0:
            raise ValueError("seed 0 gives only zeros, take any other")

    def _random_u64(self) -> int:
        state = self.state
        state ^= state >> 12
        state ^= state << 25 & MASK64
        state ^= state >> 27
        self.state = state
        return state * MULTIPLIER & MASK64

    def random_u32(self) -> int:
        """The upper half of the 64 bits, 0..2^32-1."""
        return self._random_u64() >> 32

    def random_f32(self) -> float:
        """24 bits as a number in [0, 1): the trainers' coin, exact in float32."""
        return (self.random_u32() >> 8) / 16777216

    def random_f64(self) -> float:
        """64 bits as a number in [0, 1]: the coin of the reference's text generator. Rounding can reach 1."""
        return self._random_u64() / 2**64


def sample_probabilities(probabilities: np.ndarray, coin: float) -> int:
    """The first i with coin < p[0] + ... + p[i], summed in order in the array's own type (train_gpt2.c sample_mult).

    probabilities (V), coin in [0, 1]. If rounding leaves the sum at or below the coin: the last i with p[i] > 0.
    """
    index = _search(np.cumsum(probabilities), coin)
    return index if index < probabilities.size else int(np.flatnonzero(probabilities)[-1])


def sample_logits(logits: np.ndarray, coin: float) -> int:
    """As sample_probabilities, of exp(logit) unnormalised and with no maximum subtracted (sampler.h sample_softmax).

    logits (V) float32. The sum is double, then the coin is scaled by it and compared with a float32 running sum.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # logits beyond 88 overflow as in C; the last token is drawn
        weights = np.exp(logits)
        norm = np.cumsum(weights, dtype=np.float64)[-1]  # in order, as C sums; np.sum would pair
        return min(_search(np.cumsum(weights), coin * norm), logits.size - 1)


def _search(cumulated: np.ndarray, coin: float) -> int:
    return int(np.searchsorted(cumulated, cumulated.dtype.type(coin), side="right"))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """exp((x - max) / temperature), normalised, in float64. logits (V); temperature > 0."""
    logits = logits.astype(np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def filter_top_k_top_p(probabilities: np.ndarray, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Keep the top_k likeliest tokens, and of these the fewest that reach top_p together; the rest becomes 0.

    probabilities (V) -> float64 (V), sum 1. top_k 0 keeps all, and so does top_p 1; at least one token stays, and among
    equals the lower index. top_p is of what top_k left (nucleus sampling, Holtzman et al. 2020).
    """
    probabilities = probabilities.astype(np.float64)
    ranked = np.sort(probabilities)[::-1][: top_k or None]
    if top_p < 1:
        cumulated = np.cumsum(ranked)
        ranked = ranked[: np.searchsorted(cumulated, top_p * cumulated[-1]) + 1]
    kept = probabilities > ranked[-1]
    ties = np.flatnonzero(probabilities == ranked[-1])
    kept[ties[: ranked.size - np.count_nonzero(kept)]] = True
    filtered = np.where(kept, probabilities, 0)
    return filtered / filtered.sum()
