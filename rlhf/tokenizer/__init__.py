"""Tokenizers: training, chat templates, the files of exports, and checks."""
