"""Log probabilities of tokens as OpenAI's interfaces show them."""

from __future__ import annotations

from typing import Any

from ..engine.requests import Logprobs

LEAST = -9999.0  # for a probability of zero, as JSON has no infinity


class TokenLogprobs:
    """Shows a tokenizer's tokens with their bytes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.added = dict(tokenizer.added_tokens_decoder)
        self.byte_of = byte_level_bytes()

    def is_special(self, token: int) -> bool:
        return token in self.added and self.added[token].special

    def bytes_of(self, token: int) -> bytes:
        if token in self.added:
            return self.added[token].content.encode()
        letters = self.tokenizer.convert_ids_to_tokens(token)
        if letters is None:  # a row of the vocabulary projection without a token
            return b""
        return bytes(self.byte_of[letter] for letter in letters)

    def named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}

    def entry(self, logprobs: Logprobs) -> dict[str, Any]:
        """OpenAI's entry of a picked token and the likeliest ones."""
        (token, logprob), *likeliest = logprobs
        return {**self.named(token, logprob), "top_logprobs": [self.named(*pair) for pair in likeliest]}


def byte_level_bytes() -> dict[str, int]:
    """The byte behind each letter of a byte-level vocabulary: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
