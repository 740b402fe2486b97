"""What to add? A growth ranks what is off and says how much is moved in one update."""

from prunus.growth.basic import cosine, fixed, gradient, random

__all__ = ["cosine", "fixed", "gradient", "random"]
