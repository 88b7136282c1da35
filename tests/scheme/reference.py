"""Independent numpy versions of both formats, written from docs/formats.md: float64 arithmetic, loops over small groups.

They share no code and no method with ptq.formats: tables, frexp and comparisons instead of bit manipulation.
"""

from __future__ import annotations

import itertools

import numpy as np

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E6M2 = np.array([2.0 ** (e - 48) * (1 + m / 4) for e in range(64) for m in range(4)][:255])


def decode_mxfp4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """uint8 [N, K/2], uint8 [N, K/32] -> float64 [N, K]."""
    nibbles = _nibbles(packed)
    sign = np.where(nibbles >= 8, -1.0, 1.0)
    factor = np.where(scale == 255, np.nan, 2.0 ** (scale.astype(np.float64) - 127))
    return sign * E2M1[nibbles % 8] * np.repeat(factor, 32, axis=1)


def decode_hif4(packed: np.ndarray, words: np.ndarray) -> np.ndarray:
    """uint8 [N, K/2], int32 [N, K/64] -> float64 [N, K]."""
    nibbles = _nibbles(packed)
    out = np.empty(nibbles.shape)
    for row in range(nibbles.shape[0]):
        for group in range(words.shape[1]):
            word = int(words[row, group]) % 2**32
            byte = word % 256
            scale = np.nan if byte == 255 else 2.0 ** (byte // 4 - 48) * (1 + (byte % 4) / 4)
            for i in range(64):
                e8 = (word // 2 ** (8 + i // 8)) % 2
                e16 = (word // 2 ** (16 + i // 4)) % 2
                code = int(nibbles[row, group * 64 + i])
                out[row, group * 64 + i] = (-1 if code >= 8 else 1) * (code % 8) / 4 * 2.0 ** (e8 + e16) * scale
    return out


def _nibbles(packed: np.ndarray) -> np.ndarray:
    out = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.int64)
    out[:, 0::2], out[:, 1::2] = packed % 16, packed // 16
    return out


def mxfp4_exponent(amax: np.ndarray, rule: str) -> np.ndarray:
    """Scale exponent of a positive float64 group maximum, before it is limited to what a byte can hold."""
    if rule == "floor":
        return np.frexp(amax)[1] - 1 - 2
    if rule == "even":
        binade = 2.0 ** (np.frexp(amax)[1] - 1)
        return np.frexp(amax + 0.25 * binade)[1] - 1 - 2
    # The smallest e with amax <= limit * 2^e, by comparison rather than by a logarithm that may round.
    limit = {"ceil": 6.0, "qmax7.25": 7.25}[rule]
    exponent = np.frexp(amax / limit)[1] - 2
    while np.any(amax > limit * 2.0**exponent):
        exponent = exponent + (amax > limit * 2.0**exponent)
    return exponent


def quantize_mxfp4(x: np.ndarray, rule: str = "floor", ties: str = "even") -> tuple[np.ndarray, np.ndarray]:
    """float64 groups [n, 32] of finite values -> (nibbles [n, 32], scale bytes [n])."""
    amax = np.abs(x).max(axis=1)
    safe = np.where(amax > 0, amax, 2.0**-149)
    byte = np.clip(mxfp4_exponent(safe, rule) + 127, 0, 252)
    byte = np.where(amax > 0, byte, 0)
    return nearest_e2m1(x / 2.0 ** (byte[:, None] - 127.0), ties), byte


def nearest_e2m1(y: np.ndarray, ties: str) -> np.ndarray:
    """float64 -> nibble of the nearest table entry."""
    magnitude = np.minimum(np.abs(y), 6.0)
    distance = np.abs(magnitude[..., None] - E2M1)
    best = distance.min(axis=-1, keepdims=True)
    candidates = distance == best
    if ties == "even":  # of two candidates the even index, that is the even mantissa
        index = np.where(
            candidates.sum(-1) == 2, (candidates * (np.arange(8) % 2 == 0)).argmax(-1), candidates.argmax(-1)
        )
    else:
        index = 7 - candidates[..., ::-1].argmax(-1)
    return index + 8 * ((y < 0) & (index > 0))


def bf16(x: np.ndarray) -> np.ndarray:
    """Round positive normal float64 to 8 significant bits, nearest even."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 256) / 256, exponent)


def hif4_byte(magnitude: np.ndarray) -> int:
    """E6M2 byte of the reference conversion for the float32 magnitudes of one group."""
    seventh = float(np.float32(magnitude.max()) * np.float32(bf16(np.array(1 / 7))))
    s = np.clip(bf16(np.array(seventh)) if seventh > 0 else 0.0, 2.0**-48, 49152.0)
    distance = np.abs(E6M2 - s)
    nearest = np.flatnonzero(distance == distance.min())
    return int(nearest[0] if len(nearest) == 1 else next(i for i in nearest if i % 2 == 0))


def quantize_hif4(x: np.ndarray, ties: str = "away") -> tuple[np.ndarray, np.ndarray]:
    """float64 groups [n, 64] of finite values with float32 or shorter significands -> (nibbles [n, 64], words [n]).

    Products are rounded to float32, as the reference conversion computes in float32.
    """
    f32 = np.float32
    nibbles, words = np.zeros(x.shape, dtype=np.int64), np.zeros(len(x), dtype=np.int64)
    for row, group in enumerate(x):
        magnitude = np.abs(group).astype(f32)
        v8, v16 = magnitude.reshape(8, 8).max(1), magnitude.reshape(16, 4).max(1)
        byte = hif4_byte(magnitude)
        r = f32(bf16(np.array(1 / E6M2[byte])))
        e8 = (v8 * r >= 4).astype(int)
        e16 = (v16 * r / f32(2) ** np.repeat(e8, 2) >= 2).astype(int)
        with np.errstate(over="ignore"):
            scaled = magnitude * (r * f32(4) / f32(2) ** (np.repeat(e8, 8) + np.repeat(e16, 4)))
        level = np.floor(scaled + f32(0.5)) if ties == "away" else np.round(scaled)
        level = np.minimum(level, 7).astype(int)
        nibbles[row] = level + 8 * ((group < 0) & (level > 0))
        words[row] = byte + (e8 << np.arange(8, 16)).sum() + (e16.astype(np.int64) << np.arange(16, 32)).sum()
    return nibbles, words


def hif4_errors(x: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """Squared errors of float64 groups [n, 64] under bytes [n], nearest levels: [n, 8 eights, 8 choices of the exponents].

    Choice 4 e8 + 2 a + b has a and b as the e16 of the first and the second four.
    """
    fours = np.abs(x).reshape(-1, 8, 2, 4)
    choices = []
    for e8, a, b in itertools.product((0, 1), repeat=3):
        powers = 2.0 ** (e8 + np.array([a, b]))
        step = (E6M2[byte][:, None] / 4 * powers)[:, None, :, None]
        distances = np.abs(fours[..., None] - step[..., None] * np.arange(8))
        choices.append((distances.min(-1) ** 2).sum((2, 3)))
    return np.stack(choices, -1)


def quantize_hif4_mse(x: np.ndarray, ties: str = "away") -> tuple[np.ndarray, np.ndarray]:
    """The rule `mse`: float64 groups [n, 64], maxima below 2^20 -> (nibbles [n, 64], words [n]).

    Scales by trying every byte with every choice of exponents, levels by products rounded to float32.
    """
    f32 = np.float32
    base = np.array([hif4_byte(np.abs(group).astype(f32)) for group in x])
    bytes_ = base[:, None] + np.arange(3)
    choices = np.stack([hif4_errors(x, np.minimum(byte, 254)) for byte in bytes_.T], 1)  # [n, 3, 8, 8]
    errors = np.where(bytes_ < 255, choices.min(-1).sum(-1), np.inf)
    best = errors.argmin(1)
    rows = np.arange(len(x))
    byte, choice = bytes_[rows, best], choices[rows, best].argmin(-1)  # argmin takes the first of equals
    e8, e16 = choice // 4, np.stack([choice // 2 % 2, choice % 2], -1).reshape(-1, 16)
    step = E6M2[byte][:, None] / 4 * 2.0 ** (np.repeat(e8, 8, 1) + np.repeat(e16, 4, 1))
    scaled = np.abs(x).astype(f32) * (f32(1) / step.astype(f32))
    level = np.floor(scaled + f32(0.5)) if ties == "away" else np.round(scaled)
    level = np.minimum(level, 7).astype(int)
    words = byte + (e8 << np.arange(8, 16)).sum(1) + (e16 << np.arange(16, 32)).sum(1)
    return level + 8 * ((x < 0) & (level > 0)), words


def quantize_hif4_p2(x: np.ndarray, ties: str = "even") -> tuple[np.ndarray, np.ndarray]:
    """The rule `p2`: float64 groups [n, 64] of finite values -> (nibbles [n, 64], words [n])."""
    nibbles, words = np.zeros(x.shape, dtype=np.int64), np.zeros(len(x), dtype=np.int64)
    for row, group in enumerate(x):
        magnitude = np.abs(group)
        exponent = -48
        while exponent < 15 and magnitude.max() >= 8 * 2.0**exponent:
            exponent += 1
        scale, word = 2.0**exponent, 4 * (exponent + 48)
        for eight in range(8):
            e8 = int(magnitude[8 * eight : 8 * eight + 8].max() >= 4 * scale)
            word += e8 << (8 + eight)
            for four in (2 * eight, 2 * eight + 1):
                part = slice(4 * four, 4 * four + 4)
                e16 = int(magnitude[part].max() >= (4 if e8 else 2) * scale)
                word += e16 << (16 + four)
                y = magnitude[part] / (scale / 4 * 2 ** (e8 + e16))
                level = np.minimum(np.floor(y + 0.5) if ties == "away" else np.round(y), 7).astype(int)
                nibbles[row, part] = level + 8 * ((group[part] < 0) & (level > 0))
        words[row] = word
    return nibbles, words
