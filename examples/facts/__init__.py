"""The parts of `train_facts.py`, in reading order: phrasings, data, facts_file, text, model, train, report."""
