"""DEVICE to HOST: the layout of a slot and its capture while an iteration runs."""
