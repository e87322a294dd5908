"""Latent decoding as tensor code that knows no model: state machine, sampling, one step as a program, runner tiers."""

from .program import DecodeBuffers, DecodeProgram, ProgramKey, Replacements, Step, pick_from_logits
from .sampling import PickPlan, SamplingRows, SamplingSettings, pick_tokens
from .state import MAX_END_IDS, NOTHING, DecodeRules, DecodeState, advance, plan_transition, read_emission
from .vocabulary import VocabularyRows

__all__ = [
    "MAX_END_IDS",
    "NOTHING",
    "DecodeBuffers",
    "DecodeProgram",
    "DecodeRules",
    "DecodeState",
    "PickPlan",
    "ProgramKey",
    "Replacements",
    "SamplingRows",
    "SamplingSettings",
    "Step",
    "VocabularyRows",
    "advance",
    "pick_from_logits",
    "pick_tokens",
    "plan_transition",
    "read_emission",
]
