"""The decode engine: prefill, decoder steps, continuous batching, streaming."""
