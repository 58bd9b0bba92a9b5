"""Tokenizers as files, and checks of tokenizers of unknown origin."""
