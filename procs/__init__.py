"""The stages: each module with a `main` is the program of one process."""
