"""Labelled tasks that a causal language model is asked to solve by prompts (Brown et al. 2020), without being trained on them."""
