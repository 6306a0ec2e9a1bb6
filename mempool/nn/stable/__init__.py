"""What keeps a memory in use and its training stable: other slots than the best, random or sampled, equal use, learning
rates of values, their start.

Import from the modules; this one loads none of them.
"""
