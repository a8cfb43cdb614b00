"""Standalone checkpoints made from a base and an adapter, and what tells others of them."""
