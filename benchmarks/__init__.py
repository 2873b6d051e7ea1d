"""Comparisons with the other ways to train and predict; see ``__main__``."""
