"""Coverage-guided fuzzing: ``python -m tests.fuzz``, and the inputs that are kept."""
