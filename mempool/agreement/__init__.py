"""How the processes of a pool agree: pure state machines, which others carry out. See docs/agreement.md."""
