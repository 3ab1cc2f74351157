"""Conversations in, trees out: chat formats, the tokenizer's own template, prepared folders."""
