"""What to add? A growth ranks what is off and says how much is moved in one update."""

from prunus.growth.basic import cosine, fixed, gradient, random
from prunus.growth.local import hebbian, preferential
from prunus.growth.momentum import momentum

__all__ = ["cosine", "fixed", "gradient", "hebbian", "momentum", "preferential", "random"]
