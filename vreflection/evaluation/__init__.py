"""Answering questions, scoring, statistics, and what the latents do."""
