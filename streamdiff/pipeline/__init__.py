"""Timesteps over ranks: the schedule, the packets, the stages and the links between them."""
