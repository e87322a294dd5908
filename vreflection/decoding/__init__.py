"""Latent decoding as tensor code that knows no model: state machine, sampling, the step protocol and the runner."""

from .runner import DecodeTrace, Step, decode
from .sampling import SamplingSettings
from .state import DecodeRules, DecodeState, advance, plan_transition

__all__ = [
    "DecodeRules",
    "DecodeState",
    "DecodeTrace",
    "SamplingSettings",
    "Step",
    "advance",
    "decode",
    "plan_transition",
]
