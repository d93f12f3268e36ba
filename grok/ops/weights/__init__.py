"""Kinds of weight beside the plain array: int8, LoRA, a layer of a stack, a gradient slot."""
