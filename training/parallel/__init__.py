"""Many processes as one: who is there, and what they agree on."""
