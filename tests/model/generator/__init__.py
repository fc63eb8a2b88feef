"""The parts of ../generate.py, one concern a file."""
