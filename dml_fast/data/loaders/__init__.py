"""Batches: who decodes, augments and assembles them."""
