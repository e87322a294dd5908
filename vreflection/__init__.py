"""Latent visual reasoning."""
