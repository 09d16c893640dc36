"""Engines that answer many requests at once, each with its own adapter, next to one frozen base."""
