"""Algorithms that walk a sigma schedule."""
