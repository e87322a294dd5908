"""Attention overlays, charts and the self-contained HTML report."""
