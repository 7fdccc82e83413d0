"""Pairs of images and captions: where they lie, in which order they come, and how they become batches.

Stands beside `tercet.model` and imports none of model, objectives, tasks and train.
"""
