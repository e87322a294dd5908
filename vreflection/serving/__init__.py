"""An OpenAI-compatible server on the latent decoder, and its page."""
