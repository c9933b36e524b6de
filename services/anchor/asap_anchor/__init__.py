"""Stage 1's adapter: an OpenAI-compatible chat client and its reply cache."""
