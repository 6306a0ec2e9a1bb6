"""Which slots a query finds: product keys of any number of parts, keys in groups, Tucker scores.

Import from the modules; this one loads none of them.
"""
