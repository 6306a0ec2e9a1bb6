"""How often slots are trained: counted with each commit, told, and begun anew."""
