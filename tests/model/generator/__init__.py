"""The parts of ../generate.py, one concern a file; handmade.py is run by itself."""
