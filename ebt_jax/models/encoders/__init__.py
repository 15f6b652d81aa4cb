"""Encoders of images, frames and captions, and the weights they are read from.

`patch` fits its own principal components and needs no file.
"""
