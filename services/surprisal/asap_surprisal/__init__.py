"""Stage 2: scores for the steps of a CoT from a causal LM. Importing this does not import torch."""
