"""`mempool bench plan`: a machine's constants, and how far what a plan predicts by them is from what is measured."""
