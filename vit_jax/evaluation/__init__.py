"""Exact evaluation, features, few-shot, k-NN and linear probes."""
