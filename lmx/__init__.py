"""Opta-LMX: a local LLM server for the Mac."""

__version__ = "0.1.0"
