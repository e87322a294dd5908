"""Our decoder inside other evaluation harnesses: lmms-eval and VLMEvalKit."""
