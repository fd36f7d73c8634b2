"""How weights are made: data, losses and loops for every part that learns."""
