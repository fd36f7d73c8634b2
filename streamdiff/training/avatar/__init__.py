"""Recipes of the coefficient path: motion, mouth, landmark rig, and fitting to a clip."""
