"""Drafters: what proposes the tokens to try next, and which of them are kept."""
