"""Stage settings, the trainer, the free-running curriculum and the collapse gauges."""
