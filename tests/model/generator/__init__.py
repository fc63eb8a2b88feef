"""The parts of ../generate.py, one concern a file; handmade, digits, half and inputs are run by themselves."""
