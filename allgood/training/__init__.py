"""Room: how weights come to be. Learner + Source -> the same Learner, trained.

It sees only the protocols: what is learned, and from what, it never asks.
"""
