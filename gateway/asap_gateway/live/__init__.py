"""Live serving: `/v1` in the manner of OpenAI, passed on to the servers of the models."""
